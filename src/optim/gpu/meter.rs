//! A stopwatch for kernels and copies, in memory of its own: what a device can do, beside which anything else is measured.
//!
//! Times of one stream are those of the device's own events around many repetitions; what involves the host is timed by its clock.
//!
//! Invariant: every address is within the meter's own memory, which was written before it is read.

use std::time::Instant;

use super::{Batch, ChunkAddresses, GpuKernel, PTX, Rule, slot::ALIGNMENT};
use crate::{
    Error, Result,
    cuda::{Context, DeviceBuffer, Event, Function, Module, Stream},
    mem::{Lease, PinnedRegion, Region, RegionOptions},
    optim::{OptimizerConfig, OptimizerKind, Reduction},
    types::Dtype,
};

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
    /// The wire copy's format, for kernels that make one.
    pub wire: Dtype,
}

impl Load {
    /// Bytes that the kernel must read and write at least.
    pub fn bytes(&self) -> u64 {
        let (gradient, wire) = (self.gradient_bytes() as u64, self.wire.size() as u64);
        let each = match self.kernel {
            GpuKernel::Update(rule, _) => gradient + 8 + 8 * rule.state_slots() as u64 + wire,
            GpuKernel::Reduce(_) => gradient + 4,
            GpuKernel::Encode => 4 + wire,
            GpuKernel::SquaredNorm | GpuKernel::CountNonFinite => 4,
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

/// Memory, streams and events for measurements on one device.
pub struct Meter {
    context: Context,
    one: Stream,
    other: Stream,
    begin: Event,
    end: Event,
    functions: Vec<(GpuKernel, Function)>,
    device: DeviceBuffer,
    _pinned: PinnedRegion,
    host: Lease,
}

impl Meter {
    /// A meter with `bytes` of device memory, all of them 0, and as many of page-locked host memory.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] naming the device and the call.
    pub fn new(context: &Context, bytes: usize) -> Result<Meter> {
        let device = DeviceBuffer::allocate(context, bytes)?;
        let options = RegionOptions { name: "meter".into(), prefault: true, ..RegionOptions::default() };
        let (region, host) = Region::allocate(bytes, &options)?;
        let module = Module::load(context, PTX)?;
        let functions = GpuKernel::all().map(|kernel| Ok((kernel, module.function(kernel.name())?)));
        let one = Stream::new(context)?;
        // SAFETY: the buffer is this meter's, and the stream is waited for below.
        unsafe { one.fill(device.address(), 0, bytes) }?;
        one.synchronize()?;
        Ok(Meter {
            functions: functions.collect::<Result<_>>()?,
            other: Stream::new(context)?,
            begin: Event::timed(context)?,
            end: Event::timed(context)?,
            _pinned: region.pin(context)?,
            context: context.clone(),
            one,
            device,
            host,
        })
    }

    /// Seconds of one of `times` pieces of work on the first stream, by the device's clock.
    fn time(&self, times: u32, work: impl Fn() -> Result<()>) -> Result<f64> {
        self.one.record(&self.begin)?;
        for _ in 0..times {
            work()?;
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
        self.check(2 * bytes)?;
        let source = self.device.address();
        // SAFETY: two ranges of the meter's own memory that do not overlap; the stream orders the copies, and is waited for.
        self.time(times, || unsafe { self.one.copy_on_device(source + bytes as u64, source, bytes) })
    }

    /// Seconds in which `inward` bytes go to the device while `outward` come back, over the bus at the same time.
    pub fn copy_both_ways(&self, inward: usize, outward: usize, times: u32) -> Result<f64> {
        self.check(inward + outward)?;
        let (here, there) = (self.host.host_start(), self.device.address());
        // SAFETY: `check` has seen that both ranges lie within the host's memory.
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

    /// Seconds that one launch of a kernel takes.
    pub fn kernel(&mut self, load: &Load, times: u32) -> Result<f64> {
        let (batch, table) = self.lay_out(load)?;
        let launch = batch.launch(table, self.context.info().multiprocessors);
        let (_, function) = self.functions.iter().find(|(known, _)| *known == load.kernel).expect("all were looked up");
        let parameters = (launch.table, launch.segments, launch.tiles);
        // SAFETY: our kernels have these parameters; the table names arrays that `lay_out` put into the meter's own memory, one
        // behind the other, and one stream launches one after another.
        self.time(times, || unsafe { self.one.launch(function, launch.grid, launch.block, parameters) })
    }

    /// Puts a load's arrays and its table into the meter's memory.
    fn lay_out(&mut self, load: &Load) -> Result<(Batch, u64)> {
        let segments = load.chunks as usize;
        let mut batch = Batch::new(load.kernel, segments, segments * load.contributions.max(1) as usize);
        let table = self.device.address();
        let mut next = batch.table_len_max().next_multiple_of(ALIGNMENT);
        let mut take = |bytes: usize| {
            let start = next;
            next += bytes.next_multiple_of(ALIGNMENT);
            table + start as u64
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
                wire: Some((take(elements * load.wire.size()), load.wire)),
                result: take(8),
            };
            batch.push(&chunk, 0, load.elements, Some(&plan)).expect("made for as many");
        }
        self.check(next)?;
        let len = batch.table_len();
        batch.write_table(&mut self.host.bytes_mut()[..len]);
        // SAFETY: the table is at the front on both sides, and is not touched before the stream is waited for.
        unsafe { self.one.copy_to_device(table, self.host.host_start(), len) }?;
        self.one.synchronize()?;
        Ok((batch, table))
    }

    fn check(&self, bytes: usize) -> Result<()> {
        if bytes <= self.device.len() {
            return Ok(());
        }
        Err(Error::Config(format!("a measurement needs {bytes} bytes of a meter that has {}", self.device.len())))
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
