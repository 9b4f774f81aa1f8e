//! How shards agree about a step: between reducing and applying, whether the step of a clock is taken, and what its gradient is
//! multiplied by.
//!
//! Each shard tells the decider (shard 0) the squared norm of every chunk that it has reduced. When those of all chunks are there,
//! the decider adds them in layout order, so that the sum does not depend on who holds which chunk, decides, and tells every
//! shard. A shard whose workers have all finished measures nothing any more: it says so, and its chunks count as zero.
//!
//! A note between shards may be lost with its path. Over the path that follows each end says again what the other may lack: norms
//! that are not decided, the last decision, a farewell; what was known already is passed over. No more than that can be lacking: the
//! clock after a decision is decided only when every chunk of every shard has been stepped by it.
//!
//! With two copies of each shard a decision is told to nobody before the decider's backup holds it, and nobody reduces anything of
//! the next clock before its own backup does. So a decision that anybody has applied outlives its decider, and whoever takes another
//! shard over lacks the decider's last one at most.
//!
//! Invariant: a shard applies nothing of a clock before it knows that clock's decision, and applies no other.

use super::{
    collector::{Collector, set_limit},
    decision::takes_part,
    mirror::Then,
    *,
};
use crate::{optim::LossScaler, server::replica::Inheritance};

/// A shard's part in deciding.
#[derive(Debug)]
pub(super) enum Deciding {
    /// Every step is taken as it is.
    Nothing,
    /// This shard decides.
    Here(Box<Collector>),
    /// Shard 0 does. This one has said that it measures nothing any more; the decider has taken note of that.
    There { told_finished: bool, dismissed: bool },
}

impl Deciding {
    pub(super) fn new(config: &ShardConfig, layout: &Layout) -> Deciding {
        match &config.decision {
            Some(decision) if takes_part(layout, config.shard) && config.shard.0 == 0 => {
                let collector = Collector::new(decision.rules, layout, config.start_clock, &config.live);
                Deciding::Here(Box::new(collector))
            }
            Some(_) if takes_part(layout, config.shard) => Deciding::There { told_finished: false, dismissed: false },
            _ => Deciding::Nothing,
        }
    }

    /// Whether nothing will be decided any more that concerns this shard or waits for it.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Deciding::Nothing => true,
            Deciding::Here(collector) => collector.parted().iter().all(|parted| *parted),
            Deciding::There { dismissed, .. } => *dismissed,
        }
    }
}

impl Shard {
    /// What is known of the step that was decided last: its clock, and the decision.
    pub fn last_decision(&self) -> Option<(Clock, Decision)> {
        let decides = !matches!(self.deciding, Deciding::Nothing) && self.decided > self.config.start_clock;
        decides.then(|| (self.decided - 1, self.decision))
    }

    /// Whether it is known what becomes of the step of `clock`.
    pub(super) fn is_decided(&self, clock: Clock) -> bool {
        // With a mirror and nothing to decide no chunk waits for another.
        clock < self.decided || self.mirror.is_some() && matches!(self.deciding, Deciding::Nothing)
    }

    /// The shard that a lane serves, as far as is known here.
    fn shard_of(&self, lane: PeerId) -> Option<usize> {
        self.config.decision.as_ref()?.lanes.iter().position(|known| *known == lane)
    }

    fn lane_of(&self, shard: usize) -> PeerId {
        let decision = self.config.decision.as_ref().expect("a shard that takes part in decisions knows of whom");
        decision.lanes[shard]
    }

    /// The lanes of the other shards with which this one decides.
    pub fn lanes(&self) -> Vec<PeerId> {
        let decision = self.config.decision.iter();
        decision.flat_map(|decision| decision.peers(&self.layout, self.config.shard)).collect()
    }

    /// Another lane serves a shard from now on: the one before, if this shard's path to it is to lead to the other one.
    pub fn set_lane(&mut self, shard: ShardId, lane: PeerId) -> Option<PeerId> {
        let known = self.config.decision.as_mut()?.lanes.get_mut(usize::from(shard.0))?;
        let before = std::mem::replace(known, lane);
        let speaks = match &self.deciding {
            Deciding::Nothing => false,
            Deciding::Here(_) => shard != self.config.shard && takes_part(&self.layout, shard),
            Deciding::There { dismissed, .. } => shard.0 == 0 && !dismissed,
        };
        (speaks && before != lane).then_some(before)
    }

