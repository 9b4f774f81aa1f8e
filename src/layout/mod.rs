//! How a model lies in the servers: tensors in one flat space, cut into chunks, dealt to shards. Pure; server, worker and
//! checkpoint share it.
//!
//! Invariant: the layout is a function of the declarations and the job's settings alone; every rank computes the same one.
#![forbid(unsafe_code)]

mod init;
mod philox;
mod span;

pub use init::Init;
pub use span::Span;
