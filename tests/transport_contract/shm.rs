//! The contract on shared memory, all ends in this process, and what is shm's own.
//!
//! Invariant: memory, sockets and rings are real; what needs another process is in `shm_processes.rs`.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Region, RegionOptions},
    transport::{
        Completion, Endpoint, RemoteSlot, Transport, Waiter, Wakeup, Woken,
        shm::{ShmOptions, ShmTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket},
};

use crate::world::{Fabric, World, fill, is_filled, note, write};

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
    assert!(!is_readable(world.sides[1].transport()));
    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.sides[0].transport().flush().unwrap();
    assert!(is_readable(world.sides[1].transport()));
    // The sender has a completion to fetch, the receiver something to read.
    assert_eq!(waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap(), Woken::Event);
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Event);
    world.step();
    assert_eq!(world.sides[1].arrivals(a).len(), 1);
    // The message that woke it is read away as well.
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Deadline);
}

#[test]
fn ten_thousand_turns_of_two_sleeping_threads_lose_no_wake_up() {
    const TURNS: u64 = 10_000;
    let fabric = Shm::new();
    let peers = [PeerId::server(0, 0), PeerId::worker(0)];
    let mut ends = peers.map(|peer| fabric.end(peer));
    let offers = [ends[0].offer(peers[1]).unwrap(), ends[1].offer(peers[0]).unwrap()];
    let deadline = Instant::now() + Duration::from_secs(100);
    // The first end takes the even turns, the second the odd ones; each answers what it hears with the next turn.
    let play = |at: usize, mut end: ShmTransport| {
        let other = peers[1 - at];
        end.connect(other, &offers[1 - at], deadline).unwrap();
        let waiter = Waiter::new().unwrap();
        let (mut heard, mut turn, mut mine) = (Vec::new(), 0, at == 0);
        while turn < TURNS {
            if std::mem::take(&mut mine) {
                end.post(note(turn, other, Note { clock: turn, ..Note::new(NoteKind::Absent) })).unwrap();
                end.flush().unwrap();
                turn += 1;
                continue;
            }
            end.poll(Instant::now(), &mut heard).unwrap();
            for completion in heard.drain(..) {
                match completion {
                    Completion::Arrived { note, .. } => {
                        assert_eq!(note.clock, turn);
                        (turn, mine) = (turn + 1, true);
                    }
                    Completion::Connected { .. } | Completion::Sent { .. } => {}
                    other => panic!("turn {turn}: {other:?}"),
                }
            }
            if !mine {
                let until = Instant::now() + Duration::from_secs(30);
                assert_eq!(waiter.wait(&mut [&mut end], Some(until)).unwrap(), Woken::Event, "turn {turn} was lost");
            }
        }
        end
    };
    let [first, second] = ends;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| play(1, second));
        // Neither end goes before both are through.
        let _first = play(0, first);
        let _second = other.join().unwrap();
    });
}

