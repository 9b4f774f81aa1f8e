//! A worker's leaving in order, of its own accord or because it was told to.
//!
//! Invariant: whoever leaves so has had every gradient of its own taken note of by every server, but for those of clocks at which it
//! is of the job no more.

use std::time::Instant;

use super::{Command, Worker};
use crate::{Error, Result, session::Report, types::Clock};

impl Worker {
    /// The first clock at which this worker is of the job no more, once it has been told to leave (`gradwire remove-worker`). Never
    /// waits. Gradients of earlier clocks count, all of them.
    pub fn leaves_at(&mut self) -> Option<Clock> {
        // What ends the job is told by the next call that may fail.
        let _ = self.take_events(&self.progress.shift(), Instant::now());
        self.leaves_at
    }

    /// Whether this worker was told to leave and has no clock before it: it is to [`finish`](Worker::finish). To be asked between two
    /// clocks; never waits.
    pub fn should_leave(&mut self) -> bool {
        self.leaves_at().is_some_and(|clock| self.clock >= clock)
    }

    pub(super) fn is_of_the_job(&self) -> Result<()> {
        match self.leaves_at.filter(|clock| self.clock >= *clock) {
            Some(clock) => Err(Error::Left { clock }),
            None => Ok(()),
        }
    }

    /// This worker has done its part: ends the clock if something has been pushed in it, waits until every server knows, and leaves
    /// the job in order.
    ///
    /// # Errors
    ///
    /// As [`wait`](Worker::wait).
    pub fn finish(self) -> Result<()> {
        self.finish_with(serde_json::Value::Null)
    }

    /// [`finish`](Worker::finish) with something to say about the work: whoever started the job finds it among the summaries of
    /// its outcome.
    ///
    /// # Errors
    ///
    /// As [`wait`](Worker::wait).
    pub fn finish_with(mut self, summary: serde_json::Value) -> Result<()> {
        self.is_ours()?;
        if self.wants_reply.is_some() && !self.should_leave() {
            self.wait()?;
        }
        self.progress.command([Command::Finish]);
        self.progress.set_waiting(true);
        let time = self.wait_time();
        let deadline = Instant::now() + time;
        let shift = self.progress.shift();
        while !self.finished {
            self.take_events(&shift, deadline)?;
            if !self.finished && Instant::now() >= deadline {
                let (from, awaited) = ("the servers".into(), "their goodbye");
                return Err(Error::Deadline { from, awaited, chunk: None, clock: Some(self.clock), waited: time });
            }
        }
        self.observed.finish(&self.member)?;
        let reporter = self.member.reporter();
        reporter.report(Report::Progress { clock: self.clock })?;
        reporter.report(Report::Finished { summary })
    }
}
