//! Workers that leave, come and are lost while servers die whose shards have two copies: every contribution counts once or not at all,
//! and the bits are those of the calm job without copies that was told who would be of it when.
//!
//! Invariant: a seed in which nobody took over, or nobody left or came, is run all the same, but many must have both.

use gradwire::world::{Chaos, CopyCounts, WorldOptions};

use super::{
    elastic::{Counts, compare_with_told, count_updates, losing, turning},
    sample,
};

/// Of so many seeds of each test every run tries some.
const SEEDS: u64 = 10_000;

/// A job whose shards have two copies, of which one after the other is lost.
fn with_copies(seed: u64, base: WorldOptions) -> WorldOptions {
    WorldOptions {
        servers: base.servers.max(2),
        clocks: base.clocks + 4 + seed % 12,
        copies: true,
        store_fails: seed % 16 == 9,
        chaos: Chaos::Copies,
        ..base
    }
}

/// A job that workers leave on a command, and to which others come.
pub fn turns(seed: u64, with: fn(u64, WorldOptions) -> WorldOptions) -> WorldOptions {
    let mut world = with(seed, turning(seed));
    world.elastic.losses = 0;
    world
}

/// A job that loses workers, and to which others come in their places; under half of the seeds some leave on a command, too.
pub fn losses(seed: u64, with: fn(u64, WorldOptions) -> WorldOptions) -> WorldOptions {
    let base = if seed.is_multiple_of(2) { losing(seed / 2) } else { turning(seed) };
    let mut world = with(seed, base);
    world.elastic.losses = world.elastic.losses.max(1);
    world
}

/// Under enough seeds workers turned, and servers were lost and came again.
fn check(seeds: &[u64], counts: &Counts, have_turned: fn(&Counts) -> bool) {
    let CopyCounts { takeovers, pairings, .. } = counts.copies;
    let is_enough = have_turned(counts) && takeovers > 50 && pairings > 50;
    assert!(is_enough || seeds.len() < 200, "{counts:?}");
}

/// What a worker gives before the clock at which it leaves counts, and nothing afterwards, whoever serves then.
#[test]
fn what_leaving_workers_gave_counts_once_when_servers_die() {
    let seeds = sample(300, SEEDS);
    check(&seeds, &count_updates(&seeds, |seed| turns(seed + 800_000, with_copies)), Counts::turn_often);
}

/// The divisor of the mean changes at the clock that was settled on every shard, also where another lane serves by then.
#[test]
fn a_job_whose_servers_die_has_the_bits_of_one_that_was_told_who_leaves_and_joins() {
    let seeds = sample(300, SEEDS);
    check(&seeds, &compare_with_told(&seeds, |seed| turns(seed + 900_000, with_copies)), Counts::turn_often);
}

/// What was under way from a worker that is lost may be lost with a server, too: then it counts nowhere.
#[test]
fn what_lost_workers_gave_counts_once_or_not_at_all_when_servers_die() {
    let seeds = sample(300, SEEDS);
    check(&seeds, &count_updates(&seeds, |seed| losses(seed + 1_000_000, with_copies)), Counts::are_many);
}

#[test]
fn a_job_whose_servers_die_has_the_bits_of_one_that_was_told_who_is_lost() {
    let seeds = sample(300, SEEDS);
    check(&seeds, &compare_with_told(&seeds, |seed| losses(seed + 1_100_000, with_copies)), Counts::are_many);
}
