//! `gradwire checkpoint`: asking a running job for one, and looking at those that have been written.
//!
//! Invariant: only `now` speaks to a job; the others read files and change none but the one that `export` is told to write.
#![forbid(unsafe_code)]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand};

use super::status::{ask, unexpected};
use crate::{
    Error, Result,
    checkpoint::{self, Checkpoint},
    session::{Control, ControlAnswer},
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire checkpoint now myjob                        the running job `myjob` writes one
  gradwire checkpoint list ckpt                        what is in the directory, newest first
  gradwire checkpoint verify ckpt                      read the newest whole and check every sum
  gradwire checkpoint export ckpt model.safetensors    the newest one's parameters, for other tools
  gradwire checkpoint export ckpt/clock-000000000100 model.safetensors

A directory is one checkpoint, or holds several: then the newest complete one is taken. `gradwire run --resume` takes the same.")]
pub(super) struct CheckpointArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Have a running job write a checkpoint, and wait until it is complete.
    Now {
        /// The job's name.
        name: String,
        /// How long to wait for it to be complete, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        timeout: u64,
    },
    /// List what a directory holds.
    List {
        /// Where checkpoints have been written.
        directory: PathBuf,
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Read a checkpoint whole and check every sum in it.
    Verify {
        /// A checkpoint, or a directory of them.
        directory: PathBuf,
    },
    /// Write the parameters as one ordinary safetensors file (f32), by tensor name and shape.
    Export {
        /// A checkpoint, or a directory of them.
        directory: PathBuf,
        /// The file to write; one of that name is replaced when the new one is complete.
        out: PathBuf,
    },
}

/// Does what was asked.
pub(super) fn run(arguments: &CheckpointArguments) -> Result<ExitCode> {
    match &arguments.action {
        Action::Now { name, timeout } => now(name, Duration::from_secs((*timeout).max(1)))?,
        Action::List { directory, json } => list(directory, *json)?,
        Action::Verify { directory } => {
            let checkpoint = find(directory)?;
            let bytes = checkpoint.verify()?;
            println!("{}: every sum of {bytes} bytes is right", checkpoint.path().display());
        }
        Action::Export { directory, out } => {
            let checkpoint = find(directory)?;
            let bytes = checkpoint::export(&checkpoint, out)?;
            let tensors = checkpoint.manifest().layout.tensors.len();
            let (clock, out) = (checkpoint.clock(), out.display());
            println!("{out}: {tensors} tensors of clock {clock}, {bytes} bytes");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn now(name: &str, time: Duration) -> Result<()> {
    let ControlAnswer::CheckpointWritten(clock) = ask(name, Control::Checkpoint, time)? else {
        return Err(unexpected());
    };
    println!("checkpoint of clock {clock} is complete");
    Ok(())
}

/// What was asked for; newer ones that cannot be used are told aloud.
fn find(path: &Path) -> Result<Checkpoint> {
    let found = checkpoint::find(path)?;
    for passed in &found.passed_over {
        eprintln!("gradwire: passing over {}: {}", passed.path.display(), passed.why);
    }
    found
        .checkpoint
        .ok_or_else(|| Error::Checkpoint { path: path.into(), defect: "there is no complete checkpoint here".into() })
}

fn list(directory: &Path, json: bool) -> Result<()> {
    let mut count = 0;
    for (path, opened) in checkpoint::list(directory)? {
        count += 1;
        let shown = path.display();
        match (opened, json) {
            (Ok(checkpoint), true) => println!("{}", described(&checkpoint)),
            (Ok(checkpoint), false) => {
                let about = described(&checkpoint);
                let plain = |key: &str| about[key].as_str().map_or_else(|| about[key].to_string(), String::from);
                let [job, clock, shards, bytes, linked] =
                    ["job", "clock", "shards", "bytes", "linked_bytes"].map(plain);
                let linked = if linked == "0" { String::new() } else { format!(", {linked} of them linked") };
                println!("{shown}  clock {clock}, job {job}, {shards} shards, {bytes} bytes{linked}");
            }
            (Err(why), true) => println!("{}", serde_json::json!({ "path": path, "unusable": why.to_string() })),
            (Err(why), false) => println!("{shown}  cannot be used: {why}"),
        }
    }
    if count == 0 && !json {
        eprintln!("no checkpoint is in {}", directory.display());
    }
    Ok(())
}

fn described(checkpoint: &Checkpoint) -> serde_json::Value {
    let manifest = checkpoint.manifest();
    let shards: std::collections::BTreeSet<_> = manifest.files.iter().map(|file| file.shard).collect();
    let linked = manifest.files.iter().filter(|file| file.since.is_some());
    serde_json::json!({
        "path": checkpoint.path(),
        "job": manifest.state.job,
        "clock": manifest.state.clock,
        "shards": shards.len(),
        "tensors": manifest.layout.tensors.len(),
        "bytes": manifest.files.iter().map(|file| file.bytes).sum::<u64>(),
        "linked_bytes": linked.map(|file| file.bytes).sum::<u64>(),
    })
}
