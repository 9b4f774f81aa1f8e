//! A shard's memory on the processor.
//!
//! Parameters that travel as f32 are sent from where they lie: a step changes them in place once everybody has read them, and leaves them
//! to the readers otherwise, and makes the new ones elsewhere. So nothing is copied for the wire, and a step moves a third less memory.
//!
//! Invariant: a computation is cut into tiles, and its result does not depend on them; what is being copied is not changed before
//! its copy is whole; parameters are not written while anybody may read them.

use super::{ChunkImage, Contribution, InitialValues, Part, Plan, Task, Work};
use crate::{
    Result,
    mem::{Lease, Region, SharedLease},
    optim::{ChunkParts, ChunkStep, Gradients, Kernels, StateMut, Wire},
    types::Dtype,
};

/// Elements of a tile: 128 KiB of f32, some tens of microseconds between two polls.
const TILE_ELEMENTS: usize = 32 * 1024;

struct ChunkMemory {
    elements: usize,
    /// The parameters; replies may be sent from here.
    master: SharedLease,
    first: Lease,
    second: Lease,
    accumulator: Lease,
}

/// A computation under way.
struct Running {
    work: Work,
    step: Option<ChunkStep>,
    stage: Stage,
}

/// How far a computation is.
enum Stage {
    Begins,
    /// The parameters go to another place, since somebody reads them where they are; so many elements are there.
    Moves(usize),
    Computes,
}

