//! One benchmark as it was asked for: what was left open is filled in, and what means nothing to it is refused.
//!
//! Invariant: nothing given on the command line is ignored.

use std::path::PathBuf;

use super::{DtypeArgument, OptimizerArgument, Options, TransportArgument, word};
use crate::{
    Error, Result,
    session::{JobConfig, gather},
    tools::bench::{Pace, echo::BYTES_MAX, parse_sizes, plain_bytes},
};

/// Elements of a tensor lie in groups of 16; of f32 these are 64 bytes.
const GRAIN: u64 = 64;

/// A chunk has a multiple of so many elements.
const CHUNK_GRAIN: u64 = 64;

/// Which benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    PushPull,
    Push,
    Pull,
    Latency,
    MessageRate,
    EndToEnd,
    Optimizer,
    Checkpoint,
}

/// A benchmark with all that it needs.
#[derive(Debug)]
pub(super) struct Choice {
    pub kind: Kind,
    pub sizes: Vec<u64>,
    pub transport: TransportArgument,
    pub workers: u16,
    pub servers: u16,
    pub dtype: DtypeArgument,
    pub consistency: String,
    pub optimizer: OptimizerArgument,
    pub seconds: f64,
    pub iterations: Option<u64>,
    pub repetitions: u16,
    pub window: u32,
    pub layers: u32,
    pub backward_ms: f64,
    pub threads: u16,
    pub dir: PathBuf,
    pub settings: Vec<String>,
    pub json: bool,
    pub plot: Option<PathBuf>,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Kind::PushPull => "push-pull",
            Kind::Push => "push",
            Kind::Pull => "pull",
            Kind::Latency => "latency",
            Kind::MessageRate => "message-rate",
            Kind::EndToEnd => "end-to-end",
            Kind::Optimizer => "optimizer",
            Kind::Checkpoint => "checkpoint",
        }
    }

    /// What the table calls its rate.
    pub const fn rate(self) -> &'static str {
        match self {
            Kind::PushPull | Kind::Latency | Kind::EndToEnd => "push+pull",
            Kind::Push => "pushed",
            Kind::Pull => "pulled",
            Kind::MessageRate => "both ways",
            Kind::Optimizer => "memory",
            Kind::Checkpoint => "written",
        }
    }

    const fn default_bytes(self) -> u64 {
        match self {
            Kind::PushPull | Kind::Push | Kind::Pull => 1 << 20,
            Kind::Latency => 64,
            Kind::MessageRate => 256,
            Kind::EndToEnd | Kind::Optimizer | Kind::Checkpoint => 64 << 20,
        }
    }

    const fn default_optimizer(self) -> OptimizerArgument {
        match self {
            Kind::EndToEnd | Kind::Optimizer | Kind::Checkpoint => OptimizerArgument::Adamw,
            _ => OptimizerArgument::None,
        }
    }

    /// Why an option means nothing here.
    fn why_not(self, option: &str) -> Option<&'static str> {
        const OF_MESSAGE_RATE: &str = "it goes with message-rate alone";
        const OF_END_TO_END: &str = "it goes with end-to-end alone";
        Some(match (self, option) {
            (Kind::MessageRate, "window") | (Kind::EndToEnd, "layers" | "backward-ms") => return None,
            (Kind::Optimizer, "threads") | (Kind::Checkpoint, "dir") => return None,
            (_, "window") => OF_MESSAGE_RATE,
            (_, "layers" | "backward-ms") => OF_END_TO_END,
            (_, "threads") => "it goes with optimizer alone",
            (_, "dir") => "it goes with checkpoint alone",
            (Kind::Pull, "consistency") => "nothing is pushed, so nobody runs ahead",
            (Kind::Pull, "optimizer") => "nothing is pushed, so nothing is stepped",
            (Kind::Optimizer, "transport") => "it steps over the memory of one process and sends nothing",
            (Kind::Optimizer, "servers") => "it is one server's memory; --threads shares it",
            (Kind::Optimizer, "consistency") => "every step is the same step",
            (Kind::Checkpoint, "transport") => "it writes to a disk and sends nothing",
            (Kind::Checkpoint, "workers") => "workers write no checkpoint",
            (Kind::Checkpoint, "consistency") => "what is written does not depend on it",
            (Kind::Checkpoint, "dtype") => "a checkpoint's state is f32",
            (Kind::Checkpoint, "seconds" | "iterations") => "a repetition writes one checkpoint",
            _ => return None,
        })
    }
}

