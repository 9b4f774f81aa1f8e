//! The production kernels: one body for every instruction set, working through a span in short runs, so that
//! each gradient, state and wire byte crosses the memory bus once.
//!
//! In a run all arrays advance together, and the processor is asked for what the runs ahead will touch. (Blocks of 1024 elements,
//! one array after the other, reached 0.7 to 0.9 of a plain loop: bursts of 4 KiB upset the processor's own prefetching.)
//!
//! Invariant: equal to [`super::oracle`] bit for bit on every instruction set; [`Kernels::fused`] is [`Kernels::reduce`] followed
//! by [`Kernels::apply`]; nothing is allocated.
#![forbid(unsafe_code)]

use super::{
    Isa, SpanStep,
    convert::{decode_bf16, decode_f16, decode_f32, encode_bf16, encode_f16, encode_f32},
    isa::Work,
    prefetch, update,
};
use crate::types::Dtype;

/// Elements of a run: few enough that no array gets far ahead of another.
pub const RUN: usize = 128;

/// How many elements ahead of a run its memory is asked for.
pub const AHEAD: usize = 512;

/// Of how many contributions the bytes are looked up once a call instead of once a run.
const KNOWN: usize = 16;

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
        self.step(plan, Summands::summed(accumulator), state, wire);
    }

    /// [`Kernels::reduce`] and [`Kernels::apply`] in one pass over memory, without an accumulator.
    ///
    /// # Panics
    ///
    /// As those two.
    pub fn fused(&self, plan: &SpanStep, gradients: Gradients<'_>, state: StateMut<'_>, wire: Option<Wire<'_>>) {
        self.step(plan, Summands::of(&gradients), state, wire);
    }

    fn step(&self, plan: &SpanStep, source: Summands<'_>, state: StateMut<'_>, wire: Option<Wire<'_>>) {
        if let Some(wire) = &wire {
            let wanted = state.master.len() * wire.dtype.size();
            assert_eq!(wire.bytes.len(), wanted, "a wire copy and a state of different lengths");
        }
        self.isa.run(Step { plan, source, state, wire });
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
        let source = Summands::of(&self.gradients);
        let elements = self.accumulator.len();
        for start in (0..elements).step_by(RUN) {
            let len = RUN.min(elements - start);
            ask_for(self.accumulator, start);
            source.sum(start, &mut self.accumulator[start..start + len]);
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
        let Encode { master, wire: Wire { bytes, dtype } } = self;
        assert_eq!(bytes.len(), master.len() * dtype.size(), "a wire copy and a state of different lengths");
        match dtype {
            Dtype::F32 => scatter(master, bytes, encode_f32),
            Dtype::Bf16 => scatter(master, bytes, encode_bf16),
            Dtype::F16 => scatter(master, bytes, encode_f16),
        }
    }
}

struct Step<'a> {
    plan: &'a SpanStep,
    source: Summands<'a>,
    state: StateMut<'a>,
    wire: Option<Wire<'a>>,
}

impl Work for Step<'_> {
    #[inline(always)]
    fn run(mut self) {
        let mut buffer = [0f32; RUN];
        let elements = self.state.master.len();
        for start in (0..elements).step_by(RUN) {
            let len = RUN.min(elements - start);
            let gradient = self.source.summed_run(start, &mut buffer[..len]);
            ask_for(self.state.master, start);
            ask_for(self.state.first, start);
            ask_for(self.state.second, start);
            let state = self.state.part(start, len);
            let Some(wire) = &mut self.wire else {
                update::run(self.plan, gradient, state, &mut [(); RUN], |_| ());
                continue;
            };
            let size = wire.dtype.size();
            prefetch::run(wire.bytes, (start + AHEAD) * size, RUN * size);
            let bytes = &mut wire.bytes[start * size..(start + len) * size];
            match wire.dtype {
                Dtype::F32 => update::run(self.plan, gradient, state, bytes.as_chunks_mut().0, encode_f32),
                Dtype::Bf16 => update::run(self.plan, gradient, state, bytes.as_chunks_mut().0, encode_bf16),
                Dtype::F16 => update::run(self.plan, gradient, state, bytes.as_chunks_mut().0, encode_f16),
            }
        }
    }
}

