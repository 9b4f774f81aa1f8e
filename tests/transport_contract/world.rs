//! A few ends of one fabric, driven together by one thread, with all that they have told.
//!
//! Invariant: every wait has a limit in the fabric's own time and its failure says what was awaited and what came instead.

use std::time::{Duration, Instant};

use gradwire::{
    Error,
    mem::{Lease, Region, RegionOptions, SharedLease},
    transport::{Completion, MemoryRegion, RemoteSlot, Transport, WorkRequest},
    types::PeerId,
    wire::{Note, NoteKind},
};

/// How a fabric is brought into the contract test.
pub trait Fabric {
    /// Its driver.
    type End: Transport;

    /// Makes ends that can reach each other, in the order of `peers`. Their queues hold at most 100,000 requests a peer.
    fn ends(&mut self, peers: &[PeerId]) -> Vec<Self::End>;

    /// The fabric's time.
    fn now(&self) -> Instant;

    /// Lets a little time pass.
    fn step(&mut self);

    /// Whether peers write by themselves, so that what may not land is found out after it has landed.
    fn lands_first(&self) -> bool {
        false
    }

    /// An end disappears as a killed process does.
    fn vanish(&mut self, end: Self::End) {
        drop(end);
    }
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// One end, its memory, and what it has told.
pub struct Side<T> {
    pub peer: PeerId,
    pub transport: Option<T>,
    pub memory: MemoryRegion,
    /// All of the side's registered memory that is not in use.
    pub lease: Option<Lease>,
    pub heard: Vec<Completion>,
}

impl<T: Transport> Side<T> {
    pub fn transport(&mut self) -> &mut T {
        self.transport.as_mut().expect("this end is still there")
    }

    /// Cuts `len` bytes off the side's memory.
    pub fn cut(&mut self, len: usize) -> Lease {
        let (piece, rest) = self.lease.take().expect("memory left").split_at(len);
        self.lease = Some(rest);
        piece
    }

    pub fn arm(&mut self, peer: PeerId, slot: Lease) -> RemoteSlot {
        self.transport().arm(peer, slot).unwrap()
    }

    /// Posts what must be taken.
    pub fn post(&mut self, request: WorkRequest) {
        self.transport().post(request).expect("room in the queue");
    }

    pub fn broken_by(&self, peer: PeerId) -> Option<String> {
        self.heard.iter().find_map(|completion| match completion {
            Completion::Broken { peer: who, error } if *who == peer => Some(error.to_string()),
            _ => None,
        })
    }

    pub fn is_connected_to(&self, peer: PeerId) -> bool {
        self.heard.iter().any(|completion| matches!(completion, Completion::Connected { peer: who } if *who == peer))
    }

    /// Takes the arrivals from `peer` out of what was heard.
    pub fn arrivals(&mut self, peer: PeerId) -> Vec<(Note, Option<Lease>)> {
        let taken = self.heard.extract_if(.., |c| matches!(c, Completion::Arrived { from, .. } if *from == peer));
        let writes = taken.map(|completion| match completion {
            Completion::Arrived { note, lease, .. } => (note, lease),
            other => unreachable!("{other:?}"),
        });
        writes.collect()
    }

    /// Takes what was heard of requests: the id, the source, and the error if it failed.
    pub fn outcomes(&mut self) -> Vec<(u64, Option<SharedLease>, Option<Error>)> {
        let is_outcome = |c: &mut Completion| matches!(c, Completion::Sent { .. } | Completion::Failed { .. });
        let outcomes = self.heard.extract_if(.., is_outcome).map(|completion| match completion {
            Completion::Sent { id, source } => (id, source, None),
            Completion::Failed { id, source, error } => (id, source, Some(error)),
            other => unreachable!("{other:?}"),
        });
        outcomes.collect()
    }

    pub fn arrived(&self) -> usize {
        self.heard.iter().filter(|completion| matches!(completion, Completion::Arrived { .. })).count()
    }

    pub fn sent(&self) -> usize {
        self.heard.iter().filter(|completion| matches!(completion, Completion::Sent { .. })).count()
    }
}

/// The ends of one test. The first is a server, the others workers.
pub struct World<F: Fabric> {
    pub fabric: F,
    pub sides: Vec<Side<F::End>>,
}

impl<F: Fabric> World<F> {
    /// Ends with `bytes` of registered memory each, not connected.
    pub fn apart(mut fabric: F, count: usize, bytes: usize) -> World<F> {
        let name = |at: usize| if at == 0 { PeerId::server(0, 0) } else { PeerId::worker(at as u16 - 1) };
        let peers: Vec<PeerId> = (0..count).map(name).collect();
        let ends = fabric.ends(&peers);
        let sides = peers.iter().zip(ends).map(|(peer, mut transport)| {
            let (region, lease) = Region::allocate(bytes, &RegionOptions::default()).unwrap();
            let memory = transport.register(&region).unwrap();
            Side { peer: *peer, transport: Some(transport), memory, lease: Some(lease), heard: Vec::new() }
        });
        World { sides: sides.collect(), fabric }
    }

