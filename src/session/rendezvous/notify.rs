//! An fd by which one thread wakes another that sleeps in poll.
//!
//! Invariant: a wake is never lost: it stays readable until it is taken.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{Error, Result};

/// A wake-up call.
#[derive(Debug)]
pub(super) struct Notify(EventFd);

impl Notify {
    pub fn new() -> Result<Notify> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_value_and_flags(0, flags).map(Notify).map_err(|e| Error::os("eventfd", "a wake-up call", e))
    }

    /// Makes the fd readable. A full counter is readable already.
    pub fn wake(&self) {
        let _ = self.0.write(1);
    }

    /// Makes the fd unreadable again.
    pub fn take(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Notify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
