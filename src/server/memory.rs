//! A shard's memory: master parameters and optimizer state of its chunks, and the computations over them.
//!
//! Invariant: only the shard's own thread holds it; a computation is cut into tiles, and its result does not depend on them.

use std::sync::Arc;

use crate::{
    Result,
    layout::{Layout, Piece, Span},
    mem::{Lease, Region, RegionOptions},
    optim::{
        ChunkParts, ChunkStep, Gradients, Kernels, LearningRates, OptimizerConfig, Pass, Reduction, StateMut,
        StepArguments, Wire,
    },
    types::{ChunkId, Clock, Dtype, ShardId, Version},
};

use super::{Contribution, Task, Work};

/// Elements of a tile: 128 KiB of f32, some tens of microseconds between two polls.
const TILE_ELEMENTS: usize = 32 * 1024;

/// The settings that a shard's memory needs.
#[derive(Clone, Debug)]
pub struct MemoryOptions {
    /// The optimizer that the server runs.
    pub optimizer: OptimizerConfig,
    /// Sum or mean.
    pub reduction: Reduction,
    /// Number format of landed gradients.
    pub gradient_dtype: Dtype,
    /// Number format of the wire copy.
    pub parameter_dtype: Dtype,
    /// Whether reduce and apply are separate.
    pub two_step: bool,
    /// How the state is allocated.
    pub region: RegionOptions,
}

struct ChunkMemory {
    id: ChunkId,
    spans: Vec<Span>,
    master: Lease,
    first: Lease,
    second: Lease,
    accumulator: Lease,
    /// Optimizer steps taken.
    steps: u64,
}

/// The bytes of one chunk's state, as a checkpoint stores them.
#[derive(Clone, Debug, PartialEq)]
pub struct ChunkImage {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Its version.
    pub version: Version,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Parameters.
    pub master: Vec<f32>,
    /// First state slot; empty if the optimizer has none.
    pub first: Vec<f32>,
    /// Second state slot; empty if the optimizer has none.
    pub second: Vec<f32>,
}

/// Where a shard's first values come from.
pub trait InitialValues {
    /// Fills `out` with elements `[start, start + out.len())` of `tensor`.
    fn fill(&self, tensor: &crate::layout::TensorSpec, start: u64, out: &mut [f32]) -> Result<()>;
}

/// The tensors' own rules, under a seed.
#[derive(Clone, Copy, Debug)]
pub struct Seeded(pub u64);

impl InitialValues for Seeded {
    fn fill(&self, tensor: &crate::layout::TensorSpec, start: u64, out: &mut [f32]) -> Result<()> {
        let shape: Vec<usize> = tensor.shape.iter().map(|dimension| *dimension as usize).collect();
        tensor.init.fill(self.0, &tensor.name, &shape, start as usize, out);
        Ok(())
    }
}

/// A computation under way.
#[derive(Debug)]
pub struct Running {
    work: Work,
    step: Option<ChunkStep>,
}

impl Running {
    /// The work, for the shard.
    pub fn into_work(self) -> Work {
        self.work
    }
}

/// Parameters and optimizer state of one shard.
pub struct Memory {
    options: MemoryOptions,
    kernels: Kernels,
    rates: LearningRates,
    layout: Arc<Layout>,
    chunks: Vec<ChunkMemory>,
}

impl AsRef<[u8]> for Contribution {
    fn as_ref(&self) -> &[u8] {
        self.lease.bytes()
    }
}

impl Memory {
    /// Allocates the state of a shard and fills it with its first values.
    pub fn new(
        options: MemoryOptions,
        layout: Arc<Layout>,
        shard: ShardId,
        values: &dyn InitialValues,
    ) -> Result<Memory> {
        let order = &layout.shards[usize::from(shard.0)];
        let slots = options.optimizer.kind.state_slots();
        let accumulates = options.two_step || ChunkStep::needs_accumulator(&options.optimizer);
        let parts = 1 + slots + usize::from(accumulates);
        let elements: usize = order.iter().map(|id| layout.chunk(*id).len as usize).sum();
        let (_, lease) = Region::allocate(elements * 4 * parts, &options.region)?;
        let mut rest = Some(lease);
        let mut chunks = Vec::with_capacity(order.len());
        for id in order {
            let chunk = layout.chunk(*id);
            let mut take = |wanted: bool| {
                let len = if wanted { chunk.len as usize * 4 } else { 0 };
                let (piece, tail) = rest.take().expect("put back below").split_at(len);
                rest = Some(tail);
                piece
            };
            chunks.push(ChunkMemory {
                id: *id,
                spans: chunk.spans.clone(),
                master: take(true),
                first: take(slots >= 1),
                second: take(slots >= 2),
                accumulator: take(accumulates),
                steps: 0,
            });
        }
        let rates = options.optimizer.learning_rates();
        let mut memory = Memory { kernels: Kernels::best(), rates, chunks, layout, options };
        memory.initialise(values)?;
        Ok(memory)
    }

