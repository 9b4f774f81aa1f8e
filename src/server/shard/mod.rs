//! A shard's protocol as a pure state machine: `handle_*` in, `poll_effect` out.
//!
//! It knows which contributions have arrived (`Window`), who may be answered (`StalenessGate`), and what has to be computed
//! next; it never touches the bytes behind a lease, does no I/O and reads no clock.
//!
//! Invariant: a contribution takes part in exactly one step, a chunk is in at most one computation at a time, and a reply is
//! posted only when the gate releases it.

mod changing;
mod checkpointing;
mod collector;
mod contributor;
mod deciding;
mod decision;
mod figures;
mod inherited;
mod live_state;
mod membership;
mod mirror;
mod reply;
mod resuming;
mod step;
#[cfg(test)]
mod tests;
mod waiting;
mod work;

use std::{collections::VecDeque, sync::Arc, time::Instant};

use crate::{
    Error, Result,
    consistency::{Consistency, StalenessGate, Window, position},
    layout::{Chunk, Layout},
    mem::{Lease, SharedLease},
    optim::LossScaleConfig,
    transport::{RemoteSlot, WorkRequest},
    types::{ChunkId, Clock, Dtype, Epoch, PeerId, Rank, Role, ShardId, Version},
    wire::{Attachment, Note, NoteFlags, NoteKind},
};
use checkpointing::Checkpointing;
pub(in crate::server) use collector::set_limit;
use contributor::Contributor;
use deciding::Deciding;
pub use decision::{Decided, Decision, DecisionConfig, DecisionRules};
pub use figures::Figures;
pub use live_state::LiveState;
use membership::Membership;
pub use mirror::MirrorConfig;
use mirror::{FOR_BACKUP, Mirror};
use reply::{PendingPull, PendingReply};
use step::Arrival;
pub use waiting::Lacking;
pub use work::{Contribution, Part, Reduced, Task, Work};

/// What a shard is told at birth.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// This lane.
    pub me: PeerId,
    /// The shard it owns.
    pub shard: ShardId,
    /// Workers of the job.
    pub workers: u16,
    /// What an update is and who waits for whom.
    pub consistency: Consistency,
    /// Window positions, which is landing slots a contributor.
    pub slots: u32,
    /// Whether every chunk of a clock is reduced before any is applied (needed where a decision lies between the two).
    pub two_step: bool,
    /// What is decided about each step, and where; needs two steps.
    pub decision: Option<DecisionConfig>,
    /// By what gradients come multiplied.
    pub loss_scale: LossScaleConfig,
    /// What the job that is resumed had changed.
    pub live: LiveState,
    /// Membership.
    pub epoch: Epoch,
    /// The first clock: 0, or that of the checkpoint.
    pub start_clock: Clock,
    /// Number format of pushed gradients.
    pub gradient_dtype: Dtype,
    /// Number format of parameters in replies.
    pub parameter_dtype: Dtype,
    /// A checkpoint every so many clocks.
    pub checkpoint_every: Option<u64>,
    /// The other lane, of a shard with two copies.
    pub mirror: Option<MirrorConfig>,
    /// The job goes on without a worker that is lost.
    pub may_lose_workers: bool,
}

/// What a shard wants done.
#[derive(Debug)]
pub enum Effect {
    /// Open a landing slot to one more write by `peer`.
    Arm {
        /// Whose slot it is.
        peer: PeerId,
        /// The slot.
        slot: Lease,
    },
    /// Send this.
    Post(WorkRequest),
    /// Compute this and hand it to [`Shard::handle_computed`].
    Compute(Work),
    /// Store the state of all chunks, then call [`Shard::handle_snapshotted`]. Nothing is being computed meanwhile.
    Snapshot {
        /// Every worker's updates of the clocks before this one are in it.
        clock: Clock,
    },
    /// The default group's learning rate changes from a clock on.
    SetLearningRate {
        /// The new rate.
        rate: f64,
        /// The first clock that uses it.
        clock: Clock,
    },
    /// Hand all live changes that hold to [`Shard::mirror_change`], then call [`Shard::begin_copying`].
    TellChanges,
}

