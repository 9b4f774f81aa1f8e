//! What things cost on this machine, for `gradwire plan`: jobs are run and their processor time is told apart by message, byte and
//! parameter; and the plan's predictions are held against jobs of other shapes.
//!
//! Invariant: nothing that a prediction is checked against was used to make it.

use super::{
    DtypeArgument, OptimizerArgument, TransportArgument,
    choice::{Choice, Kind},
    exchange::{Outcome, one_job},
};
use crate::{
    Error, Result,
    optim::OptimizerKind,
    session::JobConfig,
    tools::{
        bench::{
            Figure, Pace, median,
            streams::{Loop, Streams},
        },
        plan::{Cluster, Costs, predict},
    },
    types::Dtype,
};

/// Repetitions of each measurement; medians count.
const REPETITIONS: u16 = 5;

/// Messages of a round by which the cost of one is measured, and their size.
const MESSAGES: u32 = 256;
const MESSAGE_BYTES: u64 = 256;

/// Bytes of a round by which the cost of one is measured.
const BULK_BYTES: u64 = 16 << 20;

/// A job to be measured: its benchmark and what it is told.
struct Shape {
    kind: Kind,
    bytes: u64,
    workers: u16,
    servers: u16,
    dtype: DtypeArgument,
    optimizer: OptimizerArgument,
}

impl Shape {
    fn choice(&self, transport: TransportArgument) -> Choice {
        Choice {
            kind: self.kind,
            sizes: vec![self.bytes],
            transport,
            workers: self.workers,
            servers: self.servers,
            dtype: self.dtype,
            consistency: "bsp".into(),
            optimizer: self.optimizer,
            seconds: 0.3,
            iterations: None,
            repetitions: REPETITIONS,
            window: MESSAGES,
            layers: 1,
            backward_ms: 1.0,
            threads: 1,
            dir: ".".into(),
            settings: Vec::new(),
            json: true,
            plot: None,
        }
    }
}

/// The median of a job's repetitions.
fn run(shape: &Shape, transport: TransportArgument) -> Result<Outcome> {
    let choice = shape.choice(transport);
    let config = choice.config(shape.bytes)?;
    let mut outcomes = Vec::new();
    let mut pace = Pace::Rounds(10);
    for _ in 0..REPETITIONS {
        let outcome = one_job(&choice, shape.bytes, &config, pace)?;
        pace = choice.pace(outcome.figure.latency_us_p50);
        outcomes.push(outcome);
    }
    // The first one only told how long a round takes.
    outcomes.remove(0);
    let figures: Vec<Figure> = outcomes.iter().map(|outcome| outcome.figure).collect();
    let of = |number: fn(&Outcome) -> f64| {
        median(outcomes.iter().map(|outcome| number(outcome) / outcome.figure.rounds).collect())
    };
    let figure = Figure::median(&figures).expect("several repetitions");
    // Processor times are those of one round.
    Ok(Outcome {
        worker_cpu_s: of(|outcome| outcome.worker_cpu_s).unwrap_or(0.0),
        server_cpu_s: of(|outcome| outcome.server_cpu_s).unwrap_or(0.0),
        copied: None,
        figure,
    })
}

fn transport_of(name: &str) -> Result<TransportArgument> {
    let known = [TransportArgument::Tcp, TransportArgument::Shm, TransportArgument::Soft, TransportArgument::Verbs];
    let found = known.into_iter().find(|transport| super::word(transport) == name);
    found.ok_or_else(|| Error::Config(format!("--transport {name}: there are tcp, shm, soft and verbs")))
}

/// Bytes a second at which `threads` threads step AdamW over f32.
fn step_rate(threads: u16) -> Result<f64> {
    let streams = Streams {
        kind: OptimizerKind::ADAMW,
        gradient_dtype: Dtype::F32,
        wire_dtype: None,
        elements: BULK_BYTES * u64::from(threads), // four times as much as the job of that size: no cache holds it
        chunk_elements: JobConfig::default().layout_options().chunk_elements,
        workers: 1,
        threads,
        pace: Pace::Seconds(0.3),
    };
    let runs = (0..REPETITIONS).map(|_| Ok(Figure::together(&streams.run(Loop::Kernel)?).bytes_per_s));
    Ok(median(runs.collect::<Result<Vec<f64>>>()?).expect("several repetitions"))
}

fn cores() -> u16 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(1024) as u16)
}

