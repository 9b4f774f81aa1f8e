//! The benchmarks that are jobs: a job and its raw echo in turn, size by size.
//!
//! Invariant: job and echo have as many processes, move the same bytes in messages of the same size, and have as many of them under
//! way.

use std::{ffi::OsString, time::Duration};

use serde_json::{Map, Value, json};

use super::{
    DtypeArgument, OptimizerArgument, TransportArgument,
    choice::{Choice, Kind},
    echo::{DATAGRAM_BYTES, Repetitions},
    executable,
    show::Show,
    word,
};
use crate::{
    Error, Result,
    launch::{Job, JobOptions, OutputTo},
    observe::Usage,
    session::{Fabric, JobConfig, ShardShape, fabrics::probe_one},
    tools::bench::{
        Figure, Measured, Pace, Row,
        echo::{DATAGRAM_GRAIN, Echo, Flow, Over, Wait},
        median,
        worker::WorkerReport,
    },
    types::Role,
};

/// A job that takes so much longer than it was meant to is stuck.
const PATIENCE: Duration = Duration::from_secs(300);

impl TransportArgument {
    /// What the fabric stands on, if there is a raw echo over that.
    const fn over(self) -> Option<Over> {
        match self {
            TransportArgument::Tcp => Some(Over::Tcp),
            TransportArgument::Shm => Some(Over::Shm),
            TransportArgument::Soft => Some(Over::Udp),
            TransportArgument::Verbs => None,
        }
    }
}

/// The ceilings of one size.
struct Ceilings {
    /// What the rows call the ceiling: over shm with buffers that rotate.
    own: Option<Repetitions>,
    /// Over shm, the same buffers again and again.
    hot: Option<Repetitions>,
    /// Over shm, a count alone.
    line: Option<Repetitions>,
}

/// What one job reached.
pub(in crate::cli) struct Outcome {
    pub figure: Figure,
    /// Processor time of all workers, and of all servers, in the timed rounds.
    pub worker_cpu_s: f64,
    pub server_cpu_s: f64,
    /// How often a payload byte was copied by a processor on its way.
    pub copied: Option<f64>,
}

/// Runs the benchmark.
pub(super) fn run(choice: &Choice) -> Result<()> {
    let configs = choice.sizes.iter().map(|size| choice.config(*size)).collect::<Result<Vec<JobConfig>>>()?;
    if choice.transport == TransportArgument::Verbs {
        let why = |error| Error::Config(format!("--transport verbs: {error}; `gradwire doctor` says what would help"));
        probe_one(Fabric::Verbs).map_err(why)?;
    }
    let mut show = Show::new(choice, &about(choice));
    for (size, config) in choice.sizes.iter().zip(&configs) {
        let row = one_size(choice, *size, config, &mut show)?;
        show.row(row);
    }
    show.finish()
}

fn about(choice: &Choice) -> String {
    let plain = choice.optimizer == OptimizerArgument::None;
    let dtype = if choice.dtype == DtypeArgument::F16 { "f16 (parameters bf16)".into() } else { word(&choice.dtype) };
    let step = match choice.kind {
        Kind::Pull => String::new(),
        _ => format!(
            ", {}, optimizer {}{}",
            choice.consistency,
            word(&choice.optimizer),
            if plain { " (plain SGD, the cheapest step)" } else { "" }
        ),
    };
    let (workers, servers) = (choice.workers, choice.servers);
    format!(
        "over {}, {workers} workers, {servers} servers, {dtype}{step}; notes with checksums, payloads and ceiling without",
        word(&choice.transport)
    )
}

