//! Foreign libraries as raw tables of functions, each found at run time, so that one binary runs with or without them.
//!
//! Invariant: declarations and their lookup only; what is done with them is the business of the layers above.

pub mod cuda;
#[cfg(test)]
mod header;
pub mod hwloc;
pub mod kernel;
pub mod verbs;
