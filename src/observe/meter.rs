//! What a thread of a rank has done, as numbers that another thread may read at any time: bytes and chunks by peer, waits by peer and
//! cause, computing by task, the lengths of queues.
//!
//! Invariant: a number is written by one thread and read by any; writing takes no lock and allocates nothing, and nothing is decided
//! by what is read.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::types::PeerId;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it. Only one thread may.
    pub fn add(&self, n: u64) {
        // One writer: no addition of another can come in between, and no locked instruction is needed.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number as it is now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// What it was set to last.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a histogram: the last one is for whatever is longer.
pub const BUCKETS: usize = 14;

/// The upper bound of a bucket, in nanoseconds: 1 microsecond, and four times as much from bucket to bucket, up to 16.8 seconds.
pub fn bucket_ns(index: usize) -> u64 {
    1000 << (2 * index)
}

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// It took this long.
    pub fn add(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (0..BUCKETS - 1).find(|index| ns <= bucket_ns(*index)).unwrap_or(BUCKETS - 1);
        self.counts[bucket].add(1);
        self.sum_ns.add(ns);
    }

    /// How often, by bucket.
    pub fn counts(&self) -> [u64; BUCKETS] {
        self.counts.each_ref().map(Counter::value)
    }

    /// All of it together, in seconds.
    pub fn sum_s(&self) -> f64 {
        self.sum_ns.value() as f64 / 1e9
    }
}

/// What ended a wait: a note of this kind came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A worker's gradient, or its word that there is none.
    Push,
    /// A server's parameters.
    Parameters,
    /// Room for a gradient.
    Credit,
    /// A shard's norm, or the decision about a step.
    Decision,
    /// Anything else: a pull, a goodbye.
    Other,
}

impl Cause {
    /// All of them, in the order of their numbers.
    pub const ALL: [Cause; 5] = [Cause::Push, Cause::Parameters, Cause::Credit, Cause::Decision, Cause::Other];

    /// Its name among the labels of a metric.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Push => "push",
            Cause::Parameters => "parameters",
            Cause::Credit => "credit",
            Cause::Decision => "decision",
            Cause::Other => "other",
        }
    }
}

/// What a shard computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// The sum and the optimizer's step in one pass.
    Step,
    /// The sum by itself.
    Reduce,
    /// The optimizer's step by itself.
    Apply,
    /// A wire copy by itself; with two copies of a shard also a part of its state that is copied to or from the other.
    Encode,
}

impl TaskKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [TaskKind; 4] = [TaskKind::Step, TaskKind::Reduce, TaskKind::Apply, TaskKind::Encode];

    /// Its name among the labels of a metric and in a timeline.
    pub const fn name(self) -> &'static str {
        match self {
            TaskKind::Step => "step",
            TaskKind::Reduce => "reduce",
            TaskKind::Apply => "apply",
            TaskKind::Encode => "encode",
        }
    }
}

/// Something that waits its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Writes for which the fabric had no room.
    Posts,
    /// A worker's gradients whose position has no turn yet.
    Turns,
    /// Computations that have not begun.
    Computations,
    /// Landed gradients that wait for others, or for their step.
    Landed,
    /// Pushes that consistency does not let be answered yet, and pulls whose version is not there.
    Replies,
}

impl Queue {
    /// All of them, in the order of their numbers.
    pub const ALL: [Queue; 5] = [Queue::Posts, Queue::Turns, Queue::Computations, Queue::Landed, Queue::Replies];

    /// Its name among the labels of a metric.
    pub const fn name(self) -> &'static str {
        match self {
            Queue::Posts => "posts",
            Queue::Turns => "turns",
            Queue::Computations => "computations",
            Queue::Landed => "landed",
            Queue::Replies => "replies",
        }
    }
}

/// One path of a thread: all that went over one fabric to and from one peer.
#[derive(Debug)]
pub struct PeerMeter {
    /// The other end.
    pub peer: PeerId,
    /// The fabric's name.
    pub fabric: &'static str,
    /// Payload bytes posted, headers not counted.
    pub sent_bytes: Counter,
    /// Payloads posted.
    pub sent_chunks: Counter,
    /// Payload bytes that arrived.
    pub received_bytes: Counter,
    /// Payloads that arrived.
    pub received_chunks: Counter,
    /// How long this thread had nothing to do until something came from this peer, by [`Cause`].
    pub waits: [Histogram; Cause::ALL.len()],
    /// Times that the path broke and was built again.
    pub rebuilds: Counter,
    /// Of a worker: writes that were posted again over a path that was built again.
    pub resent: Counter,
    /// Positions that may be pushed beyond the next one that waits: of a worker, what the peer grants; of a shard, what it grants.
    pub credit: Gauge,
    /// 1 if the job would rather have another fabric for this path.
    pub fallback: Gauge,
}

