//! gradwire: the home of a model's parameters *and* of its optimizer state.
//!
//! Workers push gradients and pull parameters; servers hold sharded parameters, aggregate, run the optimizer themselves and
//! hand back the new parameters. See `docs/architecture.md` for the layers and `docs/wire.md` for the bytes.
//!
//! Invariant: a module imports only from layers below its own (`tests/tidy.rs` holds the table). What is hidden here is public
//! for the `gradwire` binary and the tests alone.

mod error;
pub mod types;

pub mod consistency;
pub mod layout;
#[doc(hidden)]
pub mod observe;
#[doc(hidden)]
pub mod rc;
mod sys;
pub mod wire;

#[doc(hidden)]
pub mod cuda;

pub mod mem;

pub mod optim;
pub mod transport;

pub mod checkpoint;
#[doc(hidden)]
pub mod session;

pub mod server;
pub mod worker;

#[doc(hidden)]
pub mod launch;
#[doc(hidden)]
pub mod tools;
#[doc(hidden)]
pub mod world;

#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod ffi;

pub use consistency::Consistency;
pub use error::{Error, Result};
pub use layout::{Init, TensorSpec};
pub use optim::{OptimizerConfig, OptimizerKind};
pub use types::Dtype;
pub use worker::Worker;
