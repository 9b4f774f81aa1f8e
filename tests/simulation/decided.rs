//! Shards with two copies whose steps are decided upon: the norm of the whole gradient is clipped, steps are skipped, and the loss
//! scale moves, while servers die, stop and lose each other, whoever of them decides.
//!
//! Invariant: a decision that any lane has applied is the one that all apply: the bits are those of the undisturbed job without copies.

use gradwire::{
    layout::Init,
    optim::{LiveChange, OptimizerConfig, OptimizerKind, Reduction},
    world::{Chaos, CopyCounts, Outcome, WorldOptions},
};

use super::{
    check_undisturbed,
    copies::with_copies,
    rebuilt::{MOVING, trained},
    sample,
};

/// Of so many seeds of each test every run tries some.
const SEEDS: u64 = 10_000;

/// The ledger sees every lost, doubled and torn update; what is decided here leaves every step as it is.
#[test]
fn no_update_is_lost_or_counts_twice_when_deciders_die() {
    for seed in sample(300, SEEDS) {
        let mut world = with_copies(seed + 700_000, if seed % 4 == 0 { Chaos::Calm } else { Chaos::Copies });
        world.optimizer.clip.global_norm = Some(1e30);
        check_undisturbed(&world);
    }
}

fn same_chunks(seed: u64, outcome: &Outcome, calm: &Outcome) {
    for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
        for (left, right) in left.chunks.iter().zip(&right.chunks) {
            let same = (left.steps, &left.master, &left.first, &left.second)
                == (right.steps, &right.master, &right.first, &right.second);
            let chunk = left.chunk.0;
            assert!(same, "seed {seed}, shard {shard}, chunk {chunk} differs: {:?}", outcome.copies);
        }
    }
}

/// Settings that are changed while servers die hold from the clock on that is printed, on every shard, whoever serves it then.
#[test]
fn settings_change_while_servers_die() {
    let seeds = sample(300, SEEDS);
    let counts = change_settings(&seeds, |seed| decided(seed + 50_000));
    let with_takeovers = counts.iter().filter(|counts| counts.takeovers > 0).count();
    println!("settings changed under {} of {} seeds, {with_takeovers} with take-overs", counts.len(), seeds.len());
    assert!(with_takeovers > 50 || seeds.len() < 200, "{with_takeovers}");
}

/// Settings change in each of these jobs, which have the bits of the calm ones that knew of it from the start: what happened to those in
/// which they did.
pub fn change_settings(seeds: &[u64], options: impl Fn(u64) -> WorldOptions) -> Vec<CopyCounts> {
    let mut counts = Vec::new();
    for seed in seeds.iter().copied() {
        let mut world = WorldOptions { change_from: None, ..options(seed) };
        if seed % 3 == 0 {
            (world.skip_nonfinite, world.loss_scale, world.optimizer.clip) = Default::default();
        }
        let clip_norm = world.optimizer.clip.global_norm.map(|_| 0.2);
        let change =
            LiveChange { learning_rate: Some(0.05), weight_decay: Some(0.2), clip_norm, ..LiveChange::default() };
        world.change_live = Some(change);
        let outcome = trained(&world);
        let change_from = outcome.changed.map(|clock| (clock, change));
        let calm = WorldOptions { change_live: None, change_from, ..calm(&world) };
        same_chunks(seed, &outcome, &trained(&calm));
        counts.extend(change_from.map(|_| outcome.copies));
    }
    counts
}

/// The job in which nothing goes wrong, and whose servers stay.
fn calm(world: &WorldOptions) -> WorldOptions {
    WorldOptions { chaos: Chaos::Calm, copies: false, moves: false, store_fails: false, ..world.clone() }
}

fn decided(seed: u64) -> WorldOptions {
    decides(seed, with_copies(seed + 800_000, Chaos::Copies))
}

/// A job whose steps are decided upon.
pub fn decides(seed: u64, base: WorldOptions) -> WorldOptions {
    let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
    optimizer.weight_decay = 0.1;
    let kind = seed % 4;
    optimizer.clip.global_norm = (kind != 2).then_some(0.5);
    let change = LiveChange { learning_rate: Some(0.05), clip_norm: Some(0.2), ..LiveChange::default() };
    let mut world = WorldOptions {
        reduction: Reduction::Mean,
        optimizer,
        skip_nonfinite: kind == 1,
        loss_scale: if kind >= 2 { MOVING } else { base.loss_scale },
        // Who pushes and does not wait cannot know the next loss scale: a job refuses that.
        separate_pull: base.separate_pull && kind < 2,
        change_from: (kind != 2 && seed % 3 == 1).then_some((1 + seed % 9, change)),
        ..base
    };
    for declaration in &mut world.declarations {
        declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
    }
    world
}

/// With and without copies, in calm and while servers die: the same bits, in parameters, in the optimizer's state, and in what is
/// decided by.
#[test]
fn decisions_are_those_of_a_job_without_copies() {
    let seeds = sample(500, SEEDS);
    let counts = compare_decisions(&seeds, decided);
    println!("{} seeds: {counts:?}", seeds.len());
    let is_enough = counts.takeovers > 50 && counts.pairings > 50 && counts.deposed > 5 && counts.compared > 10_000;
    assert!(is_enough || seeds.len() < 200, "{counts:?}");
}

/// Each of these jobs has the bits of the calm one.
pub fn compare_decisions(seeds: &[u64], options: impl Fn(u64) -> WorldOptions) -> CopyCounts {
    let mut counts = CopyCounts::default();
    for seed in seeds.iter().copied() {
        let world = options(seed);
        let outcome = trained(&world);
        let calm = trained(&calm(&world));
        for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
            assert_eq!(left.rates, right.rates, "seed {seed}, shard {shard}: {:?}", outcome.copies);
            assert_eq!(left.live, right.live, "seed {seed}, shard {shard}: {:?}", outcome.copies);
        }
        same_chunks(seed, &outcome, &calm);
        counts = counts.and(outcome.copies);
    }
    counts
}
