//! How a process of the echo waits: the policy of gradwire's own threads, or one of its two extremes.
//!
//! Invariant: a sleep ends after [`WAIT_TIME`] at the latest, and with an error if nothing came; nobody spins longer than
//! [`SPIN_TIME`] before it sleeps after all.

use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::failed;
use crate::{Error, Result, transport::Idle};

/// How long anybody waits for the other side.
pub(super) const WAIT_TIME: Duration = Duration::from_secs(60);

/// Nothing comes for so long only if the other side is in trouble: then a process that spins sleeps as well, and its sleep
/// notices.
const SPIN_TIME: Duration = Duration::from_millis(100);

/// What a process does that has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// Sleep in the kernel at once.
    Sleep,
    /// As gradwire's threads: look again for up to 50 microseconds if the last waits were that short, then sleep.
    Adaptive,
    /// Look again and again: no wake-up is ever paid, and a core is used up by each process.
    Spin,
}

impl Wait {
    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Wait::Sleep => "sleep",
            Wait::Adaptive => "adaptive",
            Wait::Spin => "spin",
        }
    }
}

/// The waiting of one thread.
pub(super) struct Waiting {
    wait: Wait,
    idle: Idle,
    /// Since when there has been nothing to do.
    since: Option<Instant>,
}

impl Waiting {
    pub(super) fn new(wait: Wait) -> Waiting {
        Waiting { wait, idle: Idle::default(), since: None }
    }

    /// Whether to look before sleeping at all.
    pub(super) fn looks(&self) -> bool {
        self.wait != Wait::Sleep
    }

    /// There was something to do.
    pub(super) fn busy(&mut self) {
        // The clock is read only where something has been waited for.
        if self.since.take().is_some() {
            self.idle.busy(Instant::now());
        }
    }

    /// There was nothing to do: whether to look again at once, instead of sleeping.
    pub(super) fn may_look_again(&mut self) -> bool {
        if self.wait == Wait::Sleep {
            return false;
        }
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        match self.wait {
            Wait::Adaptive => self.idle.may_spin(now),
            _ => now.duration_since(since) < SPIN_TIME,
        }
    }
}

/// One end of a connection, seen by the thread that moves its bytes.
pub(super) trait Line {
    /// Whether there is nothing left to be done.
    fn is_done(&self) -> bool;

    /// Does what can be done now; says whether that was anything. Never blocks.
    fn advance(&mut self) -> Result<bool>;

    /// Asks to be woken by `wants`; `false` if there is something to be done already.
    fn arm(&mut self) -> bool {
        true
    }

    /// What to wait for.
    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>);

    /// The thread is awake: which of what was waited for is ready.
    fn woken(&mut self, _ready: &[bool]) -> Result<()> {
        Ok(())
    }
}

/// Moves bytes on all lines until all are done.
pub(super) fn complete<L: Line>(lines: &mut [L], waiting: &mut Waiting) -> Result<()> {
    loop {
        let mut moved = false;
        for line in lines.iter_mut() {
            moved |= line.advance()?;
        }
        if moved {
            waiting.busy();
        }
        if lines.iter().all(Line::is_done) {
            return Ok(());
        }
        if !moved && !waiting.may_look_again() {
            sleep(lines)?;
        }
    }
}

fn sleep<L: Line>(lines: &mut [L]) -> Result<()> {
    let mut ready = Vec::new();
    // Every one of them, as a waiter does.
    let mut armed = true;
    for line in lines.iter_mut().filter(|line| !line.is_done()) {
        armed &= line.arm();
    }
    let mut counts = Vec::with_capacity(lines.len());
    let mut fds = Vec::with_capacity(2 * lines.len());
    for line in lines.iter() {
        let before = fds.len();
        if !line.is_done() {
            line.wants(&mut fds);
        }
        counts.push(fds.len() - before);
    }
    if armed {
        await_any(&mut fds)?;
        ready.extend(fds.iter().map(|fd| fd.any() == Some(true)));
    } else {
        ready.resize(fds.len(), false);
    }
    let mut rest = &ready[..];
    for (line, count) in lines.iter_mut().zip(counts) {
        let (own, others) = rest.split_at(count);
        if count > 0 {
            line.woken(own)?;
        }
        rest = others;
    }
    Ok(())
}

/// Sleeps until one of them is ready.
pub(super) fn await_any(fds: &mut [PollFd<'_>]) -> Result<()> {
    let timeout = PollTimeout::try_from(WAIT_TIME).unwrap_or(PollTimeout::MAX);
    match poll(fds, timeout) {
        Ok(0) => Err(failed("was waited for in vain")),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(Error::os("poll", "the raw echo", error)),
    }
}

/// What to wait for on a descriptor that is only read.
pub(super) fn readable(fd: &impl std::os::fd::AsFd) -> PollFd<'_> {
    PollFd::new(fd.as_fd(), PollFlags::POLLIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_policies_differ_in_when_they_sleep() {
        let mut sleeper = Waiting::new(Wait::Sleep);
        assert!(!sleeper.looks() && !sleeper.may_look_again());
        let mut spinner = Waiting::new(Wait::Spin);
        assert!(spinner.looks() && spinner.may_look_again());
        spinner.since = Instant::now().checked_sub(SPIN_TIME);
        assert!(!spinner.may_look_again(), "it sleeps after all");
        let mut adaptive = Waiting::new(Wait::Adaptive);
        assert!(adaptive.looks() && !adaptive.may_look_again(), "nothing has been learnt yet");
        adaptive.since = None;
        adaptive.idle = Idle::default();
        let now = Instant::now();
        adaptive.idle.may_spin(now);
        adaptive.idle.busy(now);
        assert!(adaptive.may_look_again(), "a short wait is worth looking a little longer");
    }
}
