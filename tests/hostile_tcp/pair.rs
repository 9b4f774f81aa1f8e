//! A server and a worker that keep exchanging payloads and check every byte, on a thread of their own, while others misbehave.
//!
//! Invariant: the pair panics (and the test that joins it fails) at the first byte, note or completion that should not be.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Lease, Region, RegionOptions},
    transport::{
        Completion, Endpoint, RemoteSlot, Transport, Waiter, WorkRequest,
        tcp::{Io, TcpOptions, TcpTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity},
};

use crate::allocator::{self, Allocated};

pub const JOB: u64 = 0x6f6e65;
pub const SERVER: PeerId = PeerId::server(0, 0);
pub const WORKER: PeerId = PeerId::worker(0);
/// The one that a test plays itself.
pub const ROGUE: PeerId = PeerId::worker(1);
const BYTES: usize = 20_000;

/// What the test and the running pair share.
#[derive(Default)]
pub struct Shared {
    stop: AtomicBool,
    pub exchanges: AtomicUsize,
    pub rogue_notes: AtomicUsize,
    pub rogue_breaks: Mutex<Vec<String>>,
}

pub struct RunningPair {
    pub endpoint: Endpoint,
    pub token: JobToken,
    /// A slot of 1,024 bytes that is armed for the rogue on each of its connections.
    pub rogue_slot: RemoteSlot,
    pub shared: Arc<Shared>,
    thread: JoinHandle<Allocated>,
}

pub fn identity(me: PeerId, token: &JobToken) -> Identity {
    Identity { job: JOB, token: token.clone(), me, epoch: 0 }
}

/// The interfaces of the kernel that this process may use.
pub fn interfaces() -> Vec<Io> {
    let token = JobToken::random().unwrap();
    let uring = TcpOptions { io: Io::Uring, listen: false, ..TcpOptions::new(identity(WORKER, &token)) };
    match TcpTransport::new(uring) {
        Ok(_) => vec![Io::Epoll, Io::Uring],
        Err(refusal) => {
            eprintln!("NOT RUN with io_uring: {refusal}");
            vec![Io::Epoll]
        }
    }
}

impl RunningPair {
    pub fn start(io: Io) -> RunningPair {
        let token = JobToken::random().unwrap();
        let mut server = TcpTransport::new(TcpOptions { io, ..TcpOptions::new(identity(SERVER, &token)) }).unwrap();
        let endpoint = server.offer(WORKER).unwrap();
        let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        server.register(&region).unwrap();
        let (rogue_lease, _) = lease.split_at(1024);
        let rogue_slot = server.arm(ROGUE, rogue_lease).unwrap();
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let (token, endpoint, shared) = (token.clone(), endpoint.clone(), shared.clone());
            move || {
                let options = TcpOptions { io, listen: false, ..TcpOptions::new(identity(WORKER, &token)) };
                let worker = TcpTransport::new(options).unwrap();
                Exchange::new(server, worker, &endpoint).run(&shared)
            }
        });
        RunningPair { endpoint, token, rogue_slot, shared, thread }
    }

    pub fn address(&self) -> std::net::SocketAddr {
        self.endpoint.on("tcp").unwrap().parse().unwrap()
    }

    /// Waits until the pair has made `more` further exchanges.
    pub fn await_exchanges(&self, more: usize) {
        let goal = self.shared.exchanges.load(Ordering::Relaxed) + more;
        let limit = Instant::now() + Duration::from_secs(20);
        while self.shared.exchanges.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < limit && !self.thread.is_finished(), "the pair no longer exchanges");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the pair; returns what its thread allocated after its first exchange.
    pub fn stop(self) -> Allocated {
        self.await_exchanges(10);
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the pair was disturbed")
    }
}

/// Both ends and the one payload that goes back and forth.
struct Exchange {
    server: TcpTransport,
    worker: TcpTransport,
    heard: Vec<Completion>,
    server_memory: Lease2,
    worker_memory: Lease2,
}

/// What one end sends from, and where it receives.
struct Lease2 {
    source: Option<Lease>,
    slot: Option<Lease>,
}

fn passive() -> Endpoint {
    Endpoint::new("tcp", "")
}

fn memory(transport: &mut TcpTransport) -> Lease2 {
    let (region, lease) = Region::allocate(2 * BYTES, &RegionOptions::default()).unwrap();
    transport.register(&region).unwrap();
    let (source, rest) = lease.split_at(BYTES);
    let (slot, _) = rest.split_at(BYTES);
    Lease2 { source: Some(source), slot: Some(slot) }
}

