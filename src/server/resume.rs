//! What a server takes from the checkpoint that its job goes on from.
//!
//! Invariant: what is read was written by a job of the same tensors, optimizer and groups, or the job is refused.
#![forbid(unsafe_code)]

use super::{ChunkImage, LiveState, Memory, node::Plan};
use crate::{
    Error, Result,
    checkpoint::Checkpoint,
    optim::LearningRates,
    session::JobConfig,
    types::{Clock, ShardId, Version},
};

/// What the job that is resumed had changed of its rules.
pub(super) fn live(config: &JobConfig) -> Result<LiveState> {
    let Some(path) = &config.resume else { return Ok(LiveState::default()) };
    let live = Checkpoint::open(path)?.manifest().state.live.clone();
    if live.is_null() {
        return Ok(LiveState::default());
    }
    let read = serde_json::from_value(live);
    read.map_err(|error| Error::Checkpoint { path: path.clone(), defect: error.to_string() })
}

/// Where a shard's chunks stood in a checkpoint, in shard order.
pub(super) struct Resumed {
    pub versions: Vec<Version>,
    /// By contributor, where they were not all as far as the checkpoint.
    pub clocks: Vec<Vec<Clock>>,
}

/// Loads the shard's chunks from the checkpoint to be resumed, whichever servers wrote it.
pub(super) fn restore(plan: &Plan, shard: ShardId, memory: &mut Memory) -> Result<Option<Resumed>> {
    let Some(path) = &plan.config.resume else { return Ok(None) };
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.matches(&plan.layout)?;
    let defect = |defect: String| Error::Checkpoint { path: path.clone(), defect };
    // Only the same workers push what they had pushed before, and only where every push is a step of its own.
    let has_clocks = !plan.config.consistency.aggregates() && checkpoint.same_contributors(&plan.layout);
    let mut resumed = Resumed { versions: Vec::new(), clocks: Vec::new() };
    for id in &plan.layout.shards[usize::from(shard.0)] {
        let data = checkpoint.chunk(*id)?;
        let image = ChunkImage {
            chunk: *id,
            version: data.version,
            steps: data.steps,
            master: data.master.to_vec(),
            first: data.first.to_vec(),
            second: data.second.to_vec(),
        };
        let slots = usize::from(!image.first.is_empty()) + usize::from(!image.second.is_empty());
        let wanted = plan.config.optimizer.kind.state_slots();
        if slots != wanted {
            return Err(defect(format!(
                "it holds {slots} values of optimizer state an element, and this job's optimizer needs {wanted}: resume with \
                 the optimizer that wrote it"
            )));
        }
        memory.restore(&image)?;
        resumed.versions.push(data.version);
        resumed.clocks.push(if has_clocks { data.clocks.to_vec() } else { Vec::new() });
    }
    Ok(Some(resumed))
}

/// The learning rates of the checkpoint to be resumed.
pub(super) fn restore_rates(plan: &Plan, memory: &mut Memory) -> Result<()> {
    let Some(path) = &plan.config.resume else { return Ok(()) };
    let checkpoint = Checkpoint::open(path)?;
    let defect = |defect: String| Error::Checkpoint { path: path.clone(), defect };
    let rates = checkpoint.manifest().state.learning_rate.clone();
    if !rates.is_null() {
        let rates: LearningRates = serde_json::from_value(rates).map_err(|error| defect(error.to_string()))?;
        if rates.groups() != plan.config.optimizer.group_count() {
            let (stored, own) = (rates.groups(), plan.config.optimizer.group_count());
            return Err(defect(format!(
                "it holds learning rates of {stored} parameter groups, and this job has {own}"
            )));
        }
        memory.restore_rates(rates);
    }
    Ok(())
}
