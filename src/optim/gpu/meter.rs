//! A stopwatch for kernels and copies, in memory of its own: what a device can do, beside which anything else is measured.
//!
//! Times of one stream are those of the device's own events around many repetitions; what involves the host is timed by its clock.
//! Repetitions go round in more memory than the device's cache holds, as a server's steps go round in its chunks; and no value is
//! zero, for which square roots and divisions take another way.
//!
//! Invariant: every address is within the meter's own memory, which was written before it is read.

use std::time::Instant;

use super::{Batch, ChunkAddresses, GpuKernel, Launch, Rule, slot::ALIGNMENT};
use crate::{
    Error, Result,
    cuda::{Context, DeviceBuffer, Event, Function, Module, Stream},
    mem::{Lease, PinnedRegion, Region, RegionOptions},
    optim::{NORM_TILE, OptimizerConfig, OptimizerKind, Reduction},
    types::Dtype,
};

/// Repetitions come back to the same memory after so many times the cache at the earliest.
const CACHES: usize = 4;

/// What a kernel is timed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The kernel.
    pub kernel: GpuKernel,
    /// Chunks in one launch.
    pub chunks: u32,
    /// Elements of each.
    pub elements: u32,
    /// Contributions to each, for kernels that have any.
    pub contributions: u32,
    /// The wire copy's format, if an update makes one; an encoding does.
    pub wire: Option<Dtype>,
}

impl Load {
    /// Bytes that the kernel must read and write at least.
    pub fn bytes(&self) -> u64 {
        let (gradient, wire) = (self.gradient_bytes() as u64, self.wire.map_or(0, Dtype::size) as u64);
        let each = match self.kernel {
            GpuKernel::Update(rule, _) => gradient + 8 + 8 * rule.state_slots() as u64 + wire,
            GpuKernel::Reduce(_) => gradient + 4,
            GpuKernel::Encode => 4 + wire,
            GpuKernel::SquaredNorm | GpuKernel::CountNonFinite => 4,
            GpuKernel::FoldNorm => {
                return u64::from(self.chunks) * 8 * u64::from(self.elements.div_ceil(NORM_TILE as u32));
            }
        };
        each * u64::from(self.chunks) * u64::from(self.elements)
    }

    fn gradient_bytes(&self) -> usize {
        match self.kernel {
            GpuKernel::Update(_, dtype) | GpuKernel::Reduce(dtype) => dtype.size() * self.contributions as usize,
            _ => 0,
        }
    }
}

/// What a meter is made for.
#[derive(Clone, Copy, Debug)]
pub struct MeterOptions<'a> {
    /// Bytes that the largest load, or the largest copy in both directions together, touches.
    pub bytes: usize,
    /// The kernels.
    pub ptx: &'a str,
}

/// Memory, streams and events for measurements on one device.
pub struct Meter {
    context: Context,
    one: Stream,
    other: Stream,
    begin: Event,
    end: Event,
    functions: Vec<(GpuKernel, Function)>,
    /// For kernels, and for copies within the device.
    device: DeviceBuffer,
    copies: DeviceBuffer,
    _pinned: PinnedRegion,
    /// Values to fill the device's memory with, tables, and what goes over the bus.
    host: Lease,
}

/// A load in the meter's memory, as often as it fits in.
pub struct Ready {
    kernel: GpuKernel,
    launches: Vec<Launch>,
}