impl Exchange {
    fn new(mut server: TcpTransport, mut worker: TcpTransport, endpoint: &Endpoint) -> Exchange {
        let deadline = Instant::now() + Duration::from_secs(20);
        server.connect(WORKER, &passive(), deadline).unwrap();
        worker.connect(SERVER, endpoint, deadline).unwrap();
        server.connect(ROGUE, &passive(), deadline + Duration::from_secs(1000)).unwrap();
        let (server_memory, worker_memory) = (memory(&mut server), memory(&mut worker));
        Exchange { server, worker, heard: Vec::with_capacity(64), server_memory, worker_memory }
    }

    fn run(mut self, shared: &Shared) -> Allocated {
        let waiter = Waiter::new().unwrap();
        let mut connected = 0;
        let begun = Instant::now();
        while connected < 2 {
            assert!(begun.elapsed() < Duration::from_secs(20), "the pair did not meet");
            self.poll(&waiter, shared);
            connected += self.heard.drain(..).filter(|c| matches!(c, Completion::Connected { .. })).count();
        }
        for turn in 0.. {
            if turn == 1 {
                allocator::reset();
            }
            self.turn(turn, &waiter, shared);
            shared.exchanges.fetch_add(1, Ordering::Relaxed);
            if shared.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        allocator::allocated()
    }

    /// One payload each way.
    fn turn(&mut self, turn: u64, waiter: &Waiter, shared: &Shared) {
        post(
            &mut self.server,
            &mut self.server_memory,
            &mut self.worker,
            &mut self.worker_memory,
            SERVER,
            WORKER,
            turn,
        );
        post(
            &mut self.worker,
            &mut self.worker_memory,
            &mut self.server,
            &mut self.server_memory,
            WORKER,
            SERVER,
            turn,
        );
        self.server.flush().unwrap();
        self.worker.flush().unwrap();
        let (mut missing, begun) = (4, Instant::now());
        while missing > 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "turn {turn} does not end");
            self.poll(waiter, shared);
            for completion in self.heard.drain(..) {
                missing -= 1;
                match completion {
                    Completion::Sent { id, source } => {
                        let memory = if id == 0 { &mut self.server_memory } else { &mut self.worker_memory };
                        memory.source = Some(source.unwrap().thaw().unwrap());
                    }
                    Completion::Arrived { from, note, lease: Some(lease) } => {
                        assert!(note.clock == turn && lease.bytes().iter().all(|byte| *byte == turn as u8));
                        let memory = if from == SERVER { &mut self.worker_memory } else { &mut self.server_memory };
                        memory.slot = Some(lease);
                    }
                    other => panic!("the pair was disturbed: {other:?}"),
                }
            }
        }
    }

    /// Polls both; what is the rogue's goes into the shared record, and its path is opened again.
    fn poll(&mut self, waiter: &Waiter, shared: &Shared) {
        let soon = Some(Instant::now() + Duration::from_millis(20));
        waiter.wait(&mut [&mut self.server, &mut self.worker], soon).unwrap();
        let now = Instant::now();
        self.server.poll(now, &mut self.heard).unwrap();
        self.worker.poll(now, &mut self.heard).unwrap();
        let mut is_over = false;
        self.heard.retain(|completion| match completion {
            Completion::Connected { peer: ROGUE } => false,
            Completion::Arrived { from: ROGUE, lease, .. } => {
                assert!(lease.is_none(), "the rogue's payload landed");
                shared.rogue_notes.fetch_add(1, Ordering::Relaxed);
                false
            }
            Completion::Broken { peer: ROGUE, error } => {
                shared.rogue_breaks.lock().unwrap().push(error.to_string());
                is_over = true;
                false
            }
            _ => true,
        });
        if is_over {
            let slots = self.server.fence(ROGUE);
            assert_eq!(slots.len(), 1, "the rogue's slot was kept for the fence");
            for slot in slots {
                self.server.arm(ROGUE, slot).unwrap();
            }
            self.server.connect(ROGUE, &passive(), now + Duration::from_secs(1000)).unwrap();
        }
    }
}

fn post(
    from: &mut TcpTransport,
    from_memory: &mut Lease2,
    to: &mut TcpTransport,
    to_memory: &mut Lease2,
    me: PeerId,
    peer: PeerId,
    turn: u64,
) {
    let slot = to.arm(me, to_memory.slot.take().unwrap()).unwrap();
    let mut source = from_memory.source.take().unwrap();
    source.bytes_mut().fill(turn as u8);
    let note = Note { clock: turn, length: BYTES as u32, ..Note::new(NoteKind::Push) };
    let id = u64::from(me == WORKER);
    from.post(WorkRequest { id, peer, note, payload: Some((source.freeze(), slot)) }).unwrap();
}

#[test]
fn an_undisturbed_pair_allocates_nothing() {
    for io in interfaces() {
        let pair = RunningPair::start(io);
        pair.await_exchanges(500);
        assert_eq!(pair.stop(), Allocated { count: 0, largest: 0 }, "{io:?}");
    }
}
