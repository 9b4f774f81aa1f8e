//! Shards with two copies: servers die, stop and lose each other under seeds, and nothing is lost, nothing counts twice, and the
//! parameters are those of the undisturbed job without copies, bit for bit.
//!
//! Invariant: a seed in which nobody took over proves nothing and is not counted.

use gradwire::{
    consistency::Consistency,
    world::{Chaos, WorldOptions},
};

use super::{
    check_undisturbed, options,
    rebuilt::trained,
    sample,
    states::{differing, with_state},
};

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
        let world = with_state(seed, with_copies(seed + 500_000, Chaos::Copies));
        let outcome = trained(&world);
        let calm = trained(&WorldOptions { chaos: Chaos::Calm, copies: false, ..world });
        for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
            assert_eq!(left.rates, right.rates, "seed {seed}, shard {shard}: {:?}", outcome.copies);
            let wrong = differing(&left.chunks, &right.chunks);
            assert!(wrong.is_empty(), "seed {seed}, shard {shard}: {wrong:?} differ: {:?}", outcome.copies);
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
