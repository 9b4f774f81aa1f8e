//! `gradwire set`: changing settings of a running job.
//!
//! Invariant: the job's own launcher decides what may be changed, and at which clock; nothing is changed here.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use clap::Args;

use super::status::{ask, unexpected};
use crate::{
    Result,
    optim::LiveChange,
    session::{Control, ControlAnswer},
};

/// How long the servers may take to prepare: a step may be long.
const CHANGE_TIME: Duration = Duration::from_secs(60);

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire set myjob lr=0.0003
  gradwire set myjob weight-decay=0.05 clip-norm=1
  gradwire set myjob staleness=4

What can be changed: lr (the default group's rate; other groups keep their proportion to it, and the schedule goes on multiplying),
weight-decay (of the default group and of every group that has none of its own), clip-norm (where the job was started with
--clip-norm), staleness (clocks that a worker may run ahead, of a job with --consistency ssp:N). All of one command takes effect at one clock on every server; the clock is printed.")]
pub(super) struct SetArguments {
    /// The job's name.
    name: String,
    /// What to change, as KEY=VALUE.
    #[arg(required = true, value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Changes settings of a running job, and says from which clock on they hold.
pub(super) fn set(arguments: &SetArguments) -> Result<ExitCode> {
    let change = LiveChange::parse(arguments.settings.iter().map(String::as_str))?;
    let ControlAnswer::Changed(clock) = ask(&arguments.name, Control::Change(change), CHANGE_TIME)? else {
        return Err(unexpected());
    };
    println!("{change} from clock {clock} on");
    Ok(ExitCode::SUCCESS)
}
