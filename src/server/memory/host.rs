//! A shard's memory on the processor.
//!
//! Invariant: a computation is cut into tiles, and its result does not depend on them.

use super::{ChunkImage, Contribution, InitialValues, Part, Plan, Task, Work};
use crate::{
    Result,
    mem::{Lease, Region},
    optim::{ChunkParts, ChunkStep, Gradients, Kernels, StateMut, Wire},
};

/// Elements of a tile: 128 KiB of f32, some tens of microseconds between two polls.
const TILE_ELEMENTS: usize = 32 * 1024;

struct ChunkMemory {
    master: Lease,
    first: Lease,
    second: Lease,
    accumulator: Lease,
}

/// A computation under way.
struct Running {
    work: Work,
    step: Option<ChunkStep>,
}

pub(super) struct HostMemory {
    kernels: Kernels,
    chunks: Vec<ChunkMemory>,
    running: Option<Running>,
    images: Option<Vec<ChunkImage>>,
}

impl AsRef<[u8]> for Contribution {
    fn as_ref(&self) -> &[u8] {
        self.lease.bytes()
    }
}

impl HostMemory {
    pub(super) fn new(plan: &Plan, values: &dyn InitialValues) -> Result<HostMemory> {
        let options = &plan.options;
        let slots = options.optimizer.kind.state_slots();
        let accumulates = options.two_step || ChunkStep::needs_accumulator(&options.optimizer);
        let parts = 1 + slots + usize::from(accumulates);
        let len = |id| plan.layout.chunk(id).len as usize;
        let elements: usize = plan.chunks.iter().map(|chunk| len(chunk.id)).sum();
        let (_, lease) = Region::allocate(elements * 4 * parts, &options.region)?;
        let mut rest = Some(lease);
        let mut chunks = Vec::with_capacity(plan.chunks.len());
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let mut take = |wanted: bool| {
                let len = if wanted { len(chunk.id) * 4 } else { 0 };
                let (piece, tail) = rest.take().expect("put back below").split_at(len);
                rest = Some(tail);
                piece
            };
            let mut memory = ChunkMemory {
                master: take(true),
                first: take(slots >= 1),
                second: take(slots >= 2),
                accumulator: take(accumulates),
            };
            plan.initialise(index, values, floats_mut(&mut memory.master))?;
            floats_mut(&mut memory.first).fill(options.optimizer.kind.state_start());
            chunks.push(memory);
        }
        Ok(HostMemory { kernels: Kernels::best(), chunks, running: None, images: None })
    }

    pub(super) fn restore(&mut self, index: usize, image: &ChunkImage) {
        let chunk = &mut self.chunks[index];
        floats_mut(&mut chunk.master).copy_from_slice(&image.master);
        floats_mut(&mut chunk.first).copy_from_slice(&image.first);
        floats_mut(&mut chunk.second).copy_from_slice(&image.second);
    }

    /// Fills these images, which are all chunks'.
    pub(super) fn copy(&mut self, mut images: Vec<ChunkImage>) {
        let copy = |lease: &Lease| bytemuck::cast_slice(lease.bytes()).to_vec();
        for (image, chunk) in images.iter_mut().zip(&self.chunks) {
            (image.master, image.first, image.second) = (copy(&chunk.master), copy(&chunk.first), copy(&chunk.second));
        }
        self.images = Some(images);
    }

    pub(super) fn take_images(&mut self) -> Option<Vec<ChunkImage>> {
        self.images.take()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none()
    }

    pub(super) fn start(&mut self, plan: &Plan, work: Work) {
        assert!(self.is_idle(), "one computation at a time");
        let new = |arguments| ChunkStep::new(self.kernels, &plan.options.optimizer, arguments);
        let step = plan.arguments(&work).map(new);
        self.running = Some(Running { work, step });
    }

    /// Does a tile; the work, if that was the last one.
    pub(super) fn advance(&mut self, plan: &Plan) -> Option<Work> {
        let mut running = self.running.take()?;
        if self.tile(plan, &mut running) {
            running.work.squared_norm = running.step.and_then(|step| step.squared_norm());
            return Some(running.work);
        }
        self.running = Some(running);
        None
    }

    fn tile(&mut self, plan: &Plan, running: &mut Running) -> bool {
        if let Task::CopyOut(part) | Task::CopyIn(part) = running.work.task {
            self.copy_part(plan, part, &mut running.work);
            return true;
        }
        let ended = self.step_tile(plan, running);
        let Work { task, sum, chunk, .. } = &mut running.work;
        if ended
            && *task == Task::Reduce
            && let Some(sum) = sum
        {
            let accumulator = &self.chunks[plan.index(*chunk)].accumulator;
            sum.bytes_mut()[..accumulator.len()].copy_from_slice(accumulator.bytes());
        }
        ended
    }

    /// A part of a chunk's state goes to `sum`, or comes from the one contribution.
    fn copy_part(&mut self, plan: &Plan, part: Part, work: &mut Work) {
        let chunk = &mut self.chunks[plan.index(work.chunk)];
        let state = match part {
            Part::Master => &mut chunk.master,
            Part::First => &mut chunk.first,
            Part::Second => &mut chunk.second,
        };
        let len = state.len();
        match (&mut work.sum, work.contributions.first()) {
            (Some(sum), _) => sum.bytes_mut()[..len].copy_from_slice(state.bytes()),
            (None, Some(landed)) => state.bytes_mut().copy_from_slice(&landed.lease.bytes()[..len]),
            (None, None) => unreachable!("a copy has another end"),
        }
    }

    fn step_tile(&mut self, plan: &Plan, running: &mut Running) -> bool {
        let Work { contributions, wire, chunk: id, .. } = &mut running.work;
        let index = plan.index(*id);
        let chunk = &mut self.chunks[index];
        let spans = &plan.chunks[index].spans;
        let elements = spans.last().map_or(0, |span| span.end() as usize);
        let dtype = plan.options.parameter_dtype;
        let wire = wire.as_mut().map(|lease| Wire { bytes: &mut lease.bytes_mut()[..elements * dtype.size()], dtype });
        let Some(step) = &mut running.step else {
            self.kernels.encode(floats_mut(&mut chunk.master), wire.expect("an encode has somewhere to go"));
            return true;
        };
        let mut parts = ChunkParts {
            config: &plan.options.optimizer,
            rates: &plan.rates,
            spans,
            gradients: Gradients { dtype: plan.options.gradient_dtype, contributions, start: 0 },
            accumulator: floats_mut(&mut chunk.accumulator),
            state: StateMut {
                master: floats_mut(&mut chunk.master),
                first: floats_mut(&mut chunk.first),
                second: floats_mut(&mut chunk.second),
            },
            wire,
        };
        step.advance(&mut parts, TILE_ELEMENTS)
    }
}

fn floats_mut(lease: &mut Lease) -> &mut [f32] {
    bytemuck::cast_slice_mut(lease.bytes_mut())
}
