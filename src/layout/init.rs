//! How a tensor's first values come about: a pure function of the job's seed, the tensor's name and the element's index, so that
//! any number of shards gives the same bits.
//!
//! Invariant: the value of an element never depends on which chunk, shard or thread computes it.

use serde::{Deserialize, Serialize};

/// The rule by which a server fills a tensor before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// All zeros.
    #[default]
    Zeros,
    /// All the same value.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform on ±sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 16).
    XavierUniform,
    /// Normal with standard deviation sqrt(2 / fan_in) (He et al. 2015, equation 10).
    KaimingNormal,
}
