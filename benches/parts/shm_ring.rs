//! The ring of shared memory, both ends polled by one thread: what a message costs where nobody sleeps.
//!
//! Invariant: every message that is posted has arrived and is told as sent before the next one is.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire::{
    mem::{Lease, Region, RegionOptions, SharedLease},
    transport::{
        Completion, RemoteSlot, Transport, WorkRequest,
        shm::{ShmOptions, ShmTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};

const PATIENCE: Duration = Duration::from_secs(10);

struct Pair {
    ends: [ShmTransport; 2],
    peers: [PeerId; 2],
    completions: Vec<Completion>,
    sources: Vec<SharedLease>,
    slots: Vec<Lease>,
}

impl Pair {
    fn connected(bytes: usize) -> Pair {
        let token = JobToken::random().unwrap();
        let peers = [PeerId::server(0, 0), PeerId::worker(0)];
        let mut ends = peers.map(|me| {
            let identity = Identity { job: job_id("bench", "1"), token: token.clone(), me, epoch: 0 };
            ShmTransport::new(ShmOptions::new(identity)).unwrap()
        });
        let options = RegionOptions { prefault: true, ..RegionOptions::default() };
        let (source, source_lease) = Region::allocate(bytes, &options).unwrap();
        let (target, target_lease) = Region::allocate(bytes, &options).unwrap();
        ends[0].register(&source).unwrap();
        ends[1].register(&target).unwrap();
        let offers = [ends[0].offer(peers[1]).unwrap(), ends[1].offer(peers[0]).unwrap()];
        let deadline = Instant::now() + PATIENCE;
        ends[0].connect(peers[1], &offers[1], deadline).unwrap();
        ends[1].connect(peers[0], &offers[0], deadline).unwrap();
        let sources = vec![source_lease.freeze()];
        let mut pair = Pair { ends, peers, completions: Vec::new(), sources, slots: vec![target_lease] };
        let mut connected = 0;
        while connected < 2 {
            assert!(Instant::now() < deadline, "the pair does not connect");
            pair.poll();
            connected += pair.completions.drain(..).filter(|told| matches!(told, Completion::Connected { .. })).count();
        }
        pair
    }

    fn poll(&mut self) {
        let now = Instant::now();
        for end in &mut self.ends {
            end.poll(now, &mut self.completions).unwrap();
        }
    }

    fn arm(&mut self) -> RemoteSlot {
        let slot = self.slots.pop().expect("the slot is at home");
        self.ends[1].arm(self.peers[0], slot).unwrap()
    }

    /// Posts a message and polls both ends until it has arrived and is told as sent.
    fn send(&mut self, length: u32) {
        let payload = match length {
            0 => None,
            _ => Some((self.sources.pop().expect("the source is at home"), self.arm())),
        };
        let kind = if length == 0 { NoteKind::Heartbeat } else { NoteKind::Push };
        let note = Note { length, weight: 1, ..Note::new(kind) };
        let note = if length == 0 { Note::new(kind) } else { note };
        self.ends[0].post(WorkRequest { id: 1, peer: self.peers[1], note, payload }).unwrap();
        self.ends[0].flush().unwrap();
        let mut left = 2;
        while left > 0 {
            self.poll();
            for told in self.completions.drain(..) {
                match told {
                    Completion::Sent { source, .. } => self.sources.extend(source),
                    Completion::Arrived { lease, .. } => self.slots.extend(lease),
                    told => panic!("{told:?}"),
                }
                left -= 1;
            }
        }
    }
}

pub fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("shm ring");
    let mut pair = Pair::connected(1 << 20);
    for bytes in [0u32, 4096, 1 << 20] {
        group.throughput(Throughput::Bytes(bytes.max(64).into()));
        group.bench_function(BenchmarkId::new("message", bytes), |bencher| bencher.iter(|| pair.send(bytes)));
    }
    group.finish();
}
