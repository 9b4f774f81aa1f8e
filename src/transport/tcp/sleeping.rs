//! How a thread that has nothing to do over this driver falls asleep.
//!
//! Invariant: what came before the arming is found by the look that arming ends with; what comes after it wakes.

use super::*;

impl Wakeup for TcpTransport {
    fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_ref().map_or(self.poller.fd(), Ring::fd)
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        let nothing_to_tell = self.done.is_empty();
        let may_sleep = match self.ring()? {
            Some(ring) if nothing_to_tell => ring.may_sleep()?,
            _ => nothing_to_tell,
        };
        Ok(if may_sleep { Armed::Sleep } else { Armed::Ready })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let mut next = self.strangers.as_ref().and_then(Strangers::next_deadline);
        if self.pending > 0 {
            let waits = self.paths.iter().flatten().filter_map(|path| match &path.state {
                State::Expecting { deadline } => Some(*deadline),
                State::Calling(call) => Some(call.next_deadline()),
                State::Open(_) | State::Ending { .. } | State::Dead => None,
            });
            next = waits.chain(next).min();
        }
        next
    }
}