/// Asks for what a later run will touch of an array.
#[inline(always)]
fn ask_for(array: &[f32], start: usize) {
    if !array.is_empty() {
        prefetch::run(bytemuck::cast_slice(array), (start + AHEAD) * size_of::<f32>(), RUN * size_of::<f32>());
    }
}

/// What is summed, with the bytes of the first contributions at hand.
struct Summands<'a> {
    known: [&'a [u8]; KNOWN],
    all: Option<&'a dyn Contributions>,
    count: usize,
    dtype: Dtype,
    start: usize,
}

impl<'a> Summands<'a> {
    #[inline(always)]
    fn of(gradients: &Gradients<'a>) -> Summands<'a> {
        let mut known = [&[][..]; KNOWN];
        let count = gradients.contributions.count();
        for (index, bytes) in known.iter_mut().enumerate().take(count) {
            *bytes = gradients.contributions.bytes(index);
        }
        Summands { known, all: Some(gradients.contributions), count, dtype: gradients.dtype, start: gradients.start }
    }

    /// A sum by itself.
    #[inline(always)]
    fn summed(accumulator: &'a [f32]) -> Summands<'a> {
        let mut known = [&[][..]; KNOWN];
        known[0] = bytemuck::cast_slice(accumulator);
        Summands { known, all: None, count: 1, dtype: Dtype::F32, start: 0 }
    }

    /// The sum of a run, made in `buffer`; a single gradient whose bytes are f32 as this machine has them is its own sum.
    #[inline(always)]
    fn summed_run<'b>(&'b self, start: usize, buffer: &'b mut [f32]) -> &'b [f32] {
        if self.count == 1 && self.dtype == Dtype::F32 && cfg!(target_endian = "little") {
            let from = (self.start + start) * size_of::<f32>();
            let bytes = &self.known[0][from..from + size_of_val(buffer)];
            if let Ok(run) = bytemuck::try_cast_slice(bytes) {
                prefetch::run(self.known[0], from + AHEAD * size_of::<f32>(), RUN * size_of::<f32>());
                return run;
            }
        }
        self.sum(start, buffer);
        buffer
    }

    /// Sums a run: elements `[start, start + run.len())`, counted from the gradients' own start.
    #[inline(always)]
    fn sum(&self, start: usize, run: &mut [f32]) {
        if self.count == 0 {
            run.fill(0.0);
        }
        let size = self.dtype.size();
        let from = (self.start + start) * size;
        for index in 0..self.count {
            let all = match self.all {
                Some(contributions) if index >= KNOWN => contributions.bytes(index),
                _ => self.known[index],
            };
            prefetch::run(all, from + AHEAD * size, RUN * size);
            let bytes = &all[from..from + run.len() * size];
            match self.dtype {
                Dtype::F32 => gather(bytes, run, index == 0, decode_f32),
                Dtype::Bf16 => gather(bytes, run, index == 0, decode_bf16),
                Dtype::F16 => gather(bytes, run, index == 0, decode_f16),
            }
        }
    }
}

#[inline(always)]
fn gather<const N: usize>(bytes: &[u8], run: &mut [f32], is_first: bool, decode: impl Fn([u8; N]) -> f32) {
    let elements = bytes.as_chunks::<N>().0.iter().map(|bytes| decode(*bytes));
    if is_first {
        for (sum, value) in run.iter_mut().zip(elements) {
            *sum = value;
        }
    } else {
        for (sum, value) in run.iter_mut().zip(elements) {
            *sum += value;
        }
    }
}

#[inline(always)]
fn scatter<const N: usize>(master: &[f32], bytes: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    let elements = bytes.as_chunks_mut::<N>().0;
    for (bytes, value) in elements.iter_mut().zip(master) {
        *bytes = encode(*value);
    }
}
