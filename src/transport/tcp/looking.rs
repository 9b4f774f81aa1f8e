//! Looking at what is ready, by epoll or straight away.
//!
//! Invariant: what a look does not see, a later one does before the thread sleeps: the poller's descriptor says so for as long as
//! anything is ready.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{Path, TcpTransport};
use crate::Result;

/// Up to so many open paths are read without asking the poller which of them has something: a system call less for each message.
const DIRECT_MAX: usize = 2;

/// The poller is asked at least every so many looks, since it knows of callers too.
const LOOKS_BETWEEN: u32 = 8;

impl TcpTransport {
    /// Looks at what is ready: without a ring everything, with one what is not connected yet.
    pub(super) fn look(&mut self, now: Instant) -> Result<()> {
        if self.read_directly() {
            return Ok(());
        }
        self.looks = 0;
        for at in 0..self.poller.collect()? {
            self.on_ready(self.poller.ready(at), now)?;
        }
        Ok(())
    }

    /// Reads all paths, if there are few and nothing else is to be expected; `false` if the poller is to be asked.
    fn read_directly(&mut self) -> bool {
        self.looks += 1;
        let mut paths = self.paths.iter().flatten().peekable();
        let are_few = self.paths.len() <= DIRECT_MAX && self.looks < LOOKS_BETWEEN && paths.peek().is_some();
        if !are_few || !paths.all(Path::waits_only_to_read) {
            return false;
        }
        for index in 0..self.paths.len() {
            if let Some(path) = &mut self.paths[index]
                && let Err(reason) = path.read(&mut self.table, &mut self.done)
            {
                self.break_path(index, &reason);
            }
        }
        true
    }
}
