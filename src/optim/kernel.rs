//! The production kernels: one body for every instruction set, working through a span in blocks that stay in the first-level
//! cache, so that each gradient, state and wire byte crosses the memory bus once.
//!
//! Invariant: equal to [`super::oracle`] bit for bit on every instruction set; [`Kernels::fused`] is [`Kernels::reduce`] followed
//! by [`Kernels::apply`]; nothing is allocated.
#![forbid(unsafe_code)]

use super::{
    Isa, SpanStep, StepScalars,
    convert::{decode_bf16, decode_f16, decode_f32, encode_bf16, encode_f16, encode_f32},
    isa::Work,
};
use crate::types::Dtype;

/// Elements of a block: 4 KiB of gradient; with master and two states 16 KiB of the 32 KiB that first-level caches have at least.
const BLOCK: usize = 1024;

/// The gradients of one chunk that are to be summed, in rank order.
pub trait Contributions {
    /// How many there are.
    fn count(&self) -> usize;
    /// The little-endian bytes of contribution `index`, from the chunk's first element on.
    fn bytes(&self, index: usize) -> &[u8];
}

impl<B: AsRef<[u8]>> Contributions for &[B] {
    fn count(&self) -> usize {
        self.len()
    }

    fn bytes(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

impl<B: AsRef<[u8]>> Contributions for Vec<B> {
    fn count(&self) -> usize {
        self.len()
    }

    fn bytes(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

/// Contributions, their number format, and where in them to begin.
#[derive(Clone, Copy)]
pub struct Gradients<'a> {
    /// Number format of all of them.
    pub dtype: Dtype,
    /// The gradients in rank order.
    pub contributions: &'a dyn Contributions,
    /// The element of each contribution that belongs to element 0 of the other arguments.
    pub start: usize,
}

/// The f32 state of a run of elements: three slices of one length, except that slots which the kind does not have
/// ([`super::OptimizerKind::state_slots`]) are not looked at and may be empty.
#[derive(Debug, Default)]
pub struct StateMut<'a> {
    /// The parameters.
    pub master: &'a mut [f32],
    /// Velocity (momentum), first moment (Adam) or sum of squares (Adagrad).
    pub first: &'a mut [f32],
    /// Second moment (Adam).
    pub second: &'a mut [f32],
}

impl StateMut<'_> {
    /// The state of elements `[start, start + len)`. Slots that are empty stay empty.
    pub fn part(&mut self, start: usize, len: usize) -> StateMut<'_> {
        fn cut(slot: &mut [f32], start: usize, len: usize) -> &mut [f32] {
            if slot.is_empty() { slot } else { &mut slot[start..start + len] }
        }
        StateMut {
            master: &mut self.master[start..start + len],
            first: cut(self.first, start, len),
            second: cut(self.second, start, len),
        }
    }
}

/// Where the copy of the new parameters for the wire goes.
#[derive(Debug)]
pub struct Wire<'a> {
    /// As many elements as the state has, little-endian; any alignment.
    pub bytes: &'a mut [u8],
    /// Number format of the copy.
    pub dtype: Dtype,
}

impl Wire<'_> {
    /// The copy of elements `[start, start + len)`.
    pub fn part(&mut self, start: usize, len: usize) -> Wire<'_> {
        let size = self.dtype.size();
        Wire { bytes: &mut self.bytes[start * size..(start + len) * size], dtype: self.dtype }
    }
}

/// The kernels as compiled for one instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Default for Kernels {
    fn default() -> Kernels {
        Kernels::best()
    }
}

impl Kernels {
    /// For the widest instruction set of this machine.
    pub fn best() -> Kernels {
        Kernels { isa: Isa::best() }
    }