#[derive(Debug)]
struct ChunkState {
    id: ChunkId,
    contributors: Vec<u16>,
    len: u32,
    busy: bool,
    /// Whether the chunk is in `Shard::dirty`.
    listed: bool,
    version: Version,
    gate: StalenessGate,
    published: Option<(Version, SharedLease)>,
    replies: Vec<PendingReply>,
    pulls: Vec<PendingPull>,
    /// `Aggregate`: complete positions that wait for their step.
    complete: VecDeque<u64>,
    /// `Immediate`: arrivals that wait for their step.
    arrived: VecDeque<Arrival>,
    /// Two-step: what lies in the accumulator.
    reduced: Option<Reduced>,
    /// The backup has not got the last sum: nobody may be told of the step that it makes.
    is_unheld: bool,
}

impl ChunkState {
    fn new(id: ChunkId, chunk: &Chunk, version: Version, gate: StalenessGate) -> ChunkState {
        ChunkState {
            id,
            contributors: chunk.contributors.clone(),
            len: chunk.len,
            busy: false,
            listed: false,
            version,
            gate,
            published: None,
            replies: Vec::with_capacity(chunk.contributors.len()),
            pulls: Vec::new(),
            complete: VecDeque::new(),
            arrived: VecDeque::new(),
            reduced: None,
            is_unheld: false,
        }
    }
}

/// How far a chunk got when it was its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing to do until something happens to it.
    Idle,
    /// It got on, and may have more to do.
    Progressed,
    /// It has something to do and lacks room in the pool, or a checkpoint holds it.
    Waiting,
}

/// The protocol of one shard.
#[derive(Debug)]
pub struct Shard {
    config: ShardConfig,
    layout: Arc<Layout>,
    chunks: Vec<ChunkState>,
    contributors: Vec<Contributor>,
    /// `Aggregate`: the window all contributors share.
    window: Window,
    /// `Aggregate`: what landed, by slot and worker.
    landed: Vec<Option<Contribution>>,
    /// `Aggregate`: whether the position in a slot is on its way to its step.
    queued: Vec<bool>,
    /// Chunks that may have something to do.
    dirty: VecDeque<usize>,
    /// Free wire-format slots for replies.
    pool: Vec<Lease>,
    /// Emptied vectors, to be used again.
    spare: Vec<Vec<Contribution>>,
    /// Two-step: chunks reduced at the present clock.
    reduced: usize,
    /// Two-step: clocks whose decision has been taken.
    decided: Clock,
    /// The last decision.
    decision: Decision,
    /// Steps that a decision has skipped.
    skipped: u64,
    /// The loss scale of the next step.
    loss_scale: f32,
    /// Bounds of staleness that were set while the job runs, each with its first clock; the clocks ascend.
    staleness: Vec<(Clock, u64)>,
    deciding: Deciding,
    /// The backup has not got the last decision: nobody may be told of it.
    is_decision_unheld: bool,
    /// Workers have not been told of the last change of the loss scale.
    is_scale_untold: bool,
    /// Of a shard with two copies: what is known of the other one.
    mirror: Option<Mirror>,
    /// Of a shard that was taken over: positions that were finished out of turn. Their contributions come again, and count no more.
    inherited: Vec<u64>,
    computing: usize,
    effects: VecDeque<Effect>,
    request_next: u64,
    credits_dirty: bool,
    checkpointing: Checkpointing,
    /// A change that is being made: its number, and the first clock of which nothing may begin.
    held: Option<(u64, Clock)>,
    /// Contributions of workers that were lost, without which a step was taken at a clock at which they were of the job.
    lacked: Vec<(u16, ChunkId, Clock)>,
    clock_max: Clock,
    /// The number of clocks to which anybody has pushed.
    clocks_pushed: Clock,
    /// The earliest time at which a pull's patience ends.
    pull_deadline: Option<Instant>,
}

