//! The contract on tcp, over both families of addresses, both ways to meet and both interfaces of the kernel, and what is tcp's
//! own.
//!
//! Invariant: sockets are real; all of them are on the loopback interface. Where the kernel refuses io_uring, its tests say so
//! loudly and are not run.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use gradwire::{
    transport::{
        Completion, Endpoint, Transport, Waiter, Woken,
        tcp::{Io, TcpOptions, TcpTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};

use crate::world::{Fabric, World, note};

struct Tcp {
    address: IpAddr,
    /// Whether workers listen as well.
    all_listen: bool,
    /// The interface of each end; with fewer than there are ends, in turn.
    io: &'static [Io],
    token: JobToken,
}

const EPOLL: &[Io] = &[Io::Epoll];
const URING: &[Io] = &[Io::Uring];
const MIXED: &[Io] = &[Io::Epoll, Io::Uring];

/// What the kernel answers to whoever wants io_uring here, if it refuses.
fn refusal() -> Option<String> {
    let fabric = Tcp::new(Ipv4Addr::LOCALHOST, true, EPOLL);
    let options = TcpOptions { io: Io::Uring, ..fabric.options(PeerId::worker(0)) };
    TcpTransport::new(options).err().map(|error| error.to_string())
}

/// Ends a test that needs io_uring where the kernel refuses it.
macro_rules! needs {
    ($io:expr) => {
        if $io.contains(&Io::Uring)
            && let Some(refusal) = refusal()
        {
            eprintln!("NOT RUN: {refusal}");
            return;
        }
    };
}

impl Tcp {
    fn new(address: impl Into<IpAddr>, all_listen: bool, io: &'static [Io]) -> Tcp {
        Tcp { address: address.into(), all_listen, io, token: JobToken::random().unwrap() }
    }

    fn options(&self, me: PeerId) -> TcpOptions {
        let identity = Identity { job: job_id("contract", "1"), token: self.token.clone(), me, epoch: 0 };
        TcpOptions { address: Some(self.address), queue_limit: 512, io: self.io[0], ..TcpOptions::new(identity) }
    }
}

impl Fabric for Tcp {
    type End = TcpTransport;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<TcpTransport> {
        // Between two workers one must listen: all but the last do, unless all do.
        let last = peers.len() - 1;
        let ends = peers.iter().enumerate().map(|(at, peer)| {
            let (listen, io) = (self.all_listen || at < last, self.io[at % self.io.len()]);
            let options = TcpOptions { listen, io, ..self.options(*peer) };
            TcpTransport::new(options).unwrap()
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

mod epoll_ipv4_all_listen {
    contract!(super::Tcp::new(std::net::Ipv4Addr::LOCALHOST, true, super::EPOLL));
}

mod epoll_ipv6_one_listens {
    contract!(super::Tcp::new(std::net::Ipv6Addr::LOCALHOST, false, super::EPOLL));
}

mod uring_ipv4_all_listen {
    use super::{Io, refusal};
    contract!(super::Tcp::new(std::net::Ipv4Addr::LOCALHOST, true, super::URING), needs!(super::URING));
}

mod uring_ipv6_one_listens {
    use super::{Io, refusal};
    contract!(super::Tcp::new(std::net::Ipv6Addr::LOCALHOST, false, super::URING), needs!(super::URING));
}

mod mixed_ipv4_all_listen {
    use super::{Io, refusal};
    contract!(super::Tcp::new(std::net::Ipv4Addr::LOCALHOST, true, super::MIXED), needs!(super::MIXED));
}

#[test]
fn what_is_posted_before_the_connection_is_there_is_sent_when_it_is() {
    for io in [EPOLL, URING] {
        needs!(io);
        what_is_posted_before_the_connection_is_there_is_sent_when_it_is_by(io);
    }
}

fn what_is_posted_before_the_connection_is_there_is_sent_when_it_is_by(io: &'static [Io]) {
    let mut world = World::apart(Tcp::new(Ipv4Addr::LOCALHOST, true, io), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    world.connect(0, 1, Duration::from_secs(20));
    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.step();
    world.connect(1, 0, Duration::from_secs(20));
    world.until("the note", |w| w.sides[1].arrived() == 1);
    assert!(matches!(world.sides[1].heard[..], [Completion::Connected { .. }, Completion::Arrived { .. }]));
    assert!(world.sides[0].is_connected_to(b) && world.sides[1].is_connected_to(a));
}

#[test]
fn a_caller_tries_every_address_and_waits_for_a_late_listener() {
    for io in [EPOLL, URING] {
        needs!(io);
        a_caller_tries_every_address_and_waits_for_a_late_listener_by(io);
    }
}

fn a_caller_tries_every_address_and_waits_for_a_late_listener_by(io: &'static [Io]) {
    let fabric = Tcp::new(Ipv6Addr::LOCALHOST, true, io);
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    // A port that is free a moment later, and one where nobody will ever listen.
    let address = |transport: &mut TcpTransport| transport.offer(worker).unwrap().on("tcp").unwrap().to_string();
    let late = address(&mut TcpTransport::new(fabric.options(server)).unwrap());
    let never = address(&mut TcpTransport::new(fabric.options(server)).unwrap());
    let mut caller = TcpTransport::new(TcpOptions { listen: false, ..fabric.options(worker) }).unwrap();
    let both = Endpoint::new("tcp", format!("{never},{late}"));
    let deadline = Instant::now() + Duration::from_secs(20);
    caller.connect(server, &both, deadline).unwrap();
    let mut heard = Vec::new();
    for _ in 0..20 {
        caller.poll(Instant::now(), &mut heard).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(heard.is_empty(), "{heard:?}");

    let port = late.rsplit(':').next().unwrap().parse().unwrap();
    let options = TcpOptions { ports: Some(port..=port), ..fabric.options(server) };
    let mut listener = TcpTransport::new(options).unwrap();
    listener.connect(worker, &Endpoint::new("tcp", ""), deadline).unwrap();
    let waiter = Waiter::new().unwrap();
    while heard.len() < 2 {
        assert!(Instant::now() < deadline, "they did not meet: {heard:?}");
        waiter.wait(&mut [&mut caller, &mut listener], Some(deadline)).unwrap();
        caller.poll(Instant::now(), &mut heard).unwrap();
        listener.poll(Instant::now(), &mut heard).unwrap();
    }
    assert!(heard.iter().all(|completion| matches!(completion, Completion::Connected { .. })), "{heard:?}");
}

#[test]
fn two_transports_that_do_not_listen_are_told_so() {
    let fabric = Tcp::new(Ipv4Addr::LOCALHOST, true, EPOLL);
    let mut deaf = TcpTransport::new(TcpOptions { listen: false, ..fabric.options(PeerId::worker(0)) }).unwrap();
    let endpoint = deaf.offer(PeerId::worker(1)).unwrap();
    assert_eq!(endpoint.on("tcp"), Some(""));
    let error = deaf.connect(PeerId::worker(1), &endpoint, Instant::now()).unwrap_err().to_string();
    assert!(error.contains("worker 0") && error.contains("worker 1") && error.contains("listens"), "{error}");
}

#[test]
fn an_idle_pair_sleeps_and_a_note_wakes_it() {
    for io in [EPOLL, URING] {
        needs!(io);
        an_idle_pair_sleeps_and_a_note_wakes_it_by(io);
    }
}

fn an_idle_pair_sleeps_and_a_note_wakes_it_by(io: &'static [Io]) {
    let mut world = World::joined(Tcp::new(Ipv4Addr::LOCALHOST, true, io), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let waiter = Waiter::new().unwrap();
    let soon = || Some(Instant::now() + Duration::from_millis(40));
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Deadline);
    world.sides[0].post(note(1, b, Note::new(NoteKind::Heartbeat)));
    world.sides[0].transport().flush().unwrap();
    // The sender has a completion to fetch, the receiver something to read.
    assert_eq!(waiter.wait(&mut [world.sides[0].transport()], soon()).unwrap(), Woken::Event);
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Event);
    world.step();
    assert_eq!(world.sides[1].arrivals(a).len(), 1);
    assert_eq!(waiter.wait(&mut [world.sides[1].transport()], soon()).unwrap(), Woken::Deadline);
}