    /// A path to another shard's lane is there: it is told what it may lack.
    pub fn meet_lane(&mut self, lane: PeerId) {
        self.recall(lane);
        let Some(shard) = self.shard_of(lane) else { return };
        match &self.deciding {
            Deciding::Here(collector) if !collector.has_finished(shard) && !self.is_decision_unheld => {
                if let Some((clock, decision)) = self.last_decision() {
                    self.post(lane, decision.to_note(clock), None);
                }
            }
            Deciding::Nothing | Deciding::Here(_) => {}
            Deciding::There { told_finished: true, .. } => self.post(lane, Note::new(NoteKind::Finished), None),
            Deciding::There { .. } => (0..self.chunks.len()).for_each(|index| self.measure(index)),
        }
    }

    /// A note of another shard about a decision. One of a lane that serves no shard is passed over: it is deposed, or this lane will
    /// hear of it and build another path.
    pub(super) fn on_decision_note(&mut self, from: PeerId, note: &Note) -> Result<()> {
        let Some(shard) = self.shard_of(from) else { return Ok(()) };
        match (&mut self.deciding, note.kind) {
            (Deciding::Here(collector), NoteKind::Finished) => {
                collector.finish(shard);
                match collector.parted()[shard] {
                    true => self.post(from, Note::new(NoteKind::Goodbye), None),
                    false => self.mirror_parting(shard),
                }
                self.decide();
                Ok(())
            }
            (Deciding::Here(collector), NoteKind::Measured) => {
                let measured = collector.record(shard, note.clock, note.chunk, f64::from_bits(note.version));
                measured.map_err(|what| protocol(from, what))?;
                self.decide();
                Ok(())
            }
            (Deciding::There { .. }, NoteKind::Decided) if shard == 0 => {
                let decision = Decision::from_note(note).ok_or_else(|| protocol(from, "a decision without meaning"))?;
                if note.clock >= self.decided {
                    self.on_decision(note.clock, decision);
                } else if note.clock + 1 == self.decided && !decision.is_same(&self.decision) {
                    return Err(protocol(from, format!("another decision about clock {}", note.clock)));
                }
                Ok(())
            }
            (Deciding::There { told_finished: true, .. }, NoteKind::Goodbye) if shard == 0 => {
                self.handle_left(from);
                Ok(())
            }
            (_, kind) => Err(protocol(from, format!("a {kind:?} note has no place here"))),
        }
    }

    /// Whether nothing more is owed between this shard and another.
    fn lane_has_parted(&self, lane: PeerId) -> bool {
        match &self.deciding {
            Deciding::There { dismissed, .. } if self.shard_of(lane) == Some(0) => *dismissed,
            _ => self.lane_has_left(lane),
        }
    }

    /// Whether the path of `peer` is not needed any more here: its end is no failure, and only the peer would rebuild it.
    pub fn has_parted(&self, peer: PeerId) -> bool {
        match peer.rank.role {
            Role::Worker => self.has_left(peer),
            Role::Server => self.backup() != Some(peer) && self.lane_has_parted(peer),
        }
    }

    /// Whether the path to another shard may end without harm.
    pub(super) fn lane_has_left(&self, lane: PeerId) -> bool {
        let Some(shard) = self.shard_of(lane) else { return true };
        match &self.deciding {
            Deciding::Nothing => true,
            Deciding::Here(collector) => collector.has_finished(shard),
            Deciding::There { told_finished, .. } => *told_finished || shard != 0,
        }
    }

    /// A path to another shard has ended, without harm.
    pub fn handle_left(&mut self, lane: PeerId) {
        let is_decider = self.shard_of(lane) == Some(0);
        if let Deciding::There { dismissed, .. } = &mut self.deciding
            && is_decider
            && !std::mem::replace(dismissed, true)
        {
            self.mirror_parting(self.config.shard.0.into());
        }
    }

    /// What is awaited of another shard, and for which clock: the norm of a chunk, or, without one, the decision.
    pub(super) fn lacking_of_lane(&self, lane: PeerId) -> Option<(Option<ChunkId>, Clock)> {
        let shard = self.shard_of(lane)?;
        match &self.deciding {
            Deciding::Nothing => None,
            Deciding::Here(collector) => Some((Some(collector.lacking(shard)?), collector.clock)),
            Deciding::There { .. } => {
                let clock = self.chunks.iter().find_map(|chunk| chunk.reduced)?.clock;
                (shard == 0).then_some((None, clock))
            }
        }
    }