    /// Ends of which each is connected to all others.
    pub fn joined(fabric: F, count: usize, bytes: usize) -> World<F> {
        let mut world = World::apart(fabric, count, bytes);
        for a in 0..count {
            for b in (0..count).filter(|b| *b != a) {
                world.connect(a, b, PATIENCE);
            }
        }
        for a in 0..count {
            for b in (0..count).filter(|b| *b != a) {
                let peer = world.peer(b);
                world.until("Connected", |world| world.sides[a].is_connected_to(peer));
            }
        }
        world.sides.iter_mut().for_each(|side| side.heard.clear());
        world
    }

    pub fn peer(&self, at: usize) -> PeerId {
        self.sides[at].peer
    }

    /// The key under which side `by` names the memory of side `of`.
    pub fn rkey(&mut self, of: usize, by: usize) -> u32 {
        let by = self.peer(by);
        let fabric = self.sides[of].transport().fabric(by);
        self.sides[of].memory.rkey(fabric)
    }

    /// Side `a` begins its half of the path to side `b`.
    pub fn connect(&mut self, a: usize, b: usize, within: Duration) {
        let (peer_a, peer_b) = (self.peer(a), self.peer(b));
        let endpoint = self.sides[b].transport().offer(peer_a).unwrap();
        let deadline = self.fabric.now() + within;
        self.sides[a].transport().connect(peer_b, &endpoint, deadline).unwrap();
    }

    /// Flushes and polls everybody once.
    pub fn step(&mut self) {
        for at in 0..self.sides.len() {
            self.step_side(at);
        }
        self.fabric.step();
    }

    pub fn step_side(&mut self, at: usize) {
        let now = self.fabric.now();
        let side = &mut self.sides[at];
        if let Some(transport) = &mut side.transport {
            transport.flush().unwrap();
            transport.poll(now, &mut side.heard).unwrap();
        }
    }

    /// Goes on until `reached`.
    pub fn until(&mut self, awaited: &str, mut reached: impl FnMut(&mut World<F>) -> bool) {
        let limit = self.fabric.now() + PATIENCE;
        while !reached(self) {
            if self.fabric.now() >= limit {
                for side in &self.sides {
                    eprintln!("{}: {} completions, the last: {:?}", side.peer, side.heard.len(), side.heard.last());
                }
                panic!("waited in vain for {awaited}");
            }
            self.step();
        }
    }

    /// Goes on for a while, for what must not happen.
    pub fn for_a_while(&mut self) {
        let until = self.fabric.now() + Duration::from_millis(50);
        while self.fabric.now() < until {
            self.step();
        }
    }

    /// A note from `a` arrives at `b`, and the other way round: the path works.
    pub fn assert_works(&mut self, a: usize, b: usize) {
        for (from, to) in [(a, b), (b, a)] {
            let (source, target) = (self.peer(from), self.peer(to));
            let before = self.sides[to].arrived();
            self.sides[from].post(note(7777, target, Note { clock: 7777, ..Note::new(NoteKind::Absent) }));
            self.until("a note over a path that works", |world| world.sides[to].arrived() > before);
            let arrivals = self.sides[to].arrivals(source);
            assert_eq!(arrivals.last().map(|(note, _)| note.clock), Some(7777));
        }
    }
}

/// A request without payload.
pub fn note(id: u64, peer: PeerId, note: Note) -> WorkRequest {
    WorkRequest { id, peer, note, payload: None }
}

/// A request with payload.
pub fn write(id: u64, peer: PeerId, source: SharedLease, slot: RemoteSlot) -> WorkRequest {
    let note = Note { length: source.len() as u32, clock: id, weight: 1, ..Note::new(NoteKind::Push) };
    WorkRequest { id, peer, note, payload: Some((source, slot)) }
}

/// Bytes that say where they belong.
pub fn pattern(seed: u64, at: usize) -> u8 {
    (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 ^ (at as u8).wrapping_mul(31) ^ ((at >> 8) as u8)
}

pub fn fill(lease: &mut Lease, seed: u64) {
    for (at, byte) in lease.bytes_mut().iter_mut().enumerate() {
        *byte = pattern(seed, at);
    }
}

pub fn is_filled(bytes: &[u8], seed: u64) -> bool {
    bytes.iter().enumerate().all(|(at, byte)| *byte == pattern(seed, at))
}