impl Shard {
    /// A shard at the start of a job. `pool` are the slots for replies, each large enough for any chunk in wire format;
    /// `versions` are the chunks' versions in shard order if a checkpoint is resumed. `sums` are slots for what the backup is sent,
    /// each large enough for any chunk in f32.
    pub fn new(
        config: ShardConfig,
        layout: Arc<Layout>,
        pool: Vec<Lease>,
        sums: Vec<Lease>,
        versions: Option<&[Version]>,
    ) -> Shard {
        let order = &layout.shards[usize::from(config.shard.0)];
        let (bound, start) = (config.consistency.bound(), config.start_clock);
        let loss_scale = config.live.scaler(&config.loss_scale).scale;
        let chunks: Vec<ChunkState> = order
            .iter()
            .enumerate()
            .map(|(place, id)| {
                let version = versions.map_or(start, |versions| versions[place]);
                let mut gate = StalenessGate::new(layout.chunk(*id).contributors.len(), bound, start);
                gate.rebound(&config.live.staleness);
                ChunkState::new(*id, layout.chunk(*id), version, gate)
            })
            .collect();
        let slots = config.slots;
        let base = position(start, chunks.len(), 0);
        let contributors = (0..config.workers).map(|worker| Contributor::new(worker, &layout, &config)).collect();
        let cells = slots as usize * usize::from(config.workers);
        Shard {
            window: Window::new(slots, config.workers.into(), base),
            landed: (0..cells).map(|_| None).collect(),
            queued: vec![false; slots as usize],
            dirty: VecDeque::with_capacity(chunks.len()),
            pool,
            spare: Vec::new(),
            reduced: 0,
            decided: start,
            decision: Decision::taken(loss_scale),
            skipped: 0,
            loss_scale,
            staleness: config.live.staleness.clone(),
            deciding: Deciding::new(&config, &layout),
            is_decision_unheld: false,
            is_scale_untold: false,
            mirror: config.mirror.as_ref().map(|mirror| Mirror::new(mirror, sums)),
            inherited: Vec::new(),
            computing: 0,
            effects: VecDeque::new(),
            request_next: 0,
            credits_dirty: false,
            checkpointing: Checkpointing::new(config.checkpoint_every, start, chunks.len()),
            held: None,
            lacked: Vec::new(),
            clock_max: start,
            clocks_pushed: start,
            pull_deadline: None,
            chunks,
            contributors,
            config,
            layout,
        }
    }

    /// Tells worker `worker` where it may write; `landing` names its slots. Over a path that was rebuilt, it is told first how much of
    /// what it sent is here ([`Shard::resume`]).
    pub fn attach(&mut self, worker: u16, landing: Attachment) {
        let credit = self.credit_of(worker);
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.landing = Some(landing);
        contributor.credit_sent = credit;
        contributor.membership.connected();
        let note = Attachment { credit, ..landing }.to_note();
        let peer = contributor.peer;
        self.post(peer, note, None);
        self.tell_loss_scale(worker);
        self.repeat_goodbye(worker);
    }

    /// A peer's write has arrived.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the peer did what it may not; its path must be fenced then.
    pub fn handle_arrived(&mut self, now: Instant, from: PeerId, note: Note, lease: Option<Lease>) -> Result<()> {
        let is_worker = from.rank.role == Role::Worker;
        if is_worker && usize::from(from.rank.index) >= self.contributors.len() {
            return Err(protocol(from, "it is not a worker of this job"));
        }
        if note.epoch != self.config.epoch {
            return Err(protocol(from, format!("epoch {} instead of {}", note.epoch, self.config.epoch)));
        }
        if !is_worker && self.backup() == Some(from) {
            return self.on_backup_note(from, &note);
        }
        if !is_worker {
            return self.on_decision_note(from, &note);
        }
        let worker = from.rank.index;
        if self.has_left(from) && note.kind != NoteKind::Attach {
            return Err(protocol(from, format!("a {:?} note after it has finished", note.kind)));
        }
        let is_counted =
            matches!(note.kind, NoteKind::Push | NoteKind::Absent | NoteKind::SetLearningRate | NoteKind::Finished);
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.received += u64::from(is_counted);
        contributor.inherits &= !is_counted;
        match (note.kind, lease) {
            (NoteKind::Push, Some(lease)) => self.on_push(worker, &note, lease),
            (NoteKind::Absent, None) => self.on_absent(worker, &note),
            (NoteKind::Pull, None) => self.on_pull(now, worker, &note),
            (NoteKind::Attach, None) => self.on_attach(worker, &note),
            (NoteKind::Finished, None) => self.on_finished(worker),
            (NoteKind::SetLearningRate, None) => self.on_learning_rate(from, &note),
            (kind, _) => Err(protocol(from, format!("a {kind:?} note has no place here"))),
        }
    }

    /// The post of this id no longer needs its source.
    pub fn handle_sent(&mut self, id: u64, source: Option<SharedLease>) {
        match source {
            Some(source) if id & FOR_BACKUP != 0 => self.retire_payload(source),
            Some(source) => self.retire(source),
            None => {}
        }
    }