    /// A chunk has been reduced: its part of what the decision needs, unless that is known.
    pub(super) fn measure(&mut self, index: usize) {
        let Some(Reduced { clock, squared_norm, .. }) = self.chunks[index].reduced else { return };
        // A lane that takes over without this sum may take another one, of other workers: nobody decides by what the backup has not.
        if self.is_decided(clock) || self.chunks[index].is_unheld {
            return;
        }
        let chunk = self.chunks[index].id;
        match &mut self.deciding {
            Deciding::Nothing | Deciding::There { told_finished: true, .. } => {}
            Deciding::Here(collector) => {
                let recorded = collector.record(self.config.shard.0.into(), clock, chunk, squared_norm);
                recorded.expect("a shard reduces each of its chunks once a clock");
                self.decide();
            }
            Deciding::There { .. } => {
                let note = Note { chunk, clock, version: squared_norm.to_bits(), ..Note::new(NoteKind::Measured) };
                self.post(self.lane_of(0), note, None);
            }
        }
    }

    /// Whether this shard has said that it measures nothing any more.
    pub(super) fn has_left_decisions(&self) -> bool {
        match &self.deciding {
            Deciding::Nothing => false,
            Deciding::Here(collector) => collector.has_finished(self.config.shard.0.into()),
            Deciding::There { told_finished, .. } => *told_finished,
        }
    }

    /// The first clock about which nothing has been decided here.
    pub(super) fn decided_here(&self) -> Clock {
        if let Deciding::Here(collector) = &self.deciding { collector.clock } else { 0 }
    }

    /// The limit of the norm changes from a clock on, which lies ahead of all that has been decided.
    pub fn limit_norm(&mut self, limit: f32, clock: Clock) {
        if let Deciding::Here(collector) = &mut self.deciding {
            set_limit(&mut collector.limits, limit, clock, collector.clock);
        }
    }

    /// Decides what can be decided.
    pub(super) fn decide(&mut self) {
        let held = self.is_held(self.decided_here());
        let Deciding::Here(collector) = &mut self.deciding else { return };
        if held {
            return; // settling the change decides
        }
        if let Some((clock, decision)) = collector.poll() {
            self.on_decision(clock, decision);
        }
    }

    /// A clock is decided: all its chunks may be stepped. Nobody else is told before the backup holds it.
    pub(super) fn on_decision(&mut self, clock: Clock, decision: Decision) {
        (self.decided, self.decision) = (clock + 1, decision);
        self.skipped += u64::from(decision.skips);
        self.is_scale_untold |= std::mem::replace(&mut self.loss_scale, decision.loss_scale) != decision.loss_scale;
        self.is_decision_unheld = self.mirror_note(decision.to_note(clock), Then::Tell);
        match self.is_decision_unheld {
            true => (0..self.chunks.len()).for_each(|index| self.touch(index)),
            false => self.tell_decision(),
        }
    }

    /// The last decision may be known to everybody.
    pub(super) fn tell_decision(&mut self) {
        self.is_decision_unheld = false;
        if let Deciding::Here(collector) = &self.deciding {
            let takes = |shard: &usize| *shard != usize::from(self.config.shard.0) && !collector.has_finished(*shard);
            let lanes = 0..self.config.decision.as_ref().map_or(0, |decision| decision.lanes.len());
            let lanes: Vec<PeerId> = lanes.filter(takes).map(|shard| self.lane_of(shard)).collect();
            let note = self.decision.to_note(self.decided - 1);
            lanes.into_iter().for_each(|lane| self.post(lane, note, None));
        }
        // Before any reply of this clock, on the same paths.
        if std::mem::take(&mut self.is_scale_untold) {
            (0..self.config.workers).for_each(|worker| self.tell_loss_scale(worker));
        }
        (0..self.chunks.len()).for_each(|index| self.touch(index));
    }

