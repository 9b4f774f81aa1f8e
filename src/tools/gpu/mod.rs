//! What a card is held to: the oracle's bits, and its own copies.
//!
//! Invariant: whatever is compared or measured runs through the same pipeline and kernels as a server's shard.

mod bench;
mod check;
mod job;

pub use bench::{BenchOptions, Row, bench};
pub use check::{Checked, check};
pub use job::{TENSORS, work};
