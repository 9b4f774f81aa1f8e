//! The step's decision: between reducing and applying, all shards agree whether the step of a clock is taken, and what its gradient
//! is multiplied by.
//!
//! Each shard tells the decider (shard 0) the squared norm of every chunk that it has reduced. When those of all chunks are there,
//! the decider adds them in layout order, so that the sum does not depend on who holds which chunk, decides, and tells every
//! shard. A shard whose workers have all finished measures nothing any more: it says so, and its chunks count as zero.
//!
//! Invariant: one decision a clock, made of every chunk's measure exactly once; a shard applies nothing of a clock before it knows
//! that clock's decision.

use super::*;
use crate::optim::{LossScaleConfig, LossScaler, clip_coefficient};

/// What is decided by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecisionRules {
    /// The largest norm that a whole gradient may have; a longer one is scaled down to it.
    pub norm_limit: Option<f32>,
    /// Whether a step with a gradient that is not finite is skipped, everywhere; where the loss scale is dynamic it always is.
    pub skip_nonfinite: bool,
    /// By what the gradients have been multiplied.
    pub loss_scale: LossScaleConfig,
}

impl DecisionRules {
    /// The decision about a gradient of this squared norm, each of whose elements is `loss_scale` times too large.
    pub fn decide(&self, squared_norm: f64, loss_scale: f32) -> Decision {
        let norm = squared_norm.sqrt() / f64::from(loss_scale);
        let skips = (self.skip_nonfinite || self.loss_scale.is_dynamic()) && !squared_norm.is_finite();
        let coefficient = self.norm_limit.map_or(1.0, |limit| clip_coefficient(limit, norm));
        let scale = if skips { 1.0 } else { (coefficient / f64::from(loss_scale)) as f32 };
        Decision { scale, skips, norm, loss_scale }
    }
}

/// What has been decided about a clock's step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// The factor on the mean gradient: what clips it, divided by the loss scale.
    pub scale: f32,
    /// Nothing is applied: parameters, state and step counts stay as they are.
    pub skips: bool,
    /// The norm of the whole gradient, before clipping.
    pub norm: f64,
    /// The loss scale from the next clock on.
    pub loss_scale: f32,
}

impl Decision {
    /// Nothing to decide; gradients come multiplied by this.
    pub(super) fn taken(loss_scale: f32) -> Decision {
        Decision { scale: (1.0 / f64::from(loss_scale)) as f32, skips: false, norm: 0.0, loss_scale }
    }

    const SKIPS: u64 = 1 << 32;

    fn to_note(self, clock: Clock) -> Note {
        let skips = if self.skips { Decision::SKIPS } else { 0 };
        let version = u64::from(self.scale.to_bits()) | skips;
        let (chunk, credit) = (ChunkId(self.loss_scale.to_bits()), self.norm.to_bits());
        Note { clock, chunk, version, credit, ..Note::new(NoteKind::Decided) }
    }

    fn from_note(note: &Note) -> Option<Decision> {
        let scale = f32::from_bits(note.version as u32);
        let skips = match note.version >> 32 {
            0 => false,
            1 => true,
            _ => return None,
        };
        // A norm that is not a number makes a factor that is none, where such steps are taken.
        let loss_scale = f32::from_bits(note.chunk.0);
        let has_meaning = (scale >= 0.0 || scale.is_nan()) && (0.0..=f32::MAX).contains(&loss_scale);
        has_meaning.then_some(Decision { scale, skips, norm: f64::from_bits(note.credit), loss_scale })
    }
}

/// Who decides, and by what.
#[derive(Clone, Debug)]
pub struct DecisionConfig {
    /// The rules.
    pub rules: DecisionRules,
    /// The lane of every shard, by number; the first decides.
    pub lanes: Vec<PeerId>,
}

/// A shard's part in deciding.
#[derive(Debug)]
pub(super) enum Deciding {
    /// Every step is taken as it is.
    Nothing,
    /// This shard decides.
    Here(Box<Collector>),
    /// That one does.
    There { decider: PeerId, told_finished: bool, dismissed: bool },
}

