//! The contract on shared memory, all ends in this process, and what is shm's own.
//!
//! Invariant: memory, sockets and rings are real; what needs another process is in `shm_processes.rs`.

use std::time::{Duration, Instant};

use gradwire::{
    transport::{
        Transport, Waiter, Woken,
        shm::{ShmOptions, ShmTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};

use crate::world::{Fabric, World, note};

/// Ends of one job.
pub struct Shm {
    pub token: JobToken,
}

impl Shm {
    pub fn new() -> Shm {
        Shm { token: JobToken::random().unwrap() }
    }

    pub fn end(&self, me: PeerId) -> ShmTransport {
        let identity = Identity { job: job_id("contract", "1"), token: self.token.clone(), me, epoch: 0 };
        ShmTransport::new(ShmOptions { queue_limit: 512, ..ShmOptions::new(identity) }).unwrap()
    }
}

impl Fabric for Shm {
    type End = ShmTransport;
    const OWNER_PLACES_BYTES: bool = false;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<ShmTransport> {
        peers.iter().map(|peer| self.end(*peer)).collect()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn step(&mut self) {
        std::thread::yield_now();
    }
}

mod promises {
    contract!(super::Shm::new());
}

#[test]
fn an_idle_pair_sleeps_and_a_note_wakes_it() {
    let mut world = World::joined(Shm::new(), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let waiter = Waiter::new().unwrap();
    let soon = || Some(Instant::now() + Duration::from_millis(40));
    world.for_a_while();
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Deadline);
    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.sides[0].transport().flush().unwrap();
    // The sender has a completion to fetch, the receiver something to read.
    assert_eq!(waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap(), Woken::Event);
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Event);
    world.step();
    assert_eq!(world.sides[1].arrivals(a).len(), 1);
    // The message that woke it is read away as well, at the latest by the poll after.
    world.step();
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Deadline);
}