    /// Says that nothing more will be measured here, once that is so: no worker that has a part in this shard is left, and all
    /// that they gave has been applied, where there are two copies by both.
    pub(super) fn leave_decisions(&mut self) {
        let mut workers = self.contributors.iter();
        let deserted = workers.all(|contributor| self.is_over(contributor) || contributor.own == 0);
        if !deserted
            || self.held.is_some()
            || self.somebody_joins()
            || self.computing > 0
            || !self.dirty.is_empty()
            || !self.is_held_by_backup()
            || self.owes_steps()
        {
            return;
        }
        match &mut self.deciding {
            Deciding::Nothing => {}
            Deciding::Here(collector) => {
                let shard = usize::from(self.config.shard.0);
                if !collector.has_finished(shard) {
                    collector.part(shard);
                    self.decide();
                }
            }
            Deciding::There { told_finished, .. } => {
                if !std::mem::replace(told_finished, true) {
                    self.post(self.lane_of(0), Note::new(NoteKind::Finished), None);
                }
            }
        }
    }

    /// Whether a step of a clock to which somebody has pushed is yet to be taken of what is here.
    pub(super) fn owes_steps(&self) -> bool {
        let (begun, chunks) = (self.clocks_pushed, self.chunks.len() as u64);
        let owes = |chunk: &ChunkState| {
            chunk.reduced.is_some_and(|reduced| reduced.clock < begun)
                || chunk.complete.iter().any(|position| position / chunks < begun)
        };
        self.chunks.iter().any(owes)
    }

    /// A shard measures nothing any more: its lane hears that this is known as soon as both copies know it.
    fn mirror_parting(&mut self, shard: usize) {
        let note = Note { chunk: ChunkId(shard as u32), ..Note::new(NoteKind::Finished) };
        if !self.mirror_note(note, Then::Part(shard)) {
            self.part_from_shard(shard);
        }
    }

    /// Both copies know that a shard measures nothing any more.
    pub(super) fn part_from_shard(&mut self, shard: usize) {
        let Deciding::Here(collector) = &mut self.deciding else { return };
        collector.part(shard);
        self.post(self.lane_of(shard), Note::new(NoteKind::Goodbye), None);
    }

    /// A backup that has nothing is told all that is known of decisions.
    pub(super) fn greet_with_decisions(&mut self) {
        let shard = usize::from(self.config.shard.0);
        let (parted, scaler): (Vec<usize>, _) = match &self.deciding {
            Deciding::Nothing => return,
            Deciding::Here(collector) => {
                let parted = collector.parted().iter().enumerate().filter(|(_, parted)| **parted);
                (parted.map(|(shard, _)| shard).collect(), collector.scaler)
            }
            Deciding::There { dismissed, .. } => {
                let streak = 0; // the decider alone counts
                (dismissed.then_some(shard).into_iter().collect(), LossScaler { scale: self.loss_scale, streak })
            }
        };
        let last = self.last_decision().map(|(clock, decision)| decision.to_note(clock));
        let (version, credit) = (scaler.scale.to_bits().into(), scaler.streak);
        let stands = Note { clock: self.skipped, version, credit, ..Note::new(NoteKind::LossScale) };
        let note = |shard: usize| Note { chunk: ChunkId(shard as u32), ..Note::new(NoteKind::Finished) };
        let notes: Vec<Note> = last.into_iter().chain([stands]).chain(parted.into_iter().map(note)).collect();
        for note in notes {
            self.mirror_note(note, Then::Nothing);
        }
    }

    /// Goes on deciding where another lane of this shard ended.
    pub(super) fn inherit_decisions(&mut self, holds: &Inheritance) {
        let Some(known) = &holds.decided else { return };
        (self.decided, self.decision, self.skipped) = (known.until, known.last, known.skipped);
        self.loss_scale = known.last.loss_scale;
        let shard = usize::from(self.config.shard.0);
        match &mut self.deciding {
            Deciding::Nothing => {}
            Deciding::Here(collector) => {
                (collector.clock, collector.scaler) = (known.until, known.scaler);
                collector.limits.clone_from(&known.limits);
                let parted = known.parted.iter().enumerate().filter(|(other, parted)| **parted && *other != shard);
                parted.for_each(|(other, _)| collector.part(other));
            }
            Deciding::There { told_finished, dismissed } => {
                (*told_finished, *dismissed) = (known.parted[shard], known.parted[shard]);
            }
        }
        for (chunk, reduced) in self.chunks.iter_mut().zip(&holds.reduced) {
            chunk.reduced = *reduced;
        }
        if matches!(self.deciding, Deciding::Here(_)) {
            (0..self.chunks.len()).for_each(|index| self.measure(index));
        }
    }
}
