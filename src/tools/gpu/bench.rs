//! Figures of a device, each beside its ceiling measured in the same run: kernels beside a copy within the device, a staged push
//! and pull beside the bus.
//!
//! Invariant: work and ceiling are measured in turn, repetition by repetition; what is told are medians.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    Result,
    cuda::Context,
    layout::{Layout, LayoutOptions, TensorSpec},
    mem::{Lease, Region, RegionOptions},
    optim::{
        OptimizerConfig, OptimizerKind, Pass, Reduction, StepArguments,
        gpu::{ChunkPlan, GpuKernel, Gradient, Load, Meter, MeterOptions, PTX, Pipeline, PipelineOptions, Rule},
    },
    types::Dtype,
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Bytes of a chunk, counted in f32.
    pub sizes: Vec<usize>,
    /// Chunks of the first size in a batch.
    pub batch: u32,
    /// How often each is measured.
    pub repetitions: usize,
    /// Launches or copies of one measurement.
    pub times: u32,
    /// The kernels of the rows, instead of those of this build.
    pub ptx: Option<String>,
    /// Only the rows whose name has this in it.
    pub only: String,
}

/// One figure and its ceiling.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Bytes of a chunk, counted in f32.
    pub chunk_bytes: usize,
    /// Chunks of one launch.
    pub chunks: u32,
    /// Median of one launch, copy or round.
    pub seconds: f64,
    /// Bytes that it reads and writes a second.
    pub bytes_per_s: f64,
    /// Parameters stepped a second; none for what steps none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters_per_s: Option<f64>,
    /// What the ceiling is.
    pub ceiling: &'static str,
    /// Bytes a second of the ceiling.
    pub ceiling_bytes_per_s: f64,
    /// The figure in units of its ceiling.
    pub share: f64,
}

/// Measures everything; `tell` gets each row as soon as it is there.
///
/// # Errors
///
/// [`crate::Error::Gpu`] from the device.
pub fn bench(context: &Context, options: &BenchOptions, mut tell: impl FnMut(&Row)) -> Result<()> {
    let largest = options.sizes.iter().copied().max().unwrap_or(0);
    let first = options.sizes.first().copied().unwrap_or(0) * options.batch as usize;
    // The busiest kernel touches 34 bytes an element, of which a copy of as many needs all; tables and results beside them.
    let ptx = options.ptx.as_deref().unwrap_or(PTX);
    let mut meter = Meter::new(context, MeterOptions { bytes: 9 * largest.max(first) + (1 << 20), ptx })?;
    let is_wanted = |name: &str| name.contains(&options.only);
    let shapes =
        options.sizes.iter().map(|size| (*size, 1)).chain(options.sizes.first().map(|size| (*size, options.batch)));
    for (chunk_bytes, chunks) in shapes {
        for kernel in GpuKernel::all().filter(|kernel| is_wanted(&kernel_name(*kernel))) {
            let load =
                Load { kernel, chunks, elements: elements(chunk_bytes), contributions: 2, wire: Some(Dtype::Bf16) };
            tell(&kernel_row(&mut meter, options, kernel_name(kernel), chunk_bytes, &load)?);
        }
    }
    for (chunk_bytes, wire) in options.sizes.iter().flat_map(|size| [(*size, None), (*size, Some(Dtype::Bf16))]) {
        let name = format!("adamw f32 x1, wire {}", wire.map_or("none".into(), |dtype| dtype.to_string()));
        if is_wanted(&name) {
            let kernel = GpuKernel::Update(Rule::Adam, Dtype::F32);
            let load = Load { kernel, chunks: 1, elements: elements(chunk_bytes), contributions: 1, wire };
            tell(&kernel_row(&mut meter, options, name, chunk_bytes, &load)?);
        }
    }
    if is_wanted(LAUNCH) {
        tell(&launch_row(&mut meter, options)?);
    }
    for size in &options.sizes {
        for dtype in [Dtype::F32, Dtype::Bf16].into_iter().filter(|dtype| is_wanted(&staged_name(*dtype))) {
            tell(&staged_row(context, &meter, options, *size, dtype)?);
        }
    }
    Ok(())
}