/// Measures this machine's costs over a fabric. Processor time is what is counted, so that company on the machine disturbs less.
///
/// # Errors
///
/// What a job that fails says.
pub(in crate::cli) fn measure(transport: &str) -> Result<Costs> {
    let fabric = transport_of(transport)?;
    let base = Shape {
        kind: Kind::Latency,
        bytes: 64,
        workers: 1,
        servers: 1,
        dtype: DtypeArgument::F32,
        optimizer: OptimizerArgument::None,
    };
    let round = run(&base, fabric)?;
    let many = run(&Shape { kind: Kind::MessageRate, bytes: MESSAGE_BYTES, ..base }, fabric)?;
    let bulk = run(&Shape { kind: Kind::PushPull, bytes: BULK_BYTES, ..base }, fabric)?;
    let step_bytes_per_s = step_rate(1)?;
    let messages = f64::from(MESSAGES);
    let (worker_message_s, server_message_s) = (many.worker_cpu_s / messages, many.server_cpu_s / messages);
    let chunks = (BULK_BYTES / JobConfig::default().chunk_bytes) as f64;
    // A step of plain SGD moves 12 bytes for each parameter of 4.
    let step_s = BULK_BYTES as f64 / 4.0 * 12.0 / step_bytes_per_s;
    let payload = 2.0 * BULK_BYTES as f64;
    let rest = |cpu_s: f64, message_s: f64, step_s: f64| ((cpu_s - chunks * message_s - step_s) / payload).max(0.0);
    Ok(Costs {
        transport: transport.into(),
        source: format!("measured over {transport} on {} cores by gradwire {}", cores(), env!("CARGO_PKG_VERSION")),
        worker_message_s,
        server_message_s,
        worker_byte_s: rest(bulk.worker_cpu_s, worker_message_s, 0.0),
        server_byte_s: rest(bulk.server_cpu_s, server_message_s, step_s),
        step_bytes_per_s,
        host_step_bytes_per_s: step_rate(cores())?.max(step_bytes_per_s),
        round_s: round.figure.latency_us_p50 / 1e6,
    })
}

/// Predicts jobs of shapes other than those measured, runs them, and prints both.
///
/// # Errors
///
/// What a job that fails says.
pub(in crate::cli) fn check(costs: &Costs, json: bool) -> Result<()> {
    let fabric = transport_of(&costs.transport)?;
    let shape = |bytes, workers, servers, dtype, optimizer| Shape {
        kind: Kind::PushPull,
        bytes,
        workers,
        servers,
        dtype,
        optimizer,
    };
    let (f32, bf16) = (DtypeArgument::F32, DtypeArgument::Bf16);
    let (none, adamw) = (OptimizerArgument::None, OptimizerArgument::Adamw);
    let shapes = [
        shape(4 << 20, 1, 1, f32, adamw),
        shape(32 << 20, 1, 1, f32, none),
        shape(32 << 20, 1, 1, bf16, adamw),
        shape(8 << 20, 2, 1, f32, none),
        shape(8 << 20, 1, 2, f32, adamw),
        shape(8 << 20, 2, 2, bf16, none),
    ];
    let cluster = Cluster { link_bytes_per_s: None, servers_per_link: 1, workers_per_link: 1, cores: Some(cores()) };
    if !json {
        println!("costs: {}", costs.source);
        let names = format!(
            "{:>9}  {:>7}  {:>7}  {:>5}  {:>9}  {:>12}  {:>12}  {:>5}  bottleneck",
            "bytes", "workers", "servers", "dtype", "optimizer", "predicted us", "measured us", "ratio"
        );
        println!("{names}\n{}", "-".repeat(names.len()));
    }
    for shape in shapes {
        let choice = shape.choice(fabric);
        let predicted =
            predict(&choice.config(shape.bytes)?, shape.bytes / choice.element_bytes(), costs, &cluster, 0.0);
        let measured_us = run(&shape, fabric)?.figure.latency_us_p50;
        let predicted_us = predicted.step_s * 1e6;
        let (dtype, optimizer) = (super::word(&shape.dtype), super::word(&shape.optimizer));
        let ratio = predicted_us / measured_us;
        if json {
            let row = serde_json::json!({
                "transport": costs.transport, "bytes": shape.bytes, "workers": shape.workers, "servers": shape.servers,
                "dtype": dtype, "optimizer": optimizer, "predicted_us": predicted_us, "measured_us": measured_us,
                "ratio": ratio, "bottleneck": predicted.bottleneck,
            });
            println!("{row}");
        } else {
            println!(
                "{:>9}  {:>7}  {:>7}  {dtype:>5}  {optimizer:>9}  {predicted_us:>12.1}  {measured_us:>12.1}  {ratio:>5.2}  {}",
                crate::tools::bench::plain_bytes(shape.bytes),
                shape.workers,
                shape.servers,
                predicted.bottleneck
            );
        }
    }
    Ok(())
}
