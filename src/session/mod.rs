//! The job as its ranks see it: settings, rendezvous, and the life of each path.
//!
//! Invariant: nothing here knows parameters or gradients.
#![forbid(unsafe_code)]

mod liveness;
mod paths;

pub use liveness::{Liveness, LivenessEvent};
pub use paths::Paths;
