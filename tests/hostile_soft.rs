//! Hostile input on soft-RDMA: random datagrams, mutations of genuine ones, replays, packets of a life that has ended, and a peer
//! that knows its secret and misuses it; all at a live pair that keeps exchanging.
//!
//! Invariant: nothing panics, everything refused is counted, and the pair's bytes are right throughout.

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Lease, Region, RegionOptions},
    rc::{Body, Immediate, NakCode, Packet, Psn, RnrTimer, Secret, Syndrome, Target},
    transport::{
        Completion, Endpoint, Transport, WorkRequest,
        soft::{SoftCounters, SoftOptions, SoftTransport},
    },
    types::PeerId,
    wire::{Note, NoteKind},
};

const SERVER: PeerId = PeerId::server(0, 0);
const WORKER: PeerId = PeerId::worker(0);
const ROGUE: PeerId = PeerId::worker(1);
const BYTES: usize = 20_000;
const CAPTURED_MAX: usize = 256;

/// Reproducible random numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// What a peer was offered, taken apart.
#[derive(Clone)]
struct Offer {
    socket: SocketAddr,
    qpn: u32,
    start: Psn,
    secret: Secret,
    rest: String,
}

impl Offer {
    fn read(endpoint: &Endpoint) -> Offer {
        let text = endpoint.on("soft").unwrap();
        let (socket, rest) = text.split_once('/').unwrap();
        let parts: Vec<&str> = rest.split('/').collect();
        let number = |text| u32::from_str_radix(text, 16).unwrap();
        let secret = Secret(u128::from_str_radix(parts[2], 16).unwrap().to_be_bytes());
        let start = Psn::new(number(parts[1]));
        Offer { socket: socket.parse().unwrap(), qpn: number(parts[0]), start, secret, rest: rest.into() }
    }

    /// The same, reached through another socket.
    fn through(&self, socket: SocketAddr) -> Endpoint {
        Endpoint::new("soft", format!("{socket}/{}", self.rest))
    }
}

/// Carries one direction and keeps what it saw last.
struct Proxy {
    socket: UdpSocket,
    to: SocketAddr,
    captured: Vec<Vec<u8>>,
    count: usize,
}

impl Proxy {
    fn new(to: SocketAddr) -> Proxy {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        Proxy { socket, to, captured: Vec::new(), count: 0 }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    fn forward(&mut self) {
        let mut buffer = [0; 16 << 10];
        while let Ok((len, _)) = self.socket.recv_from(&mut buffer) {
            let bytes = &buffer[..len];
            self.socket.send_to(bytes, self.to).unwrap();
            if self.captured.len() < CAPTURED_MAX {
                self.captured.push(bytes.to_vec());
            } else {
                self.captured[self.count % CAPTURED_MAX] = bytes.to_vec();
            }
            self.count += 1;
        }
    }

    fn attack(&self, bytes: &[u8]) {
        self.socket.send_to(bytes, self.to).unwrap();
    }
}

struct Side {
    transport: SoftTransport,
    source: Option<Lease>,
    slot: Option<Lease>,
}

impl Side {
    fn new() -> Side {
        let mut transport = SoftTransport::new(SoftOptions::default()).unwrap();
        let (region, lease) = Region::allocate(2 * BYTES, &RegionOptions::default()).unwrap();
        transport.register(&region).unwrap();
        let (source, rest) = lease.split_at(BYTES);
        let (slot, _) = rest.split_at(BYTES);
        Side { transport, source: Some(source), slot: Some(slot) }
    }
}

/// A server and a worker, with a proxy in each direction, driven by one thread.
struct Pair {
    /// The server, then the worker.
    sides: [Side; 2],
    /// To the server, then to the worker.
    proxies: [Proxy; 2],
    turn: u64,
    missing: usize,
    begun: Instant,
    rogue_breaks: Vec<String>,
}

const NAMES: [PeerId; 2] = [SERVER, WORKER];

impl Pair {
    fn joined() -> Pair {
        let mut sides = [Side::new(), Side::new()];
        let offers = [0, 1].map(|at| Offer::read(&sides[at].transport.offer(NAMES[1 - at]).unwrap()));
        let proxies = [0, 1].map(|at| Proxy::new(offers[at].socket));
        let deadline = Instant::now() + Duration::from_secs(20);
        for at in [0, 1] {
            let remote = offers[1 - at].through(proxies[1 - at].address());
            sides[at].transport.connect(NAMES[1 - at], &remote, deadline).unwrap();
        }
        // Both connected, and the first payload each way.
        let mut pair = Pair { sides, proxies, turn: 0, missing: 2, begun: Instant::now(), rogue_breaks: Vec::new() };
        pair.run_until(|pair| pair.turn == 1);
        pair
    }

