//! What the launcher and its agents on other hosts say to each other: one JSON value a line, over the pipes of ssh.
//!
//! The agent says hello; the launcher asks it to reach the rendezvous, then has it start its ranks; from then on output and ends
//! come one way, signals go the other, and both sides say every second that they are there.
//!
//! Invariant: the token travels in `Start` alone, on the agent's standard input.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    cause::Exit,
    crew::Crew,
    output::{Piece, Stream},
};
use crate::types::Rank;

/// How often each side says that it is there.
pub(super) const BEAT: Duration = Duration::from_secs(1);

/// Longest line: a piece of output is at most 64 KiB, which JSON makes six times as long at worst; a crew holds a command and variables.
pub(super) const LINE_BYTES_MAX: usize = 4 << 20;

/// The launcher's words. Not shown by `Debug`: they hold the token.
#[derive(Serialize, Deserialize)]
pub(super) enum ToAgent {
    /// Say by which of these addresses you reach the rendezvous; with a port also by the one that ssh came from.
    Reach { addresses: Vec<SocketAddr>, port: Option<u16> },
    /// Start these ranks. `home` is where the job's directory is made, if not in the usual place; `silence_ms` how long the
    /// launcher may be silent before it counts as gone.
    Start { crew: Box<Crew>, token: String, name: String, mark: String, home: Option<PathBuf>, silence_ms: u64 },
    /// Start this rank again, whose process has ended.
    Restart { rank: Rank },
    /// Send a signal to a rank's group.
    Signal { rank: Rank, signal: i32 },
    /// The launcher is there.
    Beat,
    /// Leave nothing behind, then go.
    End,
}

/// The agent's words.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromAgent {
    /// The first: its version, and how many cores its host has for us.
    Hello { version: String, cores: usize },
    /// The rendezvous can be reached by this address.
    Reached { rendezvous: SocketAddr },
    /// It cannot do what it was told, and why.
    Failed { text: String },
    /// A rank has written.
    Output { rank: Rank, stream: Stream, piece: Piece },
    /// A rank's process has ended.
    Exited { rank: Rank, exit: Exit },
    /// The agent is there.
    Beat,
    /// It has cleared up; so many processes could not be killed.
    Gone { left: usize },
}

/// A message as a line.
pub(super) fn line(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).expect("messages have text keys");
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_that_json_must_escape_is_one_short_line() {
        let piece = Piece::Line("\u{1}".repeat(64 << 10));
        let bytes = line(&FromAgent::Output { rank: Rank::worker(0), stream: Stream::Out, piece });
        assert_eq!(bytes.iter().filter(|&&byte| byte == b'\n').count(), 1);
        assert!(bytes.len() < LINE_BYTES_MAX);
        let FromAgent::Output { piece: Piece::Line(text), .. } = serde_json::from_slice(&bytes).unwrap() else {
            panic!("another message");
        };
        assert_eq!(text.len(), 64 << 10);
    }
}
