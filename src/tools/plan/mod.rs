//! What a job would take before anybody starts it: memory by host, landing slots, queue pairs, and how long a step would be and
//! what it would wait for.
//!
//! Memory comes from the sums by which servers allocate ([`JobConfig::shard_memory`]). Time comes from a model in closed form
//! ([`predict`]) that is fed with costs measured on a machine; docs/performance.md says what it leaves out.
//!
//! Invariant: every figure is a function of the settings, the number of parameters and the costs; nothing here measures or waits.

mod model;
mod table;

pub use model::{Cluster, Costs, Prediction, Stage, predict};
pub use table::{scaling, text};

use serde::Serialize;

use crate::{
    Error, Result,
    session::{JobConfig, ShardMemory, ShardShape},
};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The job's settings.
    pub config: JobConfig,
    /// Parameters of the model.
    pub parameters: u64,
    /// Servers on one host.
    pub servers_per_host: u16,
    /// Workers on one host.
    pub workers_per_host: u16,
    /// Bytes that a host has to give, if they are known.
    pub host_memory: Option<u64>,
    /// What things cost.
    pub costs: Costs,
    /// What stands between the processes.
    pub cluster: Cluster,
    /// Time of the backward pass, during which pushes may already go.
    pub backward_s: f64,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Parameters of the model.
    pub parameters: u64,
    /// Chunks of the model.
    pub chunks: u64,
    /// Shards of the job.
    pub shards: u32,
    /// The largest shard.
    pub shard: ShardShape,
    /// Its memory, by what it is for.
    pub shard_memory: ShardMemory,
    /// Host memory of one server: its shards (without what is on a GPU), and those that it holds the second copy of.
    pub server_bytes: u64,
    /// Bytes of one worker: gradients and parameters.
    pub worker_bytes: u64,
    /// Bytes of a host of servers.
    pub server_host_bytes: u64,
    /// Bytes of a host of workers.
    pub worker_host_bytes: u64,
    /// Bytes that a host has to give.
    pub host_memory: Option<u64>,
    /// Whether both kinds of host have room; a host that is both has to hold their sum.
    pub fits: Option<bool>,
    /// Budget for landing memory, of one server.
    pub landing_budget: u64,
    /// Landing slots of each worker on each shard.
    pub slots: u32,
    /// Queue pairs of a server's host, of a worker's host, and of the job (both ends counted).
    pub queue_pairs_server_host: u64,
    /// Of a host of workers.
    pub queue_pairs_worker_host: u64,
    /// Of the whole job, both ends counted.
    pub queue_pairs: u64,
    /// How long a step takes and why.
    pub step: Prediction,
}

/// Answers.
///
/// # Errors
///
/// [`Error::Config`] for settings that cannot be, with the sum where landing memory is too small.
pub fn plan(question: &Question) -> Result<Plan> {
    let Question { config, parameters, .. } = question;
    if *parameters == 0 || question.servers_per_host == 0 || question.workers_per_host == 0 {
        return Err(Error::Config("parameters and processes of a host must be at least 1".into()));
    }
    let shard = ShardShape::even(*parameters, config);
    let shard_memory = config.shard_memory(&shard)?;
    let lanes = u64::from(config.lanes_per_server());
    let server_bytes = shard_memory.on_host(&config.device) * lanes;
    let worker_bytes = config.worker_memory(parameters.next_multiple_of(crate::layout::ALIGNMENT));
    // Each lane of a pair has a path to the other one.
    let partners = u64::from(config.has_replicas());
    let on_host = |most: u16, all: u16| u64::from(most.min(all));
    let (servers, workers) = (u64::from(config.servers), u64::from(config.workers));
    let servers_here = on_host(question.servers_per_host, config.servers);
    let workers_here = on_host(question.workers_per_host, config.workers);
    let server_host_bytes = server_bytes * servers_here;
    let worker_host_bytes = worker_bytes * workers_here;
    let fits = question.host_memory.map(|room| server_host_bytes.max(worker_host_bytes) <= room);
    Ok(Plan {
        parameters: *parameters,
        chunks: parameters.next_multiple_of(crate::layout::ALIGNMENT).div_ceil(config.chunk_bytes / 4),
        shards: config.shard_count(),
        shard,
        shard_memory,
        server_bytes,
        worker_bytes,
        server_host_bytes,
        worker_host_bytes,
        host_memory: question.host_memory,
        fits,
        landing_budget: config.landing_bytes,
        slots: shard_memory.slots,
        queue_pairs_server_host: servers_here * lanes * (workers + partners),
        queue_pairs_worker_host: workers_here * servers * lanes,
        queue_pairs: servers * lanes * (2 * workers + partners),
        step: predict(config, *parameters, &question.costs, &question.cluster, question.backward_s),
    })
}

#[cfg(test)]
mod tests;