    fn initialise(&mut self, values: &dyn InitialValues) -> Result<()> {
        let start = self.options.optimizer.kind.state_start();
        for chunk in &mut self.chunks {
            for tensor in self.layout.tensors_of(chunk.id) {
                let of_chunk = |piece: &Piece| piece.chunk == chunk.id;
                let piece = self.layout.pieces(tensor).find(of_chunk).expect("tensors_of and pieces agree");
                let range = piece.chunk_start as usize..(piece.chunk_start + piece.len) as usize;
                values.fill(&tensor.spec, piece.tensor_start, &mut floats_mut(&mut chunk.master)[range])?;
            }
            floats_mut(&mut chunk.first).fill(start);
        }
        Ok(())
    }

    /// Puts a chunk back to what a checkpoint holds.
    ///
    /// # Panics
    ///
    /// If the image is of another shape; whoever reads checkpoints has compared the layouts.
    pub fn restore(&mut self, image: &ChunkImage) {
        let index = self.index(image.chunk);
        let chunk = &mut self.chunks[index];
        chunk.steps = image.steps;
        floats_mut(&mut chunk.master).copy_from_slice(&image.master);
        floats_mut(&mut chunk.first).copy_from_slice(&image.first);
        floats_mut(&mut chunk.second).copy_from_slice(&image.second);
    }

    /// Copies of all chunks, in shard order; `versions` come from the shard.
    pub fn images(&self, versions: impl Iterator<Item = (ChunkId, Version)>) -> Vec<ChunkImage> {
        let copy = |lease: &Lease| bytemuck::cast_slice(lease.bytes()).to_vec();
        let chunks = self.chunks.iter().zip(versions);
        chunks
            .map(|(chunk, (id, version))| {
                assert_eq!(id, chunk.id, "shard and memory keep one order");
                ChunkImage {
                    chunk: id,
                    version,
                    steps: chunk.steps,
                    master: copy(&chunk.master),
                    first: copy(&chunk.first),
                    second: copy(&chunk.second),
                }
            })
            .collect()
    }

    /// The learning rates, with the live changes.
    pub fn rates(&self) -> &LearningRates {
        &self.rates
    }

    /// Puts the learning rates back to what a checkpoint holds.
    pub fn restore_rates(&mut self, rates: LearningRates) {
        self.rates = rates;
    }

    /// The default group's learning rate changes from a clock on. No clock before `done` will be stepped any more: rates that
    /// only those would see are forgotten, lest a job that sets the rate at every clock run out of room.
    pub fn set_learning_rate(&mut self, rate: f64, clock: Clock, done: Clock) -> Result<()> {
        if self.chunks.is_empty() {
            return Ok(()); // a shard without chunks steps nothing, and would have nothing to forget by
        }
        self.rates.forget_before(done);
        self.rates.set(rate, clock)
    }

    /// Begins a computation.
    pub fn begin(&mut self, work: Work) -> Running {
        let index = self.index(work.chunk);
        let pass = match work.task {
            Task::Step => Pass::Fused,
            Task::Reduce => Pass::Reduce,
            Task::Apply => Pass::Apply,
            Task::Encode => return Running { work, step: None },
        };
        let arguments = StepArguments {
            pass,
            step: self.chunks[index].steps + 1,
            clock: work.clock,
            total_weight: work.weight,
            reduction: self.options.reduction,
            scale: 1.0,
        };
        let step = ChunkStep::new(self.kernels, &self.options.optimizer, arguments);
        Running { work, step: Some(step) }
    }

    /// Does a tile of a computation; true when it is done.
    pub fn advance(&mut self, running: &mut Running) -> bool {
        let index = self.index(running.work.chunk);
        let chunk = &mut self.chunks[index];
        let Work { task, contributions, wire, .. } = &mut running.work;
        let elements = chunk.spans.last().map_or(0, |span| span.end() as usize);
        let dtype = self.options.parameter_dtype;
        let wire = wire.as_mut().map(|lease| Wire { bytes: &mut lease.bytes_mut()[..elements * dtype.size()], dtype });
        let Some(step) = &mut running.step else {
            self.kernels.encode(floats_mut(&mut chunk.master), wire.expect("an encode has somewhere to go"));
            return true;
        };
        let mut parts = ChunkParts {
            config: &self.options.optimizer,
            rates: &self.rates,
            spans: &chunk.spans,
            gradients: Gradients { dtype: self.options.gradient_dtype, contributions, start: 0 },
            accumulator: floats_mut(&mut chunk.accumulator),
            state: StateMut {
                master: floats_mut(&mut chunk.master),
                first: floats_mut(&mut chunk.first),
                second: floats_mut(&mut chunk.second),
            },
            wire,
        };
        if !step.advance(&mut parts, TILE_ELEMENTS) {
            return false;
        }
        chunk.steps += u64::from(*task != Task::Reduce);
        true
    }

    fn index(&self, id: ChunkId) -> usize {
        self.layout.chunk(id).position as usize
    }
}

fn floats_mut(lease: &mut Lease) -> &mut [f32] {
    bytemuck::cast_slice_mut(lease.bytes_mut())
}

/// Elements of a shard's largest chunk.
pub(super) fn elements_max(layout: &Layout, shard: ShardId) -> usize {
    layout.shards[usize::from(shard.0)].iter().map(|id| layout.chunk(*id).len as usize).max().unwrap_or(0)
}
