//! Workers that are lost or told to leave while a job trains, and others that come, under seeds: every contribution counts whole and
//! once or not at all, the same for everybody, and the outcome is that of a job whose shards were told of it from the start, bit for bit.
//!
//! Invariant: which contributions count is read off the parameters, and held against what the shards wrote down.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use gradwire::{
    consistency::Consistency,
    layout::Init,
    optim::{OptimizerConfig, OptimizerKind, Reduction},
    session::Change,
    types::Clock,
    world::{At, Chaos, CopyCounts, ElasticOptions, Outcome, Program, WorldOptions, run},
};

use super::{
    bits::{Bits, compare_with_oracle},
    mix, options,
    rebuilt::MOVING,
    seeds,
};

/// Every gradient is -1 in its worker's own elements, as the ledger's; what is seen is judged at the end, when it is known who was
/// lost at which clock.
struct Register {
    seed: u64,
    workers: u64,
    /// By worker and chunk: the clocks at which it was asked for a gradient, and gave one.
    given: BTreeMap<(u16, u32), HashSet<Clock>>,
    /// Where and when parameters were received, of which worker how many updates were in them.
    seen: Vec<(At, u16, f32)>,
}

impl Register {
    fn new(options: &WorldOptions) -> Register {
        Register {
            seed: options.seed,
            workers: options.declarations.len() as u64,
            given: BTreeMap::new(),
            seen: Vec::new(),
        }
    }

    /// How many updates of one worker a chunk has before a clock.
    fn expected(&self, story: &Story, worker: u16, chunk: u32, end: Clock) -> f32 {
        let Some(given) = self.given.get(&(worker, chunk)) else { return 0.0 };
        let counts = |clock: &&Clock| **clock < end && story.counts(worker, chunk, **clock);
        given.iter().filter(counts).count() as f32
    }
}

impl Program for Register {
    fn gradient(&mut self, at: At, _parameters: &[f32], gradient: &mut [f32]) -> bool {
        for (element, value) in gradient.iter_mut().enumerate() {
            *value = if element as u64 % self.workers == u64::from(at.worker) { -1.0 } else { 0.0 };
        }
        let gives = !mix(&[self.seed, at.worker.into(), at.chunk.0.into(), at.clock]).is_multiple_of(6);
        if gives {
            self.given.entry((at.worker, at.chunk.0)).or_default().insert(at.clock);
        }
        gives
    }

    fn received(&mut self, at: At, parameters: &[f32]) -> Result<(), String> {
        for worker in 0..self.workers as u16 {
            let mut counts = parameters.iter().skip(worker.into()).step_by(self.workers as usize);
            let count = *counts.next().expect("a chunk has more elements than workers");
            if counts.any(|other| *other != count) {
                return Err(format!("{at:?}: an update of worker {worker} is there by half"));
            }
            self.seen.push((at, worker, count));
        }
        Ok(())
    }
}

/// Who was of the job when, and what did not come of those that were.
#[derive(Debug)]
struct Story {
    absences: Vec<(u16, Clock, Option<Clock>)>,
    lacked: HashSet<(u16, u32, Clock)>,
}

impl Story {
    fn of(options: &WorldOptions, outcome: &Outcome) -> Story {
        let workers = options.declarations.len() as u16;
        let empty = workers - options.elastic.empty..workers;
        let mut absences: Vec<(u16, Clock, Option<Clock>)> = empty.map(|worker| (worker, 0, None)).collect();
        for (clock, change) in &outcome.changes {
            let open = |of: u16| absences.iter().position(|(worker, _, until)| *worker == of && until.is_none());
            match change {
                Change::Lost(worker) | Change::Leaves(worker) | Change::Opens(worker) => match open(*worker) {
                    // Whoever was to leave may be lost before.
                    Some(index) => absences[index].1 = absences[index].1.min(*clock),
                    None => absences.push((*worker, *clock, None)),
                },
                Change::Joins(worker) => {
                    let index = open(*worker).expect("it was lost");
                    absences[index].2 = Some(*clock);
                }
                Change::Settings(_) => {}
            }
        }
        let lacked = outcome.lacked.iter().map(|(worker, chunk, clock)| (*worker, chunk.0, *clock)).collect();
        Story { absences, lacked }
    }

    fn counts(&self, worker: u16, chunk: u32, clock: Clock) -> bool {
        let is_out = |(of, from, until): &(u16, Clock, Option<Clock>)| {
            *of == worker && *from <= clock && until.is_none_or(|until| clock < until)
        };
        !self.absences.iter().any(is_out) && !self.lacked.contains(&(worker, chunk, clock))
    }
}

