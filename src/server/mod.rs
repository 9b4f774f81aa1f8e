//! The server: shards of the parameters and of the optimizer state, and the thread around each.
//!
//! [`Shard`] is the protocol, a pure state machine; [`Memory`] holds the bytes and runs the optimizer; [`EventLoop`] joins the
//! two over any transport.
//!
//! Invariant: the simulator and the binary run the same `Shard`, `Memory` and `EventLoop`.
#![forbid(unsafe_code)]

mod event_loop;
mod memory;
mod shard;

pub use event_loop::{EventLoop, Progress, Snapshot};
pub use memory::{ChunkImage, InitialValues, Memory, MemoryOptions, Running, Seeded};
pub use shard::{Contribution, Effect, Shard, ShardConfig, Task, Work};

use crate::{Error, Result, session::Member};

/// Serves this rank's shards until the job ends.
pub fn run(member: Member) -> Result<()> {
    Err(Error::Config(format!(
        "{} has joined, but its process cannot serve yet: the pieces are not joined",
        member.rank()
    )))
}