fn one_size(choice: &Choice, size: u64, config: &JobConfig, show: &mut Show<'_>) -> Result<Row> {
    let mut ceilings = Ceilings::new(choice, size, config)?;
    let (mut figures, mut copied) = (Vec::<Figure>::new(), Vec::new());
    for done in 0..choice.repetitions {
        show.progress(size, done);
        ceilings.repeat()?;
        let known = figures.last().copied().or_else(|| ceilings.own.as_ref()?.fastest().map(|(_, figure)| figure));
        let least = if choice.kind == Kind::EndToEnd { choice.backward_ms * 1e3 } else { 0.0 };
        let guess = known.map_or(1e4, |figure| figure.latency_us_p50).max(least);
        let outcome = one_job(choice, size, config, choice.pace(guess))?;
        figures.push(outcome.figure);
        copied.extend(outcome.copied);
    }
    let figure = Figure::median(&figures).expect("there is at least one repetition");
    let ceiling = ceilings.own.as_ref().and_then(Repetitions::fastest);
    let mut more = Map::new();
    more.extend(ceilings.own.as_ref().zip(ceiling).map(|(_, (form, _))| ("ceiling_echo".into(), form.name().into())));
    let mut put = |name: &str, value: Value| drop(more.insert(name.into(), value));
    put("dtype", word(&choice.dtype).into());
    put("repetitions", figures.len().into());
    put("rounds", figure.rounds.into());
    put("seconds", figure.seconds.into());
    put("checksums", "notes".into());
    put("ceiling_over", choice.transport.over().map(Over::name).into());
    put("ceiling_wait", ceiling.map(|_| Wait::Adaptive.name()).into());
    if choice.kind != Kind::Pull {
        put("consistency", config.consistency.to_string().into());
        put("optimizer", word(&choice.optimizer).into());
    }
    if let Some((_, hot)) = ceilings.hot.as_ref().and_then(Repetitions::fastest) {
        put("ceiling_hot_bytes_per_s", hot.bytes_per_s.round().into());
        put("ceiling_hot_latency_us", hot.latency_us_p50.into());
    }
    if let Some((_, line)) = ceilings.line.as_ref().and_then(Repetitions::fastest) {
        put("ceiling_cache_line_us", line.latency_us_p50.into());
    }
    let row = Row {
        benchmark: choice.kind.name(),
        transport: Some(word(&choice.transport)),
        bytes: size,
        workers: Some(choice.workers),
        servers: Some(choice.servers),
        bytes_copied_per_byte_sent: median(copied),
        more,
        ..Row::default()
    };
    let row = row.with(&figure, ceiling.as_ref().map(|(_, figure)| figure));
    Ok(in_its_own_sense(choice, size, row))
}

/// Leaves out what has no meaning for this benchmark, and adds what is its own.
fn in_its_own_sense(choice: &Choice, size: u64, mut row: Row) -> Row {
    match choice.kind {
        Kind::Latency => Row { bytes_per_s: None, ceiling_bytes_per_s: None, ..row },
        Kind::MessageRate => {
            let messages = |rate: Option<f64>| rate.map(|rate| (rate / size as f64).round());
            row.more.insert("window".into(), choice.window.into());
            row.more.insert("messages_per_s".into(), messages(row.bytes_per_s).into());
            row.more.insert("ceiling_messages_per_s".into(), messages(row.ceiling_bytes_per_s).into());
            // A round is many messages: its time is nobody's latency.
            let (latency_us_p50, latency_us_p99, latency_us_p999, ceiling_latency_us) = (None, None, None, None);
            Row { latency_us_p50, latency_us_p99, latency_us_p999, ceiling_latency_us, ..row }
        }
        Kind::EndToEnd => {
            let backward_us = choice.backward_ms * 1e3;
            let exposed = row.latency_us_p50.map(|step| step - backward_us);
            let fields = json!({
                "layers": choice.layers, "backward_us": backward_us, "exposed_us": exposed,
                "ceiling_exchange_us": row.ceiling_latency_us,
            });
            row.more.extend(fields.as_object().cloned().unwrap_or_default());
            // At best the exchange hides behind the backward pass, or the other way round.
            let step_us = row.ceiling_latency_us.map(|exchange| exchange.max(backward_us));
            let payload = (2 * size * u64::from(choice.workers)) as f64;
            Row { ceiling_latency_us: step_us, ceiling_bytes_per_s: step_us.map(|us| payload / us * 1e6), ..row }
        }
        _ => row,
    }
}

impl Ceilings {
    fn new(choice: &Choice, size: u64, config: &JobConfig) -> Result<Ceilings> {
        let none = Ceilings { own: None, hot: None, line: None };
        let Some(over) = choice.transport.over() else { return Ok(none) };
        let bytes = choice.model_bytes(size);
        let shape = ShardShape::even(bytes / choice.element_bytes(), config);
        let datagram = match choice.kind {
            Kind::MessageRate => size.next_multiple_of(DATAGRAM_GRAIN).min(DATAGRAM_BYTES),
            _ => DATAGRAM_BYTES,
        };
        let echo = Echo {
            executable: executable()?,
            over,
            flow: match choice.kind {
                Kind::Push => Flow::There,
                Kind::Pull => Flow::Back,
                _ => Flow::Both,
            },
            wait: Wait::Adaptive,
            bytes,
            piece: config.chunk_bytes / 4 * choice.element_bytes(),
            datagram,
            window: config.slots(&shape)?.into(),
            rotate: false,
            drivers: choice.workers,
            peers: choice.servers,
            pace: choice.free_pace(),
        };
        if over != Over::Shm {
            return Ok(Ceilings { own: Some(Repetitions::new(echo)), ..none });
        }
        let line = Echo { flow: Flow::Line, bytes: 64, piece: 64, peers: 1, drivers: 1, ..echo.clone() };
        Ok(Ceilings {
            own: Some(Repetitions::new(Echo { rotate: true, ..echo.clone() })),
            hot: Some(Repetitions::new(echo)),
            line: (choice.kind == Kind::Latency).then(|| Repetitions::new(line)),
        })
    }

