//! A shard's memory: master parameters and optimizer state of its chunks, and the computations over them, on the processor or on
//! a GPU.
//!
//! Invariant: only the shard's own thread holds it; nothing here waits for a device; where it computes does not change a bit.

mod device;
mod host;

use std::{collections::VecDeque, sync::Arc};

use half::{bf16, f16};

use crate::{
    Result,
    cuda::Context,
    layout::{Layout, Piece, Span, TensorSpec},
    mem::{Lease, Region, RegionOptions},
    optim::{LearningRates, OptimizerConfig, Pass, Reduction, StepArguments},
    transport::{Waiter, Wakeup},
    types::{ChunkId, Clock, Dtype, ShardId, Version},
};

use super::{Contribution, Part, Task, Work};
use device::DeviceMemory;
use host::HostMemory;

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
    /// Whether the norm of what is reduced is needed.
    pub measures: bool,
    /// How the state is allocated.
    pub region: RegionOptions,
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

/// A chunk's state where it lies.
#[derive(Clone, Copy, Debug)]
pub struct ChunkView<'a> {
    /// Clocks that are in it.
    pub clock: Clock,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Parameters, and the optimizer's slots, which are empty if it has none.
    pub arrays: [&'a [f32]; 3],
}

impl ChunkView<'_> {
    /// Whether steps and all bits of both are the same.
    pub fn is_same(&self, other: &ChunkView<'_>) -> bool {
        let pairs = || self.arrays.into_iter().zip(other.arrays);
        let bits = |(one, two): (&[f32], &[f32])| {
            one.len() == two.len() && one.iter().zip(two).all(|(one, two)| one.to_bits() == two.to_bits())
        };
        self.steps == other.steps && pairs().all(bits)
    }
}

/// A gradient that is not finite: whose it is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// At which clock.
    pub clock: Clock,
    /// Whose gradient; `None` if each worker's is finite and their sum is not.
    pub worker: Option<u16>,
    /// In which tensor it was met first.
    pub tensor: String,
}

/// Where a shard's first values come from.
pub trait InitialValues {
    /// Fills `out` with elements `[start, start + out.len())` of `tensor`.
    fn fill(&self, tensor: &TensorSpec, start: u64, out: &mut [f32]) -> Result<()>;
}

/// The tensors' own rules, under a seed.
#[derive(Clone, Copy, Debug)]
pub struct Seeded(pub u64);

impl InitialValues for Seeded {
    fn fill(&self, tensor: &TensorSpec, start: u64, out: &mut [f32]) -> Result<()> {
        let shape: Vec<usize> = tensor.shape.iter().map(|dimension| *dimension as usize).collect();
        tensor.init.fill(self.0, &tensor.name, &shape, start as usize, out);
        Ok(())
    }
}

/// The GPU of a shard.
#[derive(Clone, Debug)]
pub struct OnDevice {
    /// The device.
    pub context: Context,
    /// How many workers may contribute to a step.
    pub workers: u16,
    /// How long a step may take before the device counts as hung.
    pub patience: std::time::Duration,
    /// Whether a NIC may be given its memory.
    pub direct: bool,
}

/// Parameters and optimizer state of one shard.
pub struct Memory {
    plan: Plan,
    place: Place,
    not_finite: VecDeque<NotFinite>,
}

/// Where the state is.
enum Place {
    Host(Box<HostMemory>),
    Device(Box<DeviceMemory>),
}

/// What computations go by, wherever they run.
struct Plan {
    options: MemoryOptions,
    rates: LearningRates,
    layout: Arc<Layout>,
    chunks: Vec<ChunkPlan>,
}

struct ChunkPlan {
    id: ChunkId,
    spans: Vec<Span>,
    /// Optimizer steps taken.
    steps: u64,
}

