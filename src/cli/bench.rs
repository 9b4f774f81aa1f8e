//! `gradwire bench`: starts a benchmark's job and its ceiling in turn, and prints both side by side.
//!
//! Invariant: job and ceiling are processes of their own, measured in the same run, repetition by repetition.
#![forbid(unsafe_code)]

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use crate::{
    Error, Result,
    launch::{Job, JobOptions, OutputTo},
    session::{JobConfig, gather},
    tools::bench::{
        Figure, Measured, Pace, Row,
        echo::{self, BYTES_MAX, DATAGRAM_GRAIN, DATAGRAM_MAX, Drive, Echo, Form, Over, Wait},
        header, parse_sizes, plain_bytes, push_pull,
    },
    types::Role,
};

/// What the fabric `soft` puts into a datagram, headers not counted.
const DATAGRAM_BYTES: u64 = 4096;

/// Elements of a tensor lie in groups of 16; of f32 these are 64 bytes.
const GRAIN: u64 = 64;

/// A job that takes so much longer than it was meant to is stuck.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Args)]
pub(super) struct BenchArguments {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// Push a gradient, pull the new parameters: the rate and the time of a round, beside a raw echo.
    #[command(after_help = "Examples:
  gradwire bench push-pull                                 1 MiB, one worker, one server
  gradwire bench push-pull --bytes 64..64M --json          64, 256, 1024 ... 67108864 bytes, an object a line
  gradwire bench push-pull --bytes 16M --optimizer adamw --workers 2

For each size a job is started (real servers, real workers, the real fabric) and, in turn with it, the fabric's ceiling: a raw
echo, as many processes that send the same bytes by the means that the fabric stands on and get them back. Over tcp these are
plain sockets, over shm copies into memory that both sides map, over soft datagrams of 4096 bytes. Figures are medians over the
repetitions; a warm-up of a tenth of the time goes before each. The rate counts payload in both directions; a round is over when
all new parameters are in the worker's memory. `x ceiling` is the median of a round in units of the echo's.

The echo comes back whole or, above a chunk, also piece by piece as push-pull does; the faster of the two is the ceiling. Its
processes wait as gradwire's own threads do (`bench echo --wait adaptive`). Notes and headers carry their checksums as always;
payloads carry none, on either side.

--optimizer none: a server always takes a step; this is the cheapest there is, plain SGD, which reads the gradient, reads and
writes the master parameters and writes the wire copy.")]
    PushPull(Box<PushPullArguments>),
    /// The ceiling by itself: bytes sent by raw means and back.
    #[command(after_help = "Examples:
  gradwire bench echo --bytes 64..64M
  gradwire bench echo --over shm --bytes 64..64M --wait spin

--over tcp   loopback sockets, TCP_NODELAY, the kernel's buffer sizes; the peer sends back what it got
--over shm   two processes share a memfd: the driver copies its bytes in, the peer copies as many of its own back; whoever
             sleeps is woken by an eventfd. Nobody reads what he was sent, but for once, after the last round
--over udp   loopback datagrams of --datagram bytes, up to 32 a system call, no more under way than the sockets' buffers hold;
             the peer sends each one back at once

--wait adaptive   as gradwire's threads: look again for up to 20 us if the last waits were that short, then sleep in the kernel
--wait sleep      sleep in the kernel at once
--wait spin       look again and again (for 100 ms at most, then sleep): no wake-up is paid, every process needs a core")]
    Echo(EchoArguments),
    /// A worker of a push-pull benchmark's job.
    #[command(hide = true)]
    PushPullWorker {
        #[arg(long)]
        bytes: u64,
        #[arg(long)]
        rounds: u64,
    },
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
}

