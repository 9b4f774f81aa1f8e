//! GPUs through the CUDA driver: devices, contexts, streams, events, memory and kernels as handles that own what they stand for.
//! The driver is found at run time; where there is none, or no device, every entry says so in words.
//!
//! What touches memory on a stream is `unsafe`: the driver goes on with it after the call has returned. Safe code above this module
//! hands memory over by value and gets it back when an event has happened.
//!
//! Invariant: a handle keeps its context retained; nothing here panics for what a driver or a device does, and every error
//! names the device and the call. A `Drop` reports, and never panics.

mod context;
mod device;
mod driver;
mod memory;
mod module;
mod stream;

pub use context::Context;
pub use device::{DeviceInfo, devices};
pub use driver::{LIBRARY_VARIABLE, driver_version};
pub use memory::{DeviceBuffer, HostPin};
pub use module::{Function, Module};
pub use stream::{Event, Stream};