impl Memory {
    /// Allocates the state of a shard, on the processor or on a GPU, and fills it with its first values.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Gpu`] if the device cannot hold the state; what [`Region::allocate`] and `values` fail with.
    pub fn new(
        options: MemoryOptions,
        layout: Arc<Layout>,
        shard: ShardId,
        values: &dyn InitialValues,
        device: Option<OnDevice>,
    ) -> Result<Memory> {
        let order = &layout.shards[usize::from(shard.0)];
        let chunk = |id: &ChunkId| ChunkPlan { id: *id, spans: layout.chunk(*id).spans.clone(), steps: 0 };
        let chunks = order.iter().map(chunk).collect();
        let rates = options.optimizer.learning_rates();
        let plan = Plan { options, rates, chunks, layout };
        let place = match device {
            None => Place::Host(Box::new(HostMemory::new(&plan, values)?)),
            Some(device) => Place::Device(Box::new(DeviceMemory::new(&plan, values, &device)?)),
        };
        Ok(Memory { plan, place, not_finite: VecDeque::new() })
    }

    /// A region out of which contributions and wire copies will come: a GPU has it page-locked.
    pub fn adopt(&mut self, region: &Region) -> Result<()> {
        match &mut self.place {
            Place::Host(_) => Ok(()),
            Place::Device(device) => device.adopt(region),
        }
    }

    /// The region of the parameters where replies are sent from there: a transport must have it as well as the pool, which then needs
    /// one place a chunk, for a step whose parameters are still being read.
    pub fn sent_from(&self) -> Option<&Region> {
        match &self.place {
            Place::Host(host) => host.sent_from(),
            Place::Device(_) => None,
        }
    }

    /// Memory of the shard's GPU that a NIC may be given, for contributions to land in and wire copies to leave from; `None` where
    /// the processor computes, or the GPU is to keep its memory to itself.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Gpu`] if the device has not so much left.
    pub fn shared(&self, bytes: usize) -> Result<Option<(Region, Lease)>> {
        match &self.place {
            Place::Host(_) => Ok(None),
            Place::Device(device) => device.shared(bytes),
        }
    }

    /// Puts a chunk back to what a checkpoint holds.
    ///
    /// # Panics
    ///
    /// If the image is of another shape; whoever reads checkpoints has compared the layouts.
    pub fn restore(&mut self, image: &ChunkImage) -> Result<()> {
        let index = self.plan.index(image.chunk);
        self.plan.chunks[index].steps = image.steps;
        match &mut self.place {
            Place::Host(host) => host.restore(index, image),
            Place::Device(device) => return device.restore(index, image),
        }
        Ok(())
    }

    /// Begins to copy all chunks as they are now, in shard order, into `spare`, whatever is in there; `versions` come from the shard.
    /// Computations may be started meanwhile: of what they change the copy is made first.
    ///
    /// # Panics
    ///
    /// If something is being computed, or copied already.
    pub fn begin_images(
        &mut self,
        versions: impl Iterator<Item = (ChunkId, Version)>,
        spare: Vec<ChunkImage>,
    ) -> Result<()> {
        let chunks = self.plan.chunks.iter().zip(versions);
        let mut spare = spare.into_iter();
        let empty = chunks.map(|(chunk, (id, version))| {
            assert_eq!(id, chunk.id, "shard and memory keep one order");
            let used = spare.next().map(|image| [image.master, image.first, image.second]).unwrap_or_default();
            let [master, first, second] = used.map(|mut array| {
                array.clear();
                array
            });
            ChunkImage { chunk: id, version, steps: chunk.steps, master, first, second }
        });
        let empty = empty.collect();
        match &mut self.place {
            Place::Host(host) => host.begin_images(empty),
            Place::Device(device) => return device.begin_images(empty),
        }
        Ok(())
    }

    /// The copies that were begun, once all of them are there.
    pub fn take_images(&mut self) -> Option<Vec<ChunkImage>> {
        match &mut self.place {
            Place::Host(host) => host.take_images(),
            Place::Device(device) => device.take_images(),
        }
    }

    /// Copies all chunks and waits for them; for the end of a job.
    pub fn images(&mut self, versions: impl Iterator<Item = (ChunkId, Version)>) -> Result<Vec<ChunkImage>> {
        self.begin_images(versions, Vec::new())?;
        let waiter = Waiter::new()?;
        loop {
            let finished = self.advance()?;
            assert!(finished.is_none(), "nothing is computed while the state is copied");
            if let Some(images) = self.take_images() {
                return Ok(images);
            }
            if let Some(device) = self.wakeup() {
                waiter.wait(&mut [device], None)?;
            }
        }
    }

