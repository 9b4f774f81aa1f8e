//! The C ABI: what `include/gradwire.h` declares, for programs and runtimes that are not written in Rust.
//!
//! `process` has what concerns the whole process, `job` a worker's part in its job, `asking` what it may ask of it, `data` gradients
//! and parameters, `memory` where they lie. A worker is named by a number, never by a pointer, so that a handle that was closed, made up or inherited by fork is
//! told from a live one.
//!
//! Invariant: no panic crosses into C; every call answers with a status and, if it failed, leaves a text for its thread.
//! No handle, whatever its bits, makes a call read memory that is not ours.

mod asking;
mod data;
mod handle;
mod job;
mod memory;
mod process;
mod status;
mod tensor;

pub use asking::*;
pub use data::*;
pub use handle::WorkerHandle;
pub use job::*;
pub use memory::*;
pub use process::*;
pub use status::Status;
pub use tensor::{DataType, InitRule, TensorDescription};
