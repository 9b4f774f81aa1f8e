//! What is asked or ordered of a running job from outside, by whoever knows its token.
//!
//! Invariant: every call ends within the time that its caller allows.

use std::{io::Write, time::Duration};

use super::{
    Address,
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
}

/// Asks or orders something of a running job and waits at most `time` for the answer.
pub(crate) fn control(address: &Address, token: &JobToken, order: Control, time: Duration) -> Result<ControlAnswer> {
    let caller = Caller { purpose: Purpose::Control, role: None, rank: None };
    let Connection { mut stream, mut buffer } = Connection::open(address, token, &caller)?;
    let failed = |e| Error::os("write", address.to_string(), e);
    stream.set_read_timeout(Some(time)).map_err(failed)?;
    stream.write_all(&encode(&ToLauncher::Control(order))).map_err(failed)?;
    match next_message(&stream, &mut buffer) {
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
