//! The contract on several fabrics at once, behind the router: three ends, and a different fabric between each two of them; with
//! verbs among them where there is an RDMA device.
//!
//! Invariant: the drivers are the real ones, and which pair has which is checked.

use std::time::{Duration, Instant};

use gradwire::{
    transport::{
        Armed, Driver, Fabrics, Transport, Wakeup,
        shm::{ShmOptions, ShmTransport},
        soft::{SoftFaults, SoftOptions, SoftTransport},
        tcp::{TcpOptions, TcpTransport},
        verbs::{VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::world::{Fabric, World, note};

/// What each of the three ends has, and what the pairs (0, 1), (0, 2) and (1, 2) are to agree on.
struct Mixed {
    has: [&'static [&'static str]; 3],
    pairs: [&'static str; 3],
    token: JobToken,
}

impl Mixed {
    fn new(has: [&'static [&'static str]; 3], pairs: [&'static str; 3]) -> Mixed {
        Mixed { has, pairs, token: JobToken::random().unwrap() }
    }

    fn shm_first() -> Mixed {
        Mixed::new([&["shm", "soft", "tcp"], &["shm", "tcp"], &["soft", "tcp"]], ["shm", "soft", "tcp"])
    }

    fn soft_first() -> Mixed {
        Mixed::new([&["soft", "shm", "tcp"], &["tcp", "soft"], &["shm", "tcp"]], ["soft", "shm", "tcp"])
    }

    fn tcp_first() -> Mixed {
        Mixed::new([&["tcp", "shm"], &["soft", "tcp"], &["shm", "soft"]], ["tcp", "shm", "soft"])
    }

    /// Only where there is an RDMA device.
    fn verbs_first() -> Mixed {
        Mixed::new([&["verbs", "shm", "tcp"], &["verbs", "tcp"], &["shm", "tcp"]], ["verbs", "shm", "tcp"])
    }

    fn driver(&self, fabric: &str, me: PeerId) -> Box<dyn Driver> {
        let identity = Identity { job: job_id("contract", "1"), token: self.token.clone(), me, epoch: 0 };
        let queue_limit = 512;
        match fabric {
            "shm" => Box::new(ShmTransport::new(ShmOptions { queue_limit, ..ShmOptions::new(identity) }).unwrap()),
            "tcp" => Box::new(TcpTransport::new(TcpOptions { queue_limit, ..TcpOptions::new(identity) }).unwrap()),
            "verbs" => {
                let options = VerbsOptions { queue_limit, ..crate::verbs::options(me) };
                Box::new(VerbsTransport::new(options).unwrap())
            }
            _ => {
                // A lost packet is sent again by its sender, whom one test does not poll: duplicates and delays only.
                let faults = SoftFaults { duplicate: 0.02, reorder: 0.02, seed: 5, ..SoftFaults::default() };
                Box::new(SoftTransport::new(SoftOptions { queue_limit, faults, ..SoftOptions::default() }).unwrap())
            }
        }
    }
}

impl Fabric for Mixed {
    type End = Fabrics;
    const OWNER_PLACES_BYTES: bool = false;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<Fabrics> {
        let ends = peers.iter().enumerate().map(|(at, peer)| {
            let drivers = self.has[at % 3].iter().map(|fabric| self.driver(fabric, *peer));
            Fabrics::new(*peer, drivers.collect(), Vec::new()).unwrap()
        });
        ends.collect()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn step(&mut self) {
        std::thread::yield_now();
    }
}

mod shm_first {
    contract!(super::Mixed::shm_first());
}

mod soft_first {
    contract!(super::Mixed::soft_first());
}

mod tcp_first {
    contract!(super::Mixed::tcp_first());
}

mod verbs_first {
    contract!(
        super::Mixed::verbs_first(),
        if !crate::verbs::is_there() {
            return;
        }
    );
}

#[test]
fn every_pair_has_the_fabric_that_both_prefer_verbs_too_and_says_why() {
    let mut fabrics = vec![Mixed::shm_first(), Mixed::soft_first(), Mixed::tcp_first()];
    if crate::verbs::is_there() {
        fabrics.push(Mixed::verbs_first());
    }
    for fabric in fabrics {
        let (pairs, has) = (fabric.pairs, fabric.has);
        let mut world = World::joined(fabric, 3, 4096);
        for ((a, b), expected) in [(0, 1), (0, 2), (1, 2)].into_iter().zip(pairs) {
            let (peer_a, peer_b) = (world.peer(a), world.peer(b));
            assert_eq!(world.sides[a].transport().fabric(peer_b), expected);
            assert_eq!(world.sides[b].transport().fabric(peer_a), expected);
            let choices: Vec<_> = world.sides[a].transport().choices().cloned().collect();
            let choice = choices.iter().find(|choice| choice.peer == peer_b).unwrap();
            assert_eq!(choice.fabric, expected);
            // The list of the end with the smaller name decides.
            let passed_over = has[a][0] != expected;
            assert_eq!(choice.reason.contains("does not offer it"), passed_over, "{}", choice.reason);
            assert_eq!(choice.missed.is_some(), passed_over, "{:?}", choice.missed);
            world.assert_works(a, b);
        }
    }
}

/// A driver's descriptor may come to be with its first use: once a router watched the one from before, and slept until a heartbeat.
#[test]
fn a_sleeping_end_is_woken_by_any_of_its_fabrics() {
    for fabric in [Mixed::shm_first(), Mixed::soft_first(), Mixed::tcp_first()] {
        let mut world = World::joined(fabric, 3, 4096);
        for (from, to) in [(1, 0), (2, 0), (1, 2), (0, 1)] {
            let (sender, receiver) = (world.peer(from), world.peer(to));
            let limit = Instant::now() + Duration::from_secs(20);
            world.for_a_while();
            // Armed first, written to afterwards: what is there before is found by the look that comes with arming.
            while world.sides[to].transport().arm_wakeup().unwrap() == Armed::Ready {
                assert!(Instant::now() < limit, "{receiver} always has something to do");
                world.step_side(to);
            }
            world.sides[from].post(note(1, receiver, Note::new(NoteKind::Heartbeat)));
            world.sides[from].transport().flush().unwrap();
            let mut woken = [PollFd::new(world.sides[to].transport.as_ref().unwrap().fd(), PollFlags::POLLIN)];
            let count = poll(&mut woken, PollTimeout::from(20_000u16)).unwrap();
            assert_eq!(count, 1, "{sender} did not wake {receiver}");
            world.until("the note", |world| !world.sides[to].arrivals(sender).is_empty());
        }
    }
}

#[test]
fn ends_without_a_common_fabric_are_told_what_each_has() {
    let mut world = World::apart(Mixed::new([&["shm"], &["tcp", "soft"], &["shm"]], ["", "shm", ""]), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let endpoint = world.sides[1].transport().offer(a).unwrap();
    let error = world.sides[0].transport().connect(b, &endpoint, Instant::now()).unwrap_err().to_string();
    for part in ["server 0", "worker 0", "shm", "tcp,soft", "--transport"] {
        assert!(error.contains(part), "no `{part}` in: {error}");
    }
}
