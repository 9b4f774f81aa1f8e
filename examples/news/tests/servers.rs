//! Training on servers, with real processes: what many workers compute is what one computes, and it repeats bit for bit.
//!
//! The titles are made here and the models are small, so nothing is downloaded and a job takes seconds. Servers and workers are
//! this test program itself, started again (see `rank_process`).
//!
//! Invariant: every job here has a deadline and leaves no process behind, also when its test fails.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result};
use gradwire::{
    launch::{Job, JobOptions, Outcome, OutputTo},
    session::{JobConfig, Member},
};
use gradwire_news::{
    cli::defaults,
    data::{LABELS, Split, Title},
    gradwire_home::{Seat, optimizer},
    home::{Home, Hyper, Opened, Rule},
    order::Order,
    tensors::TensorDecl,
    train::{Model, TrainConfig, train},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Long enough for a busy machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(120);
const TRAINING_ROWS: usize = 100;
const EPOCHS: usize = 8;
/// Rows of all workers together a clock: 50 clocks in all.
const GLOBAL_BATCH: usize = 16;
const CLOCKS: u64 = 50;

const ADAMW: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8 };

/// What a worker process is told.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Plan {
    lstm: bool,
    rule: Rule,
    learning_rate: f64,
    dropout: f32,
}

/// What it leaves behind.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Trace {
    losses: Vec<f32>,
    /// Of the parameters after each clock.
    digests: Vec<String>,
    names: Vec<String>,
    /// The first and the last parameters, as bits: numbers in JSON are for people.
    first: Vec<Vec<u32>>,
    last: Vec<Vec<u32>>,
}

impl Plan {
    fn config(&self, seed: u64, workers: usize) -> TrainConfig {
        let tuned = defaults(if self.lstm { Model::Lstm } else { Model::Decoder });
        TrainConfig {
            seed,
            epochs: EPOCHS,
            batch: GLOBAL_BATCH / workers,
            width: 32,
            hidden: 48,
            dropout: self.dropout,
            token_dropout: self.dropout,
            next_token: 0.2,
            rule: self.rule,
            learning_rate: self.learning_rate,
            ..tuned
        }
    }
}

/// A job to run: how many ranks, and what is particular to it.
#[derive(Clone)]
struct Run {
    plan: Plan,
    servers: u16,
    workers: u16,
    seed: u64,
    change: fn(&mut JobConfig, &Path),
}

impl Run {
    fn new(plan: Plan, workers: u16) -> Self {
        Self { plan, servers: 2, workers, seed: 5, change: |_, _| {} }
    }

    /// Runs it to its end; `place` keeps its files, and gets the workers' traces.
    fn outcome(&self, place: &Path) -> (Outcome, String) {
        let home = place.join("home");
        fs::create_dir_all(&home).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(place.join("plan.json"), serde_json::to_string(&self.plan).unwrap()).unwrap();
        let mut config = JobConfig {
            name: "news-test".to_string(),
            servers: self.servers,
            workers: self.workers,
            seed: self.seed,
            optimizer: optimizer(&self.plan.config(self.seed, self.workers.into()).hyper(CLOCKS)),
            // Small, so that tensors span chunks, chunks span tensors, and every shard has several.
            chunk_bytes: 16 << 10,
            ..JobConfig::default()
        };
        (self.change)(&mut config, place);
        // The keeper clears up after a launcher that was killed. Here the launcher is the test, and nobody kills it.
        let mut options = JobOptions::new(config, shell("train", place), "true");
        options.server_command = shell("serve", place);
        options.home = Some(home);
        options.output = OutputTo::Collect;
        let mut job = Job::start(options).unwrap();
        let outcome = job.wait_for(PATIENCE);
        let output = job.output();
        (outcome.unwrap_or_else(|| panic!("the job did not end; it has written:\n{output}")), output)
    }

    /// Runs it to its good end; gives the traces by rank.
    fn traces(&self, place: &Path) -> Vec<Trace> {
        let (outcome, output) = self.outcome(place);
        assert_eq!(outcome.code, 0, "{:?}\n{output}", outcome.reason);
        let read = |rank| serde_json::from_slice(&fs::read(trace_file(place, rank)).unwrap()).unwrap();
        (0..usize::from(self.workers)).map(read).collect()
    }
}

fn trace_file(place: &Path, rank: usize) -> PathBuf {
    place.join(format!("worker-{rank}.json"))
}

/// A command that becomes this program in the part of a rank; the arguments that a server is given after it are the shell's.
fn shell(part: &str, place: &Path) -> Vec<std::ffi::OsString> {
    let program = std::env::current_exe().unwrap();
    let line = format!(
        "NEWS_PART={part} NEWS_PLACE='{}' exec '{}' --exact rank_process --nocapture --test-threads=1",
        place.display(),
        program.display()
    );
    ["sh", "-c", &line].map(Into::into).to_vec()
}

