//! What is asked of a running job, under seeds: who keeps it waiting, and that a setting changes at one clock on every shard.
//!
//! Invariant: the truth is thought up first, and what the code is told of it is never wrong, only incomplete or late.

use std::{collections::BTreeMap, time::Duration};

use gradwire::{
    consistency::Consistency,
    layout::Init,
    optim::{LiveChange, OptimizerConfig, OptimizerKind, Reduction},
    session::{Finding, Owed, Wait, judge},
    transport::sim::SimRandom,
    types::{ChunkId, Clock, PeerId, Rank},
    world::{At, Outcome, Program, WorldOptions, run},
};

use super::{Ledger, bits::Bits, options, seeds};

const SILENT_MS: u64 = 3000;

/// A job that stands still at a clock, and why.
struct Standstill {
    random: SimRandom,
    clock: Clock,
    victims: Vec<PeerId>,
    silent: bool,
    reports: BTreeMap<PeerId, Vec<Wait>>,
}

impl Standstill {
    /// What somebody who has a path to `of` says that it waits for.
    fn wait(&mut self, of: PeerId, owed: Owed, clock: Clock) -> Wait {
        let dead = self.silent && self.victims.contains(&of);
        // Somebody who did not run for a while himself heard late of one who is alive; never the other way round.
        let starved = !dead && self.reports.values().flatten().any(|wait| wait.of == of) && self.random.once_in(6);
        let silence_ms = match dead || starved {
            true => SILENT_MS + self.random.below(30_000),
            false => self.random.below(SILENT_MS),
        };
        let (chunk, since_ms) = (Some(ChunkId(self.random.below(9) as u32)), 5000 + self.random.below(30_000));
        Wait { of, owed, chunk, clock: Some(clock), since_ms, fabric: "tcp".into(), silence_ms: Some(silence_ms) }
    }

    fn add(&mut self, from: PeerId, of: PeerId, owed: Owed, clock: Clock) {
        let wait = self.wait(of, owed, clock);
        self.reports.entry(from).or_default().push(wait);
    }

    /// Workers are still in `clock`; the victims have not pushed, or do not answer, and everybody else waits.
    fn new(seed: u64) -> Standstill {
        let mut random = SimRandom::new(seed ^ 0x7e5);
        let servers: Vec<PeerId> = (0..1 + random.below(4) as u16).map(|index| PeerId::server(index, 0)).collect();
        let workers: Vec<PeerId> = (0..2 + random.below(6) as u16).map(PeerId::worker).collect();
        let silent = random.once_in(2);
        let mut victims = vec![workers[random.below(workers.len() as u64) as usize]];
        if silent && servers.len() > 1 && random.once_in(2) {
            victims.push(servers[random.below(servers.len() as u64) as usize]);
        }
        let clock = random.below(1000);
        let mut still = Standstill { random, clock, victims: victims.clone(), silent, reports: BTreeMap::new() };
        for server in servers.iter().filter(|server| !victims.contains(server)) {
            still.add(*server, victims[0], Owed::Push, clock);
            // Where steps are decided upon, shards wait for each other too, both ways.
            if *server != servers[0] && still.random.once_in(2) {
                still.add(*server, servers[0], Owed::Decision, clock);
                if !victims.contains(&servers[0]) {
                    still.add(servers[0], *server, Owed::Decision, clock);
                }
            }
        }
        for worker in workers.iter().filter(|worker| !victims.contains(worker)) {
            servers.iter().for_each(|server| still.add(*worker, *server, Owed::Parameters, clock));
            // A server may lack a later clock of somebody who waits himself.
            let server = servers[still.random.below(servers.len() as u64) as usize];
            if !victims.contains(&server) && still.random.once_in(3) {
                still.add(server, *worker, Owed::Push, clock + 1);
            }
        }
        // Who computes says that it waits for nobody; who is silent says nothing, or has said something before.
        if !silent {
            still.reports.insert(victims[0], Vec::new());
        } else if still.random.once_in(4) {
            still.add(victims[0], servers[0], Owed::Parameters, clock);
        }
        still
    }
}

#[test]
fn the_verdict_names_who_keeps_the_others_waiting() {
    for seed in seeds(2000) {
        let still = Standstill::new(seed);
        let hosts: BTreeMap<Rank, String> = still.reports.keys().map(|peer| (peer.rank, "a".into())).collect();
        let verdict = judge(&still.reports, &hosts, SILENT_MS).expect("somebody waits");
        let mut victims: Vec<Rank> = still.victims.iter().map(|victim| victim.rank).collect();
        victims.sort();
        assert_eq!(verdict.ranks, victims, "seed {seed}: {verdict}");
        let finding = if still.silent { Finding::Silent } else { Finding::Alive };
        assert_eq!((verdict.finding, verdict.clock), (finding, Some(still.clock)), "seed {seed}: {verdict}");
        let waiting = still.reports.iter().filter(|(from, waits)| !victims.contains(&from.rank) && !waits.is_empty());
        let longest = waiting.clone().flat_map(|(_, waits)| waits).map(|wait| wait.since_ms).max().unwrap();
        assert_eq!((verdict.others, verdict.since_ms), (waiting.count(), longest), "seed {seed}: {verdict}");
        let of_victims = still.reports.values().flatten().filter(|wait| victims.contains(&wait.of.rank));
        let last = of_victims.filter_map(|wait| wait.silence_ms).min();
        assert_eq!(verdict.silence_ms, last, "seed {seed}: {verdict}");
    }
}

