//! What a thread tells of its work while it does it: numbers for metrics, marks for a timeline.
//!
//! Invariant: without a recorder nothing is counted and no clock is read; with one, nothing that the protocol does depends on it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::StepRange;
use crate::{
    observe::{Cause, LaneMeter, Mark, PeerMeter, Ring, TaskKind, What, monotonic_ns},
    transport::WorkRequest,
    types::{ChunkId, Clock, PeerId},
    wire::{Note, NoteKind},
};

/// A thread's part in a timeline: the clocks that are wanted, and the ring for their marks.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The clocks.
    pub steps: StepRange,
    /// The marks.
    pub ring: Arc<Ring>,
    /// Whose they are.
    pub me: PeerId,
}

impl Trace {
    /// Whether marks of this clock are wanted.
    pub fn wants(&self, clock: Clock) -> bool {
        self.steps.contains(clock)
    }

    /// Something has happened just now.
    pub fn mark(&self, what: What, chunk: ChunkId, clock: Clock, peer: PeerId) {
        if self.wants(clock) {
            self.ring.write(Mark { at_ns: monotonic_ns(), what, chunk, clock, peer });
        }
    }
}

/// What one thread records.
#[derive(Debug)]
pub struct Recorder {
    meter: Option<Arc<LaneMeter>>,
    trace: Option<Trace>,
    peers: BTreeMap<PeerId, Arc<PeerMeter>>,
    /// Since when the thread, or the program behind it, has had nothing to do.
    waits_since: Option<Instant>,
    /// Computations under way, each since when: few.
    computing: Vec<(ChunkId, Instant)>,
    /// Time of the tiles of the computation that the processor is at.
    tiles: Duration,
    /// When the gauges were looked at last, and whether something has happened since.
    sampled: Option<Instant>,
    stale: bool,
}

/// How often gauges are looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);

impl Recorder {
    /// A recorder, if there is anything to record.
    pub fn new(meter: Option<Arc<LaneMeter>>, trace: Option<Trace>) -> Option<Box<Recorder>> {
        let recorder = Recorder {
            meter,
            trace,
            peers: BTreeMap::new(),
            waits_since: None,
            computing: Vec::with_capacity(16),
            tiles: Duration::ZERO,
            sampled: None,
            stale: true,
        };
        (recorder.meter.is_some() || recorder.trace.is_some()).then(|| Box::new(recorder))
    }

    /// The thread's meter.
    pub fn meter(&self) -> Option<&LaneMeter> {
        self.meter.as_deref()
    }

    /// A path begins, or is built again.
    pub fn connected(&mut self, peer: PeerId, fabric: &'static str) {
        if let Some(meter) = &self.meter {
            self.peers.insert(peer, meter.peer(peer, fabric));
        }
    }

    /// The meter of a peer's path, if metrics are wanted and there is one.
    pub fn peer(&self, peer: PeerId) -> Option<&PeerMeter> {
        self.peers.get(&peer).map(|meter| &**meter)
    }

    /// A write is handed to the fabric.
    pub fn posted(&self, request: &WorkRequest) {
        let note = &request.note;
        if let Some(trace) = &self.trace
            && let Some(what) = posted(note.kind)
        {
            trace.mark(what, note.chunk, note.clock, request.peer);
        }
        if request.payload.is_some()
            && let Some(peer) = self.peers.get(&request.peer)
        {
            peer.sent_bytes.add(note.length.into());
            peer.sent_chunks.add(1);
        }
    }

    /// A write has arrived.
    pub fn arrived(&mut self, from: PeerId, note: &Note, with_payload: bool, now: Instant) {
        self.stale = true;
        if let Some(trace) = &self.trace
            && let Some(what) = arrived(note.kind)
        {
            trace.mark(what, note.chunk, note.clock, from);
        }
        let Some(peer) = self.peers.get(&from) else { return };
        if with_payload {
            peer.received_bytes.add(note.length.into());
            peer.received_chunks.add(1);
        }
        if let Some(since) = self.waits_since {
            self.waits_since = Some(now);
            let waited = now.saturating_duration_since(since);
            // What comes with it in the same turn was not waited for.
            if !waited.is_zero() {
                peer.waits[cause(note.kind) as usize].add(waited);
            }
        }
    }

    /// Whether the thread has nothing to do from `now` on, or still.
    pub fn idles(&mut self, idle: bool, now: Instant) {
        self.waits_since = idle.then(|| self.waits_since.unwrap_or(now));
    }

    /// Since when the program behind this thread waits; `None` while it computes.
    pub fn program_waits(&mut self, since: Option<Instant>) {
        self.waits_since = since.map(|since| self.waits_since.map_or(since, |earlier| earlier.max(since)));
    }

    /// A computation has been started.
    pub fn started(&mut self, task: TaskKind, chunk: ChunkId, clock: Clock) {
        self.mark_own(What::Started(task), chunk, clock);
        if self.meter.is_some() {
            self.computing.push((chunk, Instant::now()));
        }
    }

    /// The time at which a tile begins, if it is wanted.
    pub fn tile(&self) -> Option<Instant> {
        self.meter.is_some().then(Instant::now)
    }

    /// A tile that began then has ended.
    pub fn tiled(&mut self, began: Option<Instant>) {
        self.tiles += began.map_or(Duration::ZERO, |began| began.elapsed());
    }

