//! The optimizer's kernel over a server's memory, and its ceiling: a plain loop that reads, changes and writes the same arrays.
//!
//! Both are processes of their own and get their memory in the same way, a range of it for each thread. What counts are the bytes
//! that a step must move, whatever it computes: it reads a gradient of each worker, reads and writes the master parameters and
//! each array of state, and writes the copy for the wire ([`Streams::bytes_per_parameter`]).
//!
//! Invariant: the ceiling touches exactly the bytes that the kernel touches, each as often and in the same order of addresses.

use std::sync::Barrier;

use multiversion::multiversion;

use super::{Measured, Pace};
use crate::{
    Error, Result,
    layout::Span,
    mem::{Lease, Region, RegionOptions},
    optim::{
        AHEAD, ChunkParts, ChunkStep, Gradients, Kernels, OptimizerConfig, OptimizerKind, Pass, RUN, Reduction,
        StateMut, StepArguments, Wire, prefetch,
    },
    types::Dtype,
};

/// Elements of a tile, as in a server.
const TILE_ELEMENTS: usize = 32 * 1024;

/// Whose arrays are stepped over, and how many there are.
#[derive(Clone, Debug, PartialEq)]
pub struct Streams {
    /// The optimizer.
    pub kind: OptimizerKind,
    /// Format of the gradients.
    pub gradient_dtype: Dtype,
    /// Format of the copy for the wire, if one is written.
    pub wire_dtype: Option<Dtype>,
    /// Parameters, of all threads together.
    pub elements: u64,
    /// Elements of a chunk.
    pub chunk_elements: u32,
    /// How many workers' gradients are summed.
    pub workers: u16,
    /// Threads, each with a part of the parameters.
    pub threads: u16,
    /// How long.
    pub pace: Pace,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// gradwire's step.
    Kernel,
    /// The plain loop.
    Ceiling,
}

/// One thread's memory.
struct Arrays {
    gradients: Vec<Lease>,
    master: Lease,
    first: Lease,
    second: Lease,
    wire: Lease,
}

impl AsRef<[u8]> for Gradient<'_> {
    fn as_ref(&self) -> &[u8] {
        self.0
    }
}

struct Gradient<'a>(&'a [u8]);

impl Streams {
    /// Bytes that a step moves for each parameter: one gradient of each worker read, the master parameter and each array of state
    /// read and written, the wire copy written. What a cache fetches before it is overwritten is not counted.
    pub fn bytes_per_parameter(&self) -> u64 {
        let state = 1 + self.kind.state_slots() as u64;
        u64::from(self.workers) * self.gradient_dtype.size() as u64 + 8 * state + self.wire_bytes() as u64
    }

    fn wire_bytes(&self) -> usize {
        self.wire_dtype.map_or(0, Dtype::size)
    }

    /// Runs one of the two and says what each thread measured; a round is one step of all parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if there is not enough memory.
    pub fn run(&self, which: Loop) -> Result<Vec<Measured>> {
        let threads = u64::from(self.threads.max(1));
        let barrier = Barrier::new(threads as usize);
        let thread = |number: u64| -> Result<Measured> {
            let elements = (self.elements / threads + u64::from(number < self.elements % threads)) as usize;
            let arrays = Arrays::new(self, elements);
            barrier.wait();
            let (mut arrays, bytes) = (arrays?, elements as u64 * self.bytes_per_parameter());
            match which {
                Loop::Kernel => self.kernel(&mut arrays, elements, bytes),
                Loop::Ceiling => Measured::take(bytes, self.pace, || {
                    self.plain(&mut arrays);
                    Ok(())
                }),
            }
        };
        let parts: Result<Vec<Measured>> = std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|number| scope.spawn(move || thread(number))).collect();
            let lost = |_| Error::JobFailed("a thread of the benchmark panicked".into());
            running.into_iter().map(|thread| thread.join().map_err(lost)?).collect()
        });
        // Each has seen the processor time of all.
        let first_only =
            |(number, part): (usize, Measured)| Measured { cpu_ns: if number == 0 { part.cpu_ns } else { 0 }, ..part };
        Ok(parts?.into_iter().enumerate().map(first_only).collect())
    }

    fn kernel(&self, arrays: &mut Arrays, elements: usize, bytes: u64) -> Result<Measured> {
        let config = OptimizerConfig::new(self.kind, 1e-3);
        let (kernels, rates) = (Kernels::best(), config.learning_rates());
        let mut step = 0;
        Measured::take(bytes, self.pace, || {
            step += 1;
            let arguments = StepArguments {
                pass: Pass::Fused,
                step,
                clock: step,
                total_weight: self.workers.into(),
                reduction: Reduction::Mean,
                scale: 1.0,
                measures: false,
            };
            let chunk = self.chunk_elements as usize;
            for start in (0..elements).step_by(chunk) {
                let len = chunk.min(elements - start);
                let spans = [Span { start: 0, len: len as u32, group: 0 }];
                let size = self.gradient_dtype.size();
                let contributions: Vec<Gradient<'_>> =
                    arrays.gradients.iter().map(|gradient| Gradient(&gradient.bytes()[start * size..])).collect();
                let mut state = StateMut {
                    master: bytemuck::cast_slice_mut(arrays.master.bytes_mut()),
                    first: bytemuck::cast_slice_mut(arrays.first.bytes_mut()),
                    second: bytemuck::cast_slice_mut(arrays.second.bytes_mut()),
                };
                let bytes = arrays.wire.bytes_mut();
                let mut wire = self.wire_dtype.map(|dtype| Wire { bytes, dtype });
                let mut parts = ChunkParts {
                    config: &config,
                    rates: &rates,
                    spans: &spans,
                    gradients: Gradients { dtype: self.gradient_dtype, contributions: &contributions, start: 0 },
                    accumulator: &mut [],
                    state: state.part(start, len),
                    wire: wire.as_mut().map(|wire| wire.part(start, len)),
                };
                let mut step = ChunkStep::new(kernels, &config, arguments);
                while !step.advance(&mut parts, TILE_ELEMENTS) {}
            }
            Ok(())
        })
    }

    fn plain(&self, arrays: &mut Arrays) {
        match (self.gradient_dtype.size(), self.wire_bytes()) {
            (4, 4) => plain_loop::<u32, u32>(arrays),
            (4, 2) => plain_loop::<u32, u16>(arrays),
            (4, _) => plain_loop::<u32, ()>(arrays),
            (_, 4) => plain_loop::<u16, u32>(arrays),
            (_, 2) => plain_loop::<u16, u16>(arrays),
            _ => plain_loop::<u16, ()>(arrays),
        }
    }
}

