//! `gradwire scale`: servers that join a running job, or leave it.
//!
//! Invariant: the job's own launcher decides what moves where; here it is only asked for, and waited for.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;

use super::status::unexpected;
use crate::{
    Result,
    launch::JobDirectory,
    session::{Control, ControlAnswer, Scaling, control_with},
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire run -s 2 --max-servers 4 -n 8 --name lm -- python3 train.py
  gradwire scale lm --servers 4        two more join, and each takes over a shard
  gradwire scale lm --servers 1        three leave, after all shards have moved to the first

Training goes on meanwhile. Shards move one at a time, with their optimizer state; what is trained has the same bits as without. The job
has max_servers x shards_per_server shards from its beginning to its end, and each server has as many as any other, or one more. What
a shard takes of memory on its way and where it goes is taken there only then; a server that has not so much says so, and the shard
stays. See docs/scaling.md.")]
pub(super) struct ScaleArguments {
    /// The job's name.
    name: String,
    /// How many servers it is to have: 1 to the `--max-servers` that it was started with.
    #[arg(long, value_name = "N")]
    servers: u16,
    /// How long to wait for the next shard to have moved, in seconds; the job goes on with it in any case.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Print one JSON object for each shard that has moved, and one at the end.
    #[arg(long)]
    json: bool,
}

/// Has a running job get so many servers, and says what moves.
pub(super) fn scale(arguments: &ScaleArguments) -> Result<ExitCode> {
    let directory = JobDirectory::open(&arguments.name)?;
    let order = Control::Scale { servers: arguments.servers };
    let time = Duration::from_secs(arguments.timeout.max(1));
    let mut say = |progress: Scaling| {
        let Scaling { moved, moves, shard } = progress;
        match shard {
            None if arguments.json => println!("{}", json!({ "moves": moves })),
            None => println!("{moves} shards are to move"),
            Some((shard, to)) if arguments.json => {
                println!("{}", json!({ "shard": shard, "to": to, "moved": moved, "moves": moves }));
            }
            Some((shard, to)) => println!("shard {} has moved to {to} ({moved} of {moves})", shard.0),
        }
    };
    let answer = control_with(&directory.address()?, &directory.token()?, order, time, &mut say)?;
    let ControlAnswer::Scaled(servers, moved) = answer else { return Err(unexpected()) };
    match arguments.json {
        true => println!("{}", json!({ "servers": servers, "moved": moved })),
        false => println!("{} has {servers} servers", arguments.name),
    }
    Ok(ExitCode::SUCCESS)
}
