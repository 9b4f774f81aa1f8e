//! The step of a whole chunk: spans of different groups, per-chunk norm clipping, and work cut into tiles so that an event loop
//! can poll in between.
//!
//! Invariant: tiles and spans never change a bit; a chunk stepped in tiles of any size equals the chunk stepped at once.
#![forbid(unsafe_code)]

use super::{Gradients, Kernels, LearningRates, OptimizerConfig, Reduction, SpanStep, SquaredNorm, StateMut, Wire};
use crate::{layout::Span, types::Clock};

/// Added to the norm before dividing by it, as in `torch.nn.utils.clip_grad_norm_`.
const NORM_EPSILON: f64 = 1e-6;

/// Which part of the work a [`ChunkStep`] is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// From contributions to new parameters; through the accumulator only if [`ChunkStep::needs_accumulator`].
    Fused,
    /// From contributions to the accumulator.
    Reduce,
    /// From the accumulator to new parameters.
    Apply,
}

/// What is the same for all elements of one chunk's step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepArguments {
    /// Which part of the work to do.
    pub pass: Pass,
    /// The chunk's own step number, counted from 1 (bias corrections).
    pub step: u64,
    /// The clock of the update (schedule, live learning rate).
    pub clock: Clock,
    /// How many workers' gradients the contributions hold together.
    pub total_weight: u32,
    /// Sum or mean.
    pub reduction: Reduction,
    /// A factor on the reduced gradient: 1 / loss scale, or a global clip; 1 for none.
    pub scale: f32,
    /// Whether [`Pass::Reduce`] measures what it reduces: see [`ChunkStep::squared_norm`].
    pub measures: bool,
}

/// The memory and the settings on which a [`ChunkStep`] works. All slices cover the whole chunk, and all but `accumulator` must
/// be the same from the first tile to the last.
pub struct ChunkParts<'a> {
    /// The job's optimizer.
    pub config: &'a OptimizerConfig,
    /// The learning rates.
    pub rates: &'a LearningRates,
    /// The chunk's spans, in order and without gaps.
    pub spans: &'a [Span],
    /// The contributions (`start` is 0 if they hold this chunk alone). Not looked at by [`Pass::Apply`].
    pub gradients: Gradients<'a>,
    /// One f32 an element; may be empty where it is not needed.
    pub accumulator: &'a mut [f32],
    /// The chunk's state. Not looked at by [`Pass::Reduce`].
    pub state: StateMut<'a>,
    /// Where the wire copy goes, if one is wanted now.
    pub wire: Option<Wire<'a>>,
}

/// The factor that brings a gradient of this norm to `limit` at most, as `torch.nn.utils.clip_grad_norm_` computes it, in f64.
/// A norm that is NaN gives NaN, as there.
pub fn clip_coefficient(limit: f32, norm: f64) -> f64 {
    let coefficient = f64::from(limit) / (norm + NORM_EPSILON);
    if coefficient >= 1.0 { 1.0 } else { coefficient }
}

/// What the gradient is multiplied by after the mean, if a chunk whose sum of contributions has this squared norm may have no
/// norm above `limit`. A norm that is NaN gives NaN, as in PyTorch.
///
/// # Panics
///
/// If the total weight is 0.
pub fn clipped_scale(limit: f32, arguments: &StepArguments, squared_norm: f64) -> f32 {
    (f64::from(arguments.scale) * clip_coefficient(limit, scaled_norm(arguments, squared_norm))) as f32
}

/// The norm of the gradient from the squared norm of the sum.
fn scaled_norm(arguments: &StepArguments, squared_norm: f64) -> f64 {
    let factor = f64::from(arguments.reduction.factor(arguments.total_weight)) * f64::from(arguments.scale);
    squared_norm.sqrt() * factor.abs()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Fused,
    /// Into the accumulator, measuring its norm if it is to be clipped afterwards.
    Reduce,
    /// Only the norm of an accumulator that was filled earlier.
    Measure,
    Apply,
    Done,
}

/// One chunk's step, resumable between tiles. Plain data: it borrows nothing while it waits.
#[derive(Clone, Copy, Debug)]
pub struct ChunkStep {
    kernels: Kernels,
    arguments: StepArguments,
    norm_limit: Option<f32>,
    stage: Stage,
    next: usize,
    norm: SquaredNorm,
}

impl ChunkStep {
    /// A step that has not begun.
    pub fn new(kernels: Kernels, config: &OptimizerConfig, arguments: StepArguments) -> ChunkStep {
        let norm_limit = config.clip.per_chunk_norm;
        let stage = match (arguments.pass, norm_limit) {
            (Pass::Fused, None) => Stage::Fused,
            (Pass::Fused, Some(_)) | (Pass::Reduce, _) => Stage::Reduce,
            (Pass::Apply, None) => Stage::Apply,
            (Pass::Apply, Some(_)) => Stage::Measure,
        };
        ChunkStep { kernels, arguments, norm_limit, stage, next: 0, norm: SquaredNorm::default() }
    }

