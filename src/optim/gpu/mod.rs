//! The optimizer on a GPU, as plain data: the PTX, which kernel does what, the table that a launch reads, and its grid. What
//! talks to a driver stands elsewhere.
//!
//! Invariant: nothing here touches a device; a batch says the same whatever card runs it, and its kernels give the bits of
//! [`super::oracle`] and [`super::norm`] on every card.
#![forbid(unsafe_code)]

mod batch;
mod kernel;
mod table;

pub use batch::{Batch, ChunkAddresses, Launch, ShortTable};
pub use kernel::{GpuKernel, Rule};

/// The kernels, for any card of compute capability 7.0 or later: the driver compiles them for the one that is there.
pub const PTX: &str = include_str!("../../../kernels/gradwire.ptx");
