//! Tests of the optimizers: kernels against the oracle, the oracle against the published formulas, settings and rates.
//!
//! Invariant: the expected values come from the oracle, from f64 arithmetic written out anew, or from paper; never from the
//! code under test.
#![forbid(unsafe_code)]

mod chunk;
mod config;
mod formula;
mod kernel;
mod schedule;
