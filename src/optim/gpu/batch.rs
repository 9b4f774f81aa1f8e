//! A batch: the runs of elements that one launch works on, of one chunk or of many, and the launch itself.
//!
//! Invariant: every address that goes into a batch is a multiple of its element's size, which is all that the kernels ask for;
//! runs keep the order in which they were added; nothing is allocated after [`Batch::new`].
#![forbid(unsafe_code)]

use bytemuck::bytes_of;

use super::{
    GpuKernel, Rule,
    table::{Constants, Segment, THREADS, TILE, wire_format},
};
use crate::{
    layout::Span,
    optim::{LearningRates, OptimizerConfig, SpanStep, StepArguments},
    types::Dtype,
};

/// Blocks that a grid has for each multiprocessor at most: more than can be resident at once, so that none idles at the end.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;

/// Where a chunk's arrays begin in device memory; 0 for those that the kernel does not use.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChunkAddresses<'a> {
    /// The contributions in rank order; those that are absent are left out. For the second half of a step in two: `sums` alone.
    pub contributions: &'a [u64],
    /// The accumulator: one f32 an element.
    pub sums: u64,
    /// The parameters, f32.
    pub master: u64,
    /// The first state slot, f32.
    pub first: u64,
    /// The second state slot, f32.
    pub second: u64,
    /// The wire copy, if one is wanted.
    pub wire: Option<(u64, Dtype)>,
    /// Where a norm's partial sums go: one f64 for each [`NORM_TILE`](crate::optim::NORM_TILE) elements, the last of which may be fewer.
    pub partials: u64,
    /// Where a norm (f64) or a count (u64) goes.
    pub result: u64,
}

/// A batch that is full: launch it, clear it, and add the rest to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a batch of at most {segments_max} segments and {contributions_max} contributions is full")]
pub struct ShortTable {
    /// Segments that it was made for.
    pub segments_max: usize,
    /// Contributions of all segments together that it was made for.
    pub contributions_max: usize,
}

/// A launch as a driver wants it: one-dimensional, without dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The name of the kernel's entry.
    pub name: &'static str,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// First parameter (u64): the table's address, a multiple of 16.
    pub table: u64,
    /// Second parameter (u32): segments in the table.
    pub segments: u32,
    /// Third parameter (u32): tiles of all segments together.
    pub tiles: u32,
}

/// Runs of elements for one kernel.
#[derive(Clone, Debug)]
pub struct Batch {
    kernel: GpuKernel,
    /// `contributions` is an index into `addresses` here.
    segments: Vec<Segment>,
    addresses: Vec<u64>,
    limits: ShortTable,
    tiles: u32,
}

impl Batch {
    /// An empty batch that holds as many segments, with as many contributions together, as given.
    pub fn new(kernel: GpuKernel, segments_max: usize, contributions_max: usize) -> Batch {
        Batch {
            kernel,
            segments: Vec::with_capacity(segments_max),
            addresses: Vec::with_capacity(contributions_max),
            limits: ShortTable { segments_max, contributions_max },
            tiles: 0,
        }
    }

    /// Takes everything out, and sets the kernel of what comes next.
    pub fn clear(&mut self, kernel: GpuKernel) {
        self.kernel = kernel;
        self.segments.clear();
        self.addresses.clear();
        self.tiles = 0;
    }

    /// Whether a launch would have nothing to do.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Adds elements `[start, start + len)` of a chunk. `plan` is looked at by [`GpuKernel::Update`] alone.
    ///
    /// # Errors
    ///
    /// [`ShortTable`]; the batch is as it was.
    ///
    /// # Panics
    ///
    /// If `len` is 2^31 or more, an address that the kernel uses is 0 or no multiple of its element's size, an update has no
    /// plan or one of another rule, or an encoding has nowhere to go.
    pub fn push(
        &mut self,
        chunk: &ChunkAddresses<'_>,
        start: u32,
        len: u32,
        plan: Option<&SpanStep>,
    ) -> Result<(), ShortTable> {
        if len == 0 && self.kernel != GpuKernel::FoldNorm {
            return Ok(());
        }
        let contributions: &[u64] = match self.kernel {
            GpuKernel::Update(..) | GpuKernel::Reduce(_) => chunk.contributions,
            _ => &[],
        };
        assert!(len < 1 << 31, "a run of {len} elements: the kernels count in 32 bits");
        let tiles = len.div_ceil(TILE);
        let fits = self.segments.len() < self.limits.segments_max
            && self.addresses.len() + contributions.len() <= self.limits.contributions_max
            && self.tiles.checked_add(tiles).is_some();
        if !fits {
            return Err(self.limits);
        }
        let mut segment = self.arrays(chunk, start, plan);
        segment.contributions = self.addresses.len() as u64;
        segment.count = contributions.len() as u32;
        segment.elements = len;
        segment.first_tile = self.tiles;
        if let GpuKernel::Update(_, dtype) | GpuKernel::Reduce(dtype) = self.kernel {
            let own = |address: &u64| element(*address, start, dtype.size() as u64, "a contribution");
            self.addresses.extend(contributions.iter().map(own));
        }
        self.tiles += tiles;
        self.segments.push(segment);
        Ok(())
    }

