//! A server and a worker on one thread, with the interface that each of them uses.
//!
//! Invariant: every wait has a limit, and says what it waited for.

use std::time::{Duration, Instant};

use gradwire::{
    Result,
    mem::{Lease, Region, RegionOptions},
    transport::{
        Completion, Endpoint, Transport, WorkRequest,
        tcp::{Io, TcpOptions, TcpTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity},
};

pub const SERVER: PeerId = PeerId::server(0, 0);
pub const WORKER: PeerId = PeerId::worker(0);
const PATIENCE: Duration = Duration::from_secs(20);

pub fn identity(me: PeerId, token: &JobToken) -> Identity {
    Identity { job: 1, token: token.clone(), me, epoch: 0 }
}

/// An end; only the server listens.
pub fn end(me: PeerId, token: &JobToken, io: Io) -> Result<TcpTransport> {
    TcpTransport::new(TcpOptions { listen: me == SERVER, io, ..TcpOptions::new(identity(me, token)) })
}

/// What the kernel answers to whoever wants io_uring here, if it refuses.
pub fn refusal() -> Option<String> {
    end(WORKER, &JobToken::random().unwrap(), Io::Uring).err().map(|error| error.to_string())
}

/// Registered memory of an end.
pub fn memory(end: &mut TcpTransport, bytes: usize) -> Lease {
    let (region, lease) = Region::allocate(bytes, &RegionOptions::default()).unwrap();
    end.register(&region).unwrap();
    lease.split_at(bytes).0
}

pub struct Pair {
    pub server: TcpTransport,
    pub worker: TcpTransport,
    pub heard: Vec<Completion>,
}

impl Pair {
    pub fn new(server: Io, worker: Io) -> Pair {
        let token = JobToken::random().unwrap();
        let (server, worker) = (end(SERVER, &token, server).unwrap(), end(WORKER, &token, worker).unwrap());
        Pair { server, worker, heard: Vec::with_capacity(64) }
    }

    pub fn connect(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let endpoint = self.server.offer(WORKER).unwrap();
        self.server.connect(WORKER, &Endpoint::new("tcp", ""), deadline).unwrap();
        self.worker.connect(SERVER, &endpoint, deadline).unwrap();
        self.until("both to be connected", |heard| heard.len() == 2);
        assert!(self.heard.drain(..).all(|heard| matches!(heard, Completion::Connected { .. })));
    }

    /// Flushes and polls both until `reached`.
    pub fn until(&mut self, awaited: &str, reached: impl Fn(&[Completion]) -> bool) {
        let limit = Instant::now() + PATIENCE;
        while !reached(&self.heard) {
            assert!(Instant::now() < limit, "waited in vain for {awaited}: {:?}", self.heard);
            for end in [&mut self.server, &mut self.worker] {
                end.flush().unwrap();
                end.poll(Instant::now(), &mut self.heard).unwrap();
            }
            std::thread::yield_now();
        }
    }

    /// A payload from the worker lands at the server; both leases come back.
    pub fn exchange(&mut self, mut source: Lease, slot: Lease, value: u8) -> (Lease, Lease) {
        source.bytes_mut().fill(value);
        let length = source.len() as u32;
        let remote = self.server.arm(WORKER, slot).unwrap();
        let note = Note { length, ..Note::new(NoteKind::Push) };
        let payload = Some((source.freeze(), remote));
        self.worker.post(WorkRequest { id: 1, peer: SERVER, note, payload }).unwrap();
        self.until("a payload", |heard| heard.len() == 2);
        let (mut source, mut slot) = (None, None);
        for heard in self.heard.drain(..) {
            match heard {
                Completion::Sent { source: Some(sent), .. } => source = Some(sent.thaw().unwrap()),
                Completion::Arrived { lease: Some(lease), .. } => slot = Some(lease),
                other => panic!("{other:?}"),
            }
        }
        let slot = slot.expect("the slot");
        assert!(slot.bytes().iter().all(|byte| *byte == value));
        (source.expect("the source"), slot)
    }
}
