//! `gradwire run`: from flags to a job, and from the job's end to an exit code.
//!
//! Invariant: every flag that is a setting goes through the same table as the file and the variables.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, ffi::OsString, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use nix::sys::signal::{SigSet, Signal as OsSignal};

use crate::{
    Error, Result,
    launch::{Job, JobOptions, Signal},
    session::gather,
    types::Rank,
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire run -s 2 -n 2 -- python3 train.py --epochs 3
  gradwire run -n 4 --optimizer sgd --learning-rate 0.1 --set optimizer.momentum=0.9 -- ./train
  gradwire run --config job.toml --checkpoint-dir ckpt --checkpoint-every 100 -- ./train
  gradwire run --config job.toml --resume ckpt -- ./train
  gradwire run -s 1 -n 2 --by-hand w1 --listen 10.0.0.1:7000 -- ./train
      worker 1 is started elsewhere, with `gradwire node --role worker --rank 1 --rendezvous 10.0.0.1:7000 -- ./train`

Settings come from flags, then from --config (or GRADWIRE_CONFIG), then from variables: seed is --seed, `seed = 1` in the file,
or GRADWIRE_SEED; checkpoint.every is --checkpoint-every, `every = 5` under [checkpoint], or GRADWIRE_CHECKPOINT_EVERY.

Signals: INT ends the job. TERM and USR1 write a checkpoint at the next clock and end the job with exit code 75 (\"preempted,
requeue me\"); where no checkpoint can be written they are passed on. A second signal ends the job at once.

Exit codes: 0 all went well; 75 preempted; 128 + n ended by signal n; else the code of the rank that failed first.")]
pub(super) struct RunArguments {
    /// Number of servers.
    #[arg(short, long, value_name = "N")]
    servers: Option<String>,
    /// Number of workers.
    #[arg(short = 'n', long, value_name = "N")]
    workers: Option<String>,
    /// The job's name [default: made up].
    #[arg(long)]
    name: Option<String>,
    /// A TOML file with settings.
    #[arg(long, value_name = "FILE", env = "GRADWIRE_CONFIG")]
    config: Option<PathBuf>,
    /// Any setting, by its key.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Shards (pinned threads) of each server.
    #[arg(long, value_name = "N")]
    shards_per_server: Option<String>,
    /// How far ahead of the slowest a worker may run: bsp, ssp:N or asp.
    #[arg(long)]
    consistency: Option<String>,
    /// sgd, adam, adamw or adagrad.
    #[arg(long, value_name = "KIND")]
    optimizer: Option<String>,
    /// Learning rate before the schedule.
    #[arg(long, visible_alias = "lr", value_name = "RATE")]
    learning_rate: Option<String>,
    /// Scale each step's whole gradient, of all tensors, down to this Euclidean norm if it is longer.
    #[arg(long, value_name = "NORM")]
    clip_norm: Option<String>,
    /// Skip a step, on all servers, for which any gradient is not finite.
    #[arg(long)]
    skip_nonfinite: bool,
    /// By what workers multiply their loss, and servers divide gradients: off, a number, or dynamic, which skips steps that are not
    /// finite and changes as torch's GradScaler does.
    #[arg(long, value_name = "MODE")]
    loss_scale: Option<String>,
    /// How gradients become one: mean or sum.
    #[arg(long)]
    reduction: Option<String>,
    /// Gradients on the wire: f32, bf16 or f16.
    #[arg(long, value_name = "DTYPE")]
    gradient_dtype: Option<String>,
    /// Parameters on the wire: f32 or bf16.
    #[arg(long, value_name = "DTYPE")]
    parameter_dtype: Option<String>,
    /// Where servers compute: cpu, gpu (all of each server's machine, a shard each in turn), gpu:0,1 or auto.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Seed of everything random.
    #[arg(long)]
    seed: Option<String>,
    /// Where checkpoints go.
    #[arg(long, value_name = "DIR")]
    checkpoint_dir: Option<String>,
    /// A checkpoint every so many clocks.
    #[arg(long, value_name = "CLOCKS")]
    checkpoint_every: Option<String>,
    /// Continue from the last checkpoint in this directory.
    #[arg(long, value_name = "DIR")]
    resume: Option<String>,
    /// The fabrics that may be used, best first, such as shm,tcp.
    #[arg(long, visible_alias = "transports", value_name = "NAMES")]
    transport: Option<String>,
    /// Soft-RDMA test mode (--transport soft): the share of packets that are lost, such as 0.05.
    #[arg(long, value_name = "CHANCE")]
    soft_loss: Option<String>,
    /// The share of packets that are sent twice.
    #[arg(long, value_name = "CHANCE")]
    soft_duplicate: Option<String>,
    /// The share of packets that later ones overtake.
    #[arg(long, value_name = "CHANCE")]
    soft_reorder: Option<String>,
    /// The share of packets in which a bit is flipped.
    #[arg(long, value_name = "CHANCE")]
    soft_corrupt: Option<String>,
    /// The longest delay of a packet, in microseconds.
    #[arg(long, value_name = "US")]
    soft_delay_us: Option<String>,
    /// The packet of each rank with whose sending its queue pair dies.
    #[arg(long, value_name = "N")]
    soft_die_after: Option<String>,
    /// Seed of these faults.
    #[arg(long, value_name = "SEED")]
    soft_seed: Option<String>,
    /// The network interface for data.
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// The ports for data, such as 20000-20100.
    #[arg(long, value_name = "FIRST-LAST")]
    ports: Option<String>,
    /// Have every process answer with its metrics, in the format of Prometheus, at this address [without one: 127.0.0.1, any port];
    /// `gradwire status` shows where.
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:0")]
    metrics: Option<String>,
    /// Write a timeline of the job, for Perfetto or chrome://tracing, when it ends.
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// The steps that it shows, such as 100..110 [default: the last ones that there is room for].
    #[arg(long, value_name = "A..B", requires = "timeline")]
    timeline_steps: Option<String>,
    /// Where the rendezvous listens; for ranks on other hosts give an address that they can reach.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Ranks that are started by hand, such as w1,s0.
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    by_hand: Vec<String>,
    /// Bind workers to their cores instead of only telling them.
    #[arg(long)]
    bind: bool,
    /// How long a rank that was told to end may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    grace: u64,
    /// What each worker runs.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl RunArguments {
    fn settings(&self) -> Result<Vec<(String, String)>> {
        let skips = self.skip_nonfinite.then(|| "true".to_string());
        let flags = [
            ("optimizer.clip.global_norm", &self.clip_norm),
            ("skip_nonfinite", &skips),
            ("loss_scale.mode", &self.loss_scale),
            ("servers", &self.servers),
            ("workers", &self.workers),
            ("name", &self.name),
            ("shards_per_server", &self.shards_per_server),
            ("consistency", &self.consistency),
            ("optimizer.kind", &self.optimizer),
            ("optimizer.learning_rate", &self.learning_rate),
            ("reduction", &self.reduction),
            ("gradient_dtype", &self.gradient_dtype),
            ("parameter_dtype", &self.parameter_dtype),
            ("device", &self.device),
            ("seed", &self.seed),
            ("checkpoint.dir", &self.checkpoint_dir),
            ("checkpoint.every", &self.checkpoint_every),
            ("resume", &self.resume),
            ("transports", &self.transport),
            ("soft.loss", &self.soft_loss),
            ("soft.duplicate", &self.soft_duplicate),
            ("soft.reorder", &self.soft_reorder),
            ("soft.corrupt", &self.soft_corrupt),
            ("soft.delay_us", &self.soft_delay_us),
            ("soft.die_after", &self.soft_die_after),
            ("soft.seed", &self.soft_seed),
            ("interface", &self.interface),
            ("ports", &self.ports),
            ("metrics", &self.metrics),
            ("timeline", &self.timeline_steps),
        ];
        let mut pairs: Vec<(String, String)> = Vec::new();
        for setting in &self.settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Error::Config(format!("--set takes KEY=VALUE, and `{setting}` has no `=`")))?;
            pairs.push((key.trim().into(), value.trim().into()));
        }
        let given = flags.into_iter().filter_map(|(key, value)| Some((key.to_string(), value.clone()?)));
        pairs.extend(given);
        Ok(pairs)
    }
}