    /// One look at everything; a turn that is complete is followed by the next.
    fn step(&mut self) {
        for at in [0, 1] {
            let mut heard = Vec::new();
            self.sides[at].transport.flush().unwrap();
            self.sides[at].transport.poll(Instant::now(), &mut heard).unwrap();
            heard.into_iter().for_each(|completion| self.hear(at, completion));
        }
        self.proxies.iter_mut().for_each(Proxy::forward);
        if self.missing == 0 {
            self.turn += 1;
            self.missing = 4;
            self.begun = Instant::now();
            [0, 1].into_iter().for_each(|from| self.post(from));
        }
        assert!(self.begun.elapsed() < Duration::from_secs(20), "turn {} does not end", self.turn);
    }

    fn run_until(&mut self, reached: impl Fn(&Pair) -> bool) {
        let limit = Instant::now() + Duration::from_secs(30);
        while !reached(self) {
            assert!(Instant::now() < limit, "waited in vain in turn {}", self.turn);
            self.step();
        }
    }

    fn post(&mut self, from: usize) {
        let slot = self.sides[1 - from].slot.take().unwrap();
        let slot = self.sides[1 - from].transport.arm(NAMES[from], slot).unwrap();
        let mut source = self.sides[from].source.take().unwrap();
        fill(source.bytes_mut(), self.turn, from);
        let note = Note { clock: self.turn, length: BYTES as u32, ..Note::new(NoteKind::Push) };
        let payload = Some((source.freeze(), slot));
        self.sides[from].transport.post(WorkRequest { id: self.turn, peer: NAMES[1 - from], note, payload }).unwrap();
    }

    fn hear(&mut self, at: usize, completion: Completion) {
        match completion {
            Completion::Connected { peer } if peer == NAMES[1 - at] && self.turn == 0 => {}
            Completion::Sent { id, source } if id == self.turn => {
                self.sides[at].source = Some(source.unwrap().thaw().unwrap());
            }
            Completion::Arrived { from, note, lease: Some(lease) } if from == NAMES[1 - at] => {
                let mut expected = vec![0; BYTES];
                fill(&mut expected, self.turn, 1 - at);
                assert!(note.clock == self.turn && lease.bytes() == expected, "wrong bytes in turn {}", self.turn);
                self.sides[at].slot = Some(lease);
            }
            Completion::Connected { peer: ROGUE } | Completion::Arrived { from: ROGUE, lease: None, .. } => return,
            Completion::Broken { peer: ROGUE, error } => {
                self.rogue_breaks.push(error.to_string());
                return;
            }
            other => panic!("the pair was disturbed in turn {}: {other:?}", self.turn),
        }
        self.missing -= 1;
    }

