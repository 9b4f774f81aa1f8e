//! A worker's protocol as a pure state machine: commands and arrivals in, effects and events out.
//!
//! A gradient whose turn has not come waits here, in the worker's own memory: backward never blocks on a credit. A chunk's
//! parameters are armed from the push (or pull) until they have arrived.
//!
//! What a lane may not have received is kept, and sent again when the lane says, over a path that has been rebuilt, how much of it
//! came: a gradient goes back to its user only when its arrival is proven, by a reply to it, by a count, or by the lane's goodbye.
//! Requests for parameters are repeated as they are then; the lane has forgotten them.
//!
//! Invariant: a position is posted only while it is below the lane's credit, and a chunk has at most one request for its
//! parameters under way.

mod inheriting;
mod leaving;
mod outgoing;
mod resuming;
mod waiting;

use std::{
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use outgoing::Outgoing;

use crate::{
    Error, Result,
    consistency::{Consistency, Unproven},
    layout::{Layout, WorkerView},
    mem::{Lease, SharedLease},
    transport::{RemoteSlot, WorkRequest},
    types::{ChunkId, Clock, Dtype, Epoch, PeerId, ShardId, Version},
    wire::{Attachment, Note, NoteFlags, NoteKind},
};

/// What a client is told at birth.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// This worker's number.
    pub worker: u16,
    /// By shard: the lane that owns it.
    pub lanes: Vec<PeerId>,
    /// Consistency of the job: it decides which order positions are counted in.
    pub consistency: Consistency,
    /// Membership.
    pub epoch: Epoch,
    /// Number format of gradients.
    pub gradient_dtype: Dtype,
    /// Number format of parameters.
    pub parameter_dtype: Dtype,
    /// Each shard has two copies: what has come to a lane may still be lost, and only what both have is proven.
    pub has_copies: bool,
}

/// What a client wants done.
#[derive(Debug)]
pub enum Effect {
    /// Open the chunk's parameters to one write by `peer`.
    Arm {
        /// The lane that owns the chunk.
        peer: PeerId,
        /// The parameters.
        slot: Lease,
    },
    /// Send this.
    Post(WorkRequest),
}

/// What a client has to tell its user.
#[derive(Debug)]
pub enum Event {
    /// Every lane has said where gradients land: pushing may begin.
    Attached,
    /// A gradient's bytes may be written again.
    GradientSent {
        /// Which chunk.
        chunk: ChunkId,
        /// The bytes.
        lease: Lease,
    },
    /// A chunk's parameters are here.
    Parameters {
        /// Which chunk.
        chunk: ChunkId,
        /// Their version.
        version: Version,
        /// The bytes.
        lease: Lease,
    },
    /// The factor on the loss from the next clock on.
    LossScale(f32),
    /// Every lane has said goodbye.
    Finished,
    /// A worker in the place of one that was lost, or that left, takes part from this clock on.
    Begins(Clock),
    /// This worker is of the job no more from this clock on: nothing of it counts or is answered.
    Leaves(Clock),
}

/// What a client waits for, to be named when a deadline passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// From whom.
    pub peer: PeerId,
    /// Which chunk's parameters.
    pub chunk: ChunkId,
    /// Pushed at this clock; `None` for a pull.
    pub clock: Option<Clock>,
}

#[derive(Debug)]
struct Lane {
    peer: PeerId,
    landing: Option<Attachment>,
    credit: u64,
    /// The position after the last one that was posted.
    pushed: u64,
    /// Chunks that positions are counted in.
    chunks: usize,
    /// What waits for its turn, lowest position first.
    waiting: BinaryHeap<Outgoing>,
    /// What has been sent and may not have arrived.
    unproven: Unproven<Sent>,
    /// The lane has said over this path how many of our notes it has.
    resumes_at: Option<u64>,
    /// There has been a path to it before this one.
    was_attached: bool,
    finished: bool,
    goodbye: bool,
}

/// What was sent: enough to send it again.
#[derive(Debug)]
struct Sent {
    note: Note,
    /// A push's position and gradient.
    payload: Option<(u64, SharedLease)>,
}

/// Why a chunk's parameters are awaited.
#[derive(Clone, Copy, Debug)]
enum Request {
    /// With a push of this clock, which has this number among all that the lane was sent, once it has been sent.
    Push { clock: Clock, number: Option<u64> },
    /// A pull.
    Pull { min_version: Version, patience_ms: u64 },
}

#[derive(Debug)]
struct ChunkState {
    lane: usize,
    /// Its place in the order that positions are counted in.
    place: usize,
    awaits: Option<Request>,
    /// Offset of the memory that was armed for them.
    armed: usize,
    /// A gradient that has arrived, while the transport still has a share of it.
    parting: Option<SharedLease>,
}

