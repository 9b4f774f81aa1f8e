//! A worker's leaving in order.
//!
//! Invariant: whoever leaves so has had every gradient of its own taken note of by every server.

use std::time::Instant;

use super::{Command, Worker};
use crate::{Error, Result, session::Report};

impl Worker {
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
        if self.wants_reply.is_some() {
            self.wait()?;
        }
        self.progress.command([Command::Finish]);
        self.progress.set_waiting(true);
        let time = self.wait_time();
        let deadline = Instant::now() + time;
        while !self.finished {
            self.take_events(deadline)?;
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
