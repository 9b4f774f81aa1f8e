//! What is asked or ordered of a running job from outside, by whoever knows its token.
//!
//! Invariant: every call ends within the time that its caller allows.

use std::{io::Write, time::Duration};

use super::{
    Address, Scaling,
    line::encode,
    member::{next_message, unexpected},
    message::{Control, FromLauncher, Purpose, Status, ToLauncher},
    peer::{Caller, Connection},
};
use crate::{Error, Result, wire::JobToken};

/// What the launcher answered to a control call.
#[derive(Debug)]
pub(crate) enum ControlAnswer {
    /// The job's state.
    Status(Box<Status>),
    /// A checkpoint of this clock is complete.
    CheckpointWritten(crate::types::Clock),
    /// A change holds from this clock on.
    Changed(crate::types::Clock),
    /// A worker has left, or takes part.
    Turned(super::WorkerTurn),
    /// The job has so many servers, and so many shards have moved.
    Scaled(u16, u32),
}

/// Asks or orders something of a running job and waits at most `time` for the answer.
pub(crate) fn control(address: &Address, token: &JobToken, order: Control, time: Duration) -> Result<ControlAnswer> {
    control_with(address, token, order, time, &mut |_| {})
}

/// [`control`] of an order whose progress is told: between two news, and before the answer, `time` may pass at most.
pub(crate) fn control_with(
    address: &Address,
    token: &JobToken,
    order: Control,
    time: Duration,
    on_progress: &mut dyn FnMut(Scaling),
) -> Result<ControlAnswer> {
    let caller = Caller { purpose: Purpose::Control, role: None, rank: None };
    let Connection { mut stream, mut buffer } = Connection::open(address, token, &caller)?;
    let failed = |e| Error::os("write", address.to_string(), e);
    stream.set_read_timeout(Some(time)).map_err(failed)?;
    stream.write_all(&encode(&ToLauncher::Control(order))).map_err(failed)?;
    let answer = loop {
        match next_message(&stream, &mut buffer) {
            Ok(FromLauncher::Scaling(progress)) => on_progress(progress),
            answer => break answer,
        }
    };
    match answer {
        Ok(FromLauncher::Scaled { servers, moved }) => Ok(ControlAnswer::Scaled(servers, moved)),
        Ok(FromLauncher::Status(status)) => Ok(ControlAnswer::Status(status)),
        Ok(FromLauncher::CheckpointWritten { clock }) => Ok(ControlAnswer::CheckpointWritten(clock)),
        Ok(FromLauncher::Changed { clock }) => Ok(ControlAnswer::Changed(clock)),
        Ok(FromLauncher::Turned(turn)) => Ok(ControlAnswer::Turned(turn)),
        Ok(FromLauncher::Refused(why)) => Err(Error::Refused { who: "the launcher".into(), why }),
        Ok(other) => Err(unexpected(&format!("{other:?}"))),
        Err(why) => {
            Err(Error::JobFailed(format!("no answer came from the launcher within {} s: {why}", time.as_secs())))
        }
    }
}
