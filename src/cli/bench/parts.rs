//! The processes that a benchmark is made of: commands that a benchmark starts for itself.
//!
//! Invariant: each ends with the one that started it, and prints what it measured as JSON on one line.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};

use super::{DtypeArgument, OptimizerArgument, executable};
use crate::{
    Error, Result,
    optim::OptimizerKind,
    tools::bench::{
        Figure, Measured, Pace, disk,
        echo::{self, Drive, Flow, Form, Over, Wait},
        streams::{Loop, Streams},
        worker::{self, Round},
    },
    types::Dtype,
};

#[derive(Subcommand)]
pub(super) enum Part {
    /// A worker of a benchmark's job.
    #[command(hide = true)]
    Worker(WorkerArguments),
    /// An echo's peer.
    #[command(hide = true)]
    EchoPeer {
        #[arg(long)]
        over: Over,
        #[arg(long)]
        callers: u16,
        #[arg(long)]
        wait: Wait,
    },
    /// An echo's driver.
    #[command(hide = true)]
    EchoDriver(DriverArguments),
    /// The optimizer's kernel, or the plain loop over the same memory.
    #[command(hide = true)]
    Streams(StreamsArguments),
    /// The plain write beside a checkpoint.
    #[command(hide = true)]
    PlainWrite {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        bytes: u64,
        #[arg(long)]
        files: u16,
        #[arg(long)]
        direct: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RoundArgument {
    PushPull,
    Push,
    Pull,
    Step,
}

#[derive(Args)]
pub(super) struct WorkerArguments {
    #[arg(long)]
    round: RoundArgument,
    #[arg(long)]
    bytes: u64,
    #[arg(long)]
    rounds: u64,
    #[arg(long, default_value_t = 1)]
    layers: u32,
    #[arg(long, default_value_t = 0)]
    backward_us: u64,
}

#[derive(Args)]
pub(super) struct DriverArguments {
    #[arg(long)]
    over: Over,
    #[arg(long)]
    flow: Flow,
    #[arg(long)]
    wait: Wait,
    #[arg(long = "peer")]
    peers: Vec<String>,
    #[arg(long)]
    piece: u64,
    #[arg(long)]
    datagram: u64,
    #[arg(long)]
    window: u64,
    #[arg(long)]
    rotate: bool,
    #[arg(long)]
    form: Form,
    #[arg(long)]
    rounds: Option<u64>,
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
}

#[derive(Args)]
pub(super) struct StreamsArguments {
    #[arg(long)]
    plain: bool,
    #[arg(long)]
    optimizer: OptimizerArgument,
    #[arg(long)]
    dtype: DtypeArgument,
    #[arg(long)]
    elements: u64,
    #[arg(long)]
    chunk_elements: u32,
    #[arg(long)]
    workers: u16,
    #[arg(long)]
    threads: u16,
    #[arg(long)]
    rounds: Option<u64>,
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
}

impl OptimizerArgument {
    /// What it steps with.
    pub fn kind(self) -> OptimizerKind {
        match self {
            OptimizerArgument::None | OptimizerArgument::Sgd => OptimizerKind::SGD,
            OptimizerArgument::Adam => OptimizerKind::ADAM,
            OptimizerArgument::Adamw => OptimizerKind::ADAMW,
            OptimizerArgument::Adagrad => OptimizerKind::ADAGRAD,
        }
    }
}

impl DtypeArgument {
    /// Of gradients and of parameters.
    pub fn dtypes(self) -> (Dtype, Dtype) {
        match self {
            DtypeArgument::F32 => (Dtype::F32, Dtype::F32),
            DtypeArgument::Bf16 => (Dtype::Bf16, Dtype::Bf16),
            DtypeArgument::F16 => (Dtype::F16, Dtype::Bf16),
        }
    }

    /// Of the copy that a server makes for the wire: none of f32, which is sent from where the parameters lie.
    pub fn copy(self) -> Option<Dtype> {
        Some(self.dtypes().1).filter(|dtype| *dtype != Dtype::F32)
    }
}

impl Part {
    pub fn run(self) -> Result<()> {
        if let Part::Worker(WorkerArguments { round, bytes, rounds, layers, backward_us }) = self {
            let round = match round {
                RoundArgument::PushPull => Round::PushPull,
                RoundArgument::Push => Round::Push,
                RoundArgument::Pull => Round::Pull,
                RoundArgument::Step => Round::Step { layers, backward: Duration::from_micros(backward_us) },
            };
            return worker::work(round, bytes, rounds);
        }
        echo::end_with_parent()?;
        let measured = match self {
            Part::Worker(_) => return Ok(()),
            Part::EchoPeer { over, callers, wait } => return echo::peer(over, callers, wait),
            Part::EchoDriver(arguments) => vec![drive(&arguments)?],
            Part::Streams(arguments) => streams(&arguments)?,
            Part::PlainWrite { dir, bytes, files, direct } => vec![disk::plain_write(&dir, bytes, files, direct)?],
        };
        println!("{}", serde_json::to_string(&measured).expect("numbers under text keys"));
        Ok(())
    }
}

fn drive(arguments: &DriverArguments) -> Result<Measured> {
    let peer = |text: &String| {
        let (address, bytes) = text.split_once(':')?;
        Some((address.to_string(), bytes.parse().ok()?))
    };
    let peers: Option<Vec<(String, u64)>> = arguments.peers.iter().map(peer).collect();
    let peers = peers.ok_or_else(|| Error::Config("--peer takes ADDRESS:BYTES".into()))?;
    let pace = arguments.rounds.map_or(Pace::Seconds(arguments.seconds), Pace::Rounds);
    let DriverArguments { over, flow, wait, piece, datagram, window, rotate, form, .. } = *arguments;
    echo::driver(&Drive { over, flow, peers, piece, datagram, window, rotate, form, wait, pace })
}

fn streams(arguments: &StreamsArguments) -> Result<Vec<Measured>> {
    let (gradient_dtype, _) = arguments.dtype.dtypes();
    let StreamsArguments { plain, elements, chunk_elements, workers, threads, .. } = *arguments;
    let streams = Streams {
        kind: arguments.optimizer.kind(),
        gradient_dtype,
        wire_dtype: arguments.dtype.copy(),
        elements,
        chunk_elements,
        workers,
        threads,
        pace: arguments.rounds.map_or(Pace::Seconds(arguments.seconds), Pace::Rounds),
    };
    streams.run(if plain { Loop::Ceiling } else { Loop::Kernel })
}

/// Runs one of the parts that print what they measured.
///
/// # Errors
///
/// [`Error::JobFailed`] with what it wrote, if it failed.
pub(super) fn measure(arguments: &[String]) -> Result<Figure> {
    let executable = executable()?;
    let mut command = Command::new(&executable);
    let output = command.arg("bench").args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).output();
    let output = output.map_err(|error| Error::os("execve", executable.display().to_string(), error))?;
    let parts: Option<Vec<Measured>> = serde_json::from_slice(&output.stdout).ok();
    match parts {
        Some(parts) if output.status.success() => Ok(Figure::together(&parts)),
        _ => {
            let text = String::from_utf8_lossy(&output.stderr);
            Err(Error::JobFailed(format!("`bench {}` measured nothing: {}", arguments[0], text.trim())))
        }
    }
}

/// `--rounds N` or `--seconds S`.
pub(super) fn pace_arguments(pace: Pace) -> [String; 2] {
    match pace {
        Pace::Rounds(rounds) => ["--rounds".into(), rounds.to_string()],
        Pace::Seconds(seconds) => ["--seconds".into(), seconds.to_string()],
    }
}