/// Not a test: a rank of the jobs below. Started by the test runner it does nothing.
#[test]
fn rank_process() {
    let Ok(part) = std::env::var("NEWS_PART") else { return };
    let place = PathBuf::from(std::env::var_os("NEWS_PLACE").unwrap());
    let outcome = match part.as_str() {
        "serve" => Member::from_environment().and_then(gradwire::server::run).map_err(Into::into),
        _ => train_as_worker(&place),
    };
    if let Err(error) = &outcome {
        println!("rank process: {error:#}");
    }
    std::process::exit(outcome.is_err().into());
}

fn train_as_worker(place: &Path) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
    let plan: Plan = serde_json::from_slice(&fs::read(place.join("plan.json"))?)?;
    let seat = Seat::take()?.context("a worker is started by a job")?;
    let (config, workers) = (plan.config(seat.seed(), seat.workers()), seat.workers());
    let trace = Rc::<RefCell<Trace>>::default();
    let mut seat = Some(seat);
    let mut open = |tensors: &[TensorDecl], hyper: &Hyper| -> Result<Opened> {
        let mut opened = seat.take().context("opened once")?.open(tensors, hyper)?;
        let names = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        trace.replace(Trace { names, first: bits(&opened.parameters), ..Trace::default() });
        opened.home = Box::new(Traced(opened.home, trace.clone()));
        Ok(opened)
    };
    let split = Split {
        train: (0..TRAINING_ROWS).collect(),
        held_out: (TRAINING_ROWS..TRAINING_ROWS + LABELS.len()).collect(),
    };
    let outcome = train(&config, &titles(), &split, workers, &mut open)?;
    let mut trace = trace.take();
    trace.losses = outcome.losses;
    fs::write(trace_file(place, outcome.rank), serde_json::to_string(&trace)?)?;
    Ok(())
}

/// Titles whose class shows in two characters at a place that varies.
fn titles() -> Vec<Title> {
    let signs = ["学校", "明星", "基金", "游戏", "选举", "楼盘", "芯片", "警方", "球赛", "股市"];
    let title = |row: usize| {
        let filler: String = "天地玄黄宇宙洪荒日月盈昃".chars().cycle().skip(row % 11).take(2 + row % 7).collect();
        Title { label: row % 10, text: format!("{filler}{}{filler}", signs[row % 10]) }
    };
    (0..TRAINING_ROWS + LABELS.len()).map(title).collect()
}

fn bits(parameters: &[Vec<f32>]) -> Vec<Vec<u32>> {
    parameters.iter().map(|tensor| tensor.iter().map(|value| value.to_bits()).collect()).collect()
}

/// A home that is watched.
struct Traced(Box<dyn Home>, Rc<RefCell<Trace>>);

impl Home for Traced {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn workers(&self) -> usize {
        self.0.workers()
    }

    fn push(&mut self, tensor: usize, gradient: Vec<f32>) -> Result<()> {
        self.0.push(tensor, gradient)
    }

