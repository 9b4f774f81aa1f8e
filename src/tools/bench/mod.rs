//! Benchmarks: what a job reaches, beside what the machine itself reaches in the same run.
//!
//! [`push_pull`] is what a worker of a benchmark's job does, [`echo`] is the ceiling: the same bytes by the means that the job's
//! fabric stands on, with nobody in between. Both are timed by the same stopwatch ([`Measured::take`]), so that they can be compared.
//!
//! Invariant: a figure is printed only together with the ceiling that was measured in turn with it.

pub mod echo;
mod measured;
pub mod push_pull;
mod row;
mod sizes;

pub use measured::{Figure, Measured, Pace};
pub use row::{Row, header};
pub use sizes::{parse_sizes, plain_bytes};