impl Arrays {
    fn new(streams: &Streams, elements: usize) -> Result<Arrays> {
        let options = RegionOptions { name: "bench".into(), prefault: true, ..RegionOptions::default() };
        let allocate = |bytes: usize| -> Result<Lease> {
            let (_, mut lease) = Region::allocate(bytes.max(1), &options)?;
            // Small numbers in every format, so that no step slows down over denormal ones.
            lease.bytes_mut().chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&[0x80, 0x3a]));
            Ok(lease.split_at(bytes).0)
        };
        let slots = streams.kind.state_slots();
        let size = streams.gradient_dtype.size();
        Ok(Arrays {
            gradients: (0..streams.workers).map(|_| allocate(elements * size)).collect::<Result<_>>()?,
            master: allocate(elements * 4)?,
            first: allocate(if slots > 0 { elements * 4 } else { 0 })?,
            second: allocate(if slots > 1 { elements * 4 } else { 0 })?,
            wire: allocate(elements * streams.wire_bytes())?,
        })
    }
}

/// A number of 2 or 4 bytes that is read into a sum, or written from one.
trait Number: bytemuck::Pod {
    fn widen(self) -> u32;
    fn narrow(sum: u32) -> Self;

    /// The numbers that lie in `bytes`.
    fn all(bytes: &mut [u8], _count: usize) -> &mut [Self] {
        bytemuck::cast_slice_mut(bytes)
    }
}

/// In the place of a copy that is not written.
impl Number for () {
    #[inline(always)]
    fn widen(self) -> u32 {
        0
    }

    #[inline(always)]
    fn narrow(_: u32) {}

    fn all(_: &mut [u8], count: usize) -> &mut [()] {
        // Takes no memory.
        vec![(); count].leak()
    }
}

impl Number for u32 {
    #[inline(always)]
    fn widen(self) -> u32 {
        self
    }

    #[inline(always)]
    fn narrow(sum: u32) -> u32 {
        sum
    }
}

impl Number for u16 {
    #[inline(always)]
    fn widen(self) -> u32 {
        self.into()
    }

    #[inline(always)]
    fn narrow(sum: u32) -> u16 {
        (sum >> 16) as u16
    }
}

/// The plain loop over one thread's memory. Whole numbers: nothing but memory can slow it down.
fn plain_loop<G: Number, W: Number>(arrays: &mut Arrays) {
    let Arrays { gradients, master, first, second, wire } = arrays;
    let master: &mut [u32] = bytemuck::cast_slice_mut(master.bytes_mut());
    let first: &mut [u32] = bytemuck::cast_slice_mut(first.bytes_mut());
    let second: &mut [u32] = bytemuck::cast_slice_mut(second.bytes_mut());
    let wire = W::all(wire.bytes_mut(), master.len());
    let gradients: Vec<&[G]> = gradients.iter().map(|gradient| bytemuck::cast_slice(gradient.bytes())).collect();
    let mut sums = [0u32; RUN];
    for start in (0..master.len()).step_by(RUN) {
        let end = master.len().min(start + RUN);
        let sums = &mut sums[..end - start];
        sums.fill(0);
        for gradient in &gradients {
            ask_for(gradient, start);
            add(sums, &gradient[start..end]);
        }
        for state in [&*master, &*first, &*second] {
            ask_for(state, start);
        }
        ask_for(wire, start);
        let cut = |slot: &[u32]| if slot.is_empty() { 0..0 } else { start..end };
        let (first_range, second_range) = (cut(first), cut(second));
        read_modify_write::<W>(
            sums,
            &mut master[start..end],
            &mut first[first_range],
            &mut second[second_range],
            &mut wire[start..end],
        );
    }
}