pub(super) struct HostMemory {
    kernels: Kernels,
    /// The parameters' first places, where replies are sent from them.
    masters: Option<Region>,
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
        bytemuck::cast_slice(match part {
            Part::Master => &self.master.bytes()[..self.elements * 4],
            Part::First => self.first.bytes(),
            Part::Second => self.second.bytes(),
        })
    }

    /// As [`ChunkMemory::floats`], to be written.
    fn floats_mut(&mut self, part: Part) -> &mut [f32] {
        match part {
            Part::Master => sole_floats(&mut self.master, self.elements),
            Part::First => floats_mut(&mut self.first),
            Part::Second => floats_mut(&mut self.second),
        }
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
        let parts = slots + usize::from(accumulates);
        let len = |id| plan.layout.chunk(id).len as usize;
        let elements: usize = plan.chunks.iter().map(|chunk| len(chunk.id)).sum();
        let is_sent = sends_master(plan);
        let largest = plan.chunks.iter().map(|chunk| len(chunk.id)).max().unwrap_or(0);
        // Places for parameters that are sent are all alike: a step may leave one chunk's to another.
        let place = |elements| if is_sent { 4 * largest } else { 4 * elements };
        let places = plan.chunks.iter().map(|chunk| place(len(chunk.id))).sum();
        let (region, lease) = Region::allocate(places, &options.region)?;
        let mut masters = Some(lease);
        let mut rest = Some(Region::allocate(elements * 4 * parts, &options.region)?.1);
        let mut chunks = Vec::with_capacity(plan.chunks.len());
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let elements = len(chunk.id);
            let array = |wanted: bool| if wanted { 4 * elements } else { 0 };
            let mut memory = ChunkMemory {
                elements,
                master: take(&mut masters, place(elements)).freeze(),
                first: take(&mut rest, array(slots >= 1)),
                second: take(&mut rest, array(slots >= 2)),
                accumulator: take(&mut rest, array(accumulates)),
            };
            plan.initialise(index, values, memory.floats_mut(Part::Master))?;
            floats_mut(&mut memory.first).fill(options.optimizer.kind.state_start());
            chunks.push(memory);
        }
        Ok(HostMemory {
            kernels: Kernels::best(),
            masters: is_sent.then_some(region),
            chunks,
            running: None,
            copying: None,
        })
    }

    /// Where replies are sent from beside the pool.
    pub(super) fn sent_from(&self) -> Option<&Region> {
        self.masters.as_ref()
    }

    pub(super) fn restore(&mut self, index: usize, image: &ChunkImage) {
        let chunk = &mut self.chunks[index];
        chunk.floats_mut(Part::Master).copy_from_slice(&image.master);
        chunk.floats_mut(Part::First).copy_from_slice(&image.first);
        chunk.floats_mut(Part::Second).copy_from_slice(&image.second);
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
        self.running = Some(Running { work, step, stage: Stage::Begins });
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
        if self.claim(plan, &mut running) && self.tile(plan, &mut running) {
            self.publish(plan, &mut running.work);
            running.work.squared_norm = running.step.and_then(|step| step.squared_norm());
            return Some(running.work);
        }
        self.running = Some(running);
        None
    }

    /// Makes the parameters ready to be changed and sent: where they are if nobody reads them, elsewhere otherwise, copied by the tile.
    /// `false` while they are on their way.
    fn claim(&mut self, plan: &Plan, running: &mut Running) -> bool {
        let Running { work, stage, .. } = running;
        let chunk = &mut self.chunks[plan.index(work.chunk)];
        if matches!(stage, Stage::Begins) {
            *stage = Stage::Computes;
            if sends_master(plan) && work.wire.is_some() {
                work.published = None;
                let stays = chunk.master.sole_bytes_mut().is_some();
                if let Some(place) = work.wire.take_if(|_| !stays) {
                    work.before = Some(std::mem::replace(&mut chunk.master, place.freeze()));
                    *stage = Stage::Moves(0);
                }
            }
        }
        if let (Stage::Moves(moved), Some(before)) = (&mut *stage, &work.before) {
            let range = *moved * 4..(*moved + TILE_ELEMENTS).min(chunk.elements) * 4;
            let place = chunk.master.sole_bytes_mut().expect("nobody has been told of it yet");
            place[range.clone()].copy_from_slice(&before.bytes()[range.clone()]);
            *moved = range.end / 4;
            if *moved < chunk.elements {
                return false;
            }
            *stage = Stage::Computes;
        }
        true
    }

    /// What replies are sent from, from here on.
    fn publish(&self, plan: &Plan, work: &mut Work) {
        if !sends_master(plan) {
            return work.publish();
        }
        if work.wire.is_some() || work.before.is_some() {
            work.published = Some(self.chunks[plan.index(work.chunk)].master.clone());
        }
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
        match (&mut work.sum, work.contributions.first()) {
            (Some(sum), _) => {
                let state: &[u8] = bytemuck::cast_slice(chunk.floats(part));
                sum.bytes_mut()[..state.len()].copy_from_slice(state);
            }
            (None, Some(landed)) => {
                let state: &mut [u8] = bytemuck::cast_slice_mut(chunk.floats_mut(part));
                state.copy_from_slice(&landed.lease.bytes()[..state.len()]);
            }
            (None, None) => unreachable!("a copy has another end"),
        }
    }

    fn step_tile(&mut self, plan: &Plan, running: &mut Running) -> bool {
        let Work { task, contributions, wire, chunk: id, .. } = &mut running.work;
        let index = plan.index(*id);
        let chunk = &mut self.chunks[index];
        let spans = &plan.chunks[index].spans;
        let elements = spans.last().map_or(0, |span| span.end() as usize);
        let dtype = plan.options.parameter_dtype;
        let copy = wire.as_mut().filter(|_| !sends_master(plan));
        let wire = copy.map(|lease| Wire { bytes: &mut lease.bytes_mut()[..elements * dtype.size()], dtype });
        let Some(step) = &mut running.step else {
            if let Some(wire) = wire {
                self.kernels.encode(chunk.floats(Part::Master), wire);
            }
            return true;
        };
        let ChunkMemory { master, first, second, accumulator, .. } = chunk;
        let state = match task {
            Task::Reduce => StateMut::default(),
            _ => {
                StateMut { master: sole_floats(master, elements), first: floats_mut(first), second: floats_mut(second) }
            }
        };
        let mut parts = ChunkParts {
            config: &plan.options.optimizer,
            rates: &plan.rates,
            spans,
            gradients: Gradients { dtype: plan.options.gradient_dtype, contributions, start: 0 },
            accumulator: floats_mut(accumulator),
            state,
            wire,
        };
        step.advance(&mut parts, TILE_ELEMENTS)
    }
}

/// Whether replies are sent from where the parameters lie.
fn sends_master(plan: &Plan) -> bool {
    plan.options.parameter_dtype == Dtype::F32 && cfg!(target_endian = "little")
}

/// The next so many bytes.
fn take(from: &mut Option<Lease>, bytes: usize) -> Lease {
    let (piece, rest) = from.take().expect("put back below").split_at(bytes);
    *from = Some(rest);
    piece
}

/// Parameters that nobody else reads.
fn sole_floats(master: &mut SharedLease, elements: usize) -> &mut [f32] {
    let bytes = master.sole_bytes_mut().expect("what others read is not written");
    bytemuck::cast_slice_mut(&mut bytes[..elements * size_of::<f32>()])
}

fn floats_mut(lease: &mut Lease) -> &mut [f32] {
    bytemuck::cast_slice_mut(lease.bytes_mut())
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
