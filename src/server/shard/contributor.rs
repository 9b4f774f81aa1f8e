//! What a shard knows of one worker: its order, its window, its credit, and where its parameters lie.
//!
//! Invariant: `credit_sent` never exceeds the window's end, so a worker never pushes where there is no slot.

use super::*;
use crate::layout::WorkerView;

#[derive(Debug)]
pub(super) struct Contributor {
    pub peer: PeerId,
    /// By the shard's chunk order: the chunk's place in this worker's own order. `None` if it does not contribute.
    places: Vec<Option<u32>>,
    /// Chunks that it contributes to.
    pub own: usize,
    /// By the shard's chunk order: first byte of the chunk's parameters in the worker's buffer.
    parameter_offsets: Vec<u64>,
    /// `Immediate`: its own window.
    pub window: Window,
    /// Where it has been told that it may write; `None` until it has a path.
    pub landing: Option<Attachment>,
    pub credit_sent: u64,
    pub parameters: Option<Attachment>,
    pub finished: bool,
    /// At which clocks it is of the job.
    pub membership: Membership,
    /// It knows that it may go.
    pub said_goodbye: bool,
    /// With two copies: a farewell is on its way to the backup.
    pub is_leaving: bool,
    /// Nothing that counts has come since this lane took the shard over.
    pub inherits: bool,
    /// The position after the last one to which it gave something or was absent.
    pub pushed: u64,
    /// Notes of its that must come exactly once and have come, over all paths.
    pub received: u64,
    /// Contributions that have come since all of a clock's had.
    pub contributed: usize,
    /// Among them is one that no reply will tell it of.
    pub is_unanswered: bool,
}

impl Contributor {
    pub fn new(worker: u16, layout: &Layout, config: &ShardConfig) -> Contributor {
        let view = WorkerView::new(layout, worker);
        let order = &layout.shards[usize::from(config.shard.0)];
        let mut own = 0;
        let mut places = Vec::with_capacity(order.len());
        let mut parameter_offsets = Vec::with_capacity(order.len());
        for chunk in order {
            let start = view.start(*chunk);
            places.push(start.map(|_| {
                own += 1;
                own as u32 - 1
            }));
            parameter_offsets.push(start.unwrap_or(0) * config.parameter_dtype.size() as u64);
        }
        Contributor {
            peer: PeerId { rank: Rank::worker(worker), lane: 0 },
            places,
            own,
            parameter_offsets,
            window: Window::new(config.slots, 1, position(config.start_clock, own, 0)),
            landing: None,
            credit_sent: 0,
            parameters: None,
            finished: false,
            membership: Membership::default(),
            said_goodbye: false,
            is_leaving: false,
            inherits: false,
            pushed: 0,
            received: 0,
            contributed: 0,
            is_unanswered: false,
        }
    }
}

impl Shard {
    /// The index in shard order of a chunk to which `worker` may push.
    pub(super) fn own_chunk(&self, worker: u16, id: ChunkId) -> Result<usize> {
        let contributor = &self.contributors[usize::from(worker)];
        if contributor.parameters.is_none() {
            return Err(protocol(contributor.peer, "it has not said where its parameters lie"));
        }
        let chunk = self.layout.chunks.get(id.index()).filter(|chunk| chunk.shard == self.config.shard);
        let index = chunk.map(|chunk| chunk.position as usize);
        match index {
            Some(index) if contributor.places[index].is_some() => Ok(index),
            _ => Err(protocol(contributor.peer, format!("chunk {} is not its to push or pull here", id.0))),
        }
    }

    /// The window position of a chunk at a clock: in the shard's order under `Aggregate`, in the worker's own otherwise.
    pub(super) fn position_of(&self, worker: u16, index: usize, clock: Clock) -> Result<u64> {
        let contributor = &self.contributors[usize::from(worker)];
        let (place, chunks) = if self.config.consistency.aggregates() {
            (index, self.chunks.len())
        } else {
            (contributor.places[index].expect("checked by own_chunk") as usize, contributor.own)
        };
        clock
            .checked_mul(chunks as u64)
            .and_then(|start| start.checked_add(place as u64))
            .ok_or_else(|| protocol(contributor.peer, format!("clock {clock} is beyond all reason")))
    }

    /// Records an arrival in the window that applies.
    pub(super) fn record(&mut self, worker: u16, position: u64) -> Result<()> {
        let aggregates = self.config.consistency.aggregates();
        let contributor = &mut self.contributors[usize::from(worker)];
        let outcome = if aggregates {
            self.window.record(position, worker.into())
        } else {
            contributor.window.record(position, 0)
        };
        outcome.map_err(|refusal| protocol(contributor.peer, refusal))
    }

