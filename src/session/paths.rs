//! The paths of one thread over its transport: posts that had no room wait here, heartbeats are sent and taken out, silence becomes
//! a broken path, payloads are checked, and a path that broke is rebuilt.
//!
//! Whoever uses this hears of a rebuilt path by another `Connected`, and sends again what the peer then says it lacks. While a path
//! is not up, what is posted on it comes back as `Failed`, and what is armed for its peer is armed when it is up again.
//!
//! Invariant: whoever uses this sees each path end at most once, as `Broken`, and nothing of it afterwards; heartbeats are seen
//! by nobody above; nothing that arrived on a path before its fence is given out after it; a payload whose checksum is wrong is
//! given to nobody.

mod rebuilding;
mod redirecting;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Liveness, LivenessEvent, Owed, PayloadChecksums, Recorder, Wait,
    checksums::on_the_wire,
    rebuild::{Path, Proposal, Rebuilding, Stage, TRIES_MAX},
};
use crate::{
    Error, Result,
    mem::{Lease, Region},
    transport::{Completion, Endpoint, Fabrics, MemoryRegion, Transport, WorkRequest},
    types::{ChunkId, Clock, Epoch, PeerId},
    wire::{Note, NoteKind},
};

/// The id of requests that nobody above asked for.
const HEARTBEAT: u64 = u64::MAX;

/// How the paths of a thread live.
#[derive(Clone, Copy, Debug)]
pub struct PathOptions {
    /// Membership.
    pub epoch: Epoch,
    /// How often a silent path carries a heartbeat.
    pub heartbeat: Duration,
    /// A peer silent for so long is dead.
    pub deadline: Duration,
    /// How long rebuilding a broken path may take; zero: it is lost at once.
    pub rebuild: Duration,
    /// Which payloads carry a checksum.
    pub checksums: PayloadChecksums,
    /// Which life of this end this is; a later one has a greater number.
    pub life: u64,
}

/// What has happened to the paths of a thread since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathCounts {
    /// Paths that broke and were built again.
    pub rebuilt: u64,
    /// Payloads whose checksum was wrong: none of them was used.
    pub corrupt: u64,
}

/// A transport with everything that belongs to the life of its paths.
#[derive(Debug)]
pub struct Paths<T> {
    transport: T,
    liveness: Liveness,
    options: PathOptions,
    paths: BTreeMap<PeerId, Path>,
    /// Paths that are being rebuilt.
    rebuilding: usize,
    proposals: Vec<Proposal>,
    /// Requests that found no room, in order.
    waiting: BTreeMap<PeerId, VecDeque<WorkRequest>>,
    /// What is told at the next poll: requests that found no path.
    failed: Vec<Completion>,
    events: Vec<LivenessEvent>,
    arrivals: Vec<Completion>,
    /// Is told what comes and goes, if anybody wants to know.
    recorder: Option<Box<Recorder>>,
    counts: PathCounts,
}

impl PathCounts {
    /// Both together.
    pub fn and(self, other: PathCounts) -> PathCounts {
        PathCounts { rebuilt: self.rebuilt + other.rebuilt, corrupt: self.corrupt + other.corrupt }
    }
}

impl<T: Transport> Paths<T> {
    /// Paths over `transport`.
    pub fn new(transport: T, options: PathOptions) -> Paths<T> {
        Paths {
            transport,
            liveness: Liveness::new(options.heartbeat, options.deadline),
            options,
            paths: BTreeMap::new(),
            rebuilding: 0,
            proposals: Vec::new(),
            waiting: BTreeMap::new(),
            failed: Vec::new(),
            events: Vec::new(),
            arrivals: Vec::new(),
            recorder: None,
            counts: PathCounts::default(),
        }
    }

    /// The transport, for what concerns the driver alone (waking up).
    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// From here on what comes and goes is recorded.
    pub fn record(&mut self, recorder: Option<Box<Recorder>>) {
        self.recorder = recorder;
    }

