//! What a worker may ask of its job while it trains: other settings, a checkpoint, how things stand.
//!
//! Each is a connection of its own to the launcher, as `gradwire set`, `checkpoint` and `status` make one.
//!
//! Invariant: nothing here waits for a step of this worker's own: a checkpoint, which does, is asked for on another thread.

use std::{
    sync::mpsc::{Receiver, TryRecvError, channel},
    time::Duration,
};

use super::Worker;
use crate::{
    Error, Result,
    optim::LiveChange,
    session::{Control, ControlAnswer, Status, control},
    types::Clock,
};

/// How long a launcher may take to say how things stand.
const STATUS_TIME: Duration = Duration::from_secs(10);

/// How long the servers may take to prepare a change: a step may be long.
const CHANGE_TIME: Duration = Duration::from_secs(60);

/// A checkpoint that has been asked for.
#[derive(Debug)]
pub(super) struct Asked(Receiver<Result<Clock>>);

impl Worker {
    /// Changes settings on all servers, as `gradwire set`: each is a `KEY=VALUE`, such as `lr=0.01`, `weight-decay=0.1`,
    /// `clip-norm=1`. Gives the clock from which on they hold, which is the same on every server.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] naming what cannot be changed; [`Error::Refused`] with the launcher's reason.
    pub fn change_settings<'a>(&mut self, settings: impl Iterator<Item = &'a str>) -> Result<Clock> {
        let change = LiveChange::parse(settings)?;
        match self.ask(Control::Change(change), CHANGE_TIME)? {
            ControlAnswer::Changed(clock) => Ok(clock),
            _ => Err(unexpected()),
        }
    }

    /// How the job stands: who has joined, how far everybody is, over which fabrics, the last checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] if the launcher does not answer.
    pub fn job_status(&self) -> Result<Status> {
        match self.ask(Control::Status, STATUS_TIME)? {
            ControlAnswer::Status(status) => Ok(*status),
            _ => Err(unexpected()),
        }
    }

    /// Asks for a checkpoint at the next clock that no server has passed, and goes on at once: it is complete some steps of all
    /// workers later. [`checkpoint_written`](Worker::checkpoint_written) tells.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if one has been asked for whose end has not been told yet.
    pub fn request_checkpoint(&mut self) -> Result<()> {
        if self.asked.is_some() {
            return Err(Error::Config(
                "a checkpoint has been asked for already: ask whether it is written before the next one".into(),
            ));
        }
        let (address, token) = (self.member.address().clone(), self.member.token().clone());
        let time = Duration::from_millis(self.config().wait_ms);
        let (outcome, asked) = channel();
        let ask = move || {
            let _ = outcome.send(match control(&address, &token, Control::Checkpoint, time) {
                Ok(ControlAnswer::CheckpointWritten(clock)) => Ok(clock),
                Ok(_) => Err(unexpected()),
                Err(e) => Err(e),
            });
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(ask);
        thread.map_err(|e| Error::os("pthread_create", "a request for a checkpoint", e))?;
        self.asked = Some(Asked(asked));
        Ok(())
    }

    /// The clock of the checkpoint that was asked for, once it is complete; `None` while it is not. Told once. Never waits.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if none has been asked for; [`Error::Refused`] with the launcher's reason why there is none.
    pub fn checkpoint_written(&mut self) -> Result<Option<Clock>> {
        let Some(Asked(outcome)) = &self.asked else {
            return Err(Error::Config("no checkpoint has been asked for".into()));
        };
        let told = match outcome.try_recv() {
            Err(TryRecvError::Empty) => return Ok(None),
            Ok(told) => told,
            Err(TryRecvError::Disconnected) => Err(unexpected()),
        };
        self.asked = None;
        told.map(Some)
    }

    fn ask(&self, order: Control, time: Duration) -> Result<ControlAnswer> {
        control(self.member.address(), self.member.token(), order, time)
    }
}

fn unexpected() -> Error {
    Error::JobFailed("the launcher answered something else than was asked".into())
}