/// A job of two workers or more that loses some.
pub fn losing(seed: u64) -> WorldOptions {
    let mut base = options(seed);
    if base.declarations.len() == 1 {
        base.declarations.push(base.declarations[0].clone());
    }
    let workers = base.declarations.len() as u32;
    let chaos = if seed.is_multiple_of(5) { Chaos::Rebuilding { corrupt: 0 } } else { Chaos::Calm };
    WorldOptions {
        consistency: Consistency::Bsp,
        clocks: 6 + seed % 9,
        elastic: ElasticOptions {
            losses: 1 + seed as u32 % workers,
            restarts: seed.is_multiple_of(2),
            ..ElasticOptions::default()
        },
        delay_max: base.delay_max.max(Duration::from_millis(2)),
        chaos,
        ..base
    }
}

/// A job that workers leave on a command, and to which others come, some to seats that were empty; a few are lost besides, and under
/// some seeds paths break.
pub fn turning(seed: u64) -> WorldOptions {
    let mut base = losing(seed);
    base.declarations.truncate(6);
    let empty = (seed / 2 % 3) as u16;
    let first = base.declarations[0].clone();
    base.declarations.extend(std::iter::repeat_n(first, empty.into()));
    let losses = if seed % 4 == 3 { 1 } else { 0 };
    let leaves = if seed.is_multiple_of(7) { 0 } else { 1 + seed as u32 % 3 };
    base.elastic = ElasticOptions { losses, leaves, empty, restarts: !seed.is_multiple_of(3), ..base.elastic };
    let chaos = if seed % 3 == 1 { Chaos::Rebuilding { corrupt: 0 } } else { Chaos::Calm };
    WorldOptions { chaos, clocks: 6 + seed % 12, hasty: seed % 6 == 1 || seed % 5 == 3, ..base }
}

fn survived(options: &WorldOptions, program: &mut dyn Program) -> Outcome {
    let outcome = run(options, program).unwrap_or_else(|wrong| panic!("seed {}: {wrong}\n{options:#?}", options.seed));
    assert!(outcome.failure.is_none(), "seed {}: {:?}\n{options:#?}", options.seed, outcome.failure);
    outcome
}

/// How often something happened under all seeds.
#[derive(Debug, Default)]
pub struct Counts {
    /// What happened to the copies of shards that have two.
    pub copies: CopyCounts,
    lost: usize,
    joined: usize,
    lacked: usize,
    /// Losses at a clock of which nothing had been lacking.
    clean: usize,
    /// Workers that left on a command.
    left: usize,
    /// Workers that came to seats that had been empty.
    came: usize,
    /// Workers that went on after they were lost.
    ghosts: u64,
}

impl Counts {
    fn add(&mut self, options: &WorldOptions, outcome: &Outcome, story: &Story) {
        let is_exit = |(_, change): &&(Clock, Change)| matches!(change, Change::Leaves(_));
        self.left += outcome.changes.iter().filter(is_exit).count();
        self.came += story.absences.iter().filter(|(_, from, until)| *from == 0 && until.is_some()).count();
        let lost = |(_, change): &(Clock, Change)| matches!(change, Change::Lost(_));
        let nobody_is_lost = options.elastic.losses == 0 && !outcome.changes.iter().any(lost);
        assert!(!nobody_is_lost || outcome.lacked.is_empty(), "seed {}: {:?}", options.seed, outcome.lacked);
        self.lost += story.absences.len();
        self.joined += story.absences.iter().filter(|(.., until)| until.is_some()).count();
        self.lacked += outcome.lacked.len();
        self.ghosts += outcome.ghosts;
        self.copies = self.copies.and(outcome.copies);
        let lacks = |worker: u16| story.lacked.iter().any(|(of, ..)| *of == worker);
        self.clean += story.absences.iter().filter(|(worker, ..)| !lacks(*worker)).count();
    }

    pub fn turn_often(&self) -> bool {
        self.left > 100 && self.came > 30 && self.joined > self.came + 20
    }

    pub fn are_many(&self) -> bool {
        self.lost > 50 && self.joined > 20 && self.lacked > 50 && self.clean > 10 && self.ghosts > 5
    }
}

/// Nobody sees an update twice, by half, of a worker that was out, or not of one that was in.
#[test]
fn what_lost_workers_gave_counts_once_or_not_at_all() {
    let counts = count_updates(&seeds(600), |seed| losing(seed + 400_000));
    assert!(counts.are_many() || seeds(600).len() < 300, "{counts:?}");
}