    /// What records, if anything does.
    pub fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_deref_mut()
    }

    /// When the recorder wants to look at gauges.
    pub fn next_sample(&self) -> Option<Instant> {
        self.recorder.as_ref().and_then(|recorder| recorder.next_sample())
    }

    /// How long rebuilding a path may take.
    pub fn rebuild_time(&self) -> Duration {
        self.options.rebuild
    }

    /// Requests that found no room.
    pub fn backlog(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    /// See [`Transport::register`].
    pub fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        self.transport.register(region)
    }

    /// See [`Transport::offer`].
    pub fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        self.transport.offer(peer)
    }

    /// See [`Transport::fabric`].
    pub fn fabric(&self, peer: PeerId) -> &'static str {
        self.transport.fabric(peer)
    }

    /// See [`Transport::connect`].
    pub fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        self.paths.entry(peer).or_insert_with(Path::begun);
        self.transport.connect(peer, remote, deadline)?;
        if let Some(recorder) = &mut self.recorder {
            recorder.connected(peer, self.transport.fabric(peer));
        }
        Ok(())
    }

    /// See [`Transport::arm`]. While the path is being rebuilt the slot is kept, and armed when it is there again.
    pub fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<()> {
        let path = self.paths.entry(peer).or_insert_with(Path::begun);
        match path.stage {
            Stage::Begun | Stage::Up => {
                path.armed += 1;
                self.transport.arm(peer, slot).map(drop)
            }
            Stage::Rebuilding(_) | Stage::Dormant | Stage::Ended => {
                path.held.push(slot);
                Ok(())
            }
        }
    }

    /// Which path to `peer` the present one is: 0 is the first, and each that was rebuilt has a greater number.
    pub fn generation(&self, peer: PeerId) -> u32 {
        self.paths.get(&peer).map_or(0, |path| path.generation)
    }

    /// What has happened to the paths so far.
    pub fn counts(&self) -> PathCounts {
        self.counts
    }

    /// What is awaited of a peer for `since`, with what is known of its path.
    pub fn wait(
        &self,
        of: PeerId,
        owed: Owed,
        at: (Option<ChunkId>, Option<Clock>),
        since: Duration,
        now: Instant,
    ) -> Wait {
        let silence = self.liveness.silence(of, now);
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Wait {
            of,
            owed,
            chunk: at.0,
            clock: at.1,
            since_ms: milliseconds(since),
            fabric: self.transport.fabric(of).into(),
            silence_ms: silence.map(milliseconds),
        }
    }

    /// Queues a write; if the driver has no room, it waits here. While the path is not up it fails: whoever uses it sends again what
    /// its peer lacks.
    pub fn post(&mut self, mut request: WorkRequest) {
        let peer = request.peer;
        if let Some(path) = self.paths.get(&peer) {
            if !matches!(path.stage, Stage::Begun | Stage::Up) {
                return self.fail(request);
            }
            if path.is_checked
                && let Some((source, _)) = &request.payload
                && source.len() >= request.note.length as usize
            {
                request.note.payload_checksum = source.checksum(request.note.length).map_or(0, on_the_wire);
            }
        }
        if let Some(recorder) = &self.recorder {
            recorder.posted(&request);
        }
        if let Some(queue) = self.waiting.get_mut(&peer).filter(|queue| !queue.is_empty()) {
            queue.push_back(request);
        } else if let Err(full) = self.transport.post(request) {
            self.waiting.entry(peer).or_default().push_back(full.0);
        }
    }

    /// The peer will go of its own accord: its silence or end is no failure any more.
    pub fn release(&mut self, peer: PeerId) {
        self.liveness.forget(peer);
        if let Some(path) = self.paths.get_mut(&peer) {
            path.is_released = true;
        }
    }

    /// Ends our side of a path for good: no later life of the other end builds it again either.
    pub fn fence(&mut self, peer: PeerId) {
        self.give_up(peer);
        if let Some(path) = self.paths.get_mut(&peer) {
            path.life = u64::MAX;
            path.held.clear();
        }
    }

    /// Ends our side of a path for good, unless another process takes the place of its other end ([`Paths::expel`]).
    fn give_up(&mut self, peer: PeerId) {
        self.end(peer);
        if let Some(path) = self.paths.get_mut(&peer) {
            self.rebuilding -= usize::from(matches!(path.stage, Stage::Rebuilding(_)));
            path.stage = Stage::Ended;
        }
    }

    /// Collects what has happened, sends heartbeats, turns silence into `Broken`, and rebuilds what broke.
    pub fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        completions.append(&mut self.failed);
        self.transport.poll(now, &mut self.arrivals)?;
        let mut arrivals = std::mem::take(&mut self.arrivals);
        for completion in arrivals.drain(..) {
            if let Some(completion) = self.sort(completion, now)? {
                completions.push(completion);
            }
        }
        self.arrivals = arrivals;
        self.retry();
        self.liveness.poll(now, &mut self.events);
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                LivenessEvent::HeartbeatDue(peer) => {
                    let note = Note { epoch: self.options.epoch, ..Note::new(NoteKind::Heartbeat) };
                    self.post(WorkRequest { id: HEARTBEAT, peer, note, payload: None });
                }
                LivenessEvent::Dead(peer, silence) => {
                    self.give_up(peer);
                    let reason = format!("no sign of life for {:.1} s", silence.as_secs_f64());
                    completions.push(Completion::Broken { peer, error: Error::Broken { peer, reason } });
                }
            }
        }
        self.events = events;
        if self.rebuilding > 0 {
            self.rebuild(now, completions);
        }
        completions.append(&mut self.failed);
        Ok(())
    }

    /// Sends what was posted.
    pub fn flush(&mut self) -> Result<()> {
        self.transport.flush()
    }

    /// When [`Paths::poll`] wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let mut next = self.liveness.next_deadline();
        if self.rebuilding > 0 {
            let rebuilding = self.paths.values().filter_map(|path| match &path.stage {
                Stage::Rebuilding(it) => {
                    Some(it.next_deadline(path.patience.unwrap_or(self.options.rebuild), path.armed == 0))
                }
                _ => None,
            });
            next = rebuilding.chain(next).min();
        }
        next
    }

    /// What a completion of the transport means for whoever uses this; nothing if it is no affair of theirs.
    fn sort(&mut self, completion: Completion, now: Instant) -> Result<Option<Completion>> {
        match completion {
            Completion::Sent { id: HEARTBEAT, .. } | Completion::Failed { id: HEARTBEAT, .. } => Ok(None),
            Completion::Sent { .. } | Completion::Failed { .. } => Ok(Some(completion)),
            Completion::Connected { peer } => self.connected(peer, now),
            Completion::Arrived { from, note, lease } => Ok(self.arrived(from, note, lease, now)),
            Completion::Released { peer, slots } => {
                self.released(peer, slots);
                Ok(None)
            }
            Completion::Broken { peer, error } => Ok(self.broken(peer, error, now)),
        }
    }

    fn connected(&mut self, peer: PeerId, now: Instant) -> Result<Option<Completion>> {
        let checked = self.options.checksums.cover(self.transport.fabric(peer));
        let path = self.paths.entry(peer).or_insert_with(Path::begun);
        path.is_checked = checked;
        let before = std::mem::replace(&mut path.stage, Stage::Up);
        let (generation, tries) = (path.generation, path.tries);
        match before {
            Stage::Begun => {}
            Stage::Rebuilding(rebuilding) => {
                self.rebuilding -= 1;
                self.counts.rebuilt += 1;
                path.armed += path.held.len();
                for slot in path.held.drain(..) {
                    self.transport.arm(peer, slot)?;
                }
                if let Some(recorder) = &mut self.recorder {
                    recorder.connected(peer, self.transport.fabric(peer));
                    recorder.peer(peer).inspect(|meter| meter.rebuilds.add(1));
                }
                let (cause, took) = (&rebuilding.cause, now.saturating_duration_since(rebuilding.since));
                let took_ms = took.as_millis();
                tracing::warn!(
                    "the path to {peer} broke ({cause}) and was rebuilt after {took_ms} ms, try {}: it is number {}",
                    tries.max(1),
                    generation + 1
                );
            }
            other => {
                path.stage = other; // of a path that was fenced: no transport tells that
                return Ok(None);
            }
        }
        if !path.is_released {
            self.liveness.track(peer, now);
        }
        Ok(Some(Completion::Connected { peer }))
    }

    fn arrived(&mut self, from: PeerId, note: Note, lease: Option<Lease>, now: Instant) -> Option<Completion> {
        let path = self.paths.entry(from).or_insert_with(Path::begun);
        if !path.is_up() {
            self.released(from, lease.into_iter().collect()); // it came before the fence, and is sent again
            return None;
        }
        if note.payload_checksum != 0
            && let Some(landed) = &lease
            && landed.device_address().is_none()
            && on_the_wire(crc32c::crc32c(&landed.bytes()[..note.length as usize])) != note.payload_checksum
        {
            path.hold(lease);
            self.counts.corrupt += 1;
            let reason = format!("the payload of chunk {} came with a wrong checksum", note.chunk.0);
            return self.broken(from, Error::Broken { peer: from, reason }, now);
        }
        path.armed -= usize::from(lease.is_some());
        self.liveness.heard(from, now);
        // What a path says in any case is no sign that it carries what it is for.
        if !matches!(note.kind, NoteKind::Attach | NoteKind::Resume) {
            path.tries = 0;
        }
        if note.kind == NoteKind::Heartbeat {
            return None;
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.arrived(from, &note, lease.is_some(), now);
        }
        Some(Completion::Arrived { from, note, lease })
    }

    fn fail(&mut self, request: WorkRequest) {
        let WorkRequest { id, peer, payload, .. } = request;
        if id != HEARTBEAT {
            let error = Error::Broken { peer, reason: "it is not there".into() };
            self.failed.push(Completion::Failed { id, source: payload.map(|(source, _)| source), error });
        }
    }

    /// Posts what found no room earlier, each peer's in its order.
    fn retry(&mut self) {
        for queue in self.waiting.values_mut() {
            while let Some(request) = queue.pop_front() {
                if let Err(full) = self.transport.post(request) {
                    queue.push_front(full.0);
                    break;
                }
            }
        }
    }
}

impl Paths<Fabrics> {
    /// Records which paths go over another fabric than the job would rather have.
    pub fn note_fallbacks(&mut self) {
        let Some(recorder) = &self.recorder else { return };
        for choice in self.transport.choices() {
            if let Some(peer) = recorder.peer(choice.peer) {
                peer.fallback.set(choice.missed.is_some().into());
            }
        }
    }
}

#[cfg(test)]
#[path = "paths_tests.rs"]
mod tests;
