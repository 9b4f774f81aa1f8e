//! What a shard has computed over a chunk, as plain data.
//!
//! Invariant: the leases in a [`Work`] are all that a computation may touch beside the chunk's own state, and come back with it.

use crate::{
    mem::Lease,
    types::{ChunkId, Clock},
};

/// One worker's gradient of one chunk, landed.
#[derive(Debug)]
pub struct Contribution {
    /// Which worker.
    pub worker: u16,
    /// How many workers' gradients it sums.
    pub weight: u16,
    /// The landing slot.
    pub lease: Lease,
}

/// What is to be computed over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Sum the contributions, run the optimizer, store the wire copy if there is a lease for it: one pass.
    Step,
    /// Sum the contributions into the chunk's accumulator.
    Reduce,
    /// Run the optimizer on the accumulator, store the wire copy if there is a lease for it.
    Apply,
    /// Store the wire copy of the present parameters.
    Encode,
}

/// A computation over one chunk; goes to [`Memory`](super::Memory) and comes back in [`Shard::handle_computed`].
#[derive(Debug)]
pub struct Work {
    /// What to do.
    pub task: Task,
    /// To which chunk.
    pub chunk: ChunkId,
    /// The clock that schedules go by.
    pub clock: Clock,
    /// The window position whose contributions these are.
    pub(super) position: u64,
    /// What landed, in rank order.
    pub contributions: Vec<Contribution>,
    /// The number of gradients that the mean divides by.
    pub weight: u32,
    /// Where the wire copy goes.
    pub wire: Option<Lease>,
    /// Of a [`Task::Step`] or [`Task::Apply`]: the factor on the gradient.
    pub scale: f32,
    /// Of a [`Task::Reduce`] that is done: the squared norm of the mean gradient, if it is needed.
    pub squared_norm: Option<f64>,
}

impl Work {
    pub(super) fn new(task: Task, chunk: ChunkId, clock: Clock) -> Work {
        let contributions = Vec::new();
        let (position, weight, scale) = (0, 0, 1.0);
        Work { task, chunk, clock, position, contributions, weight, wire: None, scale, squared_norm: None }
    }
}
