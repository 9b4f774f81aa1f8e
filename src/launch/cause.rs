//! Why a job ended: from all that was seen around the first failure, the one that the others followed from.
//!
//! When a process dies, its peers notice a broken path and report that, often before the launcher has noticed the death. So the
//! launcher waits a moment, then asks here.
//!
//! Invariant: pure; a rank that lays the cause with another never hides that other's own failure.
#![forbid(unsafe_code)]

use nix::sys::signal::Signal;

use crate::types::{Rank, Role};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// What a shell would make of it.
    fn code(self) -> u8 {
        match self {
            Exit::Code(code) => u8::try_from(code).unwrap_or(1),
            Exit::Signal(signal) => u8::try_from(128 + signal).unwrap_or(1),
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "ended with exit code {code}"),
            Exit::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by signal {number} ({signal})"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
        }
    }
}

/// One thing that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// A process ended otherwise than it should have.
    Exited(Rank, Exit),
    /// A rank said that it cannot go on, and whether it lays that with another.
    Reported { rank: Rank, text: String, elsewhere: bool },
    /// A rank's connection ended.
    Lost(Rank),
    /// A shard has no copy left; how the servers that held it ended, and whether one was killed.
    CopiesLost { text: String, killed: bool },
    /// Something that is no rank's own doing: somebody did not come in time, a process could not be started.
    General(String),
}

/// What to say and what to exit with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cause {
    pub text: String,
    pub code: u8,
}

/// Other ranks' words that are added to the cause.
const VOICES_MAX: usize = 3;

/// The cause among the sights, in the order in which they were seen; `None` if nothing was.
pub(super) fn find(sights: &[Sight]) -> Option<Cause> {
    let first = sights.iter().enumerate().min_by_key(|(order, sight)| (weight(sight, sights), *order))?.1;
    let (rank, mut text, code) = match first {
        Sight::General(text) | Sight::CopiesLost { text, .. } => (None, text.clone(), 1),
        Sight::Exited(rank, exit) => {
            let own = words(*rank, sights).map(|text| format!(": {text}")).unwrap_or_default();
            let early = rank.role == Role::Worker && *exit == Exit::Code(0);
            let early = if early { " without having finished (`Worker::finish`)" } else { "" };
            (Some(*rank), format!("{rank} {exit}{early}{own}"), exit.code().max(1))
        }
        Sight::Reported { rank, text, .. } => {
            let exit = exit(*rank, sights);
            let ended = exit.map(|exit| format!(" ({rank} {exit})")).unwrap_or_default();
            (Some(*rank), format!("{rank} failed: {text}{ended}"), exit.map_or(1, |exit| exit.code().max(1)))
        }
        Sight::Lost(rank) => (Some(*rank), format!("{rank} left the job without having finished"), 1),
    };
    let others = sights.iter().filter_map(|sight| match sight {
        Sight::Reported { rank: other, text, .. } if Some(*other) != rank => Some(format!("; {other}: {text}")),
        _ => None,
    });
    text.extend(others.take(VOICES_MAX));
    Some(Cause { text, code })
}

/// The smaller, the closer to the root.
fn weight(sight: &Sight, sights: &[Sight]) -> u8 {
    match sight {
        Sight::Exited(_, Exit::Signal(_)) | Sight::CopiesLost { killed: true, .. } => 0,
        Sight::Reported { elsewhere: false, .. } => 1,
        // A rank that had spoken before it ended is judged by its words.
        Sight::Exited(rank, _) if words(*rank, sights).is_some() => 5,
        Sight::Exited(..) => 2,
        Sight::General(_) | Sight::CopiesLost { .. } => 3,
        Sight::Reported { .. } => 4,
        Sight::Lost(_) => 6,
    }
}

fn words(rank: Rank, sights: &[Sight]) -> Option<&str> {
    sights.iter().find_map(|sight| match sight {
        Sight::Reported { rank: other, text, .. } if *other == rank => Some(text.as_str()),
        _ => None,
    })
}

fn exit(rank: Rank, sights: &[Sight]) -> Option<Exit> {
    sights.iter().find_map(|sight| match sight {
        Sight::Exited(other, exit) if *other == rank => Some(*exit),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const W0: Rank = Rank::worker(0);
    const W1: Rank = Rank::worker(1);
    const S0: Rank = Rank::server(0);

    fn reported(rank: Rank, text: &str, elsewhere: bool) -> Sight {
        Sight::Reported { rank, text: text.into(), elsewhere }
    }

    fn cause(sights: &[Sight]) -> (String, u8) {
        let cause = find(sights).unwrap();
        (cause.text, cause.code)
    }

    #[test]
    fn the_killed_come_before_those_who_noticed() {
        let (text, code) = cause(&[
            reported(S0, "the path to worker 1 broke", true),
            Sight::Exited(S0, Exit::Code(1)),
            Sight::Exited(W1, Exit::Signal(9)),
            Sight::Lost(W1),
        ]);
        assert_eq!(text, "worker 1 was killed by signal 9 (SIGKILL); server 0: the path to worker 1 broke");
        assert_eq!(code, 137);
    }

    #[test]
    fn a_failure_of_ones_own_comes_before_one_laid_with_another() {
        let (text, code) = cause(&[
            reported(W0, "waited 10 s for server 0", true),
            reported(S0, "disk full", false),
            Sight::Exited(S0, Exit::Code(3)),
        ]);
        assert_eq!(
            text,
            "server 0 failed: disk full (server 0 ended with exit code 3); worker 0: waited 10 s for server 0"
        );
        assert_eq!(code, 3);
    }

    #[test]
    fn without_words_the_exit_code_speaks() {
        assert_eq!(cause(&[Sight::Exited(W1, Exit::Code(7))]), ("worker 1 ended with exit code 7".into(), 7));
        let (text, code) = cause(&[reported(W0, "silence", true), Sight::Exited(W1, Exit::Code(2))]);
        assert_eq!((text.as_str(), code), ("worker 1 ended with exit code 2; worker 0: silence", 2));
    }

    #[test]
    fn the_last_resorts() {
        assert_eq!(cause(&[Sight::Lost(W0)]).1, 1);
        assert_eq!(cause(&[Sight::Lost(W0), Sight::General("late".into())]), ("late".into(), 1));
        assert_eq!(cause(&[Sight::Exited(S0, Exit::Code(0))]), ("server 0 ended with exit code 0".into(), 1));
        assert_eq!(find(&[]), None);
    }

    /// A worker that is lost takes the servers along that wait for it, and with them the copies.
    #[test]
    fn copies_are_lost_by_those_who_were_killed_or_after_a_worker() {
        let lost = |killed| Sight::CopiesLost { text: "shard 0 has lost both copies".into(), killed };
        let worker = Sight::Exited(W1, Exit::Code(3));
        assert_eq!(cause(&[lost(false), worker.clone()]), ("worker 1 ended with exit code 3".into(), 3));
        assert_eq!(cause(&[lost(true), worker]).1, 1);
    }

    #[test]
    fn only_some_voices_are_added() {
        let mut sights = vec![Sight::Exited(W0, Exit::Signal(11))];
        sights.extend((0..50).map(|index| reported(Rank::worker(index + 1), "broke", true)));
        assert_eq!(cause(&sights).0.matches("broke").count(), VOICES_MAX);
    }
}
