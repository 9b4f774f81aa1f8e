//! `gradwire gpu`: holds a GPU to the oracle's bits and to its own copies.
//!
//! Invariant: nothing is asserted about speed; a bit that differs is an exit status of 1.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    Error, Result,
    checkpoint::latest,
    cuda::{Context, driver_version},
    launch::{Job, JobOptions, OutputTo},
    optim::OptimizerKind,
    session::{DeviceChoice, JobConfig},
    tools::{
        bench::parse_sizes,
        gpu::{BenchOptions, Row, bench, check, work},
    },
    types::{ChunkId, Dtype},
};

/// A job of a few thousand parameters that takes so long is stuck.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Args)]
pub(super) struct GpuArguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare every kernel with the oracle, and whole jobs on this GPU with jobs on the processor, bit for bit.
    Check {
        /// Which GPU.
        #[arg(long, default_value_t = 0)]
        device: u32,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Measure kernels beside a copy within the device, and a staged push and pull beside the bus.
    Bench(BenchArguments),
    /// A worker of the jobs that `check` compares.
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        steps: u64,
    },
}

#[derive(Args)]
struct BenchArguments {
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// Bytes of a chunk, counted in f32.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', num_args = 1.., default_values_t = ["1MiB".to_string(), "4MiB".into(), "16MiB".into()])]
    bytes: Vec<String>,
    /// Chunks of the first size in one launch, for the figures of a batch.
    #[arg(long, default_value_t = 16)]
    batch: u32,
    /// How often each figure and its ceiling are measured, in turn; medians are printed.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Launches or copies of one measurement.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// Measure the kernels of this file of PTX instead of those inside.
    #[arg(long, value_name = "FILE")]
    kernels: Option<PathBuf>,
    /// Only the rows whose name has this in it, such as `adam_bf16` or `staged`.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Checks, measures, or takes part in a check.
pub(super) fn run(arguments: &GpuArguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Check { device, json } => run_check(*device, *json)?,
        Command::Bench(arguments) => run_bench(arguments)?,
        Command::Worker { steps } => work(*steps)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run_check(device: u32, as_json: bool) -> Result<()> {
    let context = Context::open(device)?;
    let (info, cuda) = (context.info().clone(), driver_version()?);
    let checked = check(&context)?;
    drop(context);
    let mut jobs = 0;
    for (dtype, two_step) in [(Dtype::F32, false), (Dtype::F32, true), (Dtype::Bf16, false)] {
        compare_jobs(device, dtype, two_step)?;
        jobs += 1;
    }
    if as_json {
        println!("{}", json!({ "device": info.to_string(), "cuda": cuda, "kernels": checked, "jobs": jobs }));
    } else {
        let (combinations, elements) = (checked.combinations, checked.elements);
        println!("{info}, CUDA {cuda}: {combinations} combinations, {elements} elements as the oracle has them;");
        println!("{jobs} jobs with the processor's bits");
    }
    Ok(())
}

/// The same job on the processor and on the GPU: parameters and state of every chunk must be the same.
fn compare_jobs(device: u32, dtype: Dtype, two_step: bool) -> Result<()> {
    let home = std::env::temp_dir().join(format!("gradwire-gpu-check-{}", std::process::id()));
    let compare = || {
        let mut found = Vec::new();
        for choice in [DeviceChoice::Cpu, DeviceChoice::Gpu(vec![device])] {
            let dir = home.join(choice.to_string().replace(':', "-"));
            run_job(choice, &dir, dtype, two_step)?;
            found.push(contents(&dir)?);
        }
        Ok(found[0] == found[1])
    };
    let outcome = compare();
    // What cannot be removed lies in the folder for such things.
    let _ = std::fs::remove_dir_all(&home);
    match outcome {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::JobFailed(format!(
            "a job on GPU {device} has not the processor's bits (wire {dtype}, two steps: {two_step})"
        ))),
        Err(error) => Err(error),
    }
}

fn run_job(device: DeviceChoice, dir: &Path, dtype: Dtype, two_step: bool) -> Result<()> {
    let mut config = JobConfig {
        name: format!("gpu-check-{}", std::process::id()),
        servers: 2,
        workers: 3,
        chunk_bytes: 1024,
        seed: 7,
        gradient_dtype: dtype,
        parameter_dtype: dtype,
        two_step,
        device,
        ..JobConfig::default()
    };
    config.optimizer.kind = OptimizerKind::ADAMW;
    config.checkpoint.dir = Some(dir.into());
    let executable = std::env::current_exe().map_err(|error| Error::os("readlink", "/proc/self/exe", error))?;
    let command = [executable.clone().into(), "gpu".into(), "worker".into(), "--steps".into(), OsString::from("20")];
    let mut options = JobOptions::new(config, command.into(), executable);
    options.output = OutputTo::Collect;
    let mut job = Job::start(options)?;
    match job.wait_for(PATIENCE) {
        Some(outcome) if outcome.code == 0 => Ok(()),
        Some(outcome) => Err(Error::JobFailed(outcome.reason.unwrap_or_else(|| job.output()))),
        None => Err(Error::JobFailed(format!("a job did not end; it has written:\n{}", job.output()))),
    }
}

/// Steps, parameters and state of every chunk, as bits.
fn contents(dir: &Path) -> Result<Vec<(u64, Vec<u32>)>> {
    let nothing = || Error::Checkpoint { path: dir.into(), defect: "the job has left none".into() };
    let checkpoint = latest(dir)?.checkpoint.ok_or_else(nothing)?;
    let chunks = checkpoint.manifest().layout.chunks.len() as u32;
    let bits = |index| {
        let chunk = checkpoint.chunk(ChunkId(index))?;
        let values = [chunk.master, chunk.first, chunk.second].concat();
        Ok((chunk.steps, values.iter().map(|value| value.to_bits()).collect()))
    };
    (0..chunks).map(bits).collect()
}

fn run_bench(arguments: &BenchArguments) -> Result<()> {
    let sizes = parse_sizes(&arguments.bytes)?.into_iter().map(|size| size as usize);
    let sizes: Vec<usize> = sizes.collect();
    if let Some(size) = sizes.iter().find(|size| !size.is_multiple_of(256) || **size > 64 << 20) {
        return Err(Error::Config(format!("--bytes {size}: a chunk has a multiple of 256 bytes, at most 64 MiB")));
    }
    let ptx = arguments.kernels.as_deref().map(|path| {
        std::fs::read_to_string(path).map_err(|error| Error::Config(format!("--kernels {}: {error}", path.display())))
    });
    let (ptx, only) = (ptx.transpose()?, arguments.only.clone());
    let context = Context::open(arguments.device)?;
    let (batch, times) = (arguments.batch, arguments.times);
    let options = BenchOptions { sizes, batch, repetitions: arguments.repetitions.into(), times, ptx, only };
    if !arguments.json {
        println!("{}, CUDA {}", context.info(), driver_version()?);
        println!("{:<38}{:>10}{:>7}{:>12}{:>10}{:>12}{:>10}", "", "chunk", "chunks", "us", "GB/s", "ceiling", "share");
    }
    bench(&context, &options, |row| if arguments.json { tell_json(row) } else { tell(row) })
}

fn tell_json(row: &Row) {
    println!("{}", serde_json::to_string(row).expect("numbers under text keys"));
}

fn tell(row: &Row) {
    let (what, chunk, chunks) = (&row.what, row.chunk_bytes, row.chunks);
    let (us, rate, ceiling) = (row.seconds * 1e6, row.bytes_per_s / 1e9, row.ceiling_bytes_per_s / 1e9);
    let parameters = row.parameters_per_s.map_or(String::new(), |rate| format!("  {:.2} G parameters/s", rate / 1e9));
    println!("{what:<38}{chunk:>10}{chunks:>7}{us:>12.2}{rate:>10.2}{ceiling:>12.2}{:>10.3}{parameters}", row.share);
}
