//! Servers that join and leave: shards move to and fro under seeds while servers that hold none die and paths break, and nothing is
//! lost, nothing counts twice, and parameters and optimizer state are those of the job whose servers stay, bit for bit.
//!
//! Invariant: seeds in which no shard moved prove nothing, and most must have moved some.

use std::collections::BTreeSet;

use gradwire::{
    consistency::Consistency,
    optim::LearningRates,
    server::ChunkImage,
    world::{Chaos, CopyCounts, Outcome, WorldOptions},
};

use super::{
    check_undisturbed, options,
    rebuilt::trained,
    sample,
    states::{differing, with_state},
};

pub fn with_moves(seed: u64, chaos: Chaos) -> WorldOptions {
    let base = options(seed);
    WorldOptions {
        consistency: Consistency::Bsp,
        servers: base.servers.max(2) + (seed % 3) as u16,
        clocks: 6 + base.clocks * 4,
        uneven: seed.is_multiple_of(5),
        hasty: seed.is_multiple_of(7),
        requests: seed.is_multiple_of(4),
        // Wide windows too: half of one is then more than one position.
        slots: if seed % 6 == 1 { 8 + seed as u32 % 9 } else { base.slots },
        checkpoint_every: (seed % 3 != 1).then_some(1 + seed % 4),
        moves: true,
        store_fails: chaos == Chaos::Moves && seed % 8 == 5,
        chaos,
        ..base
    }
}

/// Whoever serves stores each clock's state once, however often the shard has moved; none is left out.
fn check_stored(world: &WorldOptions, outcome: &Outcome, seed: u64) {
    for (shard, snapshots) in outcome.snapshots.iter().enumerate() {
        let all: Vec<_> = snapshots.iter().map(|snapshot| snapshot.clock).collect();
        let clocks: BTreeSet<_> = all.iter().copied().collect();
        // Who asks may ask for what is there already.
        assert!(clocks.len() == all.len() || world.requests, "seed {seed}, shard {shard}: {all:?}");
        let is_empty = outcome.finals[shard].chunks.is_empty();
        let Some(every) = world.checkpoint_every.filter(|_| !is_empty && !world.uneven) else { continue };
        let mut due = (1..).map(|times| times * every).take_while(|clock| *clock < world.clocks);
        assert!(due.all(|clock| clocks.contains(&clock)), "seed {seed}, shard {shard}: {all:?}, each {every}");
    }
}

/// The ledger sees every lost, doubled and torn update.
#[test]
fn no_update_is_lost_or_counts_twice_when_shards_move() {
    for seed in sample(100, 300) {
        check_undisturbed(&with_moves(seed + 600_000, if seed % 4 == 0 { Chaos::Calm } else { Chaos::Moves }));
    }
}

/// With servers that join and leave and with such that stay: the same bits, in parameters and in the optimizer's state, at the end and
/// in every checkpoint.
#[test]
fn the_final_state_is_that_of_a_job_whose_servers_stay() {
    let (mut sum, mut without) = (CopyCounts::default(), 0);
    let all = sample(230, 700);
    for &seed in &all {
        let chaos = if seed % 4 == 0 { Chaos::Calm } else { Chaos::Moves };
        let mut world = with_state(seed, with_moves(seed + 700_000, chaos));
        // Whoever sets rates has to have a part in everything, or they do not hold everywhere from the same clock on.
        if seed % 5 == 2 {
            let first = world.declarations[0].clone();
            world.declarations.fill(first);
            world.sets_rates = true;
        }
        let outcome = trained(&world);
        let calm = WorldOptions { chaos: Chaos::Calm, moves: false, store_fails: false, ..world.clone() };
        let calm = trained(&calm);
        check_stored(&world, &outcome, seed);
        let stored = |snapshots: &[Vec<_>]| snapshots.iter().flatten().cloned().collect::<Vec<_>>();
        let (moved, stayed) = (stored(&outcome.snapshots), stored(&calm.snapshots));
        for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
            // Rates that hold no more are forgotten now or later.
            let at_the_end = |rates: &LearningRates| (rates.rate(0, world.clocks), rates.weight_decay(world.clocks));
            let same = left.rates == right.rates || world.sets_rates;
            assert!(same && at_the_end(&left.rates) == at_the_end(&right.rates), "seed {seed}, shard {shard}");
            let wrong = differing(&left.chunks, &right.chunks);
            assert!(wrong.is_empty(), "seed {seed}, shard {shard}: {wrong:?} differ: {:?}", outcome.copies);
        }
        for left in &moved {
            let same = stayed.iter().find(|right| {
                let first = |chunks: &[ChunkImage]| chunks.first().map(|chunk| chunk.chunk);
                right.clock == left.clock && first(&right.chunks) == first(&left.chunks)
            });
            let wrong = same.map(|right| differing(&left.chunks, &right.chunks)).unwrap_or_default();
            assert!(wrong.is_empty(), "seed {seed}: the checkpoint of clock {}: {wrong:?} differ", left.clock);
        }
        without += u64::from(outcome.copies.moves == 0);
        sum = sum.and(outcome.copies);
    }
    let told = format!("{sum:?}, {without} jobs in which no shard moved");
    println!("{told}");
    let tried = all.len() as u64;
    let enough = sum.moves > tried && 14 * sum.given_up.min(sum.deaths) > tried && 35 * sum.cuts > tried;
    assert!(enough && 3 * without < tried || tried < 200, "{told}");
}