    /// For a given instruction set.
    pub fn on(isa: Isa) -> Kernels {
        Kernels { isa }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Writes the sum of the contributions into `accumulator` (zeros if there are none).
    ///
    /// # Panics
    ///
    /// If a contribution is shorter than `start` + the accumulator.
    pub fn reduce(&self, gradients: Gradients<'_>, accumulator: &mut [f32]) {
        self.isa.run(Reduce { gradients, accumulator });
    }

    /// Takes the step on gradients that have been summed: updates the state and, where asked, writes the copy for the wire.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn apply(&self, plan: &SpanStep, accumulator: &[f32], state: StateMut<'_>, wire: Option<Wire<'_>>) {
        assert_eq!(accumulator.len(), state.master.len(), "a sum and a state of different lengths");
        self.isa.run(Step { plan, source: Source::Sum(accumulator), state, wire });
    }

    /// [`Kernels::reduce`] and [`Kernels::apply`] in one pass over memory, without an accumulator.
    ///
    /// # Panics
    ///
    /// As those two.
    pub fn fused(&self, plan: &SpanStep, gradients: Gradients<'_>, state: StateMut<'_>, wire: Option<Wire<'_>>) {
        self.isa.run(Step { plan, source: Source::Gradients(gradients), state, wire });
    }

    /// Writes the copy for the wire of parameters that have not changed (the first pull, a late reply).
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn encode(&self, master: &[f32], wire: Wire<'_>) {
        self.isa.run(Encode { master, wire });
    }
}

struct Reduce<'a> {
    gradients: Gradients<'a>,
    accumulator: &'a mut [f32],
}

impl Work for Reduce<'_> {
    #[inline(always)]
    fn run(self) {
        // Block by block, so that the sums stay in cache however many contributions there are.
        for (i, block) in self.accumulator.chunks_mut(BLOCK).enumerate() {
            sum(&self.gradients, i * BLOCK, block);
        }
    }
}

struct Encode<'a> {
    master: &'a [f32],
    wire: Wire<'a>,
}

impl Work for Encode<'_> {
    #[inline(always)]
    fn run(self) {
        encode_block(self.wire.dtype, self.master, self.wire.bytes);
    }
}

enum Source<'a> {
    Sum(&'a [f32]),
    Gradients(Gradients<'a>),
}

struct Step<'a> {
    plan: &'a SpanStep,
    source: Source<'a>,
    state: StateMut<'a>,
    wire: Option<Wire<'a>>,
}

impl Work for Step<'_> {
    #[inline(always)]
    fn run(mut self) {
        let mut buffer = [0f32; BLOCK];
        let elements = self.state.master.len();
        if let Some(wire) = &self.wire {
            assert_eq!(wire.bytes.len(), elements * wire.dtype.size(), "a wire copy and a state of different lengths");
        }
        for start in (0..elements).step_by(BLOCK) {
            let len = BLOCK.min(elements - start);
            let gradient = &mut buffer[..len];
            match &self.source {
                Source::Sum(accumulator) => gradient.copy_from_slice(&accumulator[start..start + len]),
                Source::Gradients(gradients) => sum(gradients, start, gradient),
            }
            let state = self.state.part(start, len);
            prepare(self.plan, gradient, state.master);
            update(&self.plan.scalars, gradient, state.master, state.first, state.second);
            if let Some(wire) = &mut self.wire {
                let part = wire.part(start, len);
                encode_block(part.dtype, &self.state.master[start..start + len], part.bytes);
            }
        }
    }
}

/// Sums a block: elements `[start, start + block.len())`, counted from the gradients' own start.
#[inline(always)]
fn sum(gradients: &Gradients<'_>, start: usize, block: &mut [f32]) {
    let size = gradients.dtype.size();
    let range = (gradients.start + start) * size..(gradients.start + start + block.len()) * size;
    let contributions = gradients.contributions;
    if contributions.count() == 0 {
        block.fill(0.0);
    }
    for index in 0..contributions.count() {
        let bytes = &contributions.bytes(index)[range.clone()];
        match gradients.dtype {
            Dtype::F32 => gather(bytes, block, index == 0, decode_f32),
            Dtype::Bf16 => gather(bytes, block, index == 0, decode_bf16),
            Dtype::F16 => gather(bytes, block, index == 0, decode_f16),
        }
    }
}