/// The decider's view of one clock.
#[derive(Debug)]
pub(super) struct Collector {
    config: DecisionConfig,
    clock: Clock,
    /// Limits of the norm that were set while the job runs, each with its first clock; the clocks ascend.
    limits: Vec<(Clock, f32)>,
    scaler: LossScaler,
    /// By chunk.
    measures: Vec<Option<f64>>,
    /// By shard.
    chunks: Vec<Vec<ChunkId>>,
    /// By shard: it measures nothing any more.
    finished: Vec<bool>,
    /// Measures of unfinished shards that are not here yet.
    missing: usize,
    /// Measures that came.
    recorded: usize,
}

impl Collector {
    fn new(config: DecisionConfig, layout: &Layout, clock: Clock, live: &LiveState) -> Collector {
        let chunks = layout.shards.clone();
        let finished = chunks.iter().map(Vec::is_empty).collect();
        let (missing, measures) = (layout.chunks.len(), vec![None; layout.chunks.len()]);
        let first = LossScaler::new(&config.rules.loss_scale);
        let resumed = live.loss_scale.filter(|_| config.rules.loss_scale.is_dynamic());
        let (limits, scaler) = (live.clip_norm.clone(), resumed.unwrap_or(first));
        Collector { config, clock, limits, scaler, measures, chunks, finished, missing, recorded: 0 }
    }

    fn shard_of(&self, lane: PeerId) -> Option<usize> {
        self.config.lanes.iter().position(|known| *known == lane)
    }

    fn record(&mut self, shard: usize, clock: Clock, chunk: ChunkId, squared_norm: f64) -> Result<(), String> {
        if clock != self.clock {
            return Err(format!("a measure of clock {clock} while clock {} is being decided", self.clock));
        }
        if self.finished[shard] || !self.chunks[shard].contains(&chunk) {
            return Err(format!("a measure of chunk {}, which is not its", chunk.0));
        }
        if self.measures[chunk.index()].replace(squared_norm).is_some() {
            return Err(format!("a second measure of chunk {} at clock {clock}", chunk.0));
        }
        self.missing -= 1;
        self.recorded += 1;
        Ok(())
    }

    /// The shard measures nothing any more. What it has measured of a clock that is not decided was empty: a worker that leaves
    /// completes positions of clocks that may never begin.
    fn finish(&mut self, shard: usize) {
        if std::mem::replace(&mut self.finished[shard], true) {
            return;
        }
        for chunk in &self.chunks[shard] {
            match self.measures[chunk.index()].take() {
                Some(_) => self.recorded -= 1,
                None => self.missing -= 1,
            }
        }
    }

    /// The decision about the clock, once it can be taken; the next clock is then looked at.
    fn poll(&mut self) -> Option<(Clock, Decision)> {
        if self.missing > 0 || self.recorded == 0 {
            return None;
        }
        let squared_norm = self.measures.iter_mut().map(|measure| measure.take().unwrap_or(0.0)).sum();
        let unfinished = self.chunks.iter().zip(&self.finished).filter(|(_, finished)| !**finished);
        (self.missing, self.recorded) = (unfinished.map(|(chunks, _)| chunks.len()).sum(), 0);
        let live = self.limits.iter().rev().find(|(from, _)| *from <= self.clock).map(|(_, limit)| *limit);
        let rules = DecisionRules { norm_limit: live.or(self.config.rules.norm_limit), ..self.config.rules };
        self.clock += 1;
        let decision = rules.decide(squared_norm, self.scaler.scale);
        self.scaler.update(&rules.loss_scale, squared_norm.is_finite());
        Some((self.clock - 1, Decision { loss_scale: self.scaler.scale, ..decision }))
    }
}

impl Deciding {
    pub(super) fn new(config: &ShardConfig, layout: &Layout) -> Deciding {
        match &config.decision {
            Some(decision) if takes_part(layout, config.shard) => match decision.lanes[0] {
                decider if decider == config.me => {
                    Deciding::Here(Box::new(Collector::new(decision.clone(), layout, config.start_clock, &config.live)))
                }
                decider => Deciding::There { decider, told_finished: false, dismissed: false },
            },
            _ => Deciding::Nothing,
        }
    }

    /// What has changed of the rules since the job began: limits of the norm, and a dynamic loss scale.
    pub(super) fn changed(&self) -> (Vec<(Clock, f32)>, Option<LossScaler>) {
        let Deciding::Here(collector) = self else { return (Vec::new(), None) };
        let is_dynamic = collector.config.rules.loss_scale.is_dynamic();
        (collector.limits.clone(), is_dynamic.then_some(collector.scaler))
    }