    /// Time has passed: pulls whose time is up are answered with what there is.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.pull_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.pull_deadline = None;
        for index in 0..self.chunks.len() {
            for pull in &mut self.chunks[index].pulls {
                match pull.expires {
                    Some(expires) if expires <= now => (pull.min_version, pull.expires) = (0, None),
                    Some(expires) => {
                        self.pull_deadline = Some(self.pull_deadline.map_or(expires, |least| least.min(expires)));
                    }
                    None => {}
                }
            }
            self.touch(index);
        }
    }

    /// When [`Shard::handle_timeout`] wants to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.pull_deadline
    }

    /// What is to be done next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        while self.effects.is_empty() && self.advance_all() {}
        if self.effects.is_empty() && self.credits_dirty {
            self.flush_credits();
        }
        if self.effects.is_empty() {
            self.leave_decisions();
        }
        self.effects.pop_front()
    }

    /// Whether every worker has finished and all that arrived has been applied and stored.
    pub fn is_done(&self) -> bool {
        self.contributors.iter().all(|contributor| self.is_over(contributor) && self.has_ended(contributor))
            && self.computing == 0
            && self.effects.is_empty()
            && self.dirty.is_empty()
            && self.held.is_none()
            && self.deciding.is_over()
            && self.has_parted_from_workers()
    }

    /// The number of clocks begun to be applied, over all contributors.
    pub fn clock_max(&self) -> Clock {
        self.clock_max
    }

    /// The number of clocks whose updates are applied on every chunk of the shard.
    pub fn clock_done(&self) -> Clock {
        let slowest = self.chunks.iter().map(|chunk| chunk.gate.slowest()).min();
        slowest.unwrap_or(self.clock_max).min(self.clock_max)
    }

    /// The number of clocks whose updates are applied on a chunk of this shard.
    pub fn clock_of(&self, chunk: ChunkId) -> Clock {
        self.chunks[self.layout.chunk(chunk).position as usize].gate.slowest()
    }

    /// Version and id of every chunk, in shard order.
    pub fn versions(&self) -> impl Iterator<Item = (ChunkId, Version)> + '_ {
        self.chunks.iter().map(|chunk| (chunk.id, chunk.version))
    }

    /// Whether the path of `peer` may end without harm.
    pub fn has_left(&self, peer: PeerId) -> bool {
        match peer.rank.role {
            Role::Worker => self.contributors[usize::from(peer.rank.index)].has_left(),
            Role::Server => self.lane_has_left(peer),
        }
    }

    /// Puts a chunk on the list of those that may have something to do.
    fn touch(&mut self, index: usize) {
        let chunk = &mut self.chunks[index];
        if !chunk.listed {
            chunk.listed = true;
            self.dirty.push_back(index);
        }
    }

    /// Lets every listed chunk do what it can; those that must wait for something stay listed. `true` if any got on.
    fn advance_all(&mut self) -> bool {
        let mut progress = false;
        for _ in 0..self.dirty.len() {
            let Some(index) = self.dirty.pop_front() else { break };
            self.chunks[index].listed = false;
            match self.advance(index) {
                Turn::Idle => {}
                Turn::Waiting => self.touch(index),
                Turn::Progressed => {
                    self.touch(index);
                    progress = true;
                }
            }
        }
        self.advance_checkpoint();
        progress
    }

    /// One chunk does what it can.
    fn advance(&mut self, index: usize) -> Turn {
        if self.chunks[index].busy {
            return Turn::Idle; // its computation touches it again when done
        }
        let is_stored_first = self.checkpointing.holds_all(self.clock_max);
        if let Some(reduced) = self.chunks[index].reduced.filter(|_| self.mirror.is_some())
            && self.is_decided(reduced.clock)
        {
            return if is_stored_first { Turn::Waiting } else { self.start_apply(index, reduced) };
        }
        if self.chunks[index].is_unheld || self.is_decision_unheld || self.is_copying(index) {
            return Turn::Idle; // the backup's word touches it, or the last part
        }
        if is_stored_first {
            return Turn::Waiting;
        }
        match self.answer(index) {
            Turn::Idle => self.start_next(index),
            turn => turn,
        }
    }

    fn post(&mut self, peer: PeerId, note: Note, payload: Option<(SharedLease, RemoteSlot)>) {
        let id = self.request_next;
        self.request_next += 1;
        let note = Note { epoch: self.config.epoch, ..note };
        self.effects.push_back(Effect::Post(WorkRequest { id, peer, note, payload }));
    }
}

fn protocol(peer: PeerId, what: impl ToString) -> Error {
    Error::Protocol { peer, what: what.to_string() }
}
