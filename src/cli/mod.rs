//! The command line: `gradwire run`, `node`, `status`, `top`, `set`, `scale`, `remove-worker`, `add-worker`, `checkpoint`, `bench`, `plan`, `info`, `doctor`.
//!
//! Invariant: what a command prints for machines goes to standard output, everything else to standard error; a failure ends with
//! one line that says what happened, to whom, and what to do.
#![forbid(unsafe_code)]

mod bench;
mod checkpoint;
mod doctor;
mod gpu;
mod group;
mod hosts;
mod info;
mod node;
mod plan;
mod run;
mod scale;
mod set;
mod settings;
mod status;
mod top;
mod workers;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::{layer::SubscriberExt, util::SubscriberInitExt};

use crate::Result;

#[derive(Parser)]
#[command(
    name = "gradwire",
    version,
    about = "A parameter server: servers hold the parameters and run the optimizer, workers push gradients and pull parameters.",
    after_help = "Examples:
  gradwire run -s 2 -n 2 -- python3 train.py        two servers, two workers, on this machine
  gradwire run -s 1 -n 4 --consistency ssp:3 -- ./train
  gradwire status                                   what runs here
  gradwire status myjob                             who has joined, and how far they are
  gradwire top myjob                                rates, each second
  gradwire set myjob lr=0.0003                      change a setting while it runs
  gradwire remove-worker myjob 3                    go on without worker 3; add-worker: with another one
  gradwire scale myjob --servers 4                  have servers join, or leave, while it runs
  gradwire checkpoint now myjob                     write a checkpoint now
  gradwire checkpoint export ckpt model.safetensors the parameters, for other tools
  gradwire bench push-pull --bytes 64..64M          how fast it is here, beside what the machine can do
  gradwire plan --params 7B --workers 16 --servers 4
                                                    what such a job would take, and how long a step
  gradwire info                                     what this machine offers
  gradwire doctor                                   what is wrong with its RDMA set-up, and what mends it

`gradwire help COMMAND` says more about one. What is logged is chosen by GRADWIRE_LOG (error, warn, info, debug)."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a job, on this machine or on several, and see it to its end.
    Run(Box<run::RunArguments>),
    /// Be one process of a job: within mpirun, srun or torchrun, or joined to a running job by hand.
    Node(Box<node::NodeArguments>),
    /// Say what this machine offers, and why not more.
    Info(info::InfoArguments),
    /// Say what is wrong with this machine, or with the way to another, and what mends it.
    Doctor(doctor::DoctorArguments),
    /// List the running jobs, or say who has joined one and how far it is.
    Status(status::StatusArguments),
    /// Show a running job in the terminal, each second: rates, clocks, who is behind and why.
    Top(top::TopArguments),
    /// Change settings of a running job, at one clock on every server.
    Set(set::SetArguments),
    /// Have a worker leave a running job, from one clock on.
    RemoveWorker(workers::RemoveArguments),
    /// Have another worker take part in a running job, from one clock on.
    AddWorker(workers::AddArguments),
    /// Have servers join a running job, or leave it; its shards move.
    Scale(scale::ScaleArguments),
    /// Have a running job write a checkpoint; list, verify and export what has been written.
    Checkpoint(checkpoint::CheckpointArguments),
    /// Measure, beside what the machine itself reaches in the same run.
    Bench(bench::BenchArguments),
    /// Hold a GPU to the oracle's bits, and to what it can copy.
    Gpu(gpu::GpuArguments),
    /// Say what a job would take: memory, queue pairs, time of a step and what it waits for.
    Plan(Box<plan::PlanArguments>),
    /// Clear up after a launcher that was killed; started by `gradwire run` for itself.
    #[command(hide = true)]
    Keep(KeepArguments),
    /// Start a job's ranks on this host; started through ssh by `gradwire run` for itself.
    #[command(hide = true)]
    Agent,
}

#[derive(clap::Args)]
struct KeepArguments {
    #[arg(long)]
    job: String,
    #[arg(long)]
    directory: PathBuf,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    let outcome = match arguments.command {
        Command::Run(arguments) => run::run(*arguments),
        Command::Node(arguments) => node::run(*arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Status(arguments) => status::status(&arguments),
        Command::Top(arguments) => top::top(&arguments),
        Command::Set(arguments) => set::set(&arguments),
        Command::RemoveWorker(arguments) => workers::remove(&arguments),
        Command::AddWorker(arguments) => workers::add(&arguments),
        Command::Scale(arguments) => scale::scale(&arguments),
        Command::Checkpoint(arguments) => checkpoint::run(&arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Gpu(arguments) => gpu::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Keep(arguments) => {
            crate::launch::keep(&arguments.job, &arguments.directory);
            Ok(ExitCode::SUCCESS)
        }
        Command::Agent => crate::launch::agent().map(|()| ExitCode::SUCCESS),
    };
    finish(outcome)
}

fn finish(outcome: Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|e| {
        eprintln!("gradwire: {e}");
        // 2 is what clap exits with: the command line or a setting is wrong.
        ExitCode::from(if matches!(e, crate::Error::Config(_)) { 2 } else { 1 })
    })
}

fn start_log() {
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).without_time();
    let log = log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    // Fails only if a log is there already, which then serves.
    let _ = tracing_subscriber::registry().with(log).with(crate::observe::log_filter()).try_init();
}
