//! A shard's memory on the processor.
//!
//! Invariant: a computation is cut into tiles, and its result does not depend on them; what is being copied is not changed before
//! its copy is whole.

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
    copying: Option<Copying>,
}

/// A copy of the state under way. It goes on in tiles while there is nothing else to do, and a chunk that is about to change is
/// copied first.
struct Copying {
    images: Vec<ChunkImage>,
    /// All chunks before this one are copied.
    next: usize,
}

impl ChunkMemory {
    fn floats(&self, part: Part) -> &[f32] {
        let lease = match part {
            Part::Master => &self.master,
            Part::First => &self.first,
            Part::Second => &self.second,
        };
        bytemuck::cast_slice(lease.bytes())
    }

    /// What of this chunk an image does not have yet.
    fn lacks(&self, image: &ChunkImage) -> Option<Part> {
        let parts = [(Part::Master, &image.master), (Part::First, &image.first), (Part::Second, &image.second)];
        parts.into_iter().find(|(part, copy)| copy.len() < self.floats(*part).len()).map(|(part, _)| part)
    }
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
        Ok(HostMemory { kernels: Kernels::best(), chunks, running: None, copying: None })
    }

    pub(super) fn restore(&mut self, index: usize, image: &ChunkImage) {
        let chunk = &mut self.chunks[index];
        floats_mut(&mut chunk.master).copy_from_slice(&image.master);
        floats_mut(&mut chunk.first).copy_from_slice(&image.first);
        floats_mut(&mut chunk.second).copy_from_slice(&image.second);
    }

    /// Parameters and the optimizer's slots of a chunk.
    pub(super) fn arrays(&self, index: usize) -> [&[f32]; 3] {
        [Part::Master, Part::First, Part::Second].map(|part| self.chunks[index].floats(part))
    }

    /// Begins to fill these images, which are all chunks' and empty.
    pub(super) fn begin_images(&mut self, images: Vec<ChunkImage>) {
        assert!(self.running.is_none() && self.copying.is_none(), "the state stands still, and is copied once");
        self.copying = Some(Copying { images, next: 0 });
    }

    pub(super) fn take_images(&mut self) -> Option<Vec<ChunkImage>> {
        let chunks = self.chunks.len();
        self.next_copy();
        self.copying.take_if(|copying| copying.next == chunks).map(|copying| copying.images)
    }

    pub(super) fn has_room(&self) -> bool {
        self.running.is_none()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() && self.copying.is_none()
    }

    pub(super) fn start(&mut self, plan: &Plan, work: Work) {
        assert!(self.has_room(), "one computation at a time");
        let new = |arguments| ChunkStep::new(self.kernels, &plan.options.optimizer, arguments);
        let step = plan.arguments(&work).map(new);
        self.running = Some(Running { work, step });
    }

    /// Does a tile; the work, if that was the last one.
    pub(super) fn advance(&mut self, plan: &Plan) -> Option<Work> {
        let copy = match &self.running {
            Some(Running { work, .. }) if work.task.changes_state() => Some(plan.index(work.chunk)),
            Some(_) => None,
            None => self.next_copy(),
        };
        if copy.is_some_and(|index| self.copy_tile(index)) {
            return None;
        }
        let mut running = self.running.take()?;
        if self.tile(plan, &mut running) {
            running.work.squared_norm = running.step.and_then(|step| step.squared_norm());
            return Some(running.work);
        }
        self.running = Some(running);
        None
    }

    /// The first chunk that is not copied yet.
    fn next_copy(&mut self) -> Option<usize> {
        let Copying { images, next } = self.copying.as_mut()?;
        while images.get(*next).is_some_and(|image| self.chunks[*next].lacks(image).is_none()) {
            *next += 1;
        }
        (*next < images.len()).then_some(*next)
    }

    /// Copies a tile of a chunk, if it is to be copied and not all of it has been.
    fn copy_tile(&mut self, index: usize) -> bool {
        let Some(copying) = &mut self.copying else { return false };
        let chunk = &self.chunks[index];
        let image = &mut copying.images[index];
        let Some(part) = chunk.lacks(image) else { return false };
        let (copy, state) = match part {
            Part::Master => (&mut image.master, chunk.floats(part)),
            Part::First => (&mut image.first, chunk.floats(part)),
            Part::Second => (&mut image.second, chunk.floats(part)),
        };
        copy.reserve_exact(state.len() - copy.len());
        let end = (copy.len() + TILE_ELEMENTS).min(state.len());
        copy.extend_from_slice(&state[copy.len()..end]);
        true
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
