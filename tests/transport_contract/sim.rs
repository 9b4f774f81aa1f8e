//! The contract on the simulated fabric, under several seeds, and what is the simulator's own.
//!
//! Invariant: time is what the test says it is.

use std::time::{Duration, Instant};

use gradwire::{
    transport::{
        Transport,
        sim::{SimNetwork, SimOptions, SimRandom, SimTransport},
    },
    types::PeerId,
};

use crate::world::{Fabric, World, fill, is_filled, write};

struct Sim {
    network: SimNetwork,
    random: SimRandom,
    now: Instant,
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let now = Instant::now();
        let options = SimOptions {
            delay_max: Duration::from_millis(5),
            queue_max: 512,
            lingers: true,
            refuse_one_in: 0,
            corrupt_one_in: 0,
        };
        Sim { network: SimNetwork::new(seed, options, now), random: SimRandom::new(!seed), now }
    }
}

impl Fabric for Sim {
    type End = SimTransport;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<SimTransport> {
        peers.iter().map(|peer| self.network.transport(*peer)).collect()
    }

    fn now(&self) -> Instant {
        self.now
    }

    fn step(&mut self) {
        self.now += Duration::from_micros(self.random.below(1000));
        self.network.advance(self.now);
    }
}

mod seed_1 {
    contract!(super::Sim::new(1));
}

mod seed_2 {
    contract!(super::Sim::new(2));
}

mod seed_3 {
    contract!(super::Sim::new(3));
}

/// What makes the simulator strict: a source that is touched before its completion may or may not show in what lands.
#[test]
fn a_payload_is_read_when_it_is_sent_or_when_it_lands() {
    let (mut at_once, mut later) = (0, 0);
    for seed in 0..20 {
        let mut world = World::joined(Sim::new(seed), 2, 4096);
        let (a, b) = (world.peer(0), world.peer(1));
        let lease = world.sides[1].cut(64);
        let slot = world.sides[1].arm(a, lease);
        let mut source = world.sides[0].cut(64);
        fill(&mut source, seed);
        world.sides[0].post(write(1, b, source.freeze(), slot));
        world.sides[0].transport().flush().unwrap();
        world.step_side(0);
        if world.sides[0].sent() == 1 {
            at_once += 1
        } else {
            later += 1
        }
        world.until("the payload", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);
        let (_, lease) = world.sides[1].arrivals(a).pop().unwrap();
        assert!(is_filled(lease.unwrap().bytes(), seed));
    }
    assert!(at_once > 3 && later > 3, "{at_once} read at once, {later} later");
}

#[test]
fn a_cut_path_stands_still_and_goes_on() {
    let mut world = World::joined(Sim::new(4), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let until = world.fabric.now() + Duration::from_millis(400);
    world.fabric.network.cut(a, b, until);
    world.assert_works(0, 1);
    assert!(world.fabric.now() >= until);
}
