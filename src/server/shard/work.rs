//! What a shard has computed over a chunk, as plain data.
//!
//! Invariant: the leases in a [`Work`] are all that a computation may touch beside the chunk's own state, and come back with it.

use crate::{
    mem::{Lease, SharedLease},
    types::{ChunkId, Clock, Version},
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
    /// Sum the contributions, run the optimizer, make the wire copy if there is a lease for it: one pass.
    Step,
    /// Sum the contributions into the chunk's accumulator.
    Reduce,
    /// Run the optimizer on the accumulator, make the wire copy if there is a lease for it.
    Apply,
    /// Make the wire copy of the present parameters.
    Encode,
    /// Copy a part of the chunk's state into `sum`.
    CopyOut(Part),
    /// Copy the one contribution over a part of the chunk's state.
    CopyIn(Part),
}

impl Task {
    /// Whether it changes what a checkpoint holds of the chunk.
    pub fn changes_state(self) -> bool {
        matches!(self, Task::Step | Task::Apply | Task::CopyIn(_))
    }
}

/// A part of a chunk's state: parameters, or a slot of the optimizer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Parameters.
    Master,
    /// First state slot.
    First,
    /// Second state slot.
    Second,
}

impl Part {
    /// All of them, in the order in which they travel; an optimizer with fewer slots has only the first ones.
    pub const ALL: [Part; 3] = [Part::Master, Part::First, Part::Second];
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
    pub(in crate::server) position: u64,
    /// What landed, in rank order.
    pub contributions: Vec<Contribution>,
    /// The number of gradients that the mean divides by.
    pub weight: u32,
    /// Where the wire copy goes; still there afterwards if it was not needed.
    pub wire: Option<Lease>,
    /// Before: the last wire copy, which is given up for a new one. Afterwards: the new one.
    pub published: Option<SharedLease>,
    /// Afterwards: the last wire copy, if it was replaced.
    pub before: Option<SharedLease>,
    /// Of a [`Task::Reduce`]: where the sum is also left, in f32. Of a [`Task::CopyOut`]: where the part goes.
    pub sum: Option<Lease>,
    /// Of a [`Task::CopyOut`] that is done, and of a [`Task::CopyIn`]: the optimizer steps that the chunk has taken.
    pub steps: u64,
    /// Of a [`Task::CopyIn`]: the version of the chunk whose state it is.
    pub version: Version,
    /// Of a [`Task::Step`] or [`Task::Apply`]: the factor on the gradient.
    pub scale: f32,
    /// Of a [`Task::Reduce`] that is done: the squared norm of the mean gradient, if it is needed.
    pub squared_norm: Option<f64>,
}

/// A sum that lies in a chunk's accumulator, or is known to be empty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reduced {
    /// Whose step it makes.
    pub clock: Clock,
    /// The number of gradients that the mean divides by; 0: nobody gave anything.
    pub weight: u32,
    /// The squared norm of the mean gradient, where it is needed.
    pub squared_norm: f64,
}

impl Work {
    pub(in crate::server) fn new(task: Task, chunk: ChunkId, clock: Clock) -> Work {
        Work {
            task,
            chunk,
            clock,
            position: 0,
            contributions: Vec::new(),
            weight: 0,
            wire: None,
            published: None,
            before: None,
            sum: None,
            steps: 0,
            version: 0,
            scale: 1.0,
            squared_norm: None,
        }
    }

    /// What was written to `wire` is the wire copy from here on.
    pub(in crate::server) fn publish(&mut self) {
        if let Some(wire) = self.wire.take() {
            self.before = self.published.replace(wire.freeze());
        }
    }
}
