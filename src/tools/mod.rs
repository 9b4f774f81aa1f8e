//! Programs that measure and plan. Jobs are started by the command line; here is what runs inside them and beside them.
//!
//! Invariant: nothing here reaches into another layer's private state: a benchmark uses what every user of the library has.
#![forbid(unsafe_code)]

pub mod bench;
pub mod doctor;
pub mod gpu;
pub mod plan;
pub mod top;
