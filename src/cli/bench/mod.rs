//! `gradwire bench`: starts a benchmark and its ceiling in turn, and prints both side by side.
//!
//! Invariant: a benchmark and its ceiling are processes of their own, measured in the same run, repetition by repetition; an option
//! that means nothing to a benchmark is refused by its name.
#![forbid(unsafe_code)]

mod choice;
pub(super) mod costs;
mod echo;
mod exchange;
mod help;
mod local;
mod parts;
mod show;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand, ValueEnum};

use self::choice::{Choice, Kind};
use crate::{Error, Result, tools::bench::parse_sizes};

#[derive(Args)]
#[command(after_help = help::ALL)]
pub(super) struct BenchArguments {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// Push a gradient, pull the new parameters: the rate and the time of a round.
    #[command(after_help = help::PUSH_PULL)]
    PushPull(Box<Options>),
    /// Push gradients one after the other, wanting nothing back.
    #[command(after_help = help::PUSH)]
    Push(Box<Options>),
    /// Pull the parameters again and again; nothing is pushed.
    #[command(after_help = help::PULL)]
    Pull(Box<Options>),
    /// The time of small rounds, to the 99.9th percentile.
    #[command(after_help = help::LATENCY)]
    Latency(Box<Options>),
    /// How many small messages go a second, many under way at once.
    #[command(after_help = help::MESSAGE_RATE)]
    MessageRate(Box<Options>),
    /// The optimizer's kernel over a server's memory, with no fabric at all.
    #[command(after_help = help::OPTIMIZER)]
    Optimizer(Box<Options>),
    /// Write a checkpoint of so much state.
    #[command(after_help = help::CHECKPOINT)]
    Checkpoint(Box<Options>),
    /// A training step of a made-up model: a backward pass, and pushes that overlap with it.
    #[command(after_help = help::END_TO_END)]
    EndToEnd(Box<Options>),
    /// The ceiling of the exchanges by itself: bytes sent by raw means and back.
    #[command(after_help = help::ECHO)]
    Echo(echo::EchoArguments),
    #[command(flatten)]
    Part(parts::Part),
}

/// What all benchmarks may be told. What one of them has no use for it refuses.
#[derive(Args)]
struct Options {
    /// Sizes, or ranges that go up by a factor of 4; what they are of is said below.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', num_args = 1..)]
    bytes: Vec<String>,
    /// The fabric, which is the job's setting `transports` [default: tcp].
    #[arg(long)]
    transport: Option<TransportArgument>,
    /// Number of workers [default: 1].
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    /// Number of servers [default: 1].
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    servers: Option<u16>,
    /// Gradients and parameters on the wire; with f16 parameters travel as bf16, which has as many bytes [default: f32].
    #[arg(long)]
    dtype: Option<DtypeArgument>,
    /// How far ahead of the slowest a worker may run: bsp, ssp:N or asp [default: bsp].
    #[arg(long, value_name = "KIND")]
    consistency: Option<String>,
    /// What the servers step with; none is plain SGD, the cheapest step there is.
    #[arg(long, value_name = "KIND")]
    optimizer: Option<OptimizerArgument>,
    /// How long each repetition takes, about [default: 0.5].
    #[arg(long, conflicts_with = "iterations")]
    seconds: Option<f64>,
    /// Rounds of each repetition, instead of --seconds.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    iterations: Option<u64>,
    /// How often each size is measured, the ceiling in turn; medians are printed.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Messages under way at once (message-rate) [default: 64].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    window: Option<u32>,
    /// Tensors of the model (end-to-end) [default: 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    layers: Option<u32>,
    /// Milliseconds of the backward pass (end-to-end) [default: 20].
    #[arg(long, value_name = "MS")]
    backward_ms: Option<f64>,
    /// Threads that step, each with a part (optimizer) [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The folder to write to (checkpoint) [default: the current one].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Any setting of the job, by its key.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Print one JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// Also draw the rows and their ceilings as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TransportArgument {
    Tcp,
    Shm,
    Soft,
    Verbs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DtypeArgument {
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OptimizerArgument {
    None,
    Sgd,
    Adam,
    Adamw,
    Adagrad,
}

/// The word that stands for a value on the command line.
fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

/// Runs a benchmark, or a part of one.
pub(super) fn run(arguments: BenchArguments) -> Result<ExitCode> {
    let exchange = |kind, options: &Options| exchange::run(&Choice::new(kind, options)?);
    match arguments.benchmark {
        Benchmark::PushPull(options) => exchange(Kind::PushPull, &options)?,
        Benchmark::Push(options) => exchange(Kind::Push, &options)?,
        Benchmark::Pull(options) => exchange(Kind::Pull, &options)?,
        Benchmark::Latency(options) => exchange(Kind::Latency, &options)?,
        Benchmark::MessageRate(options) => exchange(Kind::MessageRate, &options)?,
        Benchmark::EndToEnd(options) => exchange(Kind::EndToEnd, &options)?,
        Benchmark::Optimizer(options) => local::optimizer(&Choice::new(Kind::Optimizer, &options)?)?,
        Benchmark::Checkpoint(options) => local::checkpoint(&Choice::new(Kind::Checkpoint, &options)?)?,
        Benchmark::Echo(arguments) => echo::run(&arguments)?,
        Benchmark::Part(part) => part.run()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn executable() -> Result<PathBuf> {
    std::env::current_exe().map_err(|error| Error::os("readlink", "/proc/self/exe", error))
}

fn one_size(option: &str, text: &str) -> Result<u64> {
    match parse_sizes(&[text.to_string()])?[..] {
        [size] => Ok(size),
        _ => Err(Error::Config(format!("{option} {text} is a range; give one size"))),
    }
}
