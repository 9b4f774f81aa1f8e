//! Checkpoints as the launcher sees them: what a job resumes from, and the manifest that completes a checkpoint.
//!
//! Invariant: the manifest is written last, after every shard has reported its file; a checkpoint to be resumed is found and
//! read before any process is started.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    Error, Result,
    checkpoint::{self, Checkpoint, JobState, Manifest, ShardWritten},
    layout::Layout,
    session::{CheckpointSink, JobConfig},
    types::Clock,
};

/// Resolves `resume` to one complete checkpoint and its clock, and clears up what crashed writes have left.
pub(super) fn prepare(config: &mut JobConfig) -> Result<()> {
    absolute(&mut config.checkpoint.dir)?;
    absolute(&mut config.init_from)?;
    if let Some(path) = &config.resume {
        let checkpoint = find(path)?;
        config.start_clock = checkpoint.clock();
        config.resume = Some(checkpoint.path().to_path_buf());
        absolute(&mut config.resume)?;
    }
    if let Some(dir) = &config.checkpoint.dir {
        checkpoint::begin(dir)?;
    }
    Ok(())
}

/// Servers may be started in another directory than the launcher.
fn absolute(path: &mut Option<PathBuf>) -> Result<()> {
    if let Some(path) = path {
        *path = std::path::absolute(&*path).map_err(|error| Error::file("resolve", &*path, error))?;
    }
    Ok(())
}

/// The checkpoint at `path`, or the newest complete one in it; newer ones that cannot be used are told aloud.
fn find(path: &Path) -> Result<Checkpoint> {
    let latest = checkpoint::find(path)?;
    for passed in &latest.passed_over {
        eprintln!("gradwire: not resuming from {}: {}", passed.path.display(), passed.why);
    }
    latest.checkpoint.ok_or_else(|| Error::Checkpoint {
        path: path.to_path_buf(),
        defect: "there is no complete checkpoint here to resume from".into(),
    })
}

/// Writes manifests for a job and prunes old checkpoints.
pub(super) fn recorder(config: &JobConfig) -> CheckpointSink {
    let config = config.clone();
    Box::new(move |clock, parts, layout| {
        let Some(dir) = &config.checkpoint.dir else {
            return Err(Error::Config("shards report a checkpoint, but the job has no checkpoint directory".into()));
        };
        let recorded = record(&config, dir, clock, parts, layout);
        // What could not be removed is tried again: with the next prune, or when a job begins.
        let cleared = match recorded {
            Ok(()) => checkpoint::prune(dir, config.checkpoint.keep as usize).map(drop),
            Err(_) => checkpoint::abandon(dir, clock),
        };
        if let Err(error) = cleared {
            tracing::warn!("checkpoints that are not needed are still there: {error}");
        }
        recorded
    })
}

fn record(config: &JobConfig, dir: &Path, clock: Clock, parts: Vec<Value>, layout: &Layout) -> Result<()> {
    let refused = |defect: String| Error::Checkpoint { path: dir.to_path_buf(), defect };
    let mut files = Vec::with_capacity(parts.len());
    let (mut learning_rate, mut live) = (Value::Null, Value::Null);
    for mut part in parts {
        if let Some(text) = part.get("error").and_then(Value::as_str) {
            return Err(refused(text.into()));
        }
        learning_rate = part["learning_rate"].take();
        // The first shard decides about steps, and so knows all that there is.
        let told = part["live"].take();
        if live.is_null() && told.as_object().is_some_and(|told| !told.is_empty()) {
            live = told;
        }
        let written: Vec<ShardWritten> = serde_json::from_value(part["files"].take())
            .map_err(|error| refused(format!("a shard's report: {error}")))?;
        files.extend(written);
    }
    let optimizer = serde_json::to_value(&config.optimizer).map_err(|error| refused(error.to_string()))?;
    let state = JobState {
        job: config.name.clone(),
        clock,
        epoch: 0,
        consistency: config.consistency,
        seed: config.seed,
        optimizer,
        learning_rate,
        live,
    };
    let path = checkpoint::commit(dir, &Manifest::new(state, layout, files))?;
    tracing::info!("checkpoint {} is complete", path.display());
    Ok(())
}
