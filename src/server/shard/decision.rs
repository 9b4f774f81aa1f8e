//! What is decided about a step, and by which rules; what a copy knows of decisions.
//!
//! Invariant: a decision is a function of the norm, the rules and the loss scale; as a note it keeps every bit.

use super::{collector::Limits, *};
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
    pub(in crate::server) fn taken(loss_scale: f32) -> Decision {
        Decision { scale: (1.0 / f64::from(loss_scale)) as f32, skips: false, norm: 0.0, loss_scale }
    }

    /// Whether the whole gradient was finite.
    pub(in crate::server) fn is_finite(&self) -> bool {
        self.norm.is_finite()
    }

    /// Whether it is this very decision, bit for bit; what is not a number is equal to what is none.
    pub(super) fn is_same(&self, other: &Decision) -> bool {
        let same = |one: f64, two: f64| one.to_bits() == two.to_bits() || one.is_nan() && two.is_nan();
        let same = |one: f32, two: f32| same(one.into(), two.into()) && self.skips == other.skips;
        same(self.scale, other.scale) && same(self.loss_scale, other.loss_scale)
    }

    const SKIPS: u64 = 1 << 32;

    pub(in crate::server) fn to_note(self, clock: Clock) -> Note {
        let skips = if self.skips { Decision::SKIPS } else { 0 };
        let version = u64::from(self.scale.to_bits()) | skips;
        let (chunk, credit) = (ChunkId(self.loss_scale.to_bits()), self.norm.to_bits());
        Note { clock, chunk, version, credit, ..Note::new(NoteKind::Decided) }
    }

    pub(in crate::server) fn from_note(note: &Note) -> Option<Decision> {
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
    /// The lane that serves each shard, by number, as far as is known; the first decides.
    pub lanes: Vec<PeerId>,
}

/// A shard without chunks has nothing to measure and nothing to wait for. Chunks are dealt round, so the decider has one if
/// anybody has.
pub(super) fn takes_part(layout: &Layout, shard: ShardId) -> bool {
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

/// What a copy of a shard knows of decisions.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided {
    /// Clocks whose decision has been taken.
    pub until: Clock,
    /// The last decision.
    pub last: Decision,
    /// Steps that a decision has skipped.
    pub skipped: u64,
    /// Of the shard that decides: where a dynamic loss scale stands, and limits of the norm that were set live.
    pub scaler: LossScaler,
    /// Likewise.
    pub limits: Limits,
    /// By shard: it measures nothing any more, and its lane knows that this is known.
    pub parted: Vec<bool>,
}

impl Decided {
    /// At the beginning of a job, or where it goes on from a checkpoint.
    pub(in crate::server) fn new(config: &ShardConfig) -> Option<Decided> {
        let decision = config.decision.as_ref()?;
        let scaler = config.live.scaler(&config.loss_scale);
        Some(Decided {
            until: config.start_clock,
            last: Decision::taken(scaler.scale),
            skipped: 0,
            scaler,
            limits: config.live.clip_norm.clone(),
            parted: vec![false; decision.lanes.len()],
        })
    }

    /// A clock has been decided.
    pub(in crate::server) fn take(&mut self, clock: Clock, decision: Decision, config: &LossScaleConfig) {
        (self.until, self.last) = (clock + 1, decision);
        self.skipped += u64::from(decision.skips);
        self.scaler.update(config, decision.is_finite());
    }
}
