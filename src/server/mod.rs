//! The server: shards of the parameters and of the optimizer state, and the thread around each.
//!
//! [`Shard`] is the protocol, a pure state machine; [`Memory`] holds the bytes and runs the optimizer; [`EventLoop`] joins the
//! two over any transport.
//!
//! Invariant: the simulator and the binary run the same `Shard`, `Memory` and `EventLoop`.
#![forbid(unsafe_code)]

mod computing;
mod event_loop;
mod hosting;
mod landing;
mod lane;
mod memory;
mod node;
mod replica;
mod resume;
mod room;
mod shard;
mod writer;

pub use event_loop::{EventLoop, Progress, Snapshot};
pub use memory::{ChunkImage, ChunkView, InitialValues, Memory, MemoryOptions, NotFinite, OnDevice, Seeded};
pub use node::run;
pub use replica::{Backup, BackupEffect, Inheritance, Part as LanePart, Replica, Standby, StandbyOptions, Standing};
pub use shard::{
    Contribution, Decided, Decision, DecisionConfig, DecisionRules, Effect, Figures, Lacking, LiveState, MirrorConfig,
    Part, Reduced, Shard, ShardConfig, Task, Work,
};