#[inline(always)]
fn gather<const N: usize>(bytes: &[u8], block: &mut [f32], is_first: bool, decode: impl Fn([u8; N]) -> f32) {
    let elements = bytes.as_chunks::<N>().0.iter().map(|bytes| decode(*bytes));
    if is_first {
        for (sum, value) in block.iter_mut().zip(elements) {
            *sum = value;
        }
    } else {
        for (sum, value) in block.iter_mut().zip(elements) {
            *sum += value;
        }
    }
}

/// Mean, scale, clip and coupled weight decay, each a pass over the block in cache and left out where it would change nothing.
#[inline(always)]
fn prepare(plan: &SpanStep, gradient: &mut [f32], master: &[f32]) {
    for factor in [plan.mean, plan.scale] {
        if factor != 1.0 {
            for g in gradient.iter_mut() {
                *g *= factor;
            }
        }
    }
    if let Some(limit) = plan.clip_value {
        // Two comparisons that are false for NaN, so that NaN stays.
        for g in gradient.iter_mut() {
            let below = if *g > limit { limit } else { *g };
            *g = if below < -limit { -limit } else { below };
        }
    }
    let decay = plan.scalars.decay();
    if decay != 0.0 {
        for (g, p) in gradient.iter_mut().zip(master) {
            *g += decay * *p;
        }
    }
}

/// The update itself, on a gradient that already holds the coupled weight decay.
#[inline(always)]
fn update(scalars: &StepScalars, gradient: &[f32], master: &mut [f32], first: &mut [f32], second: &mut [f32]) {
    let steps = master.iter_mut().zip(gradient);
    match *scalars {
        StepScalars::Sgd { rate, .. } => {
            for (p, g) in steps {
                *p -= rate * *g;
            }
        }
        StepScalars::Momentum { rate, momentum, .. } => {
            assert_eq!(first.len(), gradient.len(), "no state for the velocity");
            for ((p, g), a) in steps.zip(first) {
                *a = momentum * *a + *g;
                *p -= rate * *a;
            }
        }
        StepScalars::Nesterov { rate, momentum, .. } => {
            assert_eq!(first.len(), gradient.len(), "no state for the velocity");
            for ((p, g), a) in steps.zip(first) {
                *a = momentum * *a + *g;
                *p -= rate * (*g + momentum * *a);
            }
        }
        StepScalars::Adam { shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon, .. } => {
            assert!(first.len() == gradient.len() && second.len() == gradient.len(), "no state for the moments");
            for (((p, g), a), b) in steps.zip(first).zip(second) {
                *a = beta1 * *a + alpha1 * *g;
                *b = beta2 * *b + alpha2 * *g * *g;
                *p = shrink * *p - step_size * *a / (b.sqrt() * root_scale + epsilon);
            }
        }
        StepScalars::Adagrad { rate, epsilon, .. } => {
            assert_eq!(first.len(), gradient.len(), "no state for the sum of squares");
            for ((p, g), a) in steps.zip(first) {
                *a += *g * *g;
                *p -= rate * *g / (a.sqrt() + epsilon);
            }
        }
    }
}

#[inline(always)]
fn encode_block(dtype: Dtype, master: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), master.len() * dtype.size(), "a wire copy and a state of different lengths");
    match dtype {
        Dtype::F32 => scatter(master, bytes, encode_f32),
        Dtype::Bf16 => scatter(master, bytes, encode_bf16),
        Dtype::F16 => scatter(master, bytes, encode_f16),
    }
}

#[inline(always)]
fn scatter<const N: usize>(master: &[f32], bytes: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    let elements = bytes.as_chunks_mut::<N>().0;
    for (bytes, value) in elements.iter_mut().zip(master) {
        *bytes = encode(*value);
    }
}
