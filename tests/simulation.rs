//! The simulator drives the real server and worker through seeds and judges by what the workers receive.
//!
//! The ledger: every worker's gradient is -1 in its own elements and 0 elsewhere, the servers sum and step with rate 1, so that
//! each element counts how many updates of one worker are in it. Staleness, lost, doubled and torn updates are then read off the
//! parameters themselves.
//!
//! `GRADWIRE_SEEDS` sets the number of seeds of each test, `GRADWIRE_SEED` runs one alone. Without them some tests try other seeds with
//! every commit (`sample`).

#[path = "simulation/bits.rs"]
mod bits;
#[path = "simulation/copies.rs"]
mod copies;
#[path = "simulation/decided.rs"]
mod decided;
#[path = "simulation/decided_moves.rs"]
mod decided_moves;
#[path = "simulation/elastic.rs"]
mod elastic;
#[path = "simulation/elastic_copies.rs"]
mod elastic_copies;
#[path = "simulation/elastic_moves.rs"]
mod elastic_moves;
#[path = "simulation/live.rs"]
mod live;
#[path = "simulation/moves.rs"]
mod moves;
#[path = "simulation/rebuilt.rs"]
mod rebuilt;
#[path = "simulation/states.rs"]
mod states;

use std::{collections::HashMap, time::Duration};

use gradwire::{
    consistency::Consistency,
    layout::{Layout, LayoutOptions, TensorSpec},
    optim::{OptimizerConfig, OptimizerKind, Reduction},
    transport::sim::SimRandom,
    types::{ChunkId, Clock},
    world::{At, Chaos, Outcome, Program, WorldOptions, run},
};

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    match number("GRADWIRE_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("GRADWIRE_SEEDS").map_or(default, |seeds| seeds.min(default.max(seeds)))).collect(),
    }
}

/// So many seeds in a row of the first `all`, from a place that the commit decides, so that other seeds are tried with every change;
/// `GRADWIRE_SEEDS` and `GRADWIRE_SEED` do as always.
fn sample(count: u64, all: u64) -> Vec<u64> {
    if ["GRADWIRE_SEED", "GRADWIRE_SEEDS"].iter().any(|name| std::env::var_os(name).is_some()) {
        return seeds(count);
    }
    let mut git = std::process::Command::new("git");
    let head = git.args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "HEAD"]).output();
    let commit = head.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let first = u64::from_str_radix(commit.get(..8).unwrap_or("0"), 16).unwrap_or(0) % all;
    println!("{count} of {all} seeds, from {first} on");
    (0..count).map(|offset| (first + offset) % all).collect()
}

/// A number that depends on all of its parts.
fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x51_7c_c1_b7, |state, part| SimRandom::new(state ^ part).bits())
}

struct Ledger {
    seed: u64,
    workers: u64,
    consistency: Consistency,
    separate_pull: bool,
    layout: Layout,
    /// By worker: the clocks that it trains.
    clocks: Vec<Clock>,
    /// Pushed so far, by worker and chunk.
    pushed: HashMap<(u16, u32), Clock>,
    received: u64,
}

impl Ledger {
    fn new(options: &WorldOptions) -> Ledger {
        let layout = LayoutOptions { chunk_elements: options.chunk_elements, shards: options.servers };
        Ledger {
            seed: options.seed,
            workers: options.declarations.len() as u64,
            consistency: options.consistency,
            separate_pull: options.separate_pull,
            layout: Layout::build(&options.declarations, layout).unwrap(),
            clocks: (0..options.declarations.len() as u16).map(|worker| options.clocks_of(worker)).collect(),
            pushed: HashMap::new(),
            received: 0,
        }
    }

    fn gives(&self, worker: u16, chunk: ChunkId, clock: Clock) -> bool {
        !mix(&[self.seed, worker.into(), chunk.0.into(), clock]).is_multiple_of(6)
    }

    /// Updates that `worker` has given to `chunk` in the clocks before `end`.
    fn given(&self, worker: u16, chunk: ChunkId, end: Clock) -> f32 {
        let end = end.min(self.clocks[usize::from(worker)]);
        (0..end).filter(|clock| self.gives(worker, chunk, *clock)).count() as f32
    }

    fn bounds(&self, at: At, worker: u16) -> (Clock, Clock) {
        let pushed = self.pushed.get(&(worker, at.chunk.0)).copied().unwrap_or(0);
        let own = worker == at.worker;
        let end = at.clock.wrapping_add(1);
        match self.consistency {
            Consistency::Bsp => (end, end),
            _ if self.separate_pull => (0, pushed),
            _ if own => (end, end),
            Consistency::Ssp { bound } => (end.saturating_sub(bound), pushed),
            Consistency::Asp => (0, pushed),
        }
    }
}

impl Program for Ledger {
    fn gradient(&mut self, at: At, _parameters: &[f32], gradient: &mut [f32]) -> bool {
        self.pushed.insert((at.worker, at.chunk.0), at.clock + 1);
        for (element, value) in gradient.iter_mut().enumerate() {
            *value = if element as u64 % self.workers == u64::from(at.worker) { -1.0 } else { 0.0 };
        }
        self.gives(at.worker, at.chunk, at.clock)
    }

