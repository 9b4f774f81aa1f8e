//! The optimizer at work on a device: a shard's state in the device's memory, and jobs over its chunks, each on its slot's own
//! stream, so that the copies of one job and the kernels of another overlap.
//!
//! A job copies contributions and the launch's table from page-locked host memory into its slot, runs its kernels, and copies the
//! wire copy back into a lease of the caller's. A contribution that a NIC has written into the device is read where it lies, and a
//! wire copy that is to leave from the device is written there. The host waits for none of it: it asks for the oldest job's last
//! event, and while it sleeps a descriptor tells it.
//!
//! Invariant: a lease goes in by value and comes back after the last event of its job; jobs are told in the order in which they
//! were begun, and those of one chunk are done in it; addresses that reach a kernel are those of this pipeline's own memory, or of
//! a lease that its job holds.

use std::{
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{
    Batch, ChunkAddresses, ChunkPlan, Done, GpuKernel, Gradient, PTX, PipelineOptions, Rule,
    job::{Arrays, arrange},
    slot::{Held, LAUNCHES_MAX, Slot, SlotShape},
};
use crate::{
    Error, Result,
    cuda::{Context, DeviceBuffer, Function, Module, Stream},
    mem::{Lease, PinnedRegion, Region, RegionOptions},
    types::Dtype,
};

/// Jobs under way at once: one that is copied in, one in the kernels, one that is copied out, and one that waits for its turn, so
/// that none idles while the host looks. Staging is this times (workers x the largest chunk's gradient + its wire copy).
const DEPTH: usize = 4;

/// A context that has failed writes no wake-ups, so it is asked now and then.
const PROBE_EVERY: Duration = Duration::from_millis(50);

/// One shard's state on a device, and its jobs.
pub struct Pipeline {
    context: Context,
    options: PipelineOptions,
    shape: SlotShape,
    functions: Vec<(GpuKernel, Function)>,
    /// One for each launch of a job, used again and again.
    batches: [Batch; LAUNCHES_MAX],
    chunks: Vec<Arrays>,
    slots: Vec<Slot>,
    /// Wakes the sleeper, apart from the jobs: a host's function holds up what comes behind it on its stream.
    waking: Stream,
    /// The slot of the oldest job, and the number of jobs under way.
    oldest: usize,
    flying: usize,
    event: ManuallyDrop<EventFd>,
    memory: ManuallyDrop<PipelineMemory>,
    /// Whether the device must be told to finish what a NIC has written, before a kernel reads it.
    needs_flush: bool,
    /// The device hangs: nothing that waits for it is called any more.
    is_hung: bool,
}

/// What copies and kernels work on.
struct PipelineMemory {
    pinned: Vec<PinnedRegion>,
    _state: DeviceBuffer,
    _staging: DeviceBuffer,
}

impl Pipeline {
    /// Allocates everything that the pipeline will ever use, and compiles the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] naming the device and the call, above all where the device has not enough memory.
    pub fn new(context: &Context, options: PipelineOptions) -> Result<Pipeline> {
        let shape = SlotShape::new(&options);
        let (chunks, state_bytes) = arrange(&options);
        let state = DeviceBuffer::allocate(context, state_bytes)?;
        let chunks = chunks.into_iter().map(|arrays| arrays.based_at(state.address(), &options)).collect();
        let staging = DeviceBuffer::allocate(context, DEPTH * shape.device_bytes())?;
        let region = RegionOptions { name: format!("{}-bounce", options.region.name), ..options.region.clone() };
        let (bounce, lease) = Region::allocate(DEPTH * shape.host_bytes(), &region)?;
        let pinned = bounce.pin(context)?;
        let pieces = lease.chunks(shape.host_bytes()).into_iter().take(DEPTH).enumerate();
        let slots = pieces.map(|(index, piece)| {
            let device = staging.address() + (index * shape.device_bytes()) as u64;
            Slot::new(context, &shape, device, piece)
        });
        let slots = slots.collect::<Result<Vec<Slot>>>()?;
        let module = Module::load(context, PTX)?;
        let functions = GpuKernel::all().map(|kernel| Ok((kernel, module.function(kernel.name())?)));
        let batch =
            || Batch::new(GpuKernel::Encode, options.spans_max, options.spans_max * options.contributions_max.max(1));
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| Error::os("eventfd", "a GPU's completions", error))?;
        Ok(Pipeline {
            functions: functions.collect::<Result<_>>()?,
            batches: std::array::from_fn(|_| batch()),
            chunks,
            slots,
            waking: Stream::new(context)?,
            oldest: 0,
            flying: 0,
            event: ManuallyDrop::new(event),
            memory: ManuallyDrop::new(PipelineMemory { pinned: vec![pinned], _state: state, _staging: staging }),
            needs_flush: context.needs_flush()?,
            is_hung: false,
            context: context.clone(),
            options,
            shape,
        })
    }

    /// The device.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Page-locks a region of which leases will come, so that their copies go on without the processor.
    ///
    /// # Errors
    ///
    /// As [`Region::pin`].
    pub fn pin(&mut self, region: &Region) -> Result<()> {
        self.memory.pinned.push(region.pin(&self.context)?);
        Ok(())
    }

    /// Memory of the device that a NIC may be given, of which leases for contributions and wire copies will come.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device has not so much left.
    pub fn shared(&self, bytes: usize) -> Result<(Region, Lease)> {
        Region::on_device(DeviceBuffer::exportable(&self.context, bytes)?)
    }

    /// The bytes of a lease, copied if they lie on the device, and waited for; not for the data path.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    ///
    /// # Panics
    ///
    /// If the lease is shorter than `bytes`.
    pub fn read(&self, lease: &Lease, bytes: usize) -> Result<Vec<u8>> {
        assert!(lease.len() >= bytes, "{bytes} bytes of a lease of {}", lease.len());
        let Some(address) = lease.device_address() else { return Ok(lease.bytes()[..bytes].to_vec()) };
        let mut copy = vec![0; bytes];
        // SAFETY: the copy is as long, and is not touched before the stream is done.
        unsafe { self.waking.copy_to_host(std::ptr::NonNull::from(&mut copy[..]).cast(), address, bytes) }?;
        self.waking.synchronize()?;
        Ok(copy)
    }

    /// Whether another job may begin.
    pub fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// How many jobs may begin.
    pub fn room(&self) -> usize {
        DEPTH - self.flying
    }

    /// Whether no job is under way.
    pub fn is_idle(&self) -> bool {
        self.flying == 0
    }

    /// Begins a step: from the gradient to new parameters and state and, if there is a lease for it, the wire copy.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`]; then the pipeline is of no more use, and keeps what it holds.
    ///
    /// # Panics
    ///
    /// Here and below: if there is no room, there is no such chunk, a lease is too short, or the job is none of those that the
    /// options were made for.
    pub fn update(
        &mut self,
        chunk: usize,
        plan: &ChunkPlan<'_>,
        gradient: Gradient,
        wire: Option<Lease>,
    ) -> Result<()> {
        let rule = Rule::of(&plan.config.kind);
        let (kernel, contributions) = match gradient {
            Gradient::Landed(leases) => (GpuKernel::Update(rule, self.options.gradient_dtype), leases),
            Gradient::Accumulator => (GpuKernel::Update(rule, Dtype::F32), Vec::new()),
        };
        self.begin(chunk, contributions, wire, &[kernel], Some(plan))
    }

    /// Begins a sum of contributions into the chunk's accumulator, whose norm is measured if asked for. Errors as
    /// [`Pipeline::update`].
    pub fn reduce(&mut self, chunk: usize, contributions: Vec<Lease>, measure: bool) -> Result<()> {
        let reduce = GpuKernel::Reduce(self.options.gradient_dtype);
        let kernels = [reduce, GpuKernel::SquaredNorm, GpuKernel::FoldNorm];
        self.begin(chunk, contributions, None, if measure { &kernels } else { &kernels[..1] }, None)
    }

    /// Begins a measurement of the accumulator's norm. Errors as [`Pipeline::update`].
    pub fn measure(&mut self, chunk: usize) -> Result<()> {
        self.begin(chunk, Vec::new(), None, &[GpuKernel::SquaredNorm, GpuKernel::FoldNorm], None)
    }

    /// Begins a wire copy of the present parameters. Errors as [`Pipeline::update`].
    pub fn encode(&mut self, chunk: usize, wire: Lease) -> Result<()> {
        self.begin(chunk, Vec::new(), Some(wire), &[GpuKernel::Encode], None)
    }

    /// Begins to fetch the chunk's parameters and state. Errors as [`Pipeline::update`].
    pub fn fetch(&mut self, chunk: usize) -> Result<()> {
        self.begin(chunk, Vec::new(), None, &[], None)
    }

    /// Sets the chunk's parameters and state, and waits for it; for the start of a job alone.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    ///
    /// # Panics
    ///
    /// If jobs are under way, or an array has another length than the chunk.
    pub fn store(&mut self, chunk: usize, arrays: [&[f32]; 3]) -> Result<()> {
        assert!(self.is_idle(), "state is set before jobs begin");
        let slot = &mut self.slots[self.oldest];
        let target = &self.chunks[chunk];
        let bounce = slot.bounce.arrays.bytes_mut().chunks_exact_mut(self.shape.array);
        for ((values, address), bounce) in arrays[..=self.options.state_slots].iter().zip(target.state).zip(bounce) {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            assert_eq!(values.len(), target.elements as usize, "an array of another chunk");
            let bounce = &mut bounce[..bytes.len()];
            bounce.copy_from_slice(bytes);
            let start = std::ptr::NonNull::from(bounce).cast();
            // SAFETY: the bounce memory is this pipeline's, and is not touched before `synchronize` below; the array is as long.
            unsafe { slot.stream.copy_to_device(address, start, bytes.len()) }?;
        }
        slot.stream.synchronize()
    }

    /// The oldest job, if it is done.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device has failed, or the job has taken longer than the options' patience.
    pub fn poll(&mut self) -> Result<Option<Done>> {
        if self.flying == 0 {
            return Ok(None);
        }
        let slot = &mut self.slots[self.oldest];
        if !slot.done.has_happened()? {
            let taken = slot.held.as_ref().map_or(Duration::ZERO, |held| held.since.elapsed());
            self.is_hung = taken > self.options.patience;
            return if self.is_hung { Err(self.overdue(taken)) } else { Ok(None) };
        }
        let held = slot.held.take().expect("a job under way holds its leases");
        let elements = self.chunks[held.chunk].elements as usize;
        let squared_norm =
            held.has_norm.then(|| f64::from_le_bytes(slot.bounce.result.bytes()[..8].try_into().expect("eight")));
        let arrays = held.has_arrays.then(|| {
            let mut parts = slot.bounce.arrays.bytes().chunks_exact(self.shape.array.max(1));
            [0, 1, 2].map(|index| match parts.next() {
                Some(bytes) if index <= self.options.state_slots => {
                    bytemuck::cast_slice(&bytes[..elements * 4]).to_vec()
                }
                _ => Vec::new(),
            })
        });
        self.oldest = (self.oldest + 1) % DEPTH;
        self.flying -= 1;
        let Held { chunk, contributions, wire, .. } = held;
        Ok(Some(Done { chunk, contributions, wire, squared_norm, arrays }))
    }

    /// Readable after a job that was under way when [`Pipeline::arm`] was called is done.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Before a sleep: true if the oldest job is done already. The descriptor is emptied first and the job looked at second, so
    /// one that ends after the look makes it readable. A job is told of once: what has been told has happened.
    ///
    /// # Errors
    ///
    /// As [`Pipeline::poll`].
    pub fn arm(&mut self) -> Result<bool> {
        let _ = self.event.read(); // nothing in it is as good
        if self.flying == 0 {
            return Ok(false);
        }
        let slot = &mut self.slots[self.oldest];
        let is_done = slot.done.has_happened()?;
        if !is_done && !std::mem::replace(&mut slot.will_wake, true) {
            self.waking.wait(&slot.done)?;
            // SAFETY: the eventfd is closed in `drop`, after the stream is done, or never.
            unsafe { self.waking.notify(self.event.as_raw_fd()) }?;
        }
        Ok(is_done)
    }

    /// When to look even if nothing wakes the sleeper.
    pub fn next_deadline(&self) -> Option<Instant> {
        (self.flying > 0).then(|| Instant::now() + PROBE_EVERY)
    }

    fn overdue(&self, taken: Duration) -> Error {
        Error::Gpu {
            call: "cuEventQuery",
            device: self.context.info().to_string(),
            cause: format!("a step has not ended for {:.0} s; the device hangs", taken.as_secs_f64()),
        }
    }

    /// Puts a job on the streams: contributions and tables in, kernels, wire copy, norm and (with no kernel at all) arrays out.
    fn begin(
        &mut self,
        chunk: usize,
        contributions: Vec<Lease>,
        wire: Option<Lease>,
        kernels: &[GpuKernel],
        plan: Option<&ChunkPlan<'_>>,
    ) -> Result<()> {
        assert!(self.has_room(), "a job too many");
        assert!(contributions.len() <= self.options.contributions_max, "{} contributions", contributions.len());
        let index = (self.oldest + self.flying) % DEPTH;
        let has_norm = kernels.contains(&GpuKernel::FoldNorm);
        let held = Held { chunk, contributions, wire, has_norm, has_arrays: kernels.is_empty(), since: Instant::now() };
        // Jobs of one chunk follow each other: the last of them that is under way has waited for those before it.
        let flying = (0..self.flying).rev().map(|nth| &self.slots[(self.oldest + nth) % DEPTH]);
        let before = flying.into_iter().find(|slot| slot.held.as_ref().is_some_and(|held| held.chunk == chunk));
        if let Some(before) = before {
            self.slots[index].stream.wait(&before.done)?;
        }
        self.flying += 1;
        let slot = &mut self.slots[index];
        (slot.held, slot.will_wake) = (Some(held), false);
        self.copy_in(index, kernels, plan)?;
        self.launch(index, kernels)?;
        self.copy_out(index)?;
        let slot = &self.slots[index];
        slot.stream.record(&slot.done)
    }

    fn copy_in(&mut self, index: usize, kernels: &[GpuKernel], plan: Option<&ChunkPlan<'_>>) -> Result<()> {
        let slot = &mut self.slots[index];
        let held = slot.held.as_ref().expect("just put there");
        let arrays = self.chunks[held.chunk];
        let elements = arrays.elements as usize;
        let (bytes, dtype) = (elements * self.options.gradient_dtype.size(), self.options.parameter_dtype);
        let mut addresses = Vec::with_capacity(held.contributions.len().max(1));
        for (place, lease) in held.contributions.iter().enumerate() {
            assert!(lease.len() >= bytes, "a contribution of {} bytes for a chunk of {bytes}", lease.len());
            if let Some(address) = lease.device_address() {
                addresses.push(address);
                continue;
            }
            let target = slot.contributions + (place * self.shape.contribution) as u64;
            addresses.push(target);
            // SAFETY: the slot holds the lease until its last event, and its staging is nobody else's.
            unsafe { slot.stream.copy_to_device(target, lease.host_start(), bytes) }?;
        }
        if held.contributions.is_empty() {
            addresses.push(arrays.sums);
        }
        let [master, first, second] = arrays.state;
        if let Some(lease) = &held.wire {
            let bytes = elements * dtype.size();
            assert!(lease.len() >= bytes, "a wire copy of {} bytes for a chunk of {bytes}", lease.len());
        }
        if self.needs_flush && held.contributions.iter().any(|lease| lease.device_address().is_some()) {
            self.context.flush_direct_writes()?;
        }
        let wire = held.wire.as_ref().map(|lease| (lease.device_address().unwrap_or(slot.wire), dtype));
        let places = ChunkAddresses {
            contributions: &addresses,
            sums: arrays.sums,
            master,
            first,
            second,
            wire,
            partials: slot.partials,
            result: slot.result,
        };
        let tables = slot.bounce.tables.bytes_mut().chunks_exact_mut(self.shape.table);
        for ((place, kernel), table) in kernels.iter().enumerate().zip(tables) {
            let batch = &mut self.batches[place];
            batch.clear(*kernel);
            fill(batch, &places, arrays.elements, plan);
            let table = &mut table[..batch.table_len()];
            batch.write_table(table);
            let len = table.len();
            let start = std::ptr::NonNull::from(table).cast();
            let target = slot.tables + (place * self.shape.table) as u64;
            // SAFETY: bounce memory and staging are the slot's own, and are not touched before its last event.
            unsafe { slot.stream.copy_to_device(target, start, len) }?;
        }
        Ok(())
    }

    fn launch(&self, index: usize, kernels: &[GpuKernel]) -> Result<()> {
        let slot = &self.slots[index];
        for (place, kernel) in kernels.iter().enumerate() {
            let batch = &self.batches[place];
            if batch.is_empty() {
                continue;
            }
            let table = slot.tables + (place * self.shape.table) as u64;
            let launch = batch.launch(table, self.context.info().multiprocessors);
            let known = self.functions.iter().find(|(known, _)| known == kernel);
            let (_, function) = known.expect("every kernel was looked up");
            // SAFETY: our kernels have these parameters. The table names arrays of this pipeline's state and of the slot, each as
            // long as the chunk; jobs of one chunk wait for each other, and the slot's stream orders its own.
            unsafe {
                slot.stream.launch(function, launch.grid, launch.block, (launch.table, launch.segments, launch.tiles))
            }?;
        }
        Ok(())
    }

    fn copy_out(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        let held = slot.held.as_mut().expect("put there by `begin`");
        let arrays = &self.chunks[held.chunk];
        if let Some(lease) = &mut held.wire {
            let bytes = arrays.elements as usize * self.options.parameter_dtype.size();
            if lease.device_address().is_none() {
                // SAFETY: the slot holds the lease until its last event; kernels of later jobs write to other slots.
                unsafe { slot.stream.copy_to_host(lease.host_start(), slot.wire, bytes) }?;
            }
        }
        if held.has_norm {
            // SAFETY: eight bytes on both sides, the slot's own.
            unsafe { slot.stream.copy_to_host(slot.bounce.result.host_start(), slot.result, 8) }?;
        }
        if held.has_arrays {
            let parts = slot.bounce.arrays.bytes_mut().chunks_exact_mut(self.shape.array);
            for (address, bounce) in arrays.state[..=self.options.state_slots].iter().zip(parts) {
                let start = std::ptr::NonNull::from(bounce).cast();
                // SAFETY: the bounce memory is the slot's own, as long as the largest chunk; later jobs of the chunk wait.
                unsafe { slot.stream.copy_to_host(start, *address, arrays.elements as usize * 4) }?;
            }
        }
        Ok(())
    }
}

/// Puts a chunk into a batch.
fn fill(batch: &mut Batch, places: &ChunkAddresses<'_>, elements: u32, plan: Option<&ChunkPlan<'_>>) {
    let added = match plan {
        None => batch.push(places, 0, elements, None),
        Some(plan) => {
            let end = plan.spans.last().map_or(0, |span| span.end());
            assert_eq!(end, elements, "spans of another chunk");
            batch.push_chunk(places, plan.spans, plan.config, plan.rates, &plan.arguments, plan.scale)
        }
    };
    added.expect("batches have room for any chunk");
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let are_done = || {
            let mut streams = self.slots.iter().map(|slot| &slot.stream).chain([&self.waking]);
            streams.all(|stream| stream.synchronize().is_ok())
        };
        if !self.is_hung && are_done() {
            // SAFETY: taken once, here; no stream has anything to write into it any more.
            drop(unsafe { ManuallyDrop::take(&mut self.event) });
            // SAFETY: taken once, here; no stream has anything to do with it any more.
            drop(unsafe { ManuallyDrop::take(&mut self.memory) });
            return;
        }
        // The device has failed, and nobody can say what it still writes: what it was given stays where it is.
        std::mem::forget(std::mem::take(&mut self.slots));
    }
}