/// Runs a job.
pub(super) fn run(arguments: RunArguments) -> Result<ExitCode> {
    // A made-up name is the weakest of all sources.
    let made_up = format!("job-{:06x}", u32::from_le_bytes(crate::wire::random_bytes()?) & 0xff_ffff);
    let environment = std::iter::once(("GRADWIRE_NAME".to_string(), made_up)).chain(own_environment());
    let config = gather(environment, arguments.config.as_deref(), &arguments.settings()?)?;
    let (name, skips) = (config.name.clone(), config.skips_nonfinite());
    let by_hand = arguments.by_hand.iter().map(|text| rank(text)).collect::<Result<BTreeSet<Rank>>>()?;
    if let Some(stranger) = by_hand.iter().find(|rank| rank.index >= config.ranks_of(rank.role)) {
        return Err(Error::Config(format!("--by-hand names {stranger}, but the job has no such rank")));
    }
    let executable = std::env::current_exe().map_err(|e| Error::os("readlink", "/proc/self/exe", e))?;
    let mut options = JobOptions::new(config, arguments.command, executable);
    options.timeline = arguments.timeline;
    options.by_hand = by_hand;
    options.listen = arguments.listen;
    options.bind = arguments.bind;
    options.grace = Duration::from_secs(arguments.grace);
    // Before any thread is started: all of them inherit the mask, and one of them waits for these signals.
    let signals = block_signals()?;
    let mut job = Job::start(options)?;
    eprintln!("gradwire: job {name}, directory {}", job.directory().display());
    for text in &arguments.by_hand {
        let rank = rank(text)?;
        let role = rank.to_string().replace(' ', " --rank ");
        eprintln!("gradwire: waiting for {rank}: gradwire node --rendezvous {} --role {role}", job.address());
    }
    forward_signals(signals, job.signaller())?;
    let outcome = job.wait();
    if let Some(reason) = &outcome.reason {
        eprintln!("gradwire: job {name}: {reason}");
    }
    if let (count @ 1.., _) = outcome.not_finite {
        let what =
            if skips { "steps were skipped: a gradient was" } else { "steps were taken with a gradient that was" };
        eprintln!("gradwire: job {name}: {count} {what} not finite");
    }
    if !outcome.paths.is_empty() {
        let paths: Vec<String> = outcome.paths.iter().map(|(fabric, count)| format!("{count} over {fabric}")).collect();
        eprintln!("gradwire: job {name}: paths between workers and shards: {}", paths.join(", "));
    }
    Ok(ExitCode::from(outcome.code))
}