    fn received(&mut self, at: At, parameters: &[f32]) -> Result<(), String> {
        self.received += 1;
        let contributors = &self.layout.chunk(at.chunk).contributors;
        for worker in 0..self.workers as u16 {
            let mut counts = parameters.iter().skip(worker.into()).step_by(self.workers as usize);
            let count = *counts.next().expect("a chunk has more elements than workers");
            if counts.any(|other| *other != count) {
                return Err(format!("{at:?}: an update of worker {worker} is there by half"));
            }
            if !contributors.contains(&worker) {
                if count != 0.0 {
                    return Err(format!("{at:?}: worker {worker} has no part in this chunk, yet it was updated"));
                }
                continue;
            }
            let (low, high) = self.bounds(at, worker);
            let (low, high) = (self.given(worker, at.chunk, low), self.given(worker, at.chunk, high));
            if count < low || count > high {
                return Err(format!("{at:?}: {count} updates of worker {worker}, not within [{low}, {high}]"));
            }
        }
        Ok(())
    }
}

/// A job that the seed thinks up.
fn options(seed: u64) -> WorldOptions {
    let mut random = SimRandom::new(seed.wrapping_mul(0x9e37_79b9) ^ 0xabcdef);
    let workers = 1 + random.below(4) as usize;
    let mut declarations = vec![Vec::new(); workers];
    for tensor in 0..1 + random.below(6) {
        let spec = TensorSpec::new(format!("t{tensor}"), [1 + random.below(120)]);
        let everybody = random.once_in(2) || tensor == 0;
        for declaration in declarations.iter_mut() {
            if everybody || random.once_in(2) {
                declaration.push(spec.clone());
            }
        }
    }
    let consistency = match random.below(3) {
        0 => Consistency::Bsp,
        1 => Consistency::Ssp { bound: random.below(4) },
        _ => Consistency::Asp,
    };
    WorldOptions {
        seed,
        servers: 1 + random.below(3) as u16,
        declarations,
        chunk_elements: 16 * (1 + random.below(3)) as u32,
        slots: 1 + random.below(5) as u32,
        consistency,
        reduction: Reduction::Sum,
        optimizer: OptimizerConfig::new(OptimizerKind::SGD, 1.0),
        two_step: random.once_in(3),
        skip_nonfinite: false,
        loss_scale: Default::default(),
        clocks: 1 + random.below(8),
        uneven: false,
        hasty: false,
        sets_rates: false,
        requests: false,
        copies: false,
        store_fails: false,
        moves: false,
        change_from: None,
        change_live: None,
        elastic: Default::default(),
        separate_pull: random.once_in(4),
        checkpoint_every: random.once_in(3).then(|| 1 + random.below(3)),
        chaos: Chaos::Calm,
        delay_max: Duration::from_micros(1 + random.below(30_000)),
    }
}

fn ledger(options: &WorldOptions) -> (Outcome, Ledger) {
    let mut ledger = Ledger::new(options);
    match run(options, &mut ledger) {
        Ok(outcome) => (outcome, ledger),
        Err(wrong) => panic!("seed {}: {wrong}\n{options:#?}", options.seed),
    }
}

/// Every update of every worker is in the final state, once.
fn check_finals(options: &WorldOptions, outcome: &Outcome, ledger: &Ledger) {
    for snapshot in &outcome.finals {
        for image in &snapshot.chunks {
            for (element, value) in image.master.iter().enumerate() {
                let worker = (element as u64 % ledger.workers) as u16;
                let part = ledger.layout.chunk(image.chunk).contributors.contains(&worker);
                let expected = if part { ledger.given(worker, image.chunk, options.clocks) } else { 0.0 };
                assert_eq!(*value, expected, "seed {}, chunk {}, worker {worker}", options.seed, image.chunk.0);
            }
        }
    }
}

/// A stored state under BSP is exactly the state between two clocks.
fn check_snapshots(options: &WorldOptions, outcome: &Outcome, ledger: &Ledger) {
    for snapshot in outcome.snapshots.iter().flatten() {
        for image in &snapshot.chunks {
            for (element, value) in image.master.iter().enumerate() {
                let worker = (element as u64 % ledger.workers) as u16;
                if ledger.layout.chunk(image.chunk).contributors.contains(&worker) {
                    let least = ledger.given(worker, image.chunk, snapshot.clock);
                    let exact = options.consistency.aggregates();
                    let right = if exact { *value == least } else { *value >= least };
                    assert!(right, "seed {}: {value} at clock {} for {least}", options.seed, snapshot.clock);
                }
            }
        }
    }
}