/// The protocol of one worker.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    layout: Arc<Layout>,
    lanes: Vec<Lane>,
    /// By chunk of the layout; `None` where this worker has no part.
    chunks: Vec<Option<ChunkState>>,
    effects: VecDeque<Effect>,
    events: VecDeque<Event>,
    finishing: bool,
    /// Since it was asked for: to which lane how much was sent again.
    resent: Option<(PeerId, u64)>,
    /// The first clock of the loss scale that was told last.
    scaled_from: Clock,
    /// The first clock at which this worker is of the job no more.
    leaves_from: Option<Clock>,
}

impl Client {
    /// A client at the start of a job.
    pub fn new(config: ClientConfig, layout: Arc<Layout>) -> Client {
        let view = WorkerView::new(&layout, config.worker);
        let mut chunks: Vec<Option<ChunkState>> = (0..layout.chunks.len()).map(|_| None).collect();
        let mut lanes = Vec::with_capacity(config.lanes.len());
        for (index, peer) in config.lanes.iter().enumerate() {
            let own = view.order(&layout, ShardId(index as u16));
            let all = &layout.shards[index];
            let order = if config.consistency.aggregates() { all } else { &own };
            for (place, id) in order.iter().enumerate().filter(|(_, id)| view.start(**id).is_some()) {
                chunks[id.index()] = Some(ChunkState { lane: index, place, awaits: None, armed: 0, parting: None });
            }
            lanes.push(Lane {
                peer: *peer,
                landing: None,
                credit: 0,
                pushed: 0,
                chunks: order.len(),
                waiting: BinaryHeap::with_capacity(2 * own.len()),
                unproven: Unproven::default(),
                resumes_at: None,
                was_attached: false,
                finished: false,
                goodbye: false,
            });
        }
        Client {
            config,
            layout,
            lanes,
            chunks,
            effects: VecDeque::new(),
            events: VecDeque::new(),
            finishing: false,
            resent: None,
            scaled_from: 0,
            leaves_from: None,
        }
    }

    /// Pushes the chunk's gradient of `clock` when its turn comes. With `reply`, the parameters come into it.
    pub fn push(&mut self, chunk: ChunkId, clock: Clock, gradient: Lease, reply: Option<Lease>) {
        self.contribute(chunk, clock, Some(gradient), reply);
    }

    /// Says that this worker has nothing for the chunk at `clock`.
    pub fn absent(&mut self, chunk: ChunkId, clock: Clock, reply: Option<Lease>) {
        self.contribute(chunk, clock, None, reply);
    }

    /// Asks for a chunk's parameters at `min_version` or later. After `patience` (`None`: never) what there is comes back.
    pub fn pull(&mut self, chunk: ChunkId, min_version: Version, patience: Option<Duration>, into: Lease) {
        let (lane, _) = self.own(chunk);
        let patience_ms = patience.map_or(0, |patience| (patience.as_millis() as u64).max(1));
        self.await_parameters(chunk, Request::Pull { min_version, patience_ms }, into);
        if self.lanes[lane].landing.is_some() {
            self.request(chunk); // otherwise when the lane says where we are
        }
    }

    /// Changes the default group's learning rate from `clock` on, on every shard.
    pub fn set_learning_rate(&mut self, rate: f64, clock: Clock) {
        for lane in 0..self.lanes.len() {
            let note = Note { version: rate.to_bits(), clock, ..Note::new(NoteKind::SetLearningRate) };
            self.send(lane, Sent { note, payload: None });
        }
    }

    /// Nothing more will be pushed; [`Event::Finished`] follows when every lane knows.
    pub fn finish(&mut self) {
        self.finishing = true;
        (0..self.lanes.len()).for_each(|lane| self.pump(lane));
    }

