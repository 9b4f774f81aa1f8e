//! `gradwire remove-worker` and `gradwire add-worker`: who is of a running job, from which clock on.
//!
//! Invariant: the job's own launcher decides whether that can be, and at which clock; nothing is done here.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use clap::Args;

use super::status::{ask, unexpected};
use crate::{
    Result,
    session::{Control, ControlAnswer},
    types::Clock,
};

/// How long the servers may take to prepare: a step may be long.
const LEAVE_TIME: Duration = Duration::from_secs(60);

/// How long a new process may take until it has joined: programs read their data first.
const COME_TIME: Duration = Duration::from_secs(600);

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire remove-worker myjob 3
  gradwire remove-worker myjob 3 --at 2000

All that the worker gives of clocks before the one that is printed counts; from that clock on the others go on without it, and a mean is
divided by their number. Its program hears of it (Worker::should_leave, gw_should_leave, should_leave in Python), finishes, and ends.")]
pub(super) struct RemoveArguments {
    /// The job's name.
    name: String,
    /// The worker's number.
    rank: u16,
    /// Not before this clock [default: as soon as possible].
    #[arg(long, value_name = "CLOCK", default_value_t = 0, hide_default_value = true)]
    at: Clock,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire run -s 2 -n 4 --max-workers 8 --name myjob -- python3 train.py
  gradwire add-worker myjob                         the next empty seat
  gradwire add-worker myjob 3                       worker 3, which has left, or was lost

The launcher starts the job's command for it. It has joined when the clock is printed from which on all wait for it; its program begins
at that clock (Worker::clock, gw_clock, clock in Python), with the parameters as they are then.")]
pub(super) struct AddArguments {
    /// The job's name.
    name: String,
    /// The worker's number [default: the first whose seat is empty].
    rank: Option<u16>,
    /// Not before this clock [default: as soon as possible].
    #[arg(long, value_name = "CLOCK", default_value_t = 0, hide_default_value = true)]
    at: Clock,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Has a worker leave a running job, and says from which clock on.
pub(super) fn remove(arguments: &RemoveArguments) -> Result<ExitCode> {
    let order = Control::RemoveWorker { worker: arguments.rank, at: arguments.at };
    order_turn(&arguments.name, order, LEAVE_TIME, arguments.json)
}

/// Has another worker take part in a running job, and says from which clock on.
pub(super) fn add(arguments: &AddArguments) -> Result<ExitCode> {
    let order = Control::AddWorker { worker: arguments.rank, at: arguments.at };
    order_turn(&arguments.name, order, COME_TIME, arguments.json)
}

fn order_turn(name: &str, order: Control, time: Duration, json: bool) -> Result<ExitCode> {
    let ControlAnswer::Turned(turn) = ask(name, order, time)? else { return Err(unexpected()) };
    if json {
        println!("{}", serde_json::to_string(&turn).expect("numbers under text keys"));
    } else {
        println!("{turn}");
    }
    Ok(ExitCode::SUCCESS)
}
