//! Benchmarks: what a job reaches, beside what the machine itself reaches in the same run.
//!
//! [`worker`] is what a worker of a benchmark's job does; [`echo`], the plain loop of [`streams`] and the plain write of [`disk`] are
//! the ceilings: the same bytes by the means that the job stands on, with nobody in between. All are timed by the same stopwatch
//! ([`Measured::take`]), so that they can be compared.
//!
//! Invariant: a figure is printed only together with the ceiling that was measured in turn with it, or with the fact that it has
//! none.

pub mod disk;
pub mod echo;
mod measured;
mod plot;
mod row;
mod sizes;
pub mod streams;
pub mod worker;

pub use measured::{Figure, Load, Measured, Pace, median};
pub use plot::plot;
pub use row::{Row, header, plain_rate, plain_time};
pub use sizes::{parse_sizes, plain_bytes};
