//! The backup's side of a shard with two copies: it takes in what the primary has reduced, runs the same steps, and may take over.
//!
//! [`Backup`] is the protocol, a pure state machine; [`Standby`] joins it to memory and a transport, and becomes an `EventLoop`
//! when it takes over. The primary's side is in `server/shard/mirror.rs`.
//!
//! Invariant: what a backup says it holds is in its state; it never answers a worker.

mod backup;
mod part;
mod standby;

pub(in crate::server) use backup::change_notes;
pub use backup::{Backup, BackupEffect, Inheritance};
pub use part::{Part, Replica, Standing};
pub use standby::{Standby, StandbyOptions};