    /// The path to a lane is there, perhaps once more: it is told where this worker's parameters lie. Nothing else is sent on it
    /// before the lane has said where gradients land and, of an older path, what it has received.
    pub fn attach(&mut self, peer: PeerId, rkey: u32, offset: u64) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.peer == peer) {
            (lane.landing, lane.resumes_at) = (None, None);
        }
        // Of an older path: what it would have sent must not come before the lane has said what it has.
        self.effects.retain(|effect| !matches!(effect, Effect::Post(request) if request.peer == peer));
        let parameters = Attachment { rkey, offset, slot_bytes: 0, slots: 0, credit: 0 };
        self.post(peer, u64::MAX - 1, parameters.to_note(), None);
    }

    /// A lane's write has arrived.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the lane did what it may not; its path must be fenced then.
    pub fn handle_arrived(&mut self, from: PeerId, note: Note, lease: Option<Lease>) -> Result<()> {
        let protocol = |what: String| Error::Protocol { peer: from, what };
        let Some(lane) = self.lanes.iter().position(|lane| lane.peer == from) else {
            return Err(protocol("it is not a server lane of this job".into()));
        };
        if note.epoch != self.config.epoch {
            return Err(protocol(format!("epoch {} instead of {}", note.epoch, self.config.epoch)));
        }
        match (note.kind, lease) {
            (NoteKind::Attach, None) => {
                let landing = Attachment::from_note(&note).map_err(|error| protocol(error.to_string()))?;
                if landing.slots == 0 {
                    return Err(protocol("a landing window without slots".into()));
                }
                let is_first = !std::mem::replace(&mut self.lanes[lane].was_attached, true);
                self.lanes[lane].landing = Some(landing);
                self.resume(lane).map_err(protocol)?;
                self.earn(lane, note.credit);
                if is_first && self.lanes.iter().all(|lane| lane.was_attached) {
                    self.events.push_back(Event::Attached);
                }
            }
            (NoteKind::Resume, None) if note.flags.contains(NoteFlags::INHERITED) => {
                if !self.config.has_copies || self.lanes[lane].landing.is_some() || note.credit != 0 {
                    return Err(protocol("it has nothing to take over".into()));
                }
                self.inherit(lane, note.version);
                self.lanes[lane].resumes_at = Some(0);
            }
            (NoteKind::Resume, None) if self.lanes[lane].landing.is_none() => {
                let unproven = &self.lanes[lane].unproven;
                let is_passed = self.config.has_copies && note.credit < unproven.first();
                if !is_passed && !unproven.allows(note.credit) {
                    return Err(protocol(format!("it says to have {} notes of ours", note.credit)));
                }
                self.lanes[lane].resumes_at = Some(note.credit);
            }
            (NoteKind::Credit, None) => {
                if note.version > self.lanes[lane].unproven.end() {
                    return Err(protocol(format!("it says to have {} notes of ours", note.version)));
                }
                self.prove(lane, note.version);
                self.earn(lane, note.credit);
            }
            (NoteKind::Parameters, Some(lease)) => {
                self.receive(lane, note, lease).map_err(protocol)?;
                self.earn(lane, note.credit);
            }
            (NoteKind::LossScale, None) => {
                let scale = f32::from_bits(note.version as u32);
                if note.version >> 32 != 0 || !(0.0..=f32::MAX).contains(&scale) {
                    return Err(protocol(format!("loss scale {scale}")));
                }
                // A lane that is behind may tell that of a clock that is over.
                if note.clock >= self.scaled_from {
                    self.scaled_from = note.clock;
                    self.events.push_back(Event::LossScale(scale));
                }
            }
            (NoteKind::Goodbye, None) => {
                self.prove(lane, u64::MAX);
                self.lanes[lane].goodbye = true;
                if self.lanes.iter().all(|lane| lane.goodbye) {
                    self.events.push_back(Event::Finished);
                }
            }
            (kind, _) => return Err(protocol(format!("a {kind:?} note has no place here"))),
        }
        Ok(())
    }

    /// The transport no longer needs the source of a post, which may have arrived or not. `id` is the chunk of a push.
    pub fn handle_sent(&mut self, id: u64, source: Option<SharedLease>) {
        if source.is_some() {
            drop(source);
            self.part(ChunkId(id as u32), None);
        }
    }

    /// What is to be done next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// What is to be told next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether every lane has said where gradients land.
    pub fn is_attached(&self) -> bool {
        self.lanes.iter().all(|lane| lane.landing.is_some())
    }

    /// Every lane of the job.
    pub fn lanes(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.lanes.iter().map(|lane| lane.peer)
    }

    /// Whether the lane of `peer` owes nothing any more.
    pub fn has_parted(&self, peer: PeerId) -> bool {
        self.lanes.iter().any(|lane| lane.peer == peer && lane.goodbye)
    }

    fn contribute(&mut self, chunk: ChunkId, clock: Clock, gradient: Option<Lease>, reply: Option<Lease>) {
        let (lane, place) = self.own(chunk);
        let wants_reply = reply.is_some();
        if let Some(reply) = reply {
            self.await_parameters(chunk, Request::Push { clock, number: None }, reply);
        }
        if self.leaves_from.is_some_and(|from| clock >= from) {
            return self.events.extend(gradient.map(|lease| Event::GradientSent { chunk, lease }));
        }
        let lane_state = &mut self.lanes[lane];
        let position = crate::consistency::position(clock, lane_state.chunks, place);
        lane_state.waiting.push(Outgoing { position, chunk, clock, wants_reply, gradient });
        self.pump(lane);
    }

    fn await_parameters(&mut self, chunk: ChunkId, request: Request, into: Lease) {
        let peer = self.lanes[self.own(chunk).0].peer;
        let state = self.chunks[chunk.index()].as_mut().expect("own has looked");
        assert!(state.awaits.is_none(), "chunk {} is awaited already", chunk.0);
        (state.awaits, state.armed) = (Some(request), into.offset());
        self.effects.push_back(Effect::Arm { peer, slot: into });
    }

    fn earn(&mut self, lane: usize, credit: u64) {
        self.lanes[lane].credit = self.lanes[lane].credit.max(credit);
        if self.config.has_copies {
            self.prove_by_window(lane);
        }
        self.pump(lane);
    }

    /// A chunk's parameters have come, as they were asked for or not.
    fn receive(&mut self, lane: usize, note: Note, lease: Lease) -> Result<(), String> {
        let state = self.chunks.get_mut(note.chunk.index()).and_then(Option::as_mut);
        let state = state.filter(|state| state.lane == lane && state.awaits.is_some());
        let Some(state) = state else {
            return Err(format!("parameters of chunk {} that nobody awaits", note.chunk.0));
        };
        let bytes = self.layout.chunk(note.chunk).len * self.config.parameter_dtype.size() as u32;
        if lease.offset() != state.armed || note.length != bytes {
            return Err(format!("parameters of chunk {} that are not whole or elsewhere", note.chunk.0));
        }
        if let Some(Request::Push { number: Some(number), .. }) = state.awaits.take()
            && !self.config.has_copies
        {
            self.prove(lane, number + 1);
        }
        self.events.push_back(Event::Parameters { chunk: note.chunk, version: note.version, lease });
        Ok(())
    }

    /// Posts whatever has its turn.
    fn pump(&mut self, lane: usize) {
        if self.lanes[lane].landing.is_none() {
            return;
        }
        while self.lanes[lane].waiting.peek().is_some_and(|next| next.position < self.lanes[lane].credit) {
            let next = self.lanes[lane].waiting.pop().expect("just seen");
            self.send_contribution(lane, next);
        }
        if self.finishing && !self.lanes[lane].finished && self.lanes[lane].waiting.is_empty() {
            self.lanes[lane].finished = true;
            self.send(lane, Sent { note: Note::new(NoteKind::Finished), payload: None });
        }
    }

    fn send_contribution(&mut self, lane: usize, next: Outgoing) {
        let Outgoing { position, chunk, clock, wants_reply, gradient } = next;
        let flags = if wants_reply { NoteFlags::WANTS_REPLY } else { NoteFlags::NONE };
        self.lanes[lane].pushed = position + 1;
        let sent = match gradient {
            None => Sent { note: Note { chunk, clock, flags, ..Note::new(NoteKind::Absent) }, payload: None },
            Some(gradient) => {
                let length = self.layout.chunk(chunk).len * self.config.gradient_dtype.size() as u32;
                let note = Note { chunk, clock, flags, weight: 1, length, ..Note::new(NoteKind::Push) };
                Sent { note, payload: Some((position, gradient.freeze())) }
            }
        };
        let number = self.send(lane, sent);
        let state = self.chunks[chunk.index()].as_mut().expect("own has looked");
        if let Some(Request::Push { clock: awaited, number: place }) = &mut state.awaits
            && wants_reply
            && *awaited == clock
        {
            *place = Some(number);
        }
    }

    /// Sends what must arrive exactly once: at once if the lane is ready for it, and again until its arrival is proven. Its number.
    fn send(&mut self, lane: usize, sent: Sent) -> u64 {
        if self.lanes[lane].landing.is_some() {
            self.post_sent(lane, sent.note, sent.payload.clone());
        }
        self.lanes[lane].unproven.push(sent)
    }

    fn post_sent(&mut self, lane: usize, note: Note, payload: Option<(u64, SharedLease)>) {
        let Lane { peer, landing, .. } = &self.lanes[lane];
        let (peer, landing) = (*peer, landing.expect("sent only to a lane that has said where"));
        let payload = payload.map(|(position, gradient)| {
            let slot = position % u64::from(landing.slots);
            let offset = landing.offset + slot * u64::from(landing.slot_bytes);
            (gradient, RemoteSlot { rkey: landing.rkey, offset, len: landing.slot_bytes })
        });
        self.post(peer, note.chunk.0.into(), note, payload);
    }

    fn post(&mut self, peer: PeerId, id: u64, note: Note, payload: Option<(SharedLease, RemoteSlot)>) {
        let note = Note { epoch: self.config.epoch, ..note };
        self.effects.push_back(Effect::Post(WorkRequest { id, peer, note, payload }));
    }

    /// A chunk's lane, and its place in the order that positions are counted in.
    fn own(&self, chunk: ChunkId) -> (usize, usize) {
        let state = self.chunks[chunk.index()].as_ref().expect("a worker pushes and pulls its own chunks only");
        (state.lane, state.place)
    }
}
