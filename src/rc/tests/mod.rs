//! Tests of the queue pair: a seeded simulation of two of them over a hostile channel, and single rules by hand.
//!
//! Invariant: time is virtual; what happens is a function of the seed.

mod channel;
mod pair;
mod rules;

use channel::{Channel, Weather};
use pair::World;

/// Many seeds with every kind of weather; `GRADWIRE_SEED` runs one alone.
fn run(name: &str, seeds: std::ops::Range<u64>, weather: impl Fn(u64) -> Weather) -> Vec<World> {
    let alone = std::env::var("GRADWIRE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = alone.map_or(seeds, |seed: u64| seed..seed + 1);
    let worlds = seeds.map(|seed| {
        let mut world = World::new(seed, weather(seed));
        if let Err(defect) = world.run() {
            panic!("{name}, GRADWIRE_SEED={seed}: {defect}");
        }
        world
    });
    worlds.collect()
}

fn total(worlds: &[World], count: impl Fn(&World) -> u64) -> u64 {
    worlds.iter().map(count).sum()
}

#[test]
fn calm_weather_needs_nothing_twice() {
    let worlds = run("calm", 0..100, |_| Weather::default());
    assert!(worlds.iter().all(|world| !world.is_broken() && world.sum(|c| c.resent + c.naks + c.timeouts) == 0));
    assert!(total(&worlds, |world| world.sum(|c| c.probes)) > 100, "silence is probed");
}

#[test]
fn loss_reordering_duplication_and_corruption_change_nothing() {
    let worlds = run("rough", 0..1200, |seed| {
        let level = |options: &[u64], divisor: u64| options[(seed / divisor) as usize % options.len()];
        Weather {
            loss: level(&[0, 1, 5, 15, 30], 1),
            duplicate: level(&[0, 3, 20], 5),
            delay_us: level(&[0, 30, 3000], 15),
            corrupt: level(&[0, 4], 45),
            not_ready: level(&[0, 25], 90),
            blackout: None,
        }
    });
    assert!(worlds.iter().all(|world| !world.is_broken()), "a connection that could go on was given up");
    for (what, count) in [
        ("resent", total(&worlds, |world| world.sum(|c| c.resent))),
        ("naks", total(&worlds, |world| world.sum(|c| c.naks))),
        ("duplicates", total(&worlds, |world| world.sum(|c| c.duplicates))),
        ("out of order", total(&worlds, |world| world.sum(|c| c.out_of_order))),
        ("not ready", total(&worlds, |world| world.sum(|c| c.rnr_received))),
        ("damaged", total(&worlds, |world| world.channel.damaged)),
        ("wrapped", total(&worlds, |world| u64::from(world.wrapped))),
    ] {
        assert!(count > 100, "{what}: {count}; the weather hits nothing");
    }
}

#[test]
fn a_blackout_is_survived_or_ends_both_sides() {
    let worlds = run("blackout", 0..600, |seed| {
        let from_us = 1000 * (seed % 60);
        let length_us = [20_000, 200_000, u64::MAX][seed as usize % 3];
        let loss = [0, 10][seed as usize / 3 % 2];
        Weather { loss, delay_us: 500, blackout: Some((from_us, length_us)), ..Weather::default() }
    });
    let ended: Vec<u64> = (0..).zip(&worlds).filter(|(_, world)| world.is_broken()).map(|(seed, _)| seed).collect();
    if worlds.len() == 600 {
        assert!(ended.iter().all(|seed| seed % 3 == 2), "a blackout that passed ended a connection: {ended:?}");
        assert!(ended.len() > 120, "only {} ended of 200 with a blackout for ever", ended.len());
    }
}

#[test]
fn the_channel_is_a_function_of_its_seed() {
    let trace = |seed| {
        let mut channel = Channel::new(seed, Weather { loss: 30, duplicate: 20, delay_us: 900, ..Weather::default() });
        (0..200u8).for_each(|at| channel.send(0, vec![at]));
        channel.deliver(u64::MAX)
    };
    assert_eq!(trace(5), trace(5));
    assert_ne!(trace(5), trace(6));
}