fn trained(options: &WorldOptions) -> Outcome {
    let mut bits = Bits::new(options.seed, 0);
    let outcome =
        run(options, &mut bits).unwrap_or_else(|wrong| panic!("seed {}: {wrong}\n{options:#?}", options.seed));
    assert!(outcome.failure.is_none(), "seed {}: {:?}", options.seed, outcome.failure);
    outcome
}

fn parameters(outcome: &Outcome) -> Vec<u32> {
    let images = outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks);
    images.flat_map(|image| image.master.iter().map(|value| value.to_bits())).collect()
}

/// Under every seed the parameters are those of a job whose shards knew of the change from the start: all of them made it at the
/// clock that was told.
#[test]
fn a_change_holds_from_one_clock_on_every_shard() {
    let (mut changed, mut mattered) = (0, 0);
    for seed in seeds(300) {
        let base = options(seed + 90_000);
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let bsp = !seed.is_multiple_of(5);
        let clips = bsp && seed.is_multiple_of(2);
        optimizer.clip.global_norm = clips.then_some(0.5);
        let clip_norm = clips.then_some(1.5);
        let change =
            LiveChange { learning_rate: Some(0.05), weight_decay: Some(0.3), clip_norm, ..LiveChange::default() };
        let mut live = WorldOptions {
            consistency: if bsp { Consistency::Bsp } else { base.consistency },
            reduction: Reduction::Mean,
            optimizer,
            clocks: 4 + seed % 9,
            uneven: seed.is_multiple_of(3),
            requests: seed.is_multiple_of(7),
            change_live: Some(change),
            ..base
        };
        for declaration in &mut live.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        let outcome = trained(&live);
        let Some(clock) = outcome.changed.filter(|_| bsp) else { continue };
        changed += 1;
        let delay_max = live.delay_max / 2 + Duration::from_micros(1);
        let known = WorldOptions { change_live: None, change_from: Some((clock, change)), delay_max, ..live.clone() };
        assert_eq!(parameters(&outcome), parameters(&trained(&known)), "seed {seed}: changed at clock {clock}");
        let without = trained(&WorldOptions { change_live: None, ..live });
        mattered += u32::from(parameters(&without) != parameters(&outcome));
    }
    assert!((changed > 20 && mattered > 20) || seeds(300).len() < 50, "{changed} changed, {mattered} mattered");
}

/// The ledger under the looser of two bounds, and all that was seen, to be judged when the clock of the change is known.
struct Observer {
    ledger: Ledger,
    seen: Vec<(At, u16, f32)>,
}

impl Program for Observer {
    fn gradient(&mut self, at: At, parameters: &[f32], gradient: &mut [f32]) -> bool {
        self.ledger.gradient(at, parameters, gradient)
    }

    fn received(&mut self, at: At, parameters: &[f32]) -> Result<(), String> {
        let others = self.ledger.layout.chunk(at.chunk).contributors.iter().filter(|worker| **worker != at.worker);
        self.seen.extend(others.map(|worker| (at, *worker, parameters[usize::from(*worker)])));
        self.ledger.received(at, parameters)
    }
}

/// Under every seed a reply of a clock before the change keeps the old bound, and one of a later clock the new one; and the new one
/// is made use of.
#[test]
fn a_bound_of_staleness_changes_at_one_clock() {
    let (mut changed, mut used) = (0, 0);
    for seed in seeds(300) {
        let mut random = SimRandom::new(seed ^ 0x57a1e);
        let (old, new) = (random.below(4), random.below(6));
        let live = WorldOptions {
            consistency: Consistency::Ssp { bound: old },
            separate_pull: false,
            clocks: 8 + seed % 9,
            uneven: seed.is_multiple_of(3),
            requests: seed.is_multiple_of(7),
            change_live: Some(LiveChange { staleness: Some(new), ..LiveChange::default() }),
            ..options(seed + 110_000)
        };
        let loose = WorldOptions { consistency: Consistency::Ssp { bound: old.max(new) }, ..live.clone() };
        let mut observer = Observer { ledger: Ledger::new(&loose), seen: Vec::new() };
        let outcome = run(&live, &mut observer).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}\n{live:#?}"));
        assert!(outcome.failure.is_none(), "seed {seed}: {:?}", outcome.failure);
        changed += u32::from(outcome.changed.is_some());
        let from = outcome.changed.unwrap_or(Clock::MAX);
        for (at, worker, count) in observer.seen {
            let least = |bound: u64| {
                let end = at.clock.wrapping_add(1).saturating_sub(bound);
                observer.ledger.given(worker, at.chunk, end)
            };
            let bound = if at.clock != Clock::MAX && at.clock >= from { new } else { old };
            assert!(count >= least(bound), "seed {seed}: {at:?} sees {count} of worker {worker}; changed at {from}");
            used += u32::from(count < least(old));
        }
    }
    assert!((changed > 20 && used > 20) || seeds(300).len() < 50, "{changed} changed, {used} used");
}