fn check_undisturbed(options: &WorldOptions) {
    let (outcome, ledger) = ledger(options);
    if let Some((who, error)) = &outcome.failure {
        panic!("seed {}: {who} failed: {error}\n{options:#?}", options.seed);
    }
    let parts = ledger.layout.chunks.iter().flat_map(|chunk| &chunk.contributors);
    let answers: u64 = parts.map(|worker| options.clocks_of(*worker) + u64::from(!options.hasty)).sum();
    assert_eq!(ledger.received, answers, "seed {}", options.seed);
    check_finals(options, &outcome, &ledger);
    check_snapshots(options, &outcome, &ledger);
    let all_stay = options.consistency.aggregates() && !options.uneven;
    if let Some(every) = options.checkpoint_every.filter(|_| all_stay) {
        let stored = (options.clocks - 1) / every;
        for (shard, snapshots) in outcome.snapshots.iter().enumerate() {
            let empty = outcome.finals[shard].chunks.is_empty();
            assert!(empty || snapshots.len() as u64 >= stored, "seed {}: {} stored", options.seed, snapshots.len());
        }
    }
}

#[test]
fn delays_and_reordering() {
    for seed in seeds(1000) {
        check_undisturbed(&options(seed));
    }
}

/// Workers that leave while others go on, some of them with pushes under way, and checkpoints asked for in between. Found by this:
/// in two steps, the last pushes of a worker were reduced and never applied when a chunk that only others had a part in was
/// through with its clocks.
#[test]
fn workers_leave_at_different_clocks_and_checkpoints_are_asked_for() {
    for seed in seeds(1000) {
        let uneven = !seed.is_multiple_of(4);
        let hasty = seed.is_multiple_of(3);
        check_undisturbed(&WorldOptions { uneven, hasty, requests: true, ..options(seed + 40_000) });
    }
}

#[test]
fn partitions_shorter_than_the_deadline_do_no_harm() {
    for seed in seeds(500) {
        let chaos = Chaos::Partitions(Duration::from_secs(4));
        check_undisturbed(&WorldOptions { chaos, ..options(seed + 10_000) });
    }
}

/// Workers that own tensors alone are not kept together by every reply: while one still owes its part of a clock, another has
/// pushed the next. The jobs of the other tests hardly ever get there.
#[test]
fn a_checkpoint_is_a_state_between_two_clocks() {
    for seed in seeds(200) {
        let mut random = SimRandom::new(!seed);
        let workers = 2 + random.below(3) as usize;
        let own = |worker: usize| TensorSpec::new(format!("own{worker}"), [16 + 8 * worker as u64]);
        let declarations = (0..workers).map(|worker| vec![TensorSpec::new("all", [16]), own(worker)]).collect();
        check_undisturbed(&WorldOptions {
            declarations,
            servers: 1,
            chunk_elements: 16,
            slots: 4 + random.below(12) as u32,
            consistency: Consistency::Bsp,
            clocks: 8,
            checkpoint_every: Some(1 + random.below(3)),
            ..options(seed + 40_000)
        });
    }
}

/// In this version a broken path, a death and a stopped process end the job, and the report names the one that is gone.
#[test]
fn what_breaks_is_reported_by_name() {
    check_reports(600, |seed| options(seed + 20_000));
}

/// The same where servers have paths to each other, which break too.
#[test]
fn what_breaks_between_servers_is_reported_by_name() {
    check_reports(300, |seed| deciding(seed + 70_000));
}

fn check_reports(count: u64, job: impl Fn(u64) -> WorldOptions) {
    let mut reported = 0;
    for seed in seeds(count) {
        let chaos = [Chaos::BrokenPath, Chaos::Death, Chaos::Stop][seed as usize % 3];
        let options = WorldOptions { chaos, clocks: 6, ..job(seed) };
        let (outcome, ledger) = ledger(&options);
        let Some((one, other)) = outcome.victims else {
            assert!(outcome.failure.is_none(), "seed {seed}: nothing was broken, yet {:?}", outcome.failure);
            check_finals(&options, &outcome, &ledger);
            continue;
        };
        let Some((who, error)) = outcome.failure else {
            // It was broken when nothing more was owed over it.
            continue;
        };
        reported += 1;
        let text = error.to_string();
        let named = if chaos == Chaos::BrokenPath {
            (who == one && text.contains(&other.to_string())) || (who == other && text.contains(&one.to_string()))
        } else {
            who != one && text.contains(&one.to_string())
        };
        assert!(named, "seed {seed}: {one} / {other} was lost, {who} says: {text}");
        assert!(outcome.elapsed < Duration::from_secs(60), "seed {seed}: noticed after {:?}", outcome.elapsed);
    }
    assert!(reported > 0 || seeds(count).len() < 50, "no injection hit anything");
}

/// A job whose shards agree on every step.
fn deciding(seed: u64) -> WorldOptions {
    WorldOptions { consistency: Consistency::Bsp, skip_nonfinite: true, ..options(seed) }
}

/// Every shard waits for the decision about a step, which waits for every shard: also for those whose workers have all left.
#[test]
fn steps_are_decided_upon() {
    for seed in seeds(600) {
        let uneven = seed.is_multiple_of(3);
        let hasty = seed.is_multiple_of(4);
        check_undisturbed(&WorldOptions { uneven, hasty, requests: uneven, ..deciding(seed + 50_000) });
    }
    for seed in seeds(200) {
        let chaos = Chaos::Partitions(Duration::from_secs(4));
        check_undisturbed(&WorldOptions { chaos, ..deciding(seed + 60_000) });
    }
}