/// What a worker gives before the clock at which it was told to leave counts, all of it; nothing of it counts afterwards.
#[test]
fn what_leaving_workers_gave_counts_until_their_clock() {
    let counts = count_updates(&seeds(600), |seed| turning(seed + 600_000));
    assert!(counts.turn_often() || seeds(600).len() < 300, "{counts:?}");
}

pub fn count_updates(seeds: &[u64], options: impl Fn(u64) -> WorldOptions) -> Counts {
    let mut counts = Counts::default();
    for seed in seeds.iter().copied() {
        let options = options(seed);
        let mut register = Register::new(&options);
        let outcome = survived(&options, &mut register);
        let story = Story::of(&options, &outcome);
        counts.add(&options, &outcome, &story);
        for (at, worker, count) in &register.seen {
            // A version counts clocks. What a worker that leaves pulls last may be later: nobody waits for it any more.
            assert!(at.version >= at.clock.wrapping_add(1), "seed {seed}: {at:?}");
            let expected = register.expected(&story, *worker, at.chunk.0, at.version);
            assert_eq!(*count, expected, "seed {seed}: {at:?}, updates of worker {worker}; {story:?}\n{options:#?}");
        }
        for image in outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks) {
            for (element, value) in image.master.iter().enumerate() {
                let worker = (element as u64 % register.workers) as u16;
                let expected = register.expected(&story, worker, image.chunk.0, Clock::MAX);
                assert_eq!(*value, expected, "seed {seed}, chunk {}, worker {worker}; {story:?}", image.chunk.0);
            }
        }
    }
    println!("{counts:?}");
    counts
}

/// The divisor of the mean changes at the clock that was settled, on every shard: the bits are the oracle's, and those of a job whose
/// shards were told from the start who would be of it when, and whose processes stayed.
#[test]
fn a_job_that_loses_workers_has_the_bits_of_one_that_was_told() {
    let counts = compare_with_told(&seeds(300), |seed| losing(seed + 500_000));
    assert!(counts.are_many() || seeds(300).len() < 200, "{counts:?}");
}

#[test]
fn a_job_that_workers_leave_and_join_has_the_bits_of_one_that_was_told() {
    let counts = compare_with_told(&seeds(300), |seed| turning(seed + 700_000));
    assert!(counts.turn_often() || seeds(300).len() < 200, "{counts:?}");
}

pub fn compare_with_told(seeds: &[u64], options: impl Fn(u64) -> WorldOptions) -> Counts {
    let mut counts = Counts::default();
    for seed in seeds.iter().copied() {
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let clips = seed.is_multiple_of(3);
        optimizer.clip.global_norm = clips.then_some(0.5);
        let base = options(seed);
        // The scale is a power of two and leaves no trace in the bits; whoever comes again must know it.
        let scales = seed % 4 == 1;
        let mut options = WorldOptions {
            reduction: Reduction::Mean,
            optimizer,
            checkpoint_every: None,
            loss_scale: if scales { MOVING } else { base.loss_scale },
            separate_pull: base.separate_pull && !scales,
            ..base
        };
        for declaration in &mut options.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        let mut bits = Bits::new(seed, 0);
        let outcome = survived(&options, &mut bits);
        let story = Story::of(&options, &outcome);
        counts.add(&options, &outcome, &story);
        (bits.absences, bits.lacked) = (story.absences.clone(), story.lacked.clone());
        compare_with_oracle(&options, &outcome, &bits);
        // One absence of a worker can be told in advance.
        let once =
            |(of, ..): &(u16, Clock, Option<Clock>)| story.absences.iter().filter(|other| other.0 == *of).count() == 1;
        if !story.absences.iter().all(once) {
            continue;
        }
        let elastic = ElasticOptions { told: story.absences.clone(), ..ElasticOptions::default() };
        let calm =
            WorldOptions { chaos: Chaos::Calm, copies: false, moves: false, store_fails: false, ..options.clone() };
        let told = WorldOptions { elastic, ..calm };
        let calm = survived(&told, &mut bits);
        assert_eq!(parameters(&outcome), parameters(&calm), "seed {seed}: {story:?}");
    }
    println!("{counts:?}");
    counts
}

fn parameters(outcome: &Outcome) -> Vec<u32> {
    let images = outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks);
    images.flat_map(|image| image.master.iter().map(|value| value.to_bits())).collect()
}
