//! How a worker gets its first parameters: at the start of a job, or in the place of one that was lost while it ran.
//!
//! Invariant: a worker that takes another one's place begins at the clock that all servers have agreed on, with the parameters as they
//! are at the end of the clock before it.

use super::*;
use crate::session::{PathOptions, life_now};

/// How the paths of this process live: those of a process that comes later are told from those of the one before it.
pub(super) fn path_options(member: &Member) -> PathOptions {
    let life = if member.comes_again() { life_now() } else { 0 };
    PathOptions { life, ..member.config().path_options() }
}

impl Worker {
    /// Waits until all lanes are there, then pulls what they start with, or what the clock at which this worker joins starts with.
    pub(super) fn first_parameters(&mut self) -> Result<()> {
        self.progress.set_waiting(true);
        self.await_joining("the paths of the job", connect_time(self.config()), |worker| worker.attached)?;
        if !self.member.comes_again() {
            return self.pull(0, self.wait_time());
        }
        self.member.reporter().report(Report::Connected)?;
        self.await_joining("the clock to join at", self.wait_time(), |worker| worker.begins)?;
        // Under `bsp` a version counts clocks, and no server goes beyond this one without this worker.
        self.pull(self.clock, self.wait_time())
    }

    fn await_joining(&mut self, awaited: &'static str, time: Duration, is_there: fn(&Worker) -> bool) -> Result<()> {
        let deadline = Instant::now() + time;
        let shift = self.progress.shift();
        while !is_there(self) {
            self.take_events(&shift, deadline)?;
            if !is_there(self) && Instant::now() >= deadline {
                let from = "the servers".into();
                return Err(Error::Deadline { from, awaited, chunk: None, clock: None, waited: time });
            }
        }
        Ok(())
    }
}