    /// A chunk's state where it lies, of a shard that has so many clocks of it; `None` while something is computed, or on a GPU.
    pub fn view(&self, chunk: ChunkId, clock: Clock) -> Option<ChunkView<'_>> {
        let Place::Host(host) = &self.place else { return None };
        let index = self.plan.index(chunk);
        let (steps, arrays) = (self.plan.chunks[index].steps, host.arrays(index));
        host.has_room().then_some(ChunkView { clock, steps, arrays })
    }

    /// The learning rates, with the live changes.
    pub fn rates(&self) -> &LearningRates {
        &self.plan.rates
    }

    /// Puts the learning rates back to what a checkpoint holds.
    pub fn restore_rates(&mut self, rates: LearningRates) {
        self.plan.rates = rates;
    }

    /// The default group's learning rate changes from a clock on. No clock before `done` will be stepped any more: rates that
    /// only those would see are forgotten, lest a job that sets the rate at every clock run out of room.
    pub fn set_learning_rate(&mut self, rate: f64, clock: Clock, done: Clock) -> Result<()> {
        if self.plan.chunks.is_empty() {
            return Ok(()); // a shard without chunks steps nothing, and would have nothing to forget by
        }
        self.plan.rates.forget_before(done);
        self.plan.rates.set(rate, clock)
    }

    /// The weight decay changes from a clock on; otherwise as [`Memory::set_learning_rate`].
    pub fn set_weight_decay(&mut self, decay: f64, clock: Clock, done: Clock) -> Result<()> {
        if self.plan.chunks.is_empty() {
            return Ok(());
        }
        self.plan.rates.forget_before(done);
        self.plan.rates.set_weight_decay(decay, clock)
    }

    /// From here on contributions come in another number format: a backup takes in sums, and what it takes over, gradients.
    pub fn expect_gradients(&mut self, dtype: Dtype) {
        self.plan.options.gradient_dtype = dtype;
    }

    /// Whether a computation may be started.
    pub fn has_room(&self) -> bool {
        match &self.place {
            Place::Host(host) => host.has_room(),
            Place::Device(device) => device.has_room(),
        }
    }

    /// Whether nothing is being computed or copied.
    pub fn is_idle(&self) -> bool {
        match &self.place {
            Place::Host(host) => host.is_idle(),
            Place::Device(device) => device.is_idle(),
        }
    }

    /// Whether [`Memory::advance`] has something to compute or to copy by itself now.
    pub fn is_busy(&self) -> bool {
        matches!(&self.place, Place::Host(host) if !host.is_idle())
    }

    /// Starts a computation.
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn start(&mut self, work: Work) -> Result<()> {
        match &mut self.place {
            Place::Host(host) => host.start(&self.plan, work),
            Place::Device(device) => return device.start(&self.plan, work),
        }
        Ok(())
    }

    /// A computation that has ended. On the processor this does a tile of the one that was started.
    pub fn advance(&mut self) -> Result<Option<Work>> {
        let mut finished = match &mut self.place {
            Place::Host(host) => host.advance(&self.plan),
            Place::Device(device) => device.advance(&self.plan)?.map(|mut work| {
                work.publish();
                work
            }),
        };
        if let Some(work) = &mut finished {
            if let Some(sum) = work.squared_norm {
                let mean = f64::from(self.plan.options.reduction.factor(work.weight));
                work.squared_norm = Some(sum * (mean * mean));
                // Squares of f32 never overflow an f64: an element is not finite.
                if !sum.is_finite() {
                    self.not_finite.push_back(self.plan.blame(work, &self.place)?);
                }
            }
            let index = self.plan.index(work.chunk);
            let steps = &mut self.plan.chunks[index].steps;
            match work.task {
                Task::Step | Task::Apply => *steps += 1,
                Task::CopyOut(_) => work.steps = *steps,
                Task::CopyIn(_) => *steps = work.steps,
                Task::Reduce | Task::Encode => {}
            }
        }
        Ok(finished)
    }

    /// The oldest find of a gradient that is not finite, which nobody has taken; looked for only where norms are measured.
    pub fn take_not_finite(&mut self) -> Option<NotFinite> {
        self.not_finite.pop_front()
    }

    /// What wakes a sleeping thread when a computation has ended elsewhere.
    pub fn wakeup(&mut self) -> Option<&mut dyn Wakeup> {
        match &mut self.place {
            Place::Host(_) => None,
            Place::Device(device) => Some(&mut **device),
        }
    }
}

