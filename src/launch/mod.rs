//! Starting a job on this machine and seeing it to its end: processes, cores, output, signals, the first failure, and nobody left
//! behind.
//!
//! Invariant: whatever ends a job, every process that it started is gone when [`Job::wait`] returns; and when the launcher itself
//! is killed, they go with it.
#![deny(unsafe_code)]

mod cause;
mod checkpoints;
mod cores;
mod directory;
mod job;
mod keeper;
mod output;
mod processes;
#[allow(unsafe_code)]
mod spawn;
mod supervisor;
mod sweep;
mod timeline;

pub use directory::JobDirectory;
pub use job::{Job, JobOptions, Outcome, OutputTo, Signal};
pub use keeper::keep;

/// What `gradwire run` exits with when the job was told to end and its checkpoint is complete: "preempted, requeue me"
/// (EX_TEMPFAIL of sysexits.h).
pub const EXIT_PREEMPTED: u8 = 75;
