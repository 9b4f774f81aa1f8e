//! What of a shard's rules has changed since the job began, as a checkpoint keeps it.
//!
//! Invariant: a shard that begins with this state goes by the rules that the one whose state it was would have gone by.

use serde::{Deserialize, Serialize};

use super::*;
use crate::optim::{LossScaleConfig, LossScaler};

/// Live changes and the loss scale of a shard; of all shards the decider knows most.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LiveState {
    /// Limits of the norm, each with its first clock; the clocks ascend.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub clip_norm: Vec<(Clock, f32)>,
    /// Where a dynamic loss scale stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScaler>,
    /// Bounds of staleness, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub staleness: Vec<(Clock, u64)>,
}

impl LiveState {
    /// Where the loss scale stands as a job begins, or goes on.
    pub(in crate::server) fn scaler(&self, config: &LossScaleConfig) -> LossScaler {
        self.loss_scale.filter(|_| config.is_dynamic()).unwrap_or_else(|| LossScaler::new(config))
    }
}

impl Shard {
    /// What has changed, as it is now.
    pub fn live_state(&self) -> LiveState {
        let (clip_norm, loss_scale) = match &self.deciding {
            Deciding::Here(collector) => collector.changed(),
            Deciding::Nothing | Deciding::There { .. } => (Vec::new(), None),
        };
        LiveState { clip_norm, loss_scale, staleness: self.staleness.clone() }
    }

    /// The loss scale of the next step; 1 where there is none.
    pub fn loss_scale(&self) -> f32 {
        self.loss_scale
    }

    /// The bound of staleness changes from a clock on that nobody has begun.
    pub fn bound_staleness(&mut self, bound: u64, clock: Clock) {
        let done = self.clock_done();
        let seen = self.staleness.partition_point(|(from, _)| *from <= done);
        self.staleness.drain(..seen.saturating_sub(1));
        self.staleness.push((clock, bound));
        for index in 0..self.chunks.len() {
            self.chunks[index].gate.rebound(&self.staleness);
            self.touch(index);
        }
    }

    /// Tells a worker the loss scale of the next step, if steps change it.
    pub(super) fn tell_loss_scale(&mut self, worker: u16) {
        let contributor = &self.contributors[usize::from(worker)];
        let listens = contributor.landing.is_some() && !contributor.finished;
        if !self.config.loss_scale.is_dynamic() || !listens {
            return;
        }
        // Of a decision that the backup does not hold nobody is told.
        self.is_scale_untold |= self.is_decision_unheld;
        if self.is_decision_unheld {
            return;
        }
        let (peer, version) = (contributor.peer, self.loss_scale.to_bits().into());
        self.post(peer, Note { clock: self.decided, version, ..Note::new(NoteKind::LossScale) }, None);
    }
}
