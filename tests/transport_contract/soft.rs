//! The contract on soft-RDMA, in calm and in rough weather and with small and large packets, and what is soft's own.
//!
//! Invariant: sockets are real and on the loopback interface; an end that vanishes says no goodbye.

use std::time::{Duration, Instant};

use gradwire::{
    rc::Config,
    transport::{
        Completion, Endpoint, Transport, Waiter, Wakeup, Woken,
        soft::{SoftCounters, SoftFaults, SoftOptions, SoftTransport},
    },
    types::PeerId,
    wire::{Note, NoteKind},
};

use crate::world::{Fabric, World, fill, is_filled, note, write};

struct Soft {
    options: SoftOptions,
}

impl Soft {
    /// Gives a silent peer up after a second or so, so that tests of vanished peers are quick.
    fn new(mtu: u32, faults: SoftFaults) -> Soft {
        let queue_pair = Config {
            mtu,
            retry_limit: 15,
            timeout_max: Duration::from_millis(100),
            probe_interval: Duration::from_millis(500),
            ..Config::default()
        };
        Soft { options: SoftOptions { queue_pair, queue_limit: 512, faults, ..SoftOptions::default() } }
    }

    fn calm() -> Soft {
        Soft::new(4096, SoftFaults::default())
    }

    fn rough(seed: u64) -> Soft {
        Soft::new(4096, SoftFaults { loss: 0.05, duplicate: 0.05, reorder: 0.05, seed, ..SoftFaults::default() })
    }
}

