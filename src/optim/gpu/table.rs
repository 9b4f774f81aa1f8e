//! A segment: one run of elements in the table that a launch reads.
//!
//! Invariant: field for field `Segment` of kernels/table.h, 128 bytes, little-endian as every card is.
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

use super::super::{NORM_TILE, SpanStep, StepScalars};
use crate::types::Dtype;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Elements that a block takes at a time; of a norm, a warp.
pub(super) const TILE: u32 = THREADS * 8;
const _: () = assert!(TILE as usize == NORM_TILE);

/// Addresses are those of the run's own first element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub(super) struct Segment {
    /// Where the addresses of the contributions are, in bytes from the table's start.
    pub(super) contributions: u64,
    pub(super) sums: u64,
    pub(super) master: u64,
    /// Of a norm: where its tiles' sums are.
    pub(super) first: u64,
    pub(super) second: u64,
    pub(super) wire: u64,
    pub(super) result: u64,
    pub(super) elements: u32,
    /// Tiles of all segments before this one.
    pub(super) first_tile: u32,
    /// Contributions.
    pub(super) count: u32,
    pub(super) wire_format: u32,
    pub(super) constants: Constants,
}

/// What is the same for all elements of a segment. A rule leaves alone what it does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Constants {
    mean: f32,
    scale: f32,
    /// Infinity if nothing is clipped.
    clip: f32,
    rate: f32,
    decay: f32,
    momentum: f32,
    shrink: f32,
    beta1: f32,
    alpha1: f32,
    beta2: f32,
    alpha2: f32,
    step_size: f32,
    root_scale: f32,
    epsilon: f32,
}

const _: () = assert!(size_of::<Segment>() == 128 && size_of::<Constants>() == 56 && cfg!(target_endian = "little"));

impl Constants {
    pub(super) fn of(plan: &SpanStep) -> Constants {
        let common = Constants {
            mean: plan.mean,
            scale: plan.scale,
            clip: plan.clip_value.unwrap_or(f32::INFINITY),
            decay: plan.scalars.decay(),
            ..Constants::default()
        };
        match plan.scalars {
            StepScalars::Sgd { rate, .. } => Constants { rate, ..common },
            StepScalars::Momentum { rate, momentum, .. } | StepScalars::Nesterov { rate, momentum, .. } => {
                Constants { rate, momentum, ..common }
            }
            StepScalars::Adam { decay: _, shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon } => {
                Constants { shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon, ..common }
            }
            StepScalars::Adagrad { rate, epsilon, .. } => Constants { rate, epsilon, ..common },
        }
    }
}

/// `WireFormat` of kernels/table.h, where 0 is none.
pub(super) fn wire_format(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 1,
        Dtype::Bf16 => 2,
        Dtype::F16 => 3,
    }
}
