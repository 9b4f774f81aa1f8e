//! The scalar oracle: one element at a time, in the plainest form, the arithmetic that every kernel (each CPU instruction set and
//! the GPU) must reproduce bit for bit.
//!
//! The order is fixed: contributions are converted to f32 and summed in rank order; the sum is multiplied by `mean`, then by
//! `scale`, then clipped by value; then the update of [`StepScalars`]; then the wire copy is rounded to nearest even.
//!
//! Invariant: every operation rounds to f32, multiply and add are never contracted, nothing is flushed to zero, infinities and NaN
//! go where IEEE 754 sends them. Shares no arithmetic with the kernels: the conversions are those of the `half` crate.
#![forbid(unsafe_code)]

use half::{bf16, f16};

use super::{SpanStep, StepScalars};
use crate::types::Dtype;

/// Element `index` of a little-endian array in `dtype`, as f32.
pub fn decode(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    let at = index * dtype.size();
    let pair = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
        Dtype::Bf16 => bf16::from_bits(pair(at)).to_f32_const(),
        Dtype::F16 => f16::from_bits(pair(at)).to_f32_const(),
    }
}

/// Writes `value`, rounded to nearest even, as element `index` of a little-endian array in `dtype`.
pub fn encode(dtype: Dtype, value: f32, bytes: &mut [u8], index: usize) {
    let at = index * dtype.size();
    match dtype {
        Dtype::F32 => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        Dtype::Bf16 => bytes[at..at + 2].copy_from_slice(&bf16::from_f32_const(value).to_bits().to_le_bytes()),
        Dtype::F16 => bytes[at..at + 2].copy_from_slice(&f16::from_f32_const(value).to_bits().to_le_bytes()),
    }
}

/// The sum of element `index` over the contributions, in their order; 0 if there are none.
pub fn reduce(dtype: Dtype, contributions: &[&[u8]], index: usize) -> f32 {
    let mut values = contributions.iter().map(|bytes| decode(dtype, bytes, index));
    let first = values.next().unwrap_or(0.0);
    values.fold(first, |sum, value| sum + value)
}

/// The gradient that the update sees, from the sum of the contributions.
pub fn gradient(plan: &SpanStep, sum: f32) -> f32 {
    let mut gradient = sum;
    if plan.mean != 1.0 {
        gradient *= plan.mean;
    }
    if plan.scale != 1.0 {
        gradient *= plan.scale;
    }
    match plan.clip_value {
        Some(limit) if gradient > limit => limit,
        Some(limit) if gradient < -limit => -limit,
        _ => gradient,
    }
}

/// One element's update; `first` and `second` are left alone by kinds that have no such state.
pub fn update(scalars: &StepScalars, gradient: f32, master: &mut f32, first: &mut f32, second: &mut f32) {
    let decay = scalars.decay();
    let g = if decay == 0.0 { gradient } else { gradient + decay * *master };
    match *scalars {
        StepScalars::Sgd { rate, .. } => *master -= rate * g,
        StepScalars::Momentum { rate, momentum, .. } => {
            *first = momentum * *first + g;
            *master -= rate * *first;
        }
        StepScalars::Nesterov { rate, momentum, .. } => {
            *first = momentum * *first + g;
            *master -= rate * (g + momentum * *first);
        }
        StepScalars::Adam { shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon, .. } => {
            *first = beta1 * *first + alpha1 * g;
            *second = beta2 * *second + alpha2 * g * g;
            let denominator = second.sqrt() * root_scale + epsilon;
            *master = shrink * *master - step_size * *first / denominator;
        }
        StepScalars::Adagrad { rate, epsilon, .. } => {
            *first += g * g;
            *master -= rate * g / (first.sqrt() + epsilon);
        }
    }
}