    fn repeat(&mut self) -> Result<()> {
        [&mut self.own, &mut self.hot, &mut self.line].into_iter().flatten().try_for_each(Repetitions::repeat)
    }
}

/// Starts a job, waits for its end, and takes what its ranks measured.
pub(in crate::cli) fn one_job(choice: &Choice, size: u64, config: &JobConfig, pace: Pace) -> Result<Outcome> {
    let Pace::Rounds(rounds) = pace else {
        return Err(Error::Config("a job's workers must agree on a number of rounds".into()));
    };
    let program = executable()?;
    let round = match choice.kind {
        Kind::Push => "push",
        Kind::Pull => "pull",
        Kind::EndToEnd => "step",
        _ => "push-pull",
    };
    let mut command: Vec<OsString> = vec![program.clone().into(), "bench".into(), "worker".into()];
    let arguments = [
        ("--round", round.to_string()),
        ("--bytes", choice.model_bytes(size).to_string()),
        ("--rounds", rounds.to_string()),
        ("--layers", choice.layers.to_string()),
        ("--backward-us", (choice.backward_ms * 1e3).round().to_string()),
    ];
    command.extend(arguments.into_iter().flat_map(|(option, value)| [option.into(), value.into()]));
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
    let (mut reports, mut servers) = (Vec::<WorkerReport>::new(), Vec::<Usage>::new());
    for (rank, summary) in outcome.summaries {
        match rank.role {
            Role::Worker => reports.extend(serde_json::from_value::<WorkerReport>(summary)),
            Role::Server => servers.extend(serde_json::from_value::<Usage>(summary)),
        }
    }
    if (reports.len(), servers.len()) != (config.workers.into(), config.servers.into()) {
        return Err(Error::JobFailed(format!("not every rank of a benchmark reported its figures:\n{output}")));
    }
    Ok(together(&reports, &servers))
}

/// Rates and latencies are the workers'. Servers count their processor time over all rounds, so that of the timed ones is their
/// share of it; bytes sent and copied are those of whole lives.
fn together(reports: &[WorkerReport], servers: &[Usage]) -> Outcome {
    let parts: Vec<Measured> = reports.iter().map(|report| report.measured).collect();
    let figure = Figure::together(&parts);
    let timed = parts.iter().map(|part| part.rounds as f64 / part.rounds_all.max(1) as f64).fold(0.0, f64::max);
    let of_servers: Usage = servers.iter().copied().sum();
    let all: Usage = reports.iter().map(|report| report.used).chain([of_servers]).sum();
    let (worker_cpu_s, server_cpu_s) = (figure.cpu_s, of_servers.cpu_ns as f64 / 1e9 * timed);
    Outcome {
        figure: Figure { cpu_s: worker_cpu_s + server_cpu_s, ..figure },
        worker_cpu_s,
        server_cpu_s,
        copied: (all.sent_bytes > 0).then(|| all.copied_bytes as f64 / all.sent_bytes as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_of_servers_counts_for_the_timed_rounds_alone() {
        let measured = Measured {
            bytes: 1000,
            rounds: 30,
            rounds_all: 40,
            elapsed_ns: 1_000_000_000,
            cpu_ns: 500_000_000,
            latency_ns_p50: 1,
            latency_ns_p99: 2,
            latency_ns_p999: 3,
        };
        let used = Usage { cpu_ns: 9, sent_bytes: 10, copied_bytes: 30 };
        let servers = [Usage { cpu_ns: 2_000_000_000, sent_bytes: 10, copied_bytes: 10 }; 2];
        let outcome = together(&[WorkerReport { measured, used }], &servers);
        assert_eq!((outcome.figure.cpu_s, outcome.copied), (0.5 + 4.0 * 0.75, Some(50.0 / 30.0)));
        assert_eq!(outcome.figure.bytes_per_s, 1000.0);
        assert_eq!(together(&[], &[]).copied, None);
    }
}