impl Choice {
    /// Fills in and checks.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] naming what has no meaning, and sizes that cannot be.
    pub fn new(kind: Kind, options: &Options) -> Result<Choice> {
        let given = [
            ("transport", options.transport.is_some()),
            ("workers", options.workers.is_some()),
            ("servers", options.servers.is_some()),
            ("dtype", options.dtype.is_some()),
            ("consistency", options.consistency.is_some()),
            ("optimizer", options.optimizer.is_some()),
            ("seconds", options.seconds.is_some()),
            ("iterations", options.iterations.is_some()),
            ("window", options.window.is_some()),
            ("layers", options.layers.is_some()),
            ("backward-ms", options.backward_ms.is_some()),
            ("threads", options.threads.is_some()),
            ("dir", options.dir.is_some()),
        ];
        for (option, _) in given.into_iter().filter(|(_, given)| *given) {
            if let Some(why) = kind.why_not(option) {
                return Err(Error::Config(format!("--{option} means nothing to {}: {why}", kind.name())));
            }
        }
        let positive = |option: &str, number: f64| match number.is_finite() && number > 0.0 {
            true => Ok(number),
            false => Err(Error::Config(format!("--{option} {number}: give a number above 0"))),
        };
        let choice = Choice {
            kind,
            sizes: if options.bytes.is_empty() { vec![kind.default_bytes()] } else { parse_sizes(&options.bytes)? },
            transport: options.transport.unwrap_or(TransportArgument::Tcp),
            workers: options.workers.unwrap_or(1),
            servers: options.servers.unwrap_or(1),
            dtype: options.dtype.unwrap_or(DtypeArgument::F32),
            consistency: options.consistency.clone().unwrap_or_else(|| "bsp".into()),
            optimizer: options.optimizer.unwrap_or(kind.default_optimizer()),
            seconds: positive("seconds", options.seconds.unwrap_or(0.5))?,
            iterations: options.iterations,
            repetitions: options.repetitions,
            window: options.window.unwrap_or(64),
            layers: options.layers.unwrap_or(16),
            backward_ms: positive("backward-ms", options.backward_ms.unwrap_or(20.0))?,
            threads: options.threads.unwrap_or(1),
            dir: options.dir.clone().unwrap_or_else(|| PathBuf::from(".")),
            settings: options.settings.clone(),
            json: options.json,
            plot: options.plot.clone(),
        };
        choice.sizes.iter().try_for_each(|size| choice.check(*size))?;
        Ok(choice)
    }

    fn check(&self, size: u64) -> Result<()> {
        let (grain, what) = match self.kind {
            Kind::MessageRate => (CHUNK_GRAIN * self.element_bytes(), "a message is a chunk of"),
            Kind::EndToEnd => (GRAIN * u64::from(self.layers), "a model of so many layers has"),
            _ => (GRAIN, "a size is"),
        };
        // A message is a chunk, which counts in f32.
        let most = match self.kind {
            Kind::MessageRate => (64 << 20) / 4 * self.element_bytes(),
            _ => BYTES_MAX,
        };
        match size.is_multiple_of(grain) && size <= most {
            true => Ok(()),
            false => Err(Error::Config(format!(
                "--bytes {size}: {what} a multiple of {grain}, at most {}",
                plain_bytes(most)
            ))),
        }
    }

    /// Bytes of an element on the wire.
    pub fn element_bytes(&self) -> u64 {
        if self.dtype == DtypeArgument::F32 { 4 } else { 2 }
    }

    /// Bytes of the whole model whose rounds are measured at this size.
    pub fn model_bytes(&self, size: u64) -> u64 {
        if self.kind == Kind::MessageRate { size * u64::from(self.window) } else { size }
    }

    /// The time or the number of rounds, if a round takes about so long.
    pub fn pace(&self, round_us: f64) -> Pace {
        self.iterations.map_or_else(|| Pace::filling(self.seconds, round_us), Pace::Rounds)
    }

    /// The time or the number of rounds, where nobody must agree on the latter.
    pub fn free_pace(&self) -> Pace {
        self.iterations.map_or(Pace::Seconds(self.seconds), Pace::Rounds)
    }

    /// The settings of the job that is measured at this size.
    pub fn config(&self, size: u64) -> Result<JobConfig> {
        let (dtype, optimizer) = (word(&self.dtype), word(&self.optimizer));
        let kind = if optimizer == "none" { "sgd".into() } else { optimizer };
        let parameters = if self.dtype == DtypeArgument::F16 { "bf16".into() } else { dtype.clone() };
        let name = format!("bench-{:06x}", u32::from_le_bytes(crate::wire::random_bytes()?) & 0xff_ffff);
        let flags = [
            ("name", name),
            ("servers", self.servers.to_string()),
            ("workers", self.workers.to_string()),
            ("transports", word(&self.transport)),
            ("gradient_dtype", dtype),
            ("parameter_dtype", parameters),
            ("consistency", self.consistency.clone()),
            ("optimizer.kind", kind),
            ("optimizer.learning_rate", "0.001".into()),
        ];
        let mut pairs: Vec<(String, String)> = flags.map(|(key, value)| (key.to_string(), value)).into();
        if self.kind == Kind::MessageRate {
            pairs.push(("chunk_bytes".into(), (size / self.element_bytes() * 4).to_string()));
        }
        for setting in &self.settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Error::Config(format!("--set takes KEY=VALUE, and `{setting}` has no `=`")))?;
            let own = [
                ("transports", "name the fabric with --transport"),
                ("workers", "use --workers"),
                ("servers", "use --servers"),
            ];
            if let Some((_, instead)) = own.iter().find(|(own, _)| *own == key.trim()) {
                return Err(Error::Config(format!("--set {}: {instead}", key.trim())));
            }
            if key.trim() == "chunk_bytes" && self.kind == Kind::MessageRate {
                return Err(Error::Config("--set chunk_bytes: a message is a chunk, so --bytes says it".into()));
            }
            pairs.push((key.trim().into(), value.trim().into()));
        }
        gather(std::iter::empty(), None, &pairs)
    }
}