/// Elements of a chunk of so many bytes, counted in f32.
fn elements(chunk_bytes: usize) -> u32 {
    (chunk_bytes / 4) as u32
}

const LAUNCH: &str = "launch of 64 elements";

fn kernel_name(kernel: GpuKernel) -> String {
    match kernel {
        GpuKernel::Update(..) => format!("{} x2, wire bf16", kernel.name()),
        GpuKernel::Reduce(_) => format!("{} x2", kernel.name()),
        _ => kernel.name().into(),
    }
}

fn staged_name(dtype: Dtype) -> String {
    format!("staged push-pull, adamw, {dtype}")
}

/// The seconds of a kernel, and a copy that moves as many bytes, in turn.
fn beside_copy(meter: &mut Meter, options: &BenchOptions, load: &Load) -> Result<(f64, Ceiling)> {
    // A copy reads and writes: half as many bytes as the kernel touches.
    let copied = load.bytes() as usize / 2;
    let ready = meter.prepare(load)?;
    let (seconds, ceiling) = alternate(
        options.repetitions,
        meter,
        |meter| meter.kernel(&ready, options.times),
        |meter| meter.copy_on_device(copied, options.times),
    )?;
    Ok((seconds, Ceiling { name: "copy within the device", seconds: ceiling, bytes: 2 * copied }))
}

fn kernel_row(meter: &mut Meter, options: &BenchOptions, name: String, chunk_bytes: usize, load: &Load) -> Result<Row> {
    let (seconds, ceiling) = beside_copy(meter, options, load)?;
    let stepped = f64::from(load.elements) * f64::from(load.chunks) / seconds;
    let parameters = matches!(load.kernel, GpuKernel::Update(..)).then_some(stepped);
    Ok(row(name, chunk_bytes, load.chunks, [seconds, load.bytes() as f64], parameters, &ceiling))
}

/// A launch that has next to nothing to do.
fn launch_row(meter: &mut Meter, options: &BenchOptions) -> Result<Row> {
    let kernel = GpuKernel::Update(Rule::Adam, Dtype::F32);
    let load = Load { kernel, chunks: 1, elements: 64, contributions: 1, wire: Some(Dtype::F32) };
    let (seconds, ceiling) = beside_copy(meter, options, &load)?;
    Ok(row(LAUNCH.into(), 256, 1, [seconds, load.bytes() as f64], None, &ceiling))
}

/// Chunks through a shard's pipeline, one after the other: gradients from page-locked memory, AdamW, parameters back into it.
fn staged_row(
    context: &Context,
    meter: &Meter,
    options: &BenchOptions,
    chunk_bytes: usize,
    dtype: Dtype,
) -> Result<Row> {
    let elements = chunk_bytes / 4;
    let wire_bytes = elements * dtype.size();
    let mut staged = Staged::new(context, elements, dtype)?;
    let (seconds, ceiling) = alternate(
        options.repetitions,
        &mut staged,
        |staged| staged.run(options.times),
        |_| meter.copy_both_ways(wire_bytes, wire_bytes, options.times),
    )?;
    let parameters = Some(elements as f64 / seconds);
    let bytes = 2.0 * wire_bytes as f64;
    let ceiling = Ceiling { name: "copies both ways over the bus", seconds: ceiling, bytes: 2 * wire_bytes };
    Ok(row(staged_name(dtype), chunk_bytes, 1, [seconds, bytes], parameters, &ceiling))
}

/// What a figure is held against.
struct Ceiling {
    name: &'static str,
    seconds: f64,
    bytes: usize,
}

fn row(
    what: String,
    chunk_bytes: usize,
    chunks: u32,
    [seconds, bytes]: [f64; 2],
    parameters_per_s: Option<f64>,
    ceiling: &Ceiling,
) -> Row {
    let (bytes_per_s, ceiling_bytes_per_s) = (bytes / seconds, ceiling.bytes as f64 / ceiling.seconds);
    let (share, ceiling) = (bytes_per_s / ceiling_bytes_per_s, ceiling.name);
    Row { what, chunk_bytes, chunks, seconds, bytes_per_s, parameters_per_s, ceiling, ceiling_bytes_per_s, share }
}

