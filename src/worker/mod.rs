//! The worker: pushes gradients, pulls parameters, waits.
//!
//! [`Client`] is the protocol, a pure state machine; [`Engine`] joins it to a transport and is turned by the program's own thread
//! while that waits, by a progress thread otherwise; [`Worker`] is what a training program holds.
//!
//! Invariant: the simulator and the binary run the same `Client` and `Engine`.
#![forbid(unsafe_code)]

mod buffers;
mod client;
mod engine;
mod handle;
mod progress;

pub use client::{Awaited, Client, ClientConfig, Effect, Event};
pub use engine::{Command, Engine};
pub use handle::{FlatView, Worker};
