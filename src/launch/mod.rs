//! Starting a job on this machine, or on several, and seeing it to its end: hosts, processes, cores, output, signals, the first
//! failure, and nobody left behind.
//!
//! Invariant: whatever ends a job, every process that it started is gone when [`Job::wait`] returns; and when the launcher itself
//! is killed, they go with it, on every host.
#![deny(unsafe_code)]

mod addresses;
mod agent;
mod cause;
mod checkpoints;
mod cores;
mod crew;
mod directory;
mod fleet;
mod foreign;
mod hosts;
mod job;
mod keeper;
mod meeting;
mod message;
mod output;
mod pipes;
mod processes;
mod remote;
#[allow(unsafe_code)]
mod spawn;
mod supervisor;
mod sweep;
mod timeline;

pub use agent::agent;
pub use directory::JobDirectory;
pub use foreign::{Foreign, surroundings};
pub use hosts::{BindTo, Host, MapBy, parse_hosts, read_hostfile};
pub use job::{Job, JobOptions, Outcome, OutputTo, Signal};
pub use keeper::keep;
pub use meeting::Meeting;
pub use spawn::ignore;

/// What `gradwire run` exits with when the job was told to end and its checkpoint is complete: "preempted, requeue me"
/// (EX_TEMPFAIL of sysexits.h).
pub const EXIT_PREEMPTED: u8 = 75;

/// What `gradwire run` exits with when all went well, but for workers that were lost and have not come again: the job was told to go
/// on without them (`on_worker_loss`).
pub const EXIT_WITHOUT_WORKERS: u8 = 3;