    /// Whether a fused step under this configuration goes through an accumulator (per-chunk norm clipping must see the whole
    /// gradient before it changes a parameter).
    pub fn needs_accumulator(config: &OptimizerConfig) -> bool {
        config.clip.per_chunk_norm.is_some()
    }

    /// Does the next tile of at most `elements_max` elements; true when the work is complete.
    ///
    /// # Panics
    ///
    /// If slices are too short for the chunk, the spans have gaps, or `elements_max` is 0.
    pub fn advance(&mut self, parts: &mut ChunkParts<'_>, elements_max: usize) -> bool {
        assert!(elements_max > 0, "a tile of no elements would never end");
        let elements = parts.spans.last().map_or(0, |span| span.end() as usize);
        let len = elements_max.min(elements - self.next);
        match self.stage {
            Stage::Fused | Stage::Apply => self.step_tile(parts, self.next, len),
            Stage::Reduce => self.reduce_tile(parts, self.next, len),
            Stage::Measure => self.norm.add(&parts.accumulator[self.next..self.next + len]),
            Stage::Done => return true,
        }
        self.next += len;
        if self.next == elements {
            self.next = 0;
            self.stage = match self.stage {
                Stage::Reduce if self.arguments.pass == Pass::Fused => Stage::Apply,
                Stage::Measure => Stage::Apply,
                _ => Stage::Done,
            };
        }
        self.stage == Stage::Done
    }

    /// The norm of the reduced and scaled gradient, before clipping; `None` where it is not measured or not yet complete.
    pub fn norm(&self) -> Option<f64> {
        let is_measured = self.norm_limit.is_some() && self.arguments.pass != Pass::Reduce;
        (is_measured && matches!(self.stage, Stage::Apply | Stage::Done))
            .then(|| scaled_norm(&self.arguments, self.norm.total()))
    }

    /// The squared norm of the sum, if it was to be measured and is complete. Not finite if and only if an element is not: f64
    /// has room for the squares of more f32 values than there are.
    pub fn squared_norm(&self) -> Option<f64> {
        let is_measured = self.arguments.measures && self.arguments.pass == Pass::Reduce && self.stage == Stage::Done;
        is_measured.then(|| self.norm.total())
    }

    fn mean(&self) -> f32 {
        self.arguments.reduction.factor(self.arguments.total_weight)
    }

    fn scale(&self) -> f32 {
        match self.norm_limit {
            Some(limit) if self.norm().is_some() => clipped_scale(limit, &self.arguments, self.norm.total()),
            _ => self.arguments.scale,
        }
    }

    fn reduce_tile(&mut self, parts: &mut ChunkParts<'_>, start: usize, len: usize) {
        let gradients = Gradients { start: parts.gradients.start + start, ..parts.gradients };
        let sums = &mut parts.accumulator[start..start + len];
        self.kernels.reduce(gradients, sums);
        let clips = self.norm_limit.is_some() && self.arguments.pass == Pass::Fused;
        if clips || self.arguments.measures {
            self.norm.add(sums);
        }
    }

    /// Steps elements `[start, start + len)`, span by span. Spans next to each other often share a group, so the last plan is
    /// kept.
    fn step_tile(&self, parts: &mut ChunkParts<'_>, start: usize, len: usize) {
        let (end, scale) = (start + len, self.scale());
        let first = parts.spans.partition_point(|span| span.end() as usize <= start);
        let mut plan: Option<(u16, SpanStep)> = None;
        let mut at = start;
        for span in parts.spans[first..].iter().take_while(|span| (span.start as usize) < end) {
            assert!(span.start as usize <= at, "a gap before element {} of a chunk's spans", span.start);
            let stop = end.min(span.end() as usize);
            let plan = match &plan {
                Some((group, plan)) if *group == span.group => plan,
                _ => &plan.insert((span.group, self.plan(parts, span.group, scale))).1,
            };
            self.step_span(parts, plan, at, stop - at);
            at = stop;
        }
    }

    fn plan(&self, parts: &ChunkParts<'_>, group: u16, scale: f32) -> SpanStep {
        let StepArguments { step, clock, .. } = self.arguments;
        let plan = parts.config.span_step_at(parts.rates, (group, clock), step, self.mean());
        SpanStep { scale, ..plan }
    }

    fn step_span(&self, parts: &mut ChunkParts<'_>, plan: &SpanStep, start: usize, len: usize) {
        let state = parts.state.part(start, len);
        let wire = parts.wire.as_mut().map(|wire| wire.part(start, len));
        if self.stage == Stage::Apply {
            self.kernels.apply(plan, &parts.accumulator[start..start + len], state, wire);
        } else {
            let gradients = Gradients { start: parts.gradients.start + start, ..parts.gradients };
            self.kernels.fused(plan, gradients, state, wire);
        }
    }
}