impl Meter {
    /// A meter with memory for such loads.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] naming the device and the call.
    pub fn new(context: &Context, options: MeterOptions<'_>) -> Result<Meter> {
        let bytes = options.bytes.max(CACHES * context.info().l2_bytes as usize);
        let device = DeviceBuffer::allocate(context, bytes)?;
        let region = RegionOptions { name: "meter".into(), prefault: true, ..RegionOptions::default() };
        let (region, mut host) = Region::allocate(options.bytes, &region)?;
        let mut random = 1u64;
        for value in bytemuck::cast_slice_mut::<u8, u16>(host.bytes_mut()) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Between 2^-7 and 2 in every format, and so is an f32 that two of them make.
            *value = 0x3C00 | (random >> 54) as u16;
        }
        let module = Module::load(context, options.ptx)?;
        let functions = GpuKernel::all().map(|kernel| Ok((kernel, module.function(kernel.name())?)));
        let meter = Meter {
            functions: functions.collect::<Result<_>>()?,
            one: Stream::new(context)?,
            other: Stream::new(context)?,
            begin: Event::timed(context)?,
            end: Event::timed(context)?,
            _pinned: region.pin(context)?,
            context: context.clone(),
            device,
            copies: DeviceBuffer::allocate(context, bytes)?,
            host,
        };
        meter.fill(&meter.copies)?;
        Ok(meter)
    }

    /// Writes values into all of a buffer.
    fn fill(&self, buffer: &DeviceBuffer) -> Result<()> {
        for start in (0..buffer.len()).step_by(self.host.len()) {
            let len = self.host.len().min(buffer.len() - start);
            // SAFETY: within both, which are the meter's own; the stream is waited for.
            unsafe { self.one.copy_to_device(buffer.address() + start as u64, self.host.host_start(), len) }?;
        }
        self.one.synchronize()
    }

    /// Seconds of one of `times` pieces of work on the first stream, by the device's clock.
    fn time(&self, times: u32, work: impl Fn(usize) -> Result<()>) -> Result<f64> {
        self.one.record(&self.begin)?;
        for turn in 0..times as usize {
            work(turn)?;
        }
        self.one.record(&self.end)?;
        self.one.synchronize()?;
        Ok(self.end.seconds_since(&self.begin)? / f64::from(times))
    }

    /// Seconds that a copy of `bytes` takes within the device, which reads and writes as many.
    ///
    /// # Errors
    ///
    /// Here and below: [`Error::Gpu`] from the device, [`Error::Config`] if the meter has too little memory.
    pub fn copy_on_device(&self, bytes: usize, times: u32) -> Result<f64> {
        let each = bytes.next_multiple_of(ALIGNMENT);
        let places = self.places(2 * each, self.copies.len())?;
        self.time(times, |turn| {
            let source = self.copies.address() + (turn % places * 2 * each) as u64;
            // SAFETY: two ranges of the meter's own memory that do not overlap; the stream orders the copies, and is waited for.
            unsafe { self.one.copy_on_device(source + each as u64, source, bytes) }
        })
    }

    /// Seconds in which `inward` bytes go to the device while `outward` come back, over the bus at the same time.
    pub fn copy_both_ways(&self, inward: usize, outward: usize, times: u32) -> Result<f64> {
        self.places(inward + outward, self.host.len())?;
        let (here, there) = (self.host.host_start(), self.copies.address());
        // SAFETY: `places` has seen that both ranges lie within the host's memory.
        let back = unsafe { here.add(inward) };
        let begin = Instant::now();
        for _ in 0..times {
            // SAFETY: the first `inward` bytes on both sides, the meter's own, for this stream alone until it is waited for.
            unsafe { self.one.copy_to_device(there, here, inward) }?;
            // SAFETY: the `outward` bytes behind them, for the other stream alone.
            unsafe { self.other.copy_to_host(back, there + inward as u64, outward) }?;
        }
        self.one.synchronize()?;
        self.other.synchronize()?;
        Ok(begin.elapsed().as_secs_f64() / f64::from(times))
    }

    /// Puts a load into the meter's memory, as often as it fits in.
    ///
    /// # Errors
    ///
    /// As [`Meter::copy_on_device`].
    pub fn prepare(&mut self, load: &Load) -> Result<Ready> {
        self.fill(&self.device)?;
        let mut launches = Vec::new();
        let mut place = 0;
        loop {
            let (launch, end) = self.lay_out(load, place)?;
            launches.push(launch);
            if end + (end - place) > self.device.len() {
                return Ok(Ready { kernel: load.kernel, launches });
            }
            place = end;
        }
    }

    /// Seconds that one launch of a kernel takes.
    ///
    /// # Errors
    ///
    /// As [`Meter::copy_on_device`].
    pub fn kernel(&self, ready: &Ready, times: u32) -> Result<f64> {
        let (_, function) =
            self.functions.iter().find(|(known, _)| *known == ready.kernel).expect("all were looked up");
        self.time(times, |turn| {
            let launch = &ready.launches[turn % ready.launches.len()];
            let parameters = (launch.table, launch.segments, launch.tiles);
            // SAFETY: our kernels have these parameters; the table names arrays that `lay_out` put into the meter's own memory,
            // one behind the other, and one stream launches one after another.
            unsafe { self.one.launch(function, launch.grid, launch.block, parameters) }
        })
    }

    /// Puts a load's table and arrays into the meter's memory from `place` on. Gives the launch, and where the next may begin.
    fn lay_out(&mut self, load: &Load, place: usize) -> Result<(Launch, usize)> {
        let segments = load.chunks as usize;
        let mut batch = Batch::new(load.kernel, segments, segments * load.contributions.max(1) as usize);
        let base = self.device.address();
        let table = base + place as u64;
        let mut next = place + batch.table_len_max().next_multiple_of(ALIGNMENT);
        let mut take = |bytes: usize| {
            let start = next;
            next += bytes.next_multiple_of(ALIGNMENT);
            base + start as u64
        };
        let elements = load.elements as usize;
        let kind = match load.kernel {
            GpuKernel::Update(rule, _) => kind_of(rule),
            _ => OptimizerKind::SGD,
        };
        let config = OptimizerConfig::new(kind, 1e-3);
        let mean = Reduction::Mean.factor(load.contributions.max(1));
        let plan = config.span_step(0, 1, 1e-3, mean);
        for _ in 0..load.chunks {
            let one = load.gradient_bytes() / load.contributions.max(1) as usize * elements;
            let contributions: Vec<u64> = (0..load.contributions).map(|_| take(one)).collect();
            let [master, first, second, sums] = [0; 4].map(|_: u8| take(elements * 4));
            let chunk = ChunkAddresses {
                contributions: &contributions,
                sums,
                master,
                first,
                second,
                wire: load.wire.map(|dtype| (take(elements * dtype.size()), dtype)),
                partials: take(elements.div_ceil(NORM_TILE) * 8),
                result: take(8),
            };
            batch.push(&chunk, 0, load.elements, Some(&plan)).expect("made for as many");
        }
        self.places(next, self.device.len())?;
        let mut bytes = vec![0; batch.table_len()];
        batch.write_table(&mut bytes);
        let here = std::ptr::NonNull::from(&mut bytes[..]).cast();
        // SAFETY: the table's bytes, and as many within the meter's memory; neither is touched before the stream is done.
        unsafe { self.one.copy_to_device(table, here, bytes.len()) }?;
        self.one.synchronize()?;
        Ok((batch.launch(table, self.context.info().multiprocessors), next))
    }

    /// How often `bytes` fit into so much memory.
    fn places(&self, bytes: usize, memory: usize) -> Result<usize> {
        match memory / bytes.max(1) {
            0 => Err(Error::Config(format!("a measurement needs {bytes} bytes of a meter that has {memory}"))),
            places => Ok(places),
        }
    }
}

fn kind_of(rule: Rule) -> OptimizerKind {
    match rule {
        Rule::Sgd => OptimizerKind::SGD,
        Rule::Momentum => OptimizerKind::Sgd { momentum: 0.9, nesterov: false },
        Rule::Nesterov => OptimizerKind::Sgd { momentum: 0.9, nesterov: true },
        Rule::Adam => OptimizerKind::ADAMW,
        Rule::Adagrad => OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.1 },
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for stream in [&self.one, &self.other] {
            if let Err(error) = stream.synchronize() {
                tracing::debug!("{error}");
            }
        }
    }
}
