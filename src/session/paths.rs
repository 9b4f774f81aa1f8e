//! The paths of one thread over its transport: posts that had no room wait here, heartbeats are sent and taken out, and silence
//! becomes a broken path.
//!
//! Invariant: whoever uses this sees each path end exactly once, as `Broken`, and nothing of it afterwards; heartbeats are seen
//! by nobody above.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{Liveness, LivenessEvent, Owed, Recorder, Wait};
use crate::{
    Error, Result,
    mem::{Lease, Region},
    transport::{Completion, Endpoint, Fabrics, MemoryRegion, RemoteSlot, Transport, WorkRequest},
    types::{ChunkId, Clock, Epoch, PeerId},
    wire::{Note, NoteKind},
};

/// The id of requests that nobody above asked for.
const HEARTBEAT: u64 = u64::MAX;

/// A transport with everything that belongs to the life of its paths.
#[derive(Debug)]
pub struct Paths<T> {
    transport: T,
    liveness: Liveness,
    epoch: Epoch,
    /// Requests that found no room, in order.
    waiting: BTreeMap<PeerId, VecDeque<WorkRequest>>,
    events: Vec<LivenessEvent>,
    arrivals: Vec<Completion>,
    /// Is told what comes and goes, if anybody wants to know.
    recorder: Option<Box<Recorder>>,
}

impl<T: Transport> Paths<T> {
    /// Paths over `transport`, with a heartbeat every `interval`; a peer silent for `deadline` is dead.
    pub fn new(transport: T, epoch: Epoch, interval: Duration, deadline: Duration) -> Paths<T> {
        Paths {
            transport,
            liveness: Liveness::new(interval, deadline),
            epoch,
            waiting: BTreeMap::new(),
            events: Vec::new(),
            arrivals: Vec::new(),
            recorder: None,
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
        self.transport.connect(peer, remote, deadline)?;
        if let Some(recorder) = &mut self.recorder {
            recorder.connected(peer, self.transport.fabric(peer));
        }
        Ok(())
    }

    /// See [`Transport::arm`].
    pub fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.transport.arm(peer, slot)
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

    /// Queues a write; if the driver has no room, it waits here.
    pub fn post(&mut self, request: WorkRequest) {
        if let Some(recorder) = &self.recorder {
            recorder.posted(&request);
        }
        let peer = request.peer;
        if let Some(queue) = self.waiting.get_mut(&peer).filter(|queue| !queue.is_empty()) {
            queue.push_back(request);
        } else if let Err(full) = self.transport.post(request) {
            self.waiting.entry(peer).or_default().push_back(full.0);
        }
    }

    /// The peer will go of its own accord: its silence or end is no failure any more.
    pub fn release(&mut self, peer: PeerId) {
        self.liveness.forget(peer);
    }

    /// Ends our side of a path.
    pub fn fence(&mut self, peer: PeerId) {
        self.liveness.forget(peer);
        self.waiting.remove(&peer);
        drop(self.transport.fence(peer));
    }

    /// Collects what has happened, sends heartbeats, and turns silence into `Broken`.
    pub fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        self.transport.poll(now, &mut self.arrivals)?;
        for completion in self.arrivals.drain(..) {
            match &completion {
                Completion::Connected { peer } => self.liveness.track(*peer, now),
                Completion::Arrived { from, note, lease } => {
                    self.liveness.heard(*from, now);
                    if note.kind == NoteKind::Heartbeat {
                        continue;
                    }
                    if let Some(recorder) = &mut self.recorder {
                        recorder.arrived(*from, note, lease.is_some(), now);
                    }
                }
                Completion::Broken { peer, .. } => self.liveness.forget(*peer),
                Completion::Sent { id: HEARTBEAT, .. } | Completion::Failed { id: HEARTBEAT, .. } => continue,
                Completion::Sent { .. } | Completion::Failed { .. } | Completion::Released { .. } => {}
            }
            completions.push(completion);
        }
        self.retry();
        self.liveness.poll(now, &mut self.events);
        for event in std::mem::take(&mut self.events) {
            match event {
                LivenessEvent::HeartbeatDue(peer) => {
                    let note = Note { epoch: self.epoch, ..Note::new(NoteKind::Heartbeat) };
                    self.post(WorkRequest { id: HEARTBEAT, peer, note, payload: None });
                }
                LivenessEvent::Dead(peer, silence) => {
                    self.fence(peer);
                    let reason = format!("no sign of life for {:.1} s", silence.as_secs_f64());
                    completions.push(Completion::Broken { peer, error: Error::Broken { peer, reason } });
                }
            }
        }
        Ok(())
    }

    /// Sends what was posted.
    pub fn flush(&mut self) -> Result<()> {
        self.transport.flush()
    }

    /// When [`Paths::poll`] wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.liveness.next_deadline()
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
mod tests {
    use super::*;
    use crate::transport::sim::{SimNetwork, SimOptions};

    /// Once `retry` put a request that still found no room behind the others. Pushes and replies survive that, which is why no
    /// seed of the simulation notices; a `Finished` that overtakes a push would not.
    #[test]
    fn what_found_no_room_leaves_in_order() {
        let (mut now, step) = (Instant::now(), Duration::from_millis(1));
        let network = SimNetwork::new(1, SimOptions { delay_max: step, queue_max: 2 }, now);
        let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
        let second = Duration::from_secs(1);
        let mut ends = [server, worker].map(|me| Paths::new(network.transport(me), 0, second, 10 * second));
        for (end, peer) in ends.iter_mut().zip([worker, server]) {
            end.connect(peer, &Endpoint::default(), now + second).unwrap();
        }
        for clock in 0..50 {
            let note = Note { clock, ..Note::new(NoteKind::Absent) };
            ends[1].post(WorkRequest { id: clock, peer: server, note, payload: None });
        }
        let mut clocks = Vec::new();
        while clocks.len() < 50 {
            for end in &mut ends {
                let mut completions = Vec::new();
                end.poll(now, &mut completions).unwrap();
                end.flush().unwrap();
                clocks.extend(completions.into_iter().filter_map(|completion| match completion {
                    Completion::Arrived { note, .. } => Some(note.clock),
                    _ => None,
                }));
            }
            now += step;
            network.advance(now);
        }
        assert!(clocks.into_iter().eq(0..50));
    }
}