/// Whether the descriptor on which the driver's thread sleeps would wake it.
fn is_readable(transport: &ShmTransport) -> bool {
    let mut watched = [PollFd::new(transport.fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).unwrap() > 0
}

/// Posts and flushes notes until neither the ring nor the queue of side `at` takes more; returns how many those are.
fn fill_up(world: &mut World<Shm>, at: usize) -> u64 {
    let other = world.peer(1 - at);
    let transport = world.sides[at].transport();
    let mut posted = 0;
    while transport.post(note(posted, other, Note { clock: posted, ..Note::new(NoteKind::Absent) })).is_ok() {
        posted += 1;
        transport.flush().unwrap();
    }
    posted
}

#[test]
fn both_rings_full_is_no_deadlock() {
    let mut world = World::joined(Shm::new(), 2, 4096);
    for at in [0, 1] {
        assert_eq!(fill_up(&mut world, at), 1024 + 512, "the ring and the queue");
    }
    world.until("all of both", |w| w.sides.iter().all(|side| side.arrived() == 1536 && side.sent() == 1536));
    for at in [0, 1] {
        let peer = world.peer(1 - at);
        assert!(world.sides[at].arrivals(peer).into_iter().map(|(heard, _)| heard.clock).eq(0..1536));
    }
}

#[test]
fn a_writer_that_sleeps_for_want_of_room_is_woken_by_it() {
    let mut world = World::joined(Shm::new(), 2, 4096);
    let waiter = Waiter::new().unwrap();
    let soon = || Some(Instant::now() + Duration::from_millis(40));
    fill_up(&mut world, 0);
    world.step_side(0);
    while waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap() == Woken::Event {
        world.step_side(0);
    }
    assert_eq!(world.sides[0].sent(), 1024, "what is in the ring");
    // The reader has nothing to say but that there is room. The writer is not asked again: it would look for itself.
    assert!(!is_readable(world.sides[0].transport()));
    world.step_side(1);
    assert!(is_readable(world.sides[0].transport()), "room was made, and it sleeps on");
    world.until("all of it", |w| w.sides[1].arrived() == 1536 && w.sides[0].sent() == 1536);
}

#[test]
fn a_region_that_is_registered_late_is_found_by_the_first_write_to_it() {
    let mut world = World::joined(Shm::new(), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let (region, lease) = Region::allocate(8192, &RegionOptions::default()).unwrap();
    world.sides[1].transport().register(&region).unwrap();
    let slot = world.sides[1].arm(a, lease);
    let mut source = world.sides[0].cut(1000);
    fill(&mut source, 5);
    // No poll between: the region is still in the socket.
    world.sides[0].post(write(1, b, source.freeze(), slot));
    world.sides[0].transport().flush().unwrap();
    world.until("the write", |w| w.sides[1].arrived() == 1);
    let (_, lease) = world.sides[1].arrivals(a).pop().unwrap();
    assert!(is_filled(&lease.unwrap().bytes()[..1000], 5));
}

#[test]
fn a_key_that_was_never_shared_breaks_the_path() {
    let mut world = World::joined(Shm::new(), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let rkey = world.rkey(1, 0) ^ 1;
    let source = world.sides[0].cut(64).freeze();
    world.sides[0].post(write(1, b, source, RemoteSlot { rkey, offset: 0, len: 64 }));
    world.until("both ends to break", |w| w.sides[0].broken_by(b).is_some() && w.sides[1].broken_by(a).is_some());
    assert!(world.sides[0].broken_by(b).unwrap().contains("no region"));
    assert!(matches!(world.sides[0].outcomes()[..], [(1, Some(_), Some(_))]));
}

#[test]
fn two_jobs_do_not_meet() {
    let (one, other) = (Shm::new(), Shm::new());
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    let (mut listener, mut caller) = (one.end(server), other.end(worker));
    let deadline = Instant::now() + Duration::from_secs(20);
    listener.connect(worker, &caller.offer(server).unwrap(), deadline).unwrap();
    caller.connect(server, &listener.offer(worker).unwrap(), deadline).unwrap();
    let (mut heard, mut there) = (Vec::new(), Vec::new());
    while heard.is_empty() {
        caller.poll(Instant::now(), &mut heard).unwrap();
        listener.poll(Instant::now(), &mut there).unwrap();
    }
    assert!(
        matches!(&heard[..], [Completion::Broken { peer, error }] if *peer == server
        && error.to_string().contains("token")),
        "{heard:?}"
    );
    assert!(there.is_empty(), "who does not know the token changes nothing: {there:?}");
}

/// The abstract socket behind an offer.
fn dial(offer: &Endpoint) -> OwnedFd {
    let name = format!("gradwire-{}", offer.on("shm").unwrap().rsplit('/').next().unwrap());
    let socket =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).unwrap();
    socket
}

#[test]
fn strangers_who_say_nothing_or_nonsense_keep_nobody_out() {
    let fabric = Shm::new();
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    let (mut listener, mut caller) = (fabric.end(server), fabric.end(worker));
    let offer = listener.offer(worker).unwrap();
    let (mut heard, mut there) = (Vec::new(), Vec::new());
    let strangers: Vec<OwnedFd> = (0..100)
        .map(|at| {
            let socket = dial(&offer);
            if at % 3 == 0 {
                send(socket.as_raw_fd(), &[at; 50], MsgFlags::MSG_NOSIGNAL).unwrap();
            }
            listener.poll(Instant::now(), &mut there).unwrap();
            socket
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    listener.connect(worker, &caller.offer(server).unwrap(), deadline).unwrap();
    caller.connect(server, &offer, deadline).unwrap();
    while heard.is_empty() || there.is_empty() {
        caller.poll(Instant::now(), &mut heard).unwrap();
        listener.poll(Instant::now(), &mut there).unwrap();
        std::thread::yield_now();
    }
    for told in [&heard, &there] {
        assert!(matches!(told[..], [Completion::Connected { .. }]), "{told:?}");
    }
    // Those who spoke nonsense were hung up on.
    let mut bytes = [0; 64];
    let ended = strangers.iter().step_by(3).filter(|socket| {
        let next = || recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT);
        recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).is_ok() && next() != Err(Errno::EAGAIN)
    });
    assert_eq!(ended.count(), 34);
}