impl Fabric for Soft {
    type End = SoftTransport;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<SoftTransport> {
        let ends = peers.iter().enumerate().map(|(at, _)| {
            let mut options = self.options.clone();
            options.faults.seed += at as u64;
            SoftTransport::new(options).unwrap()
        });
        ends.collect()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn step(&mut self) {
        std::thread::yield_now();
    }

    /// As if its machine had been switched off: nobody says goodbye, and its socket swallows what comes.
    fn vanish(&mut self, end: SoftTransport) {
        std::mem::forget(end);
    }
}

mod calm {
    contract!(super::Soft::calm());
}

mod rough {
    contract!(super::Soft::rough(1));
}

mod small_packets {
    contract!(super::Soft::new(256, super::SoftFaults::default()));
}

mod large_packets {
    contract!(super::Soft::new(8192, super::SoftFaults::default()));
}

fn counters(world: &mut World<Soft>) -> [SoftCounters; 2] {
    [0, 1].map(|at| world.sides[at].transport().counters())
}

/// `turns` payloads of 20,000 bytes from the first side to the second, all of them checked.
fn exchange(world: &mut World<Soft>, turns: u64) {
    let (a, b) = (world.peer(0), world.peer(1));
    let mut slot_lease = Some(world.sides[1].cut(20_000));
    let mut source = Some(world.sides[0].cut(20_000));
    for turn in 0..turns {
        let slot = world.sides[1].arm(a, slot_lease.take().unwrap());
        let mut filled = source.take().unwrap();
        fill(&mut filled, turn);
        world.sides[0].post(write(turn, b, filled.freeze(), slot));
        world.until("a payload", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);
        let (heard, lease) = world.sides[1].arrivals(a).pop().unwrap();
        assert!(heard.clock == turn && is_filled(lease.as_ref().unwrap().bytes(), turn));
        slot_lease = lease;
        source = world.sides[0].outcomes().pop().and_then(|(_, source, _)| source).map(|source| source.thaw().unwrap());
    }
}

#[test]
fn every_fault_is_injected_counted_and_survived() {
    let faults = SoftFaults {
        loss: 0.05,
        duplicate: 0.05,
        reorder: 0.05,
        corrupt: 0.05,
        delay_us: 300,
        seed: 7,
        ..SoftFaults::default()
    };
    let mut world = World::joined(Soft::new(1024, faults), 2, 64 << 10);
    exchange(&mut world, 60);
    let [a, b] = counters(&mut world);
    for (what, count) in [
        ("lost", a.lost),
        ("duplicated", a.duplicated),
        ("reordered", a.reordered),
        ("corrupted", a.corrupted),
        ("delayed", a.delayed),
        ("resent", a.queue_pairs.resent),
        ("bad checks", b.bad_check + b.unknown_queue_pair),
        ("duplicates", b.queue_pairs.duplicates),
        ("out of order", b.queue_pairs.out_of_order),
    ] {
        assert!(count > 10, "{what}: {count} of {} sent; {a:?} {b:?}", a.sent);
    }
}

#[test]
fn calm_weather_sends_nothing_twice() {
    let mut world = World::joined(Soft::calm(), 2, 64 << 10);
    exchange(&mut world, 100);
    let [a, b] = counters(&mut world);
    assert_eq!((a.lost, a.corrupted, b.bad_check, b.malformed, b.unknown_queue_pair), (0, 0, 0, 0, 0));
    assert_eq!((a.queue_pairs.naks, b.queue_pairs.out_of_order, b.queue_pairs.rnr_sent), (0, 0, 0));
    assert!(a.sent > 500);
}

/// The receiver has room for eight arrivals a poll, and fifty come: it says "not ready", and none is lost or doubled.
#[test]
fn a_receiver_without_room_is_waited_for() {
    let mut fabric = Soft::calm();
    fabric.options.receive_depth = 8;
    let mut world = World::joined(fabric, 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    for clock in 0..200 {
        world.sides[0].post(note(clock, b, Note { clock, ..Note::new(NoteKind::Absent) }));
    }
    world.until("200 notes", |w| w.sides[1].arrived() == 200 && w.sides[0].sent() == 200);
    let clocks = world.sides[1].arrivals(a).into_iter().map(|(heard, _)| heard.clock);
    assert!(clocks.eq(0..200));
    let [a, b] = counters(&mut world);
    assert!(a.queue_pairs.rnr_received > 0 && b.queue_pairs.rnr_sent > 0, "{a:?} {b:?}");
}

#[test]
fn a_queue_pair_that_dies_is_broken_by_name_on_both_sides() {
    let mut fabric = Soft::calm();
    fabric.options.faults.die_after = Some(60);
    let mut world = World::apart(fabric, 2, 1 << 20);
    let (a, b) = (world.peer(0), world.peer(1));
    // Only the first side's dies.
    let calm = SoftOptions { faults: SoftFaults::default(), ..world.fabric.options.clone() };
    world.sides[1].transport = Some(SoftTransport::new(calm).unwrap());
    world.connect(0, 1, Duration::from_secs(20));
    world.connect(1, 0, Duration::from_secs(20));
    world.until("Connected", |w| w.sides[0].is_connected_to(b) && w.sides[1].is_connected_to(a));
    for id in 0..200 {
        world.sides[0].post(note(id, b, Note { clock: id, ..Note::new(NoteKind::Absent) }));
    }
    world.until("both ends", |w| w.sides[0].broken_by(b).is_some() && w.sides[1].broken_by(a).is_some());
    let (dead, bereft) = (world.sides[0].broken_by(b).unwrap(), world.sides[1].broken_by(a).unwrap());
    assert!(dead.contains("worker 0") && dead.contains("injected"), "{dead}");
    assert!(bereft.contains("server 0") && bereft.contains("retries exhausted"), "{bereft}");
    let outcomes = world.sides[0].outcomes();
    assert!(outcomes.iter().map(|(id, ..)| *id).eq(0..200));
    assert!(outcomes.iter().filter(|(.., error)| error.is_some()).count() > 100);
    assert!(world.sides[0].broken_by(b).is_some() && world.sides[1].arrived() < 100);
}

#[test]
fn what_is_posted_before_the_connection_is_there_is_sent_when_it_is() {
    let mut world = World::apart(Soft::calm(), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    world.connect(0, 1, Duration::from_secs(20));
    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.step();
    world.connect(1, 0, Duration::from_secs(20));
    world.until("the note", |w| w.sides[1].arrived() == 1);
    assert!(matches!(world.sides[1].heard[..], [Completion::Connected { .. }, Completion::Arrived { .. }]));
    assert!(world.sides[1].is_connected_to(a));
}

#[test]
fn an_idle_pair_sleeps_and_a_note_wakes_it() {
    let mut fabric = Soft::calm();
    fabric.options.queue_pair.probe_interval = Duration::from_secs(20);
    let mut world = World::joined(fabric, 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    world.for_a_while();
    let before = counters(&mut world).map(|counters| counters.sent);
    let waiter = Waiter::new().unwrap();
    let soon = || Some(Instant::now() + Duration::from_millis(40));
    for side in &mut world.sides {
        assert_eq!(waiter.wait(&mut [side.transport()], soon()).unwrap(), Woken::Deadline);
        // Nothing but the probe is due.
        let due = side.transport().next_deadline().expect("the probe");
        assert!(due > Instant::now() + Duration::from_secs(5));
    }
    world.for_a_while();
    assert_eq!(counters(&mut world).map(|counters| counters.sent), before, "an idle pair is silent");

    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.sides[0].transport().flush().unwrap();
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Event);
    world.step_side(1);
    assert_eq!(world.sides[1].arrivals(a).len(), 1);
    // The acknowledgement wakes the sender.
    assert_eq!(waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap(), Woken::Event);
    world.step_side(0);
    assert_eq!(world.sides[0].sent(), 1);
    for side in &mut world.sides {
        assert_eq!(waiter.wait(&mut [side.transport()], soon()).unwrap(), Woken::Deadline);
    }
    // What no packet announces is no reason to sleep either.
    world.sides[0].post(note(2, PeerId::worker(7), Note::new(NoteKind::Heartbeat)));
    assert_eq!(waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap(), Woken::Event);
}

/// Only the waiter decides when anybody polls: no wake-up is lost, whatever the channel does.
#[test]
fn a_pair_that_polls_only_when_woken_gets_through_rough_weather() {
    let mut world = World::joined(Soft::rough(3), 2, 64 << 10);
    let b = world.peer(1);
    let waiter = Waiter::new().unwrap();
    let limit = Instant::now() + Duration::from_secs(25);
    for clock in 0..300 {
        world.sides[0].post(note(clock, b, Note { clock, ..Note::new(NoteKind::Absent) }));
    }
    world.step();
    while world.sides[1].arrived() < 300 || world.sides[0].sent() < 300 {
        assert!(Instant::now() < limit, "{} arrived", world.sides[1].arrived());
        let (first, second) = world.sides.split_at_mut(1);
        waiter.wait(&mut [first[0].transport(), second[0].transport()], Some(limit)).unwrap();
        world.step();
    }
}

#[test]
fn every_peer_and_every_life_has_an_address_of_its_own() {
    let mut transport = SoftTransport::new(SoftOptions::default()).unwrap();
    let (one, other) = (PeerId::worker(1), PeerId::worker(2));
    let mut offer = |peer| transport.offer(peer).unwrap().on("soft").unwrap().to_string();
    let first = offer(one);
    assert_eq!(offer(one), first, "the same until a fence");
    let differ = |left: &str, right: &str| left.split('/').zip(right.split('/')).skip(1).all(|(l, r)| l != r);
    assert!(differ(&offer(other), &first));
    transport.fence(one);
    let again = transport.offer(one).unwrap().on("soft").unwrap().to_string();
    assert!(differ(&again, &first), "{again} {first}");
    let error = transport.connect(one, &Endpoint::new("soft", "nonsense"), Instant::now()).unwrap_err().to_string();
    assert!(error.contains("`nonsense`"), "{error}");
    let error = transport.connect(one, &Endpoint::new("tcp", "127.0.0.1:1"), Instant::now()).unwrap_err().to_string();
    assert!(error.contains("worker 1") && error.contains("tcp"), "{error}");
}