/// One thread of a rank: a server's shard, or a worker's progress thread.
#[derive(Debug, Default)]
pub struct LaneMeter {
    /// Its number in its rank.
    pub lane: u16,
    peers: Mutex<Vec<Arc<PeerMeter>>>,
    /// The length of each [`Queue`], looked at a few times a second.
    pub queues: [Gauge; Queue::ALL.len()],
    /// Nanoseconds of each [`TaskKind`].
    pub computing_ns: [Counter; TaskKind::ALL.len()],
    /// Computations of each [`TaskKind`].
    pub computations: [Counter; TaskKind::ALL.len()],
    /// Clocks done.
    pub clock: Gauge,
    /// How many clocks the furthest worker is ahead of the slowest.
    pub staleness: Gauge,
    /// Steps that were skipped because a gradient was not finite.
    pub skipped: Counter,
    /// The loss scale of the next step, as the bits of an f32; 0 before it is known.
    pub loss_scale: Gauge,
    /// How long a worker's program waited at the end of each clock; written by the program's thread.
    pub program: Histogram,
}

impl LaneMeter {
    /// The meter of a path, new if it is. When a path begins, never while data flow.
    pub fn peer(&self, peer: PeerId, fabric: &'static str) -> Arc<PeerMeter> {
        let mut peers = lock(&self.peers);
        if let Some(known) = peers.iter().find(|known| (known.peer, known.fabric) == (peer, fabric)) {
            return known.clone();
        }
        let new = Arc::new(PeerMeter {
            peer,
            fabric,
            sent_bytes: Counter::default(),
            sent_chunks: Counter::default(),
            received_bytes: Counter::default(),
            received_chunks: Counter::default(),
            waits: Default::default(),
            rebuilds: Counter::default(),
            resent: Counter::default(),
            credit: Gauge::default(),
            fallback: Gauge::default(),
        });
        peers.push(new.clone());
        new
    }

    /// The gauge of a queue's length.
    pub fn queue(&self, queue: Queue) -> &Gauge {
        &self.queues[queue as usize]
    }

    /// All paths that this thread has had.
    pub fn peers(&self) -> Vec<Arc<PeerMeter>> {
        lock(&self.peers).clone()
    }
}

/// All meters of a process.
#[derive(Debug, Default)]
pub struct Meters {
    lanes: Mutex<Vec<Arc<LaneMeter>>>,
    memory: Mutex<Vec<(&'static str, u64)>>,
}

impl Meters {
    /// A meter for a further thread.
    pub fn lane(&self, lane: u16) -> Arc<LaneMeter> {
        let meter = Arc::new(LaneMeter { lane, ..LaneMeter::default() });
        lock(&self.lanes).push(meter.clone());
        meter
    }

    /// The meters of all threads.
    pub fn lanes(&self) -> Vec<Arc<LaneMeter>> {
        lock(&self.lanes).clone()
    }

    /// The process has allocated so many bytes more of a kind.
    pub fn add_memory(&self, kind: &'static str, bytes: u64) {
        let mut memory = lock(&self.memory);
        match memory.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, sum)) => *sum += bytes,
            None => memory.push((kind, bytes)),
        }
    }

    /// Bytes allocated, by kind.
    pub fn memory(&self) -> Vec<(&'static str, u64)> {
        lock(&self.memory).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_go_into_the_bucket_that_holds_them() {
        let histogram = Histogram::default();
        for (ns, bucket) in [(0, 0), (1000, 0), (1001, 1), (4000, 1), (16_777_216_000, 12), (u64::MAX, 13)] {
            let before = histogram.counts();
            histogram.add(Duration::from_nanos(ns));
            let after = histogram.counts();
            assert_eq!(
                (after[bucket], after.iter().sum::<u64>()),
                (before[bucket] + 1, before.iter().sum::<u64>() + 1)
            );
        }
        let one = Histogram::default();
        one.add(Duration::from_millis(2500));
        assert_eq!(one.sum_s(), 2.5);
    }

    #[test]
    fn a_path_has_one_meter_and_each_fabric_its_own() {
        let meters = Meters::default();
        let lane = meters.lane(3);
        lane.peer(PeerId::worker(1), "tcp").sent_bytes.add(5);
        lane.peer(PeerId::worker(1), "tcp").sent_bytes.add(6);
        lane.peer(PeerId::worker(1), "shm").sent_bytes.add(7);
        let sent: Vec<u64> = meters.lanes()[0].peers().iter().map(|peer| peer.sent_bytes.value()).collect();
        assert_eq!((meters.lanes()[0].lane, sent), (3, vec![11, 7]));
        meters.add_memory("master", 4);
        meters.add_memory("master", 4);
        assert_eq!(meters.memory(), [("master", 8)]);
    }
}
