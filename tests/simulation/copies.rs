//! Shards with two copies: servers die, stop and lose each other under seeds, and nothing is lost, nothing counts twice, and the
//! parameters are those of the undisturbed job without copies, bit for bit.
//!
//! Invariant: a seed in which nobody took over proves nothing and is not counted.

use gradwire::{
    consistency::Consistency,
    layout::Init,
    optim::{LiveChange, OptimizerConfig, OptimizerKind, Reduction},
    world::{Chaos, WorldOptions},
};

use super::{check_undisturbed, options, rebuilt::trained, sample};

/// Of so many seeds of each test every run tries some.
const SEEDS: u64 = 10_000;

pub fn with_copies(seed: u64, chaos: Chaos) -> WorldOptions {
    let base = options(seed);
    let clocks = 4 + base.clocks * 3;
    WorldOptions {
        consistency: Consistency::Bsp,
        servers: base.servers.max(2),
        clocks,
        uneven: seed.is_multiple_of(5),
        hasty: seed.is_multiple_of(7),
        requests: seed.is_multiple_of(6),
        copies: true,
        store_fails: seed % 16 == 9,
        chaos,
        ..base
    }
}

/// The ledger sees every lost, doubled and torn update.
#[test]
fn no_update_is_lost_or_counts_twice_when_servers_die() {
    for seed in sample(300, SEEDS) {
        check_undisturbed(&with_copies(seed + 400_000, if seed % 4 == 0 { Chaos::Calm } else { Chaos::Copies }));
    }
}

/// With and without copies, in calm and while servers die: the same bits, in parameters and in the optimizer's state.
#[test]
fn the_final_state_is_that_of_a_job_without_copies() {
    let (mut takeovers, mut pairings, mut deposed, mut cuts, mut compared, mut unanswered) = (0, 0, 0, 0, 0, 0);
    let seeds = sample(700, SEEDS);
    for seed in seeds.iter().copied() {
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let change = LiveChange { learning_rate: Some(0.05), weight_decay: Some(0.2), ..LiveChange::default() };
        let mut world = WorldOptions {
            reduction: Reduction::Mean,
            optimizer,
            change_from: seed.is_multiple_of(2).then_some((1 + seed % 9, change)),
            ..with_copies(seed + 500_000, Chaos::Copies)
        };
        for declaration in &mut world.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        let outcome = trained(&world);
        let calm = trained(&WorldOptions { chaos: Chaos::Calm, copies: false, ..world });
        for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
            assert_eq!(left.rates, right.rates, "seed {seed}, shard {shard}: {:?}", outcome.copies);
            for (left, right) in left.chunks.iter().zip(&right.chunks) {
                let wrong = [
                    (left.steps != right.steps, "steps"),
                    (left.master != right.master, "parameters"),
                    (left.first != right.first, "first state"),
                    (left.second != right.second, "second state"),
                ];
                let wrong: Vec<_> = wrong.iter().filter(|(wrong, _)| *wrong).map(|(_, what)| what).collect();
                let chunk = left.chunk.0;
                assert!(
                    wrong.is_empty(),
                    "seed {seed}, shard {shard}, chunk {chunk}: {wrong:?}, steps {} and {}: {:?}",
                    left.steps,
                    right.steps,
                    outcome.copies
                );
            }
        }
        takeovers += outcome.copies.takeovers;
        pairings += outcome.copies.pairings;
        deposed += outcome.copies.deposed;
        cuts += outcome.copies.cuts;
        compared += outcome.copies.compared;
        unanswered += outcome.copies.unanswered;
    }
    let told = format!(
        "{} seeds: {takeovers} lanes took over, {pairings} backups were built, {deposed} were deposed, {cuts} cuts, \
         {unanswered} claims without an answer; a chunk was compared with its backup's {compared} times",
        seeds.len()
    );
    println!("{told}");
    let is_enough = takeovers > 50 && pairings > 50 && deposed > 5 && cuts > 5 && compared > 10_000;
    assert!(is_enough || seeds.len() < 200, "{told}");
}