impl Place {
    /// The bytes of a lease, wherever they are; for what happens seldom.
    fn read(&self, lease: &Lease, bytes: usize) -> Result<Vec<u8>> {
        match self {
            Place::Host(_) => Ok(lease.bytes()[..bytes].to_vec()),
            Place::Device(device) => device.read(lease, bytes),
        }
    }
}

impl Plan {
    fn index(&self, id: ChunkId) -> usize {
        self.layout.chunk(id).position as usize
    }

    /// The numbers of a computation; a wire copy by itself has none.
    fn arguments(&self, work: &Work) -> Option<StepArguments> {
        let pass = match work.task {
            Task::Step => Pass::Fused,
            Task::Reduce => Pass::Reduce,
            Task::Apply => Pass::Apply,
            Task::Encode | Task::CopyOut(_) | Task::CopyIn(_) => return None,
        };
        Some(StepArguments {
            pass,
            step: self.chunks[self.index(work.chunk)].steps + 1,
            clock: work.clock,
            total_weight: work.weight,
            reduction: self.options.reduction,
            scale: work.scale,
            measures: self.options.measures,
        })
    }

    /// Whose gradient made a chunk's sum not finite, and in which tensor.
    fn blame(&self, work: &Work, place: &Place) -> Result<NotFinite> {
        let dtype = self.options.gradient_dtype;
        let elements = self.layout.chunk(work.chunk).len as usize;
        let is_wrong = |bytes: &[u8]| match dtype {
            Dtype::F32 => !bytemuck::pod_read_unaligned::<f32>(bytes).is_finite(),
            Dtype::Bf16 => !bytemuck::pod_read_unaligned::<bf16>(bytes).is_finite(),
            Dtype::F16 => !bytemuck::pod_read_unaligned::<f16>(bytes).is_finite(),
        };
        let mut found = None;
        for Contribution { worker, lease, .. } in &work.contributions {
            let bytes = place.read(lease, elements * dtype.size())?;
            if let Some(element) = bytes.chunks_exact(dtype.size()).position(is_wrong) {
                found = Some((*worker, element as u32));
                break;
            }
        }
        let element = found.map_or(0, |(_, element)| element);
        let mut tensors = self.layout.tensors_of(work.chunk).filter(|tensor| {
            let mut pieces = self.layout.pieces(tensor).filter(|piece| piece.chunk == work.chunk);
            pieces.any(|piece| (piece.chunk_start..piece.chunk_start + piece.len).contains(&element))
        });
        let tensor = tensors.next().map(|tensor| tensor.spec.name.clone()).unwrap_or_default();
        Ok(NotFinite { clock: work.clock, worker: found.map(|(worker, _)| worker), tensor })
    }

    /// First values of a chunk's parameters.
    fn initialise(&self, index: usize, values: &dyn InitialValues, master: &mut [f32]) -> Result<()> {
        let id = self.chunks[index].id;
        for tensor in self.layout.tensors_of(id) {
            let of_chunk = |piece: &Piece| piece.chunk == id;
            let piece = self.layout.pieces(tensor).find(of_chunk).expect("tensors_of and pieces agree");
            let range = piece.chunk_start as usize..(piece.chunk_start + piece.len) as usize;
            values.fill(&tensor.spec, piece.tensor_start, &mut master[range])?;
        }
        Ok(())
    }
}

/// Elements of a shard's largest chunk.
pub(super) fn elements_max(layout: &Layout, shard: ShardId) -> usize {
    layout.shards[usize::from(shard.0)].iter().map(|id| layout.chunk(*id).len as usize).max().unwrap_or(0)
}