    /// Whether nothing will be decided any more that concerns this shard or waits for it.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Deciding::Nothing => true,
            Deciding::Here(collector) => collector.finished.iter().all(|finished| *finished),
            Deciding::There { dismissed, .. } => *dismissed,
        }
    }
}

/// A shard without chunks has nothing to measure and nothing to wait for. Chunks are dealt round, so the decider has one if
/// anybody has.
fn takes_part(layout: &Layout, shard: ShardId) -> bool {
    !layout.shards[usize::from(shard.0)].is_empty()
}

impl DecisionConfig {
    /// The lanes to which that of `shard` needs a path: from the decider to all others that take part, and back.
    pub fn peers(&self, layout: &Layout, shard: ShardId) -> Vec<PeerId> {
        let part = |other: &usize| takes_part(layout, ShardId(*other as u16));
        let others = (0..self.lanes.len()).filter(part).filter(|other| *other != usize::from(shard.0));
        let joined = others.filter(|other| shard.0 == 0 || *other == 0);
        if takes_part(layout, shard) { joined.map(|other| self.lanes[other]).collect() } else { Vec::new() }
    }
}

impl Shard {
    /// What is known of the step that was decided last: its clock, and the decision.
    pub fn last_decision(&self) -> Option<(Clock, Decision)> {
        let decides = !matches!(self.deciding, Deciding::Nothing) && self.decided > self.config.start_clock;
        decides.then(|| (self.decided - 1, self.decision))
    }

    /// A note of another shard about a decision.
    pub(super) fn on_decision_note(&mut self, from: PeerId, note: &Note) -> Result<()> {
        match (&mut self.deciding, note.kind) {
            (Deciding::Here(collector), NoteKind::Measured | NoteKind::Finished) => {
                let shard = collector.shard_of(from).ok_or_else(|| protocol(from, "it is not a shard of this job"))?;
                if collector.finished[shard] {
                    return Err(protocol(from, format!("a {:?} note after it has finished", note.kind)));
                }
                if note.kind == NoteKind::Finished {
                    collector.finish(shard);
                    self.post_lane(from, Note::new(NoteKind::Goodbye));
                } else {
                    let measured = collector.record(shard, note.clock, note.chunk, f64::from_bits(note.version));
                    measured.map_err(|what| protocol(from, what))?;
                }
                self.decide();
                Ok(())
            }
            (Deciding::There { decider, .. }, NoteKind::Decided) if *decider == from => {
                let decision = Decision::from_note(note).ok_or_else(|| protocol(from, "a decision without meaning"))?;
                if note.clock < self.decided {
                    return Err(protocol(from, format!("a second decision about clock {}", note.clock)));
                }
                self.on_decision(note.clock, decision);
                Ok(())
            }
            (Deciding::There { decider, dismissed, told_finished: true }, NoteKind::Goodbye) if *decider == from => {
                *dismissed = true;
                Ok(())
            }
            (_, kind) => Err(protocol(from, format!("a {kind:?} note has no place here"))),
        }
    }

