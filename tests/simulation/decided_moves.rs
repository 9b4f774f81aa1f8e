//! Steps that are decided upon, and settings that change, in a job whose shards move: every shard takes the same step or none, whoever
//! serves it, with the bits of the job whose servers stay.
//!
//! Invariant: the shard that decides stays where it is; the others move to and fro, and lose their path to it.

use gradwire::world::{Chaos, WorldOptions};

use super::{
    check_undisturbed,
    decided::{change_settings, compare_decisions, decides},
    moves::with_moves,
    sample,
};

/// Of so many seeds of each test every run tries some.
const SEEDS: u64 = 10_000;

fn chaos(seed: u64) -> Chaos {
    if seed.is_multiple_of(4) { Chaos::Calm } else { Chaos::Moves }
}

fn moving(seed: u64) -> WorldOptions {
    decides(seed, with_moves(seed + 900_000, chaos(seed)))
}

/// The ledger sees every lost, doubled and torn update; what is decided here leaves every step as it is.
#[test]
fn no_update_is_lost_or_counts_twice_when_shards_move_between_decisions() {
    for seed in sample(100, SEEDS) {
        let mut world = with_moves(seed + 800_000, chaos(seed));
        world.optimizer.clip.global_norm = Some(1e30);
        check_undisturbed(&world);
    }
}

#[test]
fn decisions_are_those_of_a_job_whose_servers_stay() {
    let seeds = sample(250, SEEDS);
    let counts = compare_decisions(&seeds, moving);
    println!("{} seeds: {counts:?}", seeds.len());
    let tried = seeds.len() as u64;
    let is_enough = counts.moves > tried && 14 * counts.given_up.min(counts.deaths) > tried && 35 * counts.cuts > tried;
    assert!(is_enough || tried < 200, "{counts:?}");
}

/// Whoever takes a shard has promised nothing, and is told what has changed before it serves.
#[test]
fn settings_change_while_shards_move() {
    let seeds = sample(250, SEEDS);
    let counts = change_settings(&seeds, |seed| moving(seed + 50_000));
    let with_moves = counts.iter().filter(|counts| counts.moves > 0).count();
    println!("settings changed under {} of {} seeds, {with_moves} while shards moved", counts.len(), seeds.len());
    assert!(3 * with_moves > seeds.len() || seeds.len() < 200, "{with_moves}");
}