/// Medians of two measurements that are taken in turn, after a warm-up of each.
fn alternate<T>(
    repetitions: usize,
    on: &mut T,
    mut work: impl FnMut(&mut T) -> Result<f64>,
    mut ceiling: impl FnMut(&mut T) -> Result<f64>,
) -> Result<(f64, f64)> {
    work(on)?;
    ceiling(on)?;
    let (mut times, mut ceilings) = (Vec::new(), Vec::new());
    for _ in 0..repetitions {
        times.push(work(on)?);
        ceilings.push(ceiling(on)?);
    }
    Ok((median(times), median(ceilings)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A pipeline that is kept full.
struct Staged {
    pipeline: Pipeline,
    layout: Layout,
    config: OptimizerConfig,
    /// Pairs of a contribution and a reply that no job holds.
    free: Vec<(Lease, Lease)>,
    step: u64,
}

impl Staged {
    /// Chunks in turn, so that a job need not wait for the one before because of its chunk.
    const CHUNKS: usize = 4;

    fn new(context: &Context, elements: usize, dtype: Dtype) -> Result<Staged> {
        let tensors = (0..Staged::CHUNKS).map(|index| TensorSpec::new(format!("tensor{index}"), [elements as u64]));
        let limits = LayoutOptions { chunk_elements: elements as u32, shards: 1 };
        let layout = Layout::build(&[tensors.collect()], limits)?;
        let config = OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3);
        let region = RegionOptions { name: "staged".into(), prefault: true, ..RegionOptions::default() };
        let options = PipelineOptions {
            chunks: layout.chunks.iter().map(|chunk| chunk.len).collect(),
            state_slots: 2,
            has_accumulator: false,
            gradient_dtype: dtype,
            parameter_dtype: dtype,
            contributions_max: 1,
            spans_max: layout.chunks.iter().map(|chunk| chunk.spans.len()).max().unwrap_or(1),
            patience: Duration::from_secs(60),
            region: region.clone(),
        };
        let mut pipeline = Pipeline::new(context, options)?;
        let bytes = elements * dtype.size();
        let (memory, lease) = Region::allocate(2 * Staged::CHUNKS * bytes, &region)?;
        pipeline.pin(&memory)?;
        let mut pieces = lease.chunks(bytes).into_iter();
        let mut pair = || Some((pieces.next()?, pieces.next()?));
        let free = (0..Staged::CHUNKS).filter_map(|_| pair()).collect();
        for (index, chunk) in layout.chunks.iter().enumerate() {
            let zeros = vec![0.0; chunk.len as usize];
            pipeline.store(index, [&zeros, &zeros, &zeros])?;
        }
        Ok(Staged { pipeline, layout, config, free, step: 0 })
    }

    /// Seconds of one of `times` chunks.
    fn run(&mut self, times: u32) -> Result<f64> {
        let rates = self.config.learning_rates();
        let begin = Instant::now();
        let mut ended = 0;
        let mut begun = 0;
        while ended < times {
            while begun < times && self.pipeline.has_room() {
                let Some((landed, wire)) = self.free.pop() else { break };
                let chunk = begun as usize % self.layout.chunks.len();
                self.step += 1;
                let (pass, reduction) = (Pass::Fused, Reduction::Mean);
                let arguments = StepArguments {
                    pass,
                    step: self.step,
                    clock: 0,
                    total_weight: 1,
                    reduction,
                    scale: 1.0,
                    measures: false,
                };
                let spans = &self.layout.chunks[chunk].spans;
                let plan = ChunkPlan { spans, config: &self.config, rates: &rates, arguments, scale: 1.0 };
                self.pipeline.update(chunk, &plan, Gradient::Landed(vec![landed]), Some(wire))?;
                begun += 1;
            }
            if let Some(mut done) = self.pipeline.poll()? {
                let pair = done.contributions.pop().zip(done.wire);
                self.free.push(pair.expect("a step holds both"));
                ended += 1;
            }
        }
        Ok(begin.elapsed().as_secs_f64() / f64::from(times))
    }
}
