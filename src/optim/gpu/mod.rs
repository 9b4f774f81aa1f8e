//! The optimizer on a GPU. As plain data: the PTX, which kernel does what, the table that a launch reads, and its grid. And
//! [`Pipeline`], which runs it on a device, and [`Meter`], which times it there.
//!
//! Invariant: nothing but those two touches a device; a batch says the same whatever card runs it, and its kernels give the bits of
//! [`super::oracle`] and [`super::norm`] on every card.

mod batch;
mod job;
mod kernel;
mod meter;
mod pipeline;
mod slot;
mod table;

pub use batch::{Batch, ChunkAddresses, Launch, ShortTable};
pub use job::{ChunkPlan, Done, Gradient, PipelineOptions};
pub use kernel::{GpuKernel, Rule};
pub use meter::{Load, Meter, MeterOptions, Ready};
pub use pipeline::Pipeline;

/// The kernels, for any card of compute capability 7.0 or later: the driver compiles them for the one that is there.
pub const PTX: &str = include_str!("../../../kernels/gradwire.ptx");