    /// Whether nothing more is owed between this shard and another.
    fn lane_has_parted(&self, lane: PeerId) -> bool {
        match &self.deciding {
            Deciding::There { decider, dismissed, .. } if *decider == lane => *dismissed,
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
        match &self.deciding {
            Deciding::Nothing => true,
            Deciding::Here(collector) => collector.shard_of(lane).is_none_or(|shard| collector.finished[shard]),
            Deciding::There { told_finished, .. } => *told_finished,
        }
    }

    /// A path to another shard has ended, without harm.
    pub fn handle_left(&mut self, lane: PeerId) {
        if let Deciding::There { decider, dismissed, .. } = &mut self.deciding {
            *dismissed |= *decider == lane;
        }
    }

    /// What is awaited of another shard, and for which clock: the norm of a chunk, or, without one, the decision.
    pub(super) fn lacking_of_lane(&self, lane: PeerId) -> Option<(Option<ChunkId>, Clock)> {
        match &self.deciding {
            Deciding::Nothing => None,
            Deciding::Here(collector) => {
                let shard = collector.shard_of(lane)?;
                let open = |chunk: &&ChunkId| collector.measures[chunk.index()].is_none();
                let chunk = collector.chunks[shard].iter().find(open)?;
                Some((Some(*chunk), collector.clock))
            }
            Deciding::There { .. } => {
                let (clock, _) = self.chunks.iter().find_map(|chunk| chunk.reduced)?;
                Some((None, clock))
            }
        }
    }

    /// A chunk has been reduced: its part of what the decision needs.
    pub(super) fn measured(&mut self, index: usize, clock: Clock, squared_norm: f64) {
        let chunk = self.chunks[index].id;
        match &mut self.deciding {
            Deciding::Nothing | Deciding::There { told_finished: true, .. } => {}
            Deciding::Here(collector) if collector.finished[usize::from(self.config.shard.0)] => {}
            Deciding::Here(collector) => {
                let shard = usize::from(self.config.shard.0);
                let recorded = collector.record(shard, clock, chunk, squared_norm);
                recorded.expect("a shard reduces each of its chunks once a clock");
                self.decide();
            }
            Deciding::There { decider, .. } => {
                let decider = *decider;
                let note = Note { chunk, clock, version: squared_norm.to_bits(), ..Note::new(NoteKind::Measured) };
                self.post_lane(decider, note);
            }
        }
    }

    /// Whether this shard has said that it measures nothing any more.
    pub(super) fn has_left_decisions(&self) -> bool {
        match &self.deciding {
            Deciding::Nothing => false,
            Deciding::Here(collector) => collector.finished[usize::from(self.config.shard.0)],
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
            let next = collector.clock;
            let seen = collector.limits.partition_point(|(from, _)| *from <= next);
            collector.limits.drain(..seen.saturating_sub(1));
            collector.limits.push((clock, limit));
        }
    }

    /// Decides what can be decided.
    pub(super) fn decide(&mut self) {
        let held = self.is_held(self.decided_here());
        let Deciding::Here(collector) = &mut self.deciding else { return };
        if held {
            return; // settling the change decides
        }
        let Some((clock, decision)) = collector.poll() else { return };
        let others = collector.config.lanes.iter().zip(&collector.finished);
        let others = others.filter(|(lane, finished)| **lane != self.config.me && !**finished);
        let lanes: Vec<PeerId> = others.map(|(lane, _)| *lane).collect();
        for lane in lanes {
            self.post_lane(lane, decision.to_note(clock));
        }
        self.on_decision(clock, decision);
    }

    pub(super) fn on_decision(&mut self, clock: Clock, decision: Decision) {
        (self.decided, self.decision) = (clock + 1, decision);
        self.skipped += u64::from(decision.skips);
        // Before any reply of this clock, on the same paths.
        if std::mem::replace(&mut self.loss_scale, decision.loss_scale) != decision.loss_scale {
            (0..self.config.workers).for_each(|worker| self.tell_loss_scale(worker));
        }
        (0..self.chunks.len()).for_each(|index| self.touch(index));
    }

    /// Says that nothing more will be measured here, once that is so: no worker that has a part in this shard is left, and all
    /// that they gave has been applied.
    pub(super) fn leave_decisions(&mut self) {
        let mut workers = self.contributors.iter();
        let deserted = workers.all(|contributor| self.is_over(contributor) || contributor.own == 0);
        let (begun, chunks) = (self.clocks_pushed, self.chunks.len() as u64);
        let owes = |chunk: &ChunkState| {
            chunk.reduced.is_some_and(|(clock, _)| clock < begun)
                || chunk.complete.iter().any(|position| position / chunks < begun)
        };
        if !deserted
            || self.held.is_some()
            || self.somebody_joins()
            || self.computing > 0
            || !self.dirty.is_empty()
            || self.chunks.iter().any(owes)
        {
            return;
        }
        match &mut self.deciding {
            Deciding::Nothing => {}
            Deciding::Here(collector) => {
                let shard = usize::from(self.config.shard.0);
                if !collector.finished[shard] {
                    collector.finish(shard);
                    self.decide();
                }
            }
            Deciding::There { decider, told_finished, .. } => {
                if !std::mem::replace(told_finished, true) {
                    let decider = *decider;
                    self.post_lane(decider, Note::new(NoteKind::Finished));
                }
            }
        }
    }
}
