//! What a pipeline is made for, what its jobs are told and what they give back, and where a shard's arrays are on the device.
//!
//! Invariant: no two arrays overlap, and each begins at a multiple of [`ALIGNMENT`].
#![forbid(unsafe_code)]

use std::time::Duration;

use super::slot::ALIGNMENT;
use crate::{
    layout::Span,
    mem::{Lease, RegionOptions},
    optim::{LearningRates, OptimizerConfig, StepArguments},
    types::Dtype,
};

/// What a pipeline is made for.
#[derive(Clone, Debug)]
pub struct PipelineOptions {
    /// Elements of each chunk; jobs name chunks by their place here.
    pub chunks: Vec<u32>,
    /// f32 values of state that an element has beside its master value.
    pub state_slots: usize,
    /// Whether there is a sum to be kept between two jobs.
    pub has_accumulator: bool,
    /// Number format of contributions.
    pub gradient_dtype: Dtype,
    /// Number format of the wire copy.
    pub parameter_dtype: Dtype,
    /// Contributions of one job at most.
    pub contributions_max: usize,
    /// Spans of a chunk at most.
    pub spans_max: usize,
    /// How long a job may take before the device counts as hung.
    pub patience: Duration,
    /// How host memory is allocated.
    pub region: RegionOptions,
}

/// What a step is made of, beside the memory.
#[derive(Clone, Copy)]
pub struct ChunkPlan<'a> {
    /// The chunk's spans, in order and without gaps.
    pub spans: &'a [Span],
    /// The job's optimizer.
    pub config: &'a OptimizerConfig,
    /// The learning rates.
    pub rates: &'a LearningRates,
    /// Step, clock, weight and reduction.
    pub arguments: StepArguments,
    /// What the reduced gradient is multiplied by.
    pub scale: f32,
}

/// Where an update's gradient comes from.
#[derive(Debug)]
pub enum Gradient {
    /// Contributions that have landed, in rank order.
    Landed(Vec<Lease>),
    /// The chunk's accumulator.
    Accumulator,
}

/// A job that is done, and what it held.
#[derive(Debug)]
pub struct Done {
    /// Its chunk.
    pub chunk: usize,
    /// The contributions, in the order in which they were given.
    pub contributions: Vec<Lease>,
    /// The wire copy, written.
    pub wire: Option<Lease>,
    /// The squared norm of the accumulator, if the job measured it.
    pub squared_norm: Option<f64>,
    /// Master and state slots, if the job fetched them; a slot that the optimizer does not have is empty.
    pub arrays: Option<[Vec<f32>; 3]>,
}

/// Where a chunk's arrays are on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrays {
    pub elements: u32,
    /// Master, first and second.
    pub state: [u64; 3],
    pub sums: u64,
}

/// The chunks' arrays, one behind the other, counted from 0; and the bytes of all.
pub(super) fn arrange(options: &PipelineOptions) -> (Vec<Arrays>, usize) {
    let mut next = 0usize;
    let mut take = |elements: u32, wanted: bool| {
        let start = next;
        next += if wanted { (elements as usize * 4).next_multiple_of(ALIGNMENT) } else { 0 };
        start as u64
    };
    let chunks = options.chunks.iter().map(|&elements| Arrays {
        elements,
        state: [0, 1, 2].map(|slot| take(elements, slot <= options.state_slots)),
        sums: take(elements, options.has_accumulator),
    });
    let chunks = chunks.collect();
    (chunks, next)
}

impl Arrays {
    /// The same with addresses on the device; 0 for those that there are not.
    pub(super) fn based_at(self, base: u64, options: &PipelineOptions) -> Arrays {
        let mut state = self.state.map(|offset| base + offset);
        state[1 + options.state_slots..].fill(0);
        Arrays { state, sums: if options.has_accumulator { base + self.sums } else { 0 }, ..self }
    }
}
