//! Workers that leave, come and are lost while shards move from server to server: every contribution counts once or not at all, and the
//! bits are those of the calm job whose servers stay and that was told who would be of it when.
//!
//! Invariant: a seed in which no shard moved, or nobody left or came, is run all the same, but many must have both.

use gradwire::world::{Chaos, WorldOptions};

use super::{
    elastic::{Counts, compare_with_told, count_updates},
    elastic_copies::{losses, turns},
    sample,
};

/// Of so many seeds of each test every run tries some.
const SEEDS: u64 = 10_000;

/// A job whose shards move.
fn with_moves(seed: u64, base: WorldOptions) -> WorldOptions {
    WorldOptions {
        servers: base.servers.max(2) + (seed % 3) as u16,
        clocks: base.clocks + 6 + seed % 16,
        moves: true,
        store_fails: seed % 8 == 5,
        chaos: if seed.is_multiple_of(4) { Chaos::Calm } else { Chaos::Moves },
        ..base
    }
}

/// Under enough seeds workers turned, shards moved, and servers were lost as they did.
fn check(seeds: &[u64], counts: &Counts, have_turned: fn(&Counts) -> bool) {
    let (tried, copies) = (seeds.len() as u64, counts.copies);
    let is_enough = have_turned(counts) && copies.moves > tried && copies.given_up.min(copies.deaths) > 10;
    assert!(is_enough || tried < 200, "{counts:?}");
}

/// What a worker gives before the clock at which it leaves counts, and nothing afterwards, whoever serves then.
#[test]
fn what_leaving_workers_gave_counts_once_when_shards_move() {
    let seeds = sample(200, SEEDS);
    check(&seeds, &count_updates(&seeds, |seed| turns(seed + 1_200_000, with_moves)), Counts::turn_often);
}

/// The divisor of the mean changes at the clock that was settled on every shard, also where another lane serves by then.
#[test]
fn a_job_whose_shards_move_has_the_bits_of_one_that_was_told_who_leaves_and_joins() {
    let seeds = sample(200, SEEDS);
    check(&seeds, &compare_with_told(&seeds, |seed| turns(seed + 1_300_000, with_moves)), Counts::turn_often);
}

/// What was under way from a worker that is lost may not have come where the shard has moved to: then it counts nowhere.
#[test]
fn what_lost_workers_gave_counts_once_or_not_at_all_when_shards_move() {
    let seeds = sample(200, SEEDS);
    check(&seeds, &count_updates(&seeds, |seed| losses(seed + 1_400_000, with_moves)), Counts::are_many);
}

#[test]
fn a_job_whose_shards_move_has_the_bits_of_one_that_was_told_who_is_lost() {
    let seeds = sample(200, SEEDS);
    check(&seeds, &compare_with_told(&seeds, |seed| losses(seed + 1_500_000, with_moves)), Counts::are_many);
}