    /// Adds a whole chunk, cut where the parameter group changes. `scale` is what the reduced gradient is multiplied by
    /// ([`super::super::clipped_scale`]). Other kernels than updates take the chunk in one piece.
    ///
    /// # Errors
    ///
    /// [`ShortTable`]; the batch is as it was.
    ///
    /// # Panics
    ///
    /// As [`Batch::push`], and if there is no such parameter group.
    pub fn push_chunk(
        &mut self,
        chunk: &ChunkAddresses<'_>,
        spans: &[Span],
        config: &OptimizerConfig,
        rates: &LearningRates,
        arguments: &StepArguments,
        scale: f32,
    ) -> Result<(), ShortTable> {
        let before = (self.segments.len(), self.addresses.len(), self.tiles);
        let mean = arguments.reduction.factor(arguments.total_weight);
        let is_update = matches!(self.kernel, GpuKernel::Update(..));
        for run in spans.chunk_by(|a, b| !is_update || a.group == b.group) {
            let (start, end, group) = (run[0].start, run[run.len() - 1].end(), run[0].group);
            let plan = config.span_step_at(rates, (group, arguments.clock), arguments.step, mean);
            if let Err(full) = self.push(chunk, start, end - start, Some(&SpanStep { scale, ..plan })) {
                self.segments.truncate(before.0);
                self.addresses.truncate(before.1);
                self.tiles = before.2;
                return Err(full);
            }
        }
        Ok(())
    }

    /// The segment's arrays and constants: those that the kernel uses.
    fn arrays(&self, chunk: &ChunkAddresses<'_>, start: u32, plan: Option<&SpanStep>) -> Segment {
        let f32_at = |address, name| element(address, start, 4, name);
        let mut segment = Segment::default();
        let f64_at = |address, name| element(address, 0, 8, name);
        match self.kernel {
            GpuKernel::Update(rule, _) => {
                let plan = plan.expect("an update has a plan");
                assert_eq!(Rule::of_scalars(&plan.scalars), rule, "a plan of another rule than the kernel's");
                segment.constants = Constants::of(plan);
                segment.master = f32_at(chunk.master, "the master values");
                if rule.state_slots() > 0 {
                    segment.first = f32_at(chunk.first, "the first state slot");
                }
                if rule.state_slots() > 1 {
                    segment.second = f32_at(chunk.second, "the second state slot");
                }
            }
            GpuKernel::Encode => {
                assert!(chunk.wire.is_some(), "an encoding without a wire copy");
                segment.master = f32_at(chunk.master, "the master values");
            }
            GpuKernel::Reduce(_) => segment.sums = f32_at(chunk.sums, "the accumulator"),
            GpuKernel::SquaredNorm => {
                segment.sums = f32_at(chunk.sums, "the accumulator");
                segment.first = f64_at(chunk.partials, "the partial sums");
            }
            GpuKernel::FoldNorm => {
                segment.first = f64_at(chunk.partials, "the partial sums");
                segment.result = f64_at(chunk.result, "the result");
            }
            GpuKernel::CountNonFinite => {
                segment.sums = f32_at(chunk.sums, "the accumulator");
                segment.result = f64_at(chunk.result, "the result");
            }
        }
        if let (GpuKernel::Update(..) | GpuKernel::Encode, Some((address, dtype))) = (self.kernel, chunk.wire) {
            segment.wire = element(address, start, dtype.size() as u64, "the wire copy");
            segment.wire_format = wire_format(dtype);
        }
        segment
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> usize {
        self.segments.len() * size_of::<Segment>() + self.addresses.len() * 8
    }

    /// Bytes of the largest table that this batch can have.
    pub fn table_len_max(&self) -> usize {
        self.limits.segments_max * size_of::<Segment>() + self.limits.contributions_max * 8
    }

    /// Writes the table, which is the same wherever in device memory it will lie.
    ///
    /// # Panics
    ///
    /// If `out` is not [`Batch::table_len`] long.
    pub fn write_table(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.table_len(), "a table of another length");
        let (segments, addresses) = out.split_at_mut(self.segments.len() * size_of::<Segment>());
        let base = segments.len() as u64;
        for (out, segment) in segments.chunks_exact_mut(size_of::<Segment>()).zip(&self.segments) {
            out.copy_from_slice(bytes_of(&Segment { contributions: base + segment.contributions * 8, ..*segment }));
        }
        for (out, address) in addresses.chunks_exact_mut(8).zip(&self.addresses) {
            out.copy_from_slice(&address.to_le_bytes());
        }
    }

    /// The launch, for a table at this address and a card with so many multiprocessors.
    ///
    /// # Panics
    ///
    /// If the batch is empty, or the address is no multiple of 16.
    pub fn launch(&self, table: u64, multiprocessors: u32) -> Launch {
        assert!(!self.is_empty(), "a launch of nothing");
        assert!(table.is_multiple_of(16), "the table's address {table:#x} is no multiple of 16");
        let segments = self.segments.len() as u32;
        let wanted = match self.kernel {
            GpuKernel::SquaredNorm => self.tiles.div_ceil(THREADS / 32),
            GpuKernel::FoldNorm => segments,
            _ => self.tiles,
        };
        Launch {
            name: self.kernel.name(),
            grid: wanted.min(multiprocessors.saturating_mul(BLOCKS_PER_MULTIPROCESSOR)).max(1),
            block: THREADS,
            table,
            segments,
            tiles: self.tiles,
        }
    }
}

/// The address of element `start` of an array.
fn element(address: u64, start: u32, size: u64, what: &str) -> u64 {
    assert!(address != 0 && address.is_multiple_of(size), "{what} at {address:#x}, which is no multiple of {size}");
    address + u64::from(start) * size
}