    fn wait(&mut self, parameters: &mut [Vec<f32>]) -> Result<()> {
        self.0.wait(parameters)?;
        let mut trace = self.1.borrow_mut();
        let mut hash = Sha256::new();
        parameters.iter().flatten().for_each(|value| hash.update(value.to_bits().to_le_bytes()));
        trace.digests.push(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        trace.last = bits(parameters);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.0.finish()
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

fn float(bits: &u32) -> f64 {
    f64::from(f32::from_bits(*bits))
}

/// Two workers with half the batch each, and one with all of it.
fn two_and_one(plan: Plan) -> (Vec<Trace>, Trace) {
    let places = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let two = Run::new(plan, 2).traces(places[0].path());
    let one = Run::new(plan, 1).traces(places[1].path()).remove(0);
    assert_eq!(one.losses.len() as u64, CLOCKS);
    assert_eq!(two[0].digests, two[1].digests, "under bsp all workers see the same parameters at every clock");
    assert_eq!(two[0].first, one.first, "the servers draw the first parameters from the seed alone");
    (two, one)
}

/// Summation order in the workers' own matrix products is the only difference allowed.
fn assert_same_parameters(plan: Plan) {
    let (two, one) = two_and_one(plan);
    let mut worst = 0f64;
    for (at, name) in one.names.iter().enumerate() {
        let (first, one, two) = (&one.first[at], &one.last[at], &two[0].last[at]);
        let size = norm(one.iter().map(float));
        let moved = norm(one.iter().zip(first).map(|(a, b)| float(a) - float(b)));
        let apart = norm(one.iter().zip(two).map(|(a, b)| float(a) - float(b)));
        assert!(moved > 1e-3 * size, "{plan:?}: {name} has hardly moved: {moved:e} of {size:e}");
        assert!(apart <= 1e-5 * size, "{plan:?}: {name} is {apart:e} apart, its norm is {size:e}");
        worst = worst.max(apart / size);
    }
    println!("{plan:?}: a tensor is at most {worst:e} of its norm apart");
}

#[test]
fn two_workers_with_sgd_are_one_with_twice_the_batch() {
    for lstm in [false, true] {
        assert_same_parameters(Plan { lstm, rule: Rule::Sgd, learning_rate: 0.2, dropout: 0.0 });
    }
}

#[test]
fn two_workers_with_momentum_are_one_with_twice_the_batch() {
    for lstm in [false, true] {
        assert_same_parameters(Plan { lstm, rule: Rule::Momentum(0.9), learning_rate: 0.03, dropout: 0.0 });
    }
}

/// Where a true gradient is zero, as for attention's key bias, Adam turns rounding noise into full steps: elementwise comparison
/// means nothing there, the loss does.
#[test]
fn two_workers_with_adamw_have_the_loss_of_one_with_twice_the_batch() {
    for lstm in [false, true] {
        let (two, one) = two_and_one(Plan { lstm, rule: ADAMW, learning_rate: 3e-3, dropout: 0.0 });
        let mut worst = 0f64;
        for (clock, alone) in one.losses.iter().enumerate() {
            let together = (f64::from(two[0].losses[clock]) + f64::from(two[1].losses[clock])) / 2.0;
            let apart = (together - f64::from(*alone)).abs();
            assert!(apart < 1e-4, "lstm {lstm}, clock {clock}: {together} and {alone}");
            worst = worst.max(apart);
        }
        println!("lstm {lstm}: the losses are at most {worst:e} apart");
        let (first, last) = (one.losses[0], one.losses[one.losses.len() - 1]);
        assert!(last < 0.85 * first, "lstm {lstm}: the loss went from {first} to {last} only");
    }
}

#[test]
fn a_seed_gives_the_same_bits_every_time_on_any_number_of_servers() {
    for lstm in [false, true] {
        let run = Run::new(Plan { lstm, rule: ADAMW, learning_rate: 3e-3, dropout: 0.3 }, 2);
        let digests = |run: &Run| run.traces(tempfile::tempdir().unwrap().path()).remove(0).digests;
        let first = digests(&run);
        assert_eq!(first.len() as u64, CLOCKS);
        assert_eq!(first, digests(&run), "lstm {lstm}: a second run");
        assert_eq!(first, digests(&Run { servers: 3, ..run.clone() }), "lstm {lstm}: three servers");
        assert_ne!(first.last(), digests(&Run { seed: 6, ..run }).last(), "lstm {lstm}: another seed");
    }
}

#[test]
fn a_job_resumed_from_its_checkpoint_ends_with_the_same_bits() {
    let place = tempfile::tempdir().unwrap();
    let mut run = Run::new(Plan { lstm: false, rule: ADAMW, learning_rate: 3e-3, dropout: 0.3 }, 2);
    run.change = |config, place| {
        config.checkpoint.dir = Some(place.join("checkpoints"));
        config.checkpoint.every = Some(20);
        config.checkpoint.at_end = false;
    };
    let whole = run.traces(place.path()).remove(0);
    run.change = |config, place| config.resume = Some(place.join("checkpoints"));
    let tail = run.traces(place.path()).remove(0);
    assert_eq!(tail.digests.len(), 10, "clocks 40 to 49");
    assert_eq!(whole.digests[40..], tail.digests);
    assert_eq!(whole.losses[40..], tail.losses);
}

#[test]
fn settings_that_are_not_the_runs_end_the_job_by_name() {
    let plan = Plan { lstm: true, rule: ADAMW, learning_rate: 3e-3, dropout: 0.0 };
    let changes: [(&str, fn(&mut JobConfig, &Path)); 2] = [
        ("optimizer.learning_rate = 0.5 instead of 0.003", |config, _| config.optimizer.learning_rate = 0.5),
        ("optimizer.groups = []", |config, _| config.optimizer.groups.clear()),
    ];
    for (expected, change) in changes {
        let place = tempfile::tempdir().unwrap();
        let (outcome, output) = Run { change, ..Run::new(plan, 1) }.outcome(place.path());
        let reason = outcome.reason.unwrap();
        assert_ne!(outcome.code, 0);
        assert!(reason.contains(expected) && reason.contains("news settings"), "{reason}\n{output}");
        assert!(!trace_file(place.path(), 0).exists(), "no step was taken");
    }
}

#[test]
fn the_made_titles_fill_the_planned_clocks() {
    let config = Plan { lstm: true, rule: ADAMW, learning_rate: 1.0, dropout: 0.0 }.config(1, 2);
    let order = Order::new(TRAINING_ROWS, 1, (0, 2), config.batch, config.sharding);
    assert_eq!(order.clocks(config.epochs), CLOCKS);
}