/// As the kernel does: without it either of them could be the slower one for no reason but this.
fn ask_for<T: bytemuck::Pod>(array: &[T], start: usize) {
    if !array.is_empty() {
        prefetch::run(bytemuck::cast_slice(array), (start + AHEAD) * size_of::<T>(), RUN * size_of::<T>());
    }
}

#[multiversion(targets = "simd")]
fn add<G: Number>(sums: &mut [u32], gradient: &[G]) {
    for (sum, gradient) in sums.iter_mut().zip(gradient) {
        *sum = sum.wrapping_add(gradient.widen());
    }
}

/// `first` and `second` are as long as `master`, or empty.
#[multiversion(targets = "simd")]
fn read_modify_write<W: Number>(
    gradient: &[u32],
    master: &mut [u32],
    first: &mut [u32],
    second: &mut [u32],
    wire: &mut [W],
) {
    let len = master.len();
    let (gradient, wire) = (&gradient[..len], &mut wire[..len]);
    if first.is_empty() {
        for i in 0..len {
            master[i] = master[i].wrapping_add(gradient[i]);
            wire[i] = W::narrow(master[i]);
        }
        return;
    }
    let first = &mut first[..len];
    if second.is_empty() {
        for i in 0..len {
            let read = gradient[i];
            first[i] = first[i].wrapping_add(read);
            master[i] = master[i].wrapping_add(read);
            wire[i] = W::narrow(master[i]);
        }
        return;
    }
    let second = &mut second[..len];
    for i in 0..len {
        let read = gradient[i];
        first[i] = first[i].wrapping_add(read);
        second[i] = second[i].wrapping_add(read);
        master[i] = master[i].wrapping_add(read);
        wire[i] = W::narrow(master[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(kind: OptimizerKind, dtype: Dtype, workers: u16) -> Streams {
        Streams {
            kind,
            gradient_dtype: dtype,
            wire_dtype: Some(dtype),
            elements: 5000,
            chunk_elements: 1024,
            workers,
            threads: 2,
            pace: Pace::Rounds(5),
        }
    }

    #[test]
    fn a_step_moves_so_many_bytes() {
        let of = |kind, dtype, workers| streams(kind, dtype, workers).bytes_per_parameter();
        assert_eq!(of(OptimizerKind::SGD, Dtype::F32, 1), 4 + 8 + 4);
        assert_eq!(of(OptimizerKind::ADAGRAD, Dtype::F32, 1), 4 + 16 + 4);
        assert_eq!(of(OptimizerKind::ADAMW, Dtype::F32, 1), 4 + 24 + 4);
        assert_eq!(of(OptimizerKind::ADAMW, Dtype::Bf16, 4), 8 + 24 + 2);
        let alone = Streams { wire_dtype: None, ..streams(OptimizerKind::ADAMW, Dtype::F32, 1) };
        assert_eq!(alone.bytes_per_parameter(), 4 + 24);
    }

    #[test]
    fn both_loops_run_over_every_mix_and_count_alike() {
        for kind in [OptimizerKind::SGD, OptimizerKind::ADAGRAD, OptimizerKind::ADAMW] {
            for (dtype, workers) in [(Dtype::F32, 1), (Dtype::Bf16, 3)] {
                let streams = streams(kind, dtype, workers);
                for which in [Loop::Kernel, Loop::Ceiling] {
                    let parts = streams.run(which).unwrap();
                    let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
                    assert_eq!((parts.len(), bytes), (2, 5 * 5000 * streams.bytes_per_parameter()));
                }
            }
        }
    }

    /// The plain loop reads every gradient and changes every array: what it leaves is what adding up by hand gives.
    #[test]
    fn the_plain_loop_touches_every_byte() {
        for workers in [1, 3] {
            let streams = streams(OptimizerKind::ADAMW, Dtype::F32, workers);
            let mut arrays = Arrays::new(&streams, 5000).unwrap();
            let word = u32::from_le_bytes([0x80, 0x3a, 0x80, 0x3a]);
            streams.plain(&mut arrays);
            let wanted = word.wrapping_add(word.wrapping_mul(workers.into()));
            for lease in [&arrays.master, &arrays.first, &arrays.second, &arrays.wire] {
                let words: &[u32] = bytemuck::cast_slice(lease.bytes());
                assert!(words.len() == 5000 && words.iter().all(|found| *found == wanted));
            }
        }
    }
}