    /// The slot of `position` is free again.
    pub(super) fn finish_position(&mut self, worker: u16, position: u64) {
        let moved = if self.config.consistency.aggregates() {
            self.queued[self.window.slot(position)] = false;
            let moved = self.window.finish(position);
            if moved {
                self.complete_open_positions();
                if self.mirror.is_some() {
                    self.dismiss_finished();
                }
            }
            moved
        } else {
            self.contributors[usize::from(worker)].window.finish(position)
        };
        self.credits_dirty |= moved;
    }

    /// The first position that `worker` may not yet push.
    pub(super) fn credit_of(&self, worker: u16) -> u64 {
        if self.config.consistency.aggregates() {
            self.window.end()
        } else {
            self.contributors[usize::from(worker)].window.end()
        }
    }

    /// A contribution has come. With the last of a clock the worker is told how many of its notes are here, if there was one among
    /// them to which no reply will say so: until then it keeps the gradients.
    pub(super) fn note_contribution(&mut self, worker: u16, wants_reply: bool) {
        if self.mirror.is_some() {
            return; // there every movement of the window is told
        }
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.contributed += 1;
        contributor.is_unanswered |= !wants_reply;
        if contributor.contributed >= contributor.own {
            contributor.contributed = 0;
            if std::mem::take(&mut contributor.is_unanswered) {
                self.tell_credit(worker);
            }
        }
    }

    /// Tells a worker which positions it may push, and how many of its notes are here.
    fn tell_credit(&mut self, worker: u16) {
        let credit = self.take_credit(worker);
        let contributor = &self.contributors[usize::from(worker)];
        // With two copies it is not what has come that counts, but what both have: that is said by the window.
        let version = if self.mirror.is_some() { 0 } else { contributor.received };
        let note = Note { credit, version, ..Note::new(NoteKind::Credit) };
        self.post(contributor.peer, note, None);
    }

    /// Tells those workers of their credit that no reply has told lately.
    pub(super) fn flush_credits(&mut self) {
        self.credits_dirty = false;
        let half = (u64::from(self.config.slots) / 2).max(1);
        let worthwhile = if self.mirror.is_some() { 1 } else { half };
        for worker in 0..self.config.workers {
            let credit = self.credit_of(worker);
            let contributor = &self.contributors[usize::from(worker)];
            let attached = contributor.landing.is_some() && !contributor.finished;
            if attached && credit - contributor.credit_sent >= worthwhile {
                self.tell_credit(worker);
            }
        }
    }

    /// The credit to put on a note to `worker`, which thereby knows of it.
    pub(super) fn take_credit(&mut self, worker: u16) -> u64 {
        let credit = self.credit_of(worker);
        self.contributors[usize::from(worker)].credit_sent = credit;
        credit
    }

    /// Whether `lease` is the landing slot that belongs to `position` of `worker`.
    pub(super) fn lands_in(&self, worker: u16, position: u64, lease: &Lease) -> bool {
        let contributor = &self.contributors[usize::from(worker)];
        let slot = position % u64::from(self.config.slots);
        let at = |landing: Attachment| landing.offset + slot * u64::from(landing.slot_bytes);
        contributor.landing.is_some_and(|landing| lease.offset() as u64 == at(landing))
    }

    /// Where the parameters of a chunk lie in the memory of `worker`; `None` before it has said so.
    pub(super) fn parameter_slot(&self, worker: u16, index: usize) -> Option<RemoteSlot> {
        let contributor = &self.contributors[usize::from(worker)];
        let parameters = contributor.parameters?;
        let len = self.chunks[index].len * self.config.parameter_dtype.size() as u32;
        Some(RemoteSlot {
            rkey: parameters.rkey,
            offset: parameters.offset + contributor.parameter_offsets[index],
            len,
        })
    }

    pub(super) fn on_attach(&mut self, worker: u16, note: &Note) -> Result<()> {
        let peer = self.contributors[usize::from(worker)].peer;
        let parameters = Attachment::from_note(note).map_err(|error| protocol(peer, error))?;
        match self.contributors[usize::from(worker)].parameters.replace(parameters) {
            None => Ok(()),
            Some(_) => Err(protocol(peer, "it has said on this path where its parameters lie")),
        }
    }

    pub(super) fn on_learning_rate(&mut self, from: PeerId, note: &Note) -> Result<()> {
        let rate = f64::from_bits(note.version);
        if !(0.0..=f64::from(f32::MAX)).contains(&rate) {
            return Err(protocol(from, format!("learning rate {rate}")));
        }
        self.effects.push_back(Effect::SetLearningRate { rate, clock: note.clock });
        Ok(())
    }

    pub(super) fn on_finished(&mut self, worker: u16) -> Result<()> {
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.finished = true;
        self.dismiss_finished();
        self.cancel_checkpoints_if_over();
        for index in 0..self.chunks.len() {
            self.retire_finished(index);
            self.touch(index);
        }
        self.complete_open_positions();
        Ok(())
    }
}
