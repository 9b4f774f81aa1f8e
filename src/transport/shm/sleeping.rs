//! How a thread that has nothing to do over this driver falls asleep.
//!
//! Invariant: what came before the arming is found by the look that arming ends with; what comes after it wakes.

use super::*;

impl Wakeup for ShmTransport {
    fn fd(&self) -> BorrowedFd<'_> {
        self.poller.fd()
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        if !self.done.is_empty() {
            return Ok(Armed::Ready);
        }
        if self.asleep {
            // No poll since: a flush may have read the message that ended that sleep, and no other is sent for it.
            self.set_asleep(false);
        }
        self.set_asleep(true);
        Ring::full_fence();
        let ready = self.paths.iter_mut().flatten().any(Path::has_work) || self.withheld.has_work();
        Ok(if ready { Armed::Ready } else { Armed::Sleep })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let mut next = self.strangers.next_deadline();
        if self.pending > 0 {
            let waits = self.paths.iter().flatten().filter_map(|path| match &path.state {
                State::Expecting { deadline } => Some(*deadline),
                State::Calling(call) => Some(call.next_deadline()),
                State::Linked(link) => (!link.is_told).then_some(link.deadline),
                State::Dead(_) => None,
            });
            next = waits.chain(next).min();
        }
        next
    }
}