    fn counters(&self, at: usize) -> SoftCounters {
        self.sides[at].transport.counters()
    }
}

fn fill(bytes: &mut [u8], turn: u64, from: usize) {
    let seed = (turn * 2 + from as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (seed >> 32) as u8 ^ (at as u8).wrapping_mul(31) ^ (at >> 8) as u8;
    }
}

fn refused(counters: &SoftCounters) -> u64 {
    counters.unknown_queue_pair + counters.bad_check + counters.malformed
}

/// Something other than `genuine`, and not far from it.
fn mutate(random: &mut Random, genuine: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = genuine.to_vec();
    match random.below(6) {
        0 => {
            let bit = random.below(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        1 => (0..1 + random.below(8)).for_each(|_| bytes[random.below(genuine.len())] = random.next() as u8),
        2 => bytes.truncate(random.below(genuine.len())),
        3 => bytes.extend((0..1 + random.below(60)).map(|_| random.next() as u8)),
        // The header of one packet before the rest of another.
        4 => {
            let at = 8 + random.below(12);
            bytes = [&genuine[..at.min(genuine.len())], other.get(at..).unwrap_or_default()].concat();
        }
        // Sealed as plainly as it gets: with a check, and without the secret.
        _ => {
            let at = bytes.len() - 4;
            let check = crc32c::crc32c(&bytes[..at]);
            bytes[at..].copy_from_slice(&check.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn a_hundred_thousand_hostile_datagrams_disturb_nobody() {
    let mut pair = Pair::joined();
    let mut random = Random(11);
    let before = [0, 1].map(|at| refused(&pair.counters(at)));
    let (turn, mut attacks) = (pair.turn, [0u64; 2]);
    for round in 0..100_000usize {
        let at = round % 2;
        let proxy = &pair.proxies[at];
        let bytes = if random.below(4) == 0 {
            (0..random.below(300)).map(|_| random.next() as u8).collect()
        } else {
            let captured = &proxy.captured;
            let (one, other) = (random.below(captured.len()), random.below(captured.len()));
            mutate(&mut random, &captured[one], &captured[other])
        };
        if !proxy.captured.contains(&bytes) {
            proxy.attack(&bytes);
            attacks[at] += 1;
        }
        if round % 16 == 0 {
            pair.step();
        }
    }
    let goal = pair.turn + 20;
    pair.run_until(|pair| pair.turn >= goal);
    assert!(attacks.iter().all(|count| *count > 45_000), "{attacks:?}");
    for at in [0, 1] {
        let counters = pair.counters(at);
        assert_eq!(refused(&counters) - before[at], attacks[at], "every one is counted: {counters:?}");
        assert!(counters.unknown_queue_pair > 1000 && counters.bad_check > 10_000, "{counters:?}");
    }
    assert!(pair.turn > turn + 50, "the pair went on meanwhile");
}

#[test]
fn genuine_packets_that_come_again_are_not_applied_again() {
    let mut pair = Pair::joined();
    let mut random = Random(12);
    for round in 0..20_000usize {
        let proxy = &pair.proxies[round % 2];
        let at = random.below(proxy.captured.len());
        // A goodbye is not among them, and a packet that refuses is not either: the pair does not end.
        proxy.attack(&proxy.captured[at]);
        if round % 16 == 0 {
            pair.step();
        }
    }
    let goal = pair.turn + 20;
    pair.run_until(|pair| pair.turn >= goal);
    for at in [0, 1] {
        assert!(pair.counters(at).queue_pairs.duplicates > 1000, "{:?}", pair.counters(at));
    }
}

#[test]
fn packets_of_a_life_that_ended_touch_nothing() {
    let mut pair = Pair::joined();
    let goal = pair.turn + 5;
    pair.run_until(|pair| pair.turn >= goal);
    let old = pair.proxies[0].captured.clone();
    assert!(old.len() > 20);

    // The server ends its side; what was under way comes back, and a new life begins over the same slots.
    let server = &mut pair.sides[0].transport;
    let mut slots = server.fence(WORKER);
    slots.retain(|slot| slot.len() == BYTES);
    let mut slot = slots.pop().unwrap_or_else(|| pair.sides[0].slot.take().expect("armed, or at home"));
    slot.bytes_mut().fill(0xEE);
    let server = &mut pair.sides[0].transport;
    let offer = server.offer(WORKER).unwrap();
    server.arm(WORKER, slot).unwrap();
    let answered = server.counters();
    let mut heard = Vec::new();
    for bytes in &old {
        pair.proxies[0].attack(bytes);
        pair.sides[0].transport.poll(Instant::now(), &mut heard).unwrap();
    }
    assert!(heard.iter().all(|completion| matches!(completion, Completion::Failed { .. })), "{heard:?}");
    let server = &mut pair.sides[0].transport;
    assert!(server.counters().after_end >= answered.after_end + old.len() as u64);
    assert_eq!(server.offer(WORKER).unwrap(), offer, "the new life is untouched");
    let slot = server.fence(WORKER).pop().expect("it is still armed");
    assert!(slot.bytes().iter().all(|byte| *byte == 0xEE), "something of the old life landed");
}

/// Any body that a packet can have, with its payload.
fn any_body(random: &mut Random, note: &Immediate) -> (Body, usize) {
    let length = random.below(3000) as u32;
    let target = Target { rkey: random.next() as u32, offset: random.next() >> random.below(64), length };
    let immediate = if random.below(2) == 0 { *note } else { std::array::from_fn(|_| random.next() as u8) };
    let syndrome = match random.below(3) {
        0 => Syndrome::Ack,
        1 => Syndrome::NotReady(RnrTimer::at_least(Duration::from_micros(random.below(5000) as u64))),
        _ => Syndrome::Nak([NakCode::Sequence, NakCode::InvalidRequest, NakCode::RemoteAccess][random.below(3)]),
    };
    match random.below(9) {
        0 => (Body::Send(immediate), 0),
        1 => (Body::WriteFirst(target), random.below(length.max(2) as usize - 1) + 1),
        2 => (Body::WriteMiddle, 1 + random.below(4000)),
        3 => (Body::WriteLast(immediate), 1 + random.below(4000)),
        4 => (Body::WriteOnly(target, immediate), length as usize),
        5 => (Body::Probe, 0),
        6 => (Body::Acknowledge(syndrome), 0),
        7 => (Body::Hello, 0),
        _ => (Body::Ready, 0),
    }
}

/// A peer that is let in, knows the secret of its own queue pair, and sends what no honest one would.
#[test]
fn a_peer_that_misuses_its_secret_loses_its_own_path_only() {
    let mut pair = Pair::joined();
    let mut random = Random(13);
    let rogue = UdpSocket::bind("127.0.0.1:0").unwrap();
    let note = Note { clock: 1, ..Note::new(NoteKind::Absent) }.encode();
    let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
    pair.sides[0].transport.register(&region).unwrap();
    let mut slot = Some(lease);
    let goal = 300;
    for life in 0..goal {
        let server = &mut pair.sides[0].transport;
        let armed = server.arm(ROGUE, slot.take().unwrap()).unwrap();
        let offer = Offer::read(&server.offer(ROGUE).unwrap());
        let mine = format!("{}/00000{:x}/000000/{}", rogue.local_addr().unwrap(), 1 + life % 9, "00".repeat(16));
        let deadline = Instant::now() + Duration::from_secs(60);
        server.connect(ROGUE, &Endpoint::new("soft", mine), deadline).unwrap();
        let (mut psn, limit) = (0, Instant::now() + Duration::from_secs(20));
        while pair.rogue_breaks.len() == life {
            assert!(Instant::now() < limit, "whatever it sends, its path holds");
            let (mut body, len) = any_body(&mut random, &note);
            if let Body::WriteFirst(target) = &mut body
                && random.below(2) == 0
            {
                // It begins as it should.
                *target = Target { rkey: armed.rkey, offset: armed.offset, ..*target };
            }
            let near = Psn::new((psn + random.below(3) as u32).wrapping_sub(1));
            let packet =
                Packet { qpn: offer.qpn, psn: near, ack_request: random.below(2) == 0 && is_request(&body), body };
            let mut bytes = Vec::new();
            packet.encode(&vec![7; len], &offer.secret, &mut bytes);
            rogue.send_to(&bytes, offer.socket).unwrap();
            psn += u32::from(near.bits() == psn && is_request(&body));
            pair.step();
        }
        let mut slots = pair.sides[0].transport.fence(ROGUE);
        assert_eq!(slots.len(), 1, "its slot was kept for the fence");
        slot = slots.pop();
        assert_eq!(offer.start.bits() & !Psn::MASK, 0);
    }
    let reasons = |text: &str| pair.rogue_breaks.iter().filter(|reason| reason.contains(text)).count();
    assert!(pair.rogue_breaks.iter().all(|reason| reason.contains("worker 1")));
    for text in ["may not land", "out of place", "cannot be read"] {
        assert!(reasons(text) > 3, "{text}: {}", reasons(text));
    }
    let goal = pair.turn + 20;
    pair.run_until(|pair| pair.turn >= goal);
}

fn is_request(body: &Body) -> bool {
    !matches!(body, Body::Acknowledge(_) | Body::Hello | Body::Ready | Body::Bye)
}
