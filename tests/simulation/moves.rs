//! Servers that join and leave: shards move to and fro under seeds while servers that hold none die and paths break, and nothing is
//! lost, nothing counts twice, and parameters and optimizer state are those of the job whose servers stay, bit for bit.
//!
//! Invariant: seeds in which no shard moved prove nothing, and most must have moved some.

use std::collections::BTreeSet;

use gradwire::{
    consistency::Consistency,
    layout::Init,
    optim::{LiveChange, OptimizerConfig, OptimizerKind, Reduction},
    server::ChunkImage,
    world::{Chaos, CopyCounts, Outcome, WorldOptions},
};

use super::{check_undisturbed, options, rebuilt::trained, sample};

fn with_moves(seed: u64, chaos: Chaos) -> WorldOptions {
    let base = options(seed);
    WorldOptions {
        consistency: Consistency::Bsp,
        servers: base.servers.max(2) + (seed % 3) as u16,
        clocks: 6 + base.clocks * 4,
        uneven: seed.is_multiple_of(5),
        hasty: seed.is_multiple_of(7),
        requests: seed.is_multiple_of(4),
        checkpoint_every: seed.is_multiple_of(3).then_some(1 + seed % 4),
        moves: true,
        chaos,
        ..base
    }
}

/// Whoever serves stores each clock's state once, however often the shard has moved.
fn check_stored_once(outcome: &Outcome, seed: u64) {
    for (shard, snapshots) in outcome.snapshots.iter().enumerate() {
        let clocks: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.clock).collect();
        let all: Vec<_> = snapshots.iter().map(|snapshot| snapshot.clock).collect();
        assert_eq!(clocks.len(), all.len(), "seed {seed}, shard {shard}: {all:?}");
    }
}

/// The chunks of which anything differs that training goes by.
fn differing(one: &[ChunkImage], other: &[ChunkImage]) -> Vec<u32> {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let of = |image: &ChunkImage| (image.steps, bits(&image.master), bits(&image.first), bits(&image.second));
    assert_eq!(one.len(), other.len());
    let differ = one.iter().zip(other).filter(|(one, other)| of(one) != of(other));
    differ.map(|(one, _)| one.chunk.0).collect()
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
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let change = LiveChange { learning_rate: Some(0.05), weight_decay: Some(0.2), ..LiveChange::default() };
        let mut world = WorldOptions {
            reduction: Reduction::Mean,
            optimizer,
            change_from: seed.is_multiple_of(2).then_some((1 + seed % 9, change)),
            ..with_moves(seed + 700_000, if seed % 4 == 0 { Chaos::Calm } else { Chaos::Moves })
        };
        for declaration in &mut world.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        let outcome = trained(&world);
        let calm = trained(&WorldOptions { chaos: Chaos::Calm, moves: false, ..world });
        if !world.requests {
            check_stored_once(&outcome, seed); // who asks may ask for what is there already
        }
        let stored = |snapshots: &[Vec<_>]| snapshots.iter().flatten().cloned().collect::<Vec<_>>();
        let (moved, stayed) = (stored(&outcome.snapshots), stored(&calm.snapshots));
        for (shard, (left, right)) in outcome.finals.iter().zip(&calm.finals).enumerate() {
            assert_eq!(left.rates, right.rates, "seed {seed}, shard {shard}: {:?}", outcome.copies);
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
        let CopyCounts { deaths, cuts, moves, given_up, .. } = outcome.copies;
        without += u64::from(moves == 0);
        sum = CopyCounts {
            deaths: sum.deaths + deaths,
            cuts: sum.cuts + cuts,
            moves: sum.moves + moves,
            given_up: sum.given_up + given_up,
            ..sum
        };
    }
    let told = format!("{sum:?}, {without} jobs in which no shard moved");
    println!("{told}");
    let tried = all.len() as u64;
    let enough = sum.moves > tried && 14 * sum.given_up.min(sum.deaths) > tried && 35 * sum.cuts > tried;
    assert!(enough && 7 * without < 2 * tried || tried < 200, "{told}");
}