/// The environment as far as it is text, without what a launcher around this one has set for its own ranks.
fn own_environment() -> impl Iterator<Item = (String, String)> {
    let nested = std::env::var_os("GRADWIRE_RENDEZVOUS").is_some();
    let inherited = move |name: &str| nested && matches!(name, "GRADWIRE_WORKERS" | "GRADWIRE_SERVERS");
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    all.filter(move |(name, _)| !inherited(name))
}

/// "w1", "worker:1" or "s0".
fn rank(text: &str) -> Result<Rank> {
    let digits = text.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == ':');
    let role = text[..text.len() - digits.len()].trim_end_matches(':');
    match (role, digits.parse()) {
        ("w" | "worker", Ok(index)) => Ok(Rank::worker(index)),
        ("s" | "server", Ok(index)) => Ok(Rank::server(index)),
        _ => Err(Error::Config(format!("`{text}` names no rank; write w1 for worker 1, s0 for server 0"))),
    }
}

fn block_signals() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [OsSignal::SIGINT, OsSignal::SIGTERM, OsSignal::SIGUSR1, OsSignal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().map_err(|e| Error::os("pthread_sigmask", "the launcher's signals", e))?;
    Ok(signals)
}

fn forward_signals(signals: SigSet, send: impl Fn(Signal) + Send + 'static) -> Result<()> {
    let forward = move || {
        while let Ok(signal) = signals.wait() {
            send(match signal {
                OsSignal::SIGTERM | OsSignal::SIGUSR1 => Signal::Preempt(signal as i32),
                _ => Signal::Interrupt,
            });
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(forward);
    thread.map(drop).map_err(|e| Error::os("pthread_create", "the signal thread", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_short_names() {
        assert_eq!(rank("w1").unwrap(), Rank::worker(1));
        assert_eq!(rank("server:12").unwrap(), Rank::server(12));
        for wrong in ["", "1", "x1", "w", "w-1", "w99999"] {
            assert!(rank(wrong).is_err(), "{wrong}");
        }
    }
}
