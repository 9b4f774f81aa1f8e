//! The optimizers that the servers run: hyper-parameters and schedules, the scalar oracle that defines every bit, and the CPU
//! and GPU kernels that must agree with it.
//!
//! Invariant: what a step does to an element depends on that element's gradients (in rank order), its state and the step's
//! scalars alone; never on vector width, tile, chunk or thread. NaN is one value here: that an element is NaN is defined, the
//! payload and sign of the NaN are not (Rust and LLVM leave them open).

mod chunk;
mod config;
mod convert;
mod form;
pub mod gpu;
mod isa;
mod kernel;
mod live;
mod loss_scale;
mod norm;
pub mod oracle;
mod plan;
pub mod prefetch;
mod schedule;
mod update;

pub use chunk::{ChunkParts, ChunkStep, Pass, StepArguments, clip_coefficient, clipped_scale};
pub use config::{Clip, GroupConfig, OptimizerConfig, OptimizerKind};
pub use isa::{Isa, isa};
pub use kernel::{AHEAD, Contributions, Gradients, Kernels, RUN, StateMut, Wire};
pub use live::LiveChange;
pub use loss_scale::{LossScaleConfig, LossScaleMode, LossScaler};
pub use norm::{NORM_TILE, SquaredNorm, squared_norm};
pub use plan::{Reduction, SpanStep, StepScalars};
pub use schedule::{LearningRates, Schedule};

#[cfg(test)]
mod tests;