/// What all benchmarks are told.
#[derive(Args)]
struct Common {
    /// Payload of a round in each direction: sizes, or ranges that go up by a factor of 4.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', num_args = 1.., default_value = "1MiB")]
    bytes: Vec<String>,
    /// How long each repetition takes, about.
    #[arg(long, default_value_t = 0.5, conflicts_with = "iterations")]
    seconds: f64,
    /// Rounds of each repetition, instead of --seconds.
    #[arg(long, value_name = "N")]
    iterations: Option<u64>,
    /// How often each size is measured; medians are printed.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Number of workers, or of echo drivers.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Number of servers, or of echo peers.
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    servers: u16,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PushPullArguments {
    #[command(flatten)]
    common: Common,
    /// The fabric: the job's setting `transports`.
    #[arg(long, default_value = "tcp")]
    transport: TransportArgument,
    /// Gradients and parameters on the wire.
    #[arg(long, default_value = "f32")]
    dtype: DtypeArgument,
    /// What the servers step with.
    #[arg(long, value_name = "KIND", default_value = "none")]
    optimizer: OptimizerArgument,
    /// Any setting of the job, by its key.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

#[derive(Args)]
struct EchoArguments {
    #[command(flatten)]
    common: Common,
    /// By what means the bytes go.
    #[arg(long, value_name = "MEANS", default_value = "tcp", hide_possible_values = true)]
    over: Over,
    /// What a process does that has nothing to do: adaptive, sleep or spin.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", hide_possible_values = true)]
    wait: Wait,
    /// Bytes of a piece; peers share the pieces.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    piece: String,
    /// Bytes of a datagram, for --over udp [default: 4KiB].
    #[arg(long, value_name = "SIZE")]
    datagram: Option<String>,
}

#[derive(Args)]
struct DriverArguments {
    #[arg(long)]
    over: Over,
    #[arg(long)]
    wait: Wait,
    #[arg(long = "peer")]
    peers: Vec<String>,
    #[arg(long)]
    piece: u64,
    #[arg(long)]
    datagram: u64,
    #[arg(long)]
    form: Form,
    #[arg(long)]
    rounds: Option<u64>,
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum TransportArgument {
    Tcp,
    Shm,
    Soft,
}

impl TransportArgument {
    /// What the fabric stands on.
    const fn over(self) -> Over {
        match self {
            TransportArgument::Tcp => Over::Tcp,
            TransportArgument::Shm => Over::Shm,
            TransportArgument::Soft => Over::Udp,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArgument {
    F32,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
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
    match arguments.benchmark {
        Benchmark::PushPull(arguments) => push_pull(&arguments)?,
        Benchmark::Echo(arguments) => raw_echo(&arguments)?,
        Benchmark::PushPullWorker { bytes, rounds } => drop(push_pull::work(bytes, rounds)?),
        Benchmark::EchoPeer { over, callers, wait } => {
            echo::end_with_parent()?;
            echo::peer(over, callers, wait)?;
        }
        Benchmark::EchoDriver(arguments) => {
            echo::end_with_parent()?;
            let measured = drive(&arguments)?;
            println!("{}", serde_json::to_string(&measured).expect("numbers under text keys"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn drive(arguments: &DriverArguments) -> Result<Measured> {
    let peer = |text: &String| {
        let (address, bytes) = text.split_once(':')?;
        Some((address.to_string(), bytes.parse().ok()?))
    };
    let peers: Option<Vec<(String, u64)>> = arguments.peers.iter().map(peer).collect();
    let peers = peers.ok_or_else(|| Error::Config("--peer takes ADDRESS:BYTES".into()))?;
    let pace = arguments.rounds.map_or(Pace::Seconds(arguments.seconds), Pace::Rounds);
    let DriverArguments { over, wait, piece, datagram, form, .. } = *arguments;
    echo::driver(&Drive { over, peers, piece, datagram, form, wait, pace })
}

impl Common {
    fn sizes(&self) -> Result<Vec<u64>> {
        let sizes = parse_sizes(&self.bytes)?;
        match sizes.iter().find(|size| !size.is_multiple_of(GRAIN) || **size > BYTES_MAX) {
            None => Ok(sizes),
            Some(size) => Err(Error::Config(format!(
                "--bytes {size}: a size is a multiple of {GRAIN}, at most {}",
                plain_bytes(BYTES_MAX)
            ))),
        }
    }

    fn pace(&self) -> Pace {
        self.iterations.map_or(Pace::Seconds(self.seconds), Pace::Rounds)
    }

    /// The echo over `over`, of no bytes yet, as gradwire's threads wait.
    fn echo(&self, over: Over, piece: u64) -> Result<Echo> {
        let (executable, wait, datagram) = (executable()?, Wait::Adaptive, DATAGRAM_BYTES);
        let (drivers, peers, pace) = (self.workers, self.servers, self.pace());
        Ok(Echo { executable, over, wait, bytes: 0, piece, datagram, drivers, peers, pace })
    }
}

fn executable() -> Result<PathBuf> {
    std::env::current_exe().map_err(|error| Error::os("readlink", "/proc/self/exe", error))
}

/// Repetitions of one form of the echo.
type Rounds = Vec<(Form, Vec<Figure>)>;

/// One more repetition of every form.
fn repeat_echo(echo: &Echo, rounds: &mut Rounds) -> Result<()> {
    for form in echo.forms() {
        let figure = echo.run(*form)?;
        match rounds.iter_mut().find(|(known, _)| known == form) {
            Some((_, figures)) => figures.push(figure),
            None => rounds.push((*form, vec![figure])),
        }
    }
    Ok(())
}

/// The fastest form by its median.
fn fastest(rounds: &Rounds) -> Option<(Form, Figure)> {
    let medians = rounds.iter().filter_map(|(form, figures)| Some((*form, Figure::median(figures)?)));
    medians.max_by(|a, b| a.1.bytes_per_s.total_cmp(&b.1.bytes_per_s))
}

impl EchoArguments {
    fn echo(&self) -> Result<Echo> {
        let echo = self.common.echo(self.over, one_size("--piece", &self.piece)?)?;
        let datagram = match &self.datagram {
            None => echo.datagram,
            Some(_) if self.over != Over::Udp => {
                return Err(Error::Config("--datagram goes with --over udp alone".into()));
            }
            Some(text) => one_size("--datagram", text)?,
        };
        if !datagram.is_multiple_of(DATAGRAM_GRAIN) || datagram > DATAGRAM_MAX {
            return Err(Error::Config(format!(
                "--datagram {datagram}: a datagram has a multiple of {DATAGRAM_GRAIN} bytes, at most {DATAGRAM_MAX}"
            )));
        }
        Ok(Echo { wait: self.wait, datagram, ..echo })
    }
}

fn one_size(option: &str, text: &str) -> Result<u64> {
    match parse_sizes(&[text.to_string()])?[..] {
        [size] => Ok(size),
        _ => Err(Error::Config(format!("{option} {text} is a range; give one size"))),
    }
}

fn raw_echo(arguments: &EchoArguments) -> Result<()> {
    let common = &arguments.common;
    let echo = arguments.echo()?;
    for bytes in common.sizes()? {
        let echo = Echo { bytes, ..echo.clone() };
        let mut rounds = Rounds::new();
        for _ in 0..common.repetitions {
            repeat_echo(&echo, &mut rounds)?;
        }
        for (form, figures) in &rounds {
            let Some(figure) = Figure::median(figures) else { continue };
            let Figure { bytes_per_s, latency_us_p50, latency_us_p99 } = figure;
            if common.json {
                let json = serde_json::json!({
                    "benchmark": "echo", "transport": echo.over.name(), "bytes": bytes, "echo": form.name(),
                    "wait": echo.wait.name(),
                    "workers": common.workers, "servers": common.servers, "repetitions": common.repetitions,
                    "goodput_bytes_per_s": bytes_per_s.round(),
                    "latency_us_p50": latency_us_p50, "latency_us_p99": latency_us_p99,
                });
                println!("{json}");
            } else {
                let (size, rate) = (plain_bytes(bytes), bytes_per_s / 1e6);
                println!(
                    "{size:>9}  {:<6}  {rate:>9.1} MB/s  p50 {latency_us_p50:>9.1} us  p99 {latency_us_p99:>9.1} us",
                    form.name()
                );
            }
        }
    }
    Ok(())
}

impl PushPullArguments {
    fn config(&self) -> Result<JobConfig> {
        let (dtype, optimizer) = (word(&self.dtype), word(&self.optimizer));
        let kind = if optimizer == "none" { "sgd".into() } else { optimizer };
        let name = format!("bench-{:06x}", u32::from_le_bytes(crate::wire::random_bytes()?) & 0xff_ffff);
        let flags = [
            ("name", name),
            ("servers", self.common.servers.to_string()),
            ("workers", self.common.workers.to_string()),
            ("transports", word(&self.transport)),
            ("gradient_dtype", dtype.clone()),
            ("parameter_dtype", dtype),
            ("optimizer.kind", kind),
            ("optimizer.learning_rate", "0.001".into()),
        ];
        let mut pairs: Vec<(String, String)> = flags.map(|(key, value)| (key.to_string(), value)).into();
        for setting in &self.settings {
            let pair = setting.split_once('=');
            let (key, value) =
                pair.ok_or_else(|| Error::Config(format!("--set takes KEY=VALUE, and `{setting}` has no `=`")))?;
            if key.trim() == "transports" {
                return Err(Error::Config("--set transports: name the fabric with --transport".into()));
            }
            pairs.push((key.trim().into(), value.trim().into()));
        }
        gather(std::iter::empty(), None, &pairs)
    }

    /// Bytes of a chunk on the wire.
    fn piece(&self, config: &JobConfig) -> u64 {
        config.chunk_bytes / 4 * config.gradient_dtype.size() as u64
    }
}

fn push_pull(arguments: &PushPullArguments) -> Result<()> {
    let common = &arguments.common;
    let sizes = common.sizes()?;
    let config = arguments.config()?;
    let echo = common.echo(arguments.transport.over(), arguments.piece(&config))?;
    if !common.json {
        let (transport, dtype, optimizer) =
            (word(&arguments.transport), word(&arguments.dtype), word(&arguments.optimizer));
        let note = if optimizer == "none" { " (plain SGD, the cheapest step)" } else { "" };
        let (workers, servers, repetitions) = (common.workers, common.servers, common.repetitions);
        println!(
            "push-pull over {transport}, {workers} workers, {servers} servers, {dtype}, optimizer {optimizer}{note}, medians of \
             {repetitions}\n{}",
            header()
        );
    }
    for bytes in sizes {
        let echo = Echo { bytes, ..echo.clone() };
        let (mut raw, mut figures) = (Rounds::new(), Vec::<Figure>::new());
        for _ in 0..common.repetitions {
            repeat_echo(&echo, &mut raw)?;
            let known = figures.last().copied().or_else(|| fastest(&raw).map(|(_, figure)| figure));
            let guess = known.map_or(1e6, |figure| figure.latency_us_p50);
            let pace = common.iterations.map_or_else(|| Pace::filling(common.seconds, guess), Pace::Rounds);
            figures.push(one_job(&config, bytes, pace)?);
        }
        let (Some(figure), Some((form, ceiling))) = (Figure::median(&figures), fastest(&raw)) else { continue };
        let row = Row {
            benchmark: "push-pull",
            transport: word(&arguments.transport),
            bytes,
            workers: common.workers,
            servers: common.servers,
            dtype: word(&arguments.dtype),
            optimizer: word(&arguments.optimizer),
            repetitions: figures.len(),
            figure,
            ceiling,
            ceiling_over: echo.over.name(),
            ceiling_wait: echo.wait.name(),
            ceiling_echo: form.name(),
        };
        if common.json { println!("{}", row.json()) } else { println!("{}", row.line()) }
    }
    Ok(())
}

/// Starts a job, waits for its end, and takes what its workers measured.
fn one_job(config: &JobConfig, bytes: u64, pace: Pace) -> Result<Figure> {
    let (Pace::Rounds(rounds), program) = (pace, executable()?) else {
        return Err(Error::Config("a job's workers must agree on a number of rounds".into()));
    };
    let mut command: Vec<OsString> = vec![program.clone().into()];
    let (bytes, rounds) = (bytes.to_string(), rounds.to_string());
    command.extend(["bench", "push-pull-worker", "--bytes", &bytes, "--rounds", &rounds].map(OsString::from));
    let mut options = JobOptions::new(config.clone(), command, program);
    options.output = OutputTo::Collect;
    let mut job = Job::start(options)?;
    let outcome = job.wait_for(PATIENCE);
    let output = job.output();
    let Some(outcome) = outcome else {
        return Err(Error::JobFailed(format!("a benchmark's job did not end; it has written:\n{output}")));
    };
    if let Some(reason) = outcome.reason {
        return Err(Error::JobFailed(format!("a benchmark's job: {reason}\n{output}")));
    }
    let workers = outcome.summaries.into_iter().filter(|(rank, _)| rank.role == Role::Worker);
    let parts: std::result::Result<Vec<Measured>, _> =
        workers.map(|(_, summary)| serde_json::from_value(summary)).collect();
    match parts {
        Ok(parts) if parts.len() == usize::from(config.workers) => Ok(Figure::together(&parts)),
        _ => Err(Error::JobFailed(format!("not every worker of a benchmark reported its figures:\n{output}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_form_is_the_ceiling() {
        let figure = |rate| Figure { bytes_per_s: rate, latency_us_p50: 1.0, latency_us_p99: 1.0 };
        let rounds = vec![
            (Form::Whole, vec![figure(3.0), figure(1.0), figure(9.0)]),
            (Form::Pieces, vec![figure(4.0), figure(4.0), figure(5.0)]),
        ];
        assert_eq!(fastest(&rounds), Some((Form::Pieces, figure(4.0))));
        assert_eq!(fastest(&Rounds::new()), None);
    }
}