    /// A computation has ended. `on_processor`: it took the time of its tiles; otherwise all the time since it was started.
    pub fn ended(&mut self, task: TaskKind, chunk: ChunkId, clock: Clock, on_processor: bool) {
        self.stale = true;
        self.mark_own(What::Ended(task), chunk, clock);
        let at = self.computing.iter().position(|(of, _)| *of == chunk);
        let (Some(meter), Some(at)) = (&self.meter, at) else { return };
        let (_, since) = self.computing.swap_remove(at);
        let time = if on_processor { std::mem::take(&mut self.tiles) } else { since.elapsed() };
        meter.computing_ns[task as usize].add(time.as_nanos() as u64);
        meter.computations[task as usize].add(1);
    }

    fn mark_own(&self, what: What, chunk: ChunkId, clock: Clock) {
        if let Some(trace) = &self.trace {
            trace.mark(what, chunk, clock, trace.me);
        }
    }

    /// The meter, if its gauges are to be looked at now.
    pub fn sample(&mut self, now: Instant) -> Option<&LaneMeter> {
        let meter = self.meter.as_deref()?;
        let due = self.stale && self.sampled.is_none_or(|at| now >= at + SAMPLE_EVERY);
        if due {
            (self.sampled, self.stale) = (Some(now), false);
        }
        due.then_some(meter)
    }

    /// When [`Recorder::sample`] wants to be called, even if nothing happens any more.
    pub fn next_sample(&self) -> Option<Instant> {
        let pending = self.meter.is_some() && self.stale;
        pending.then(|| self.sampled.map(|at| at + SAMPLE_EVERY)).flatten()
    }
}

fn posted(kind: NoteKind) -> Option<What> {
    match kind {
        NoteKind::Push => Some(What::Pushed),
        NoteKind::Parameters => Some(What::Replied),
        _ => None,
    }
}

fn arrived(kind: NoteKind) -> Option<What> {
    match kind {
        NoteKind::Push => Some(What::Landed),
        NoteKind::Parameters => Some(What::Received),
        _ => None,
    }
}

fn cause(kind: NoteKind) -> Cause {
    match kind {
        NoteKind::Push | NoteKind::Absent => Cause::Push,
        NoteKind::Parameters => Cause::Parameters,
        NoteKind::Credit | NoteKind::Attach => Cause::Credit,
        NoteKind::Measured | NoteKind::Decided => Cause::Decision,
        _ => Cause::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(kind: NoteKind) -> Note {
        Note { length: 100, clock: 3, chunk: ChunkId(2), ..Note::new(kind) }
    }

    #[test]
    fn a_wait_is_laid_to_whom_it_ended_by_and_once() {
        let meter = Arc::new(LaneMeter::default());
        let mut recorder = Recorder::new(Some(meter.clone()), None).unwrap();
        let (one, two) = (PeerId::worker(0), PeerId::worker(1));
        recorder.connected(one, "tcp");
        recorder.connected(two, "shm");
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        recorder.arrived(one, &note(NoteKind::Push), true, at(1));
        recorder.idles(true, at(2));
        recorder.idles(true, at(3));
        recorder.arrived(two, &note(NoteKind::Push), true, at(7));
        recorder.arrived(one, &note(NoteKind::Push), true, at(7));
        recorder.idles(false, at(7));
        recorder.arrived(one, &note(NoteKind::Push), true, at(9));
        let waited = |peer| recorder.peer(peer).unwrap().waits[Cause::Push as usize].sum_s();
        assert_eq!((waited(one), waited(two)), (0.0, 0.005));
        recorder.program_waits(Some(at(10)));
        recorder.arrived(one, &note(NoteKind::Parameters), true, at(12));
        recorder.program_waits(Some(at(10)));
        recorder.arrived(one, &note(NoteKind::Parameters), true, at(13));
        recorder.program_waits(Some(at(20)));
        recorder.arrived(two, &note(NoteKind::Parameters), true, at(21));
        recorder.program_waits(None);
        recorder.arrived(two, &note(NoteKind::Parameters), true, at(22));
        let waited = |peer| recorder.peer(peer).unwrap().waits[Cause::Parameters as usize].sum_s();
        assert_eq!((waited(one), waited(two)), (0.003, 0.001));
        let peers = meter.peers();
        assert_eq!((peers[0].received_bytes.value(), peers[0].received_chunks.value()), (500, 5));
        assert_eq!((peers[1].peer, peers[1].fabric, peers[1].received_chunks.value()), (two, "shm", 3));
    }

    #[test]
    fn only_the_clocks_that_are_wanted_are_marked() {
        let ring = Arc::new(Ring::new(8));
        let me = PeerId::server(0, 0);
        let trace = Trace { steps: "3..4".parse().unwrap(), ring: ring.clone(), me };
        let mut recorder = Recorder::new(None, Some(trace)).unwrap();
        for clock in 2..5 {
            recorder.arrived(PeerId::worker(1), &Note { clock, ..note(NoteKind::Push) }, true, Instant::now());
        }
        recorder.started(TaskKind::Step, ChunkId(2), 3);
        recorder.ended(TaskKind::Step, ChunkId(2), 3, true);
        let (marks, lost) = ring.read();
        let seen: Vec<_> = marks.iter().map(|mark| (mark.what, mark.clock, mark.peer)).collect();
        let step = TaskKind::Step;
        let wanted = [(What::Landed, 3, PeerId::worker(1)), (What::Started(step), 3, me), (What::Ended(step), 3, me)];
        assert_eq!((seen, lost), (wanted.to_vec(), 0));
        assert!(marks.is_sorted_by_key(|mark| mark.at_ns));
    }
}
