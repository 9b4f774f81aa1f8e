//! The decider's view of one clock: the norms of all chunks as they come, and what follows from them.
//!
//! Norms and farewells may come twice: whoever builds a path to the decider says again what is not decided yet. A chunk's norm at a
//! clock is the same whoever says it, since its sum is: nobody says the norm of a sum that another lane may take anew.
//!
//! Invariant: one decision a clock, made of every chunk's measure exactly once.

use super::{decision::DecisionRules, *};
use crate::optim::LossScaler;

/// Limits of the norm that were set while the job runs, each with its first clock; the clocks ascend.
pub(in crate::server) type Limits = Vec<(Clock, f32)>;

/// A limit holds from a clock on. Those that no clock from `next` on sees are forgotten.
pub(in crate::server) fn set_limit(limits: &mut Limits, limit: f32, clock: Clock, next: Clock) {
    let seen = limits.partition_point(|(from, _)| *from <= next);
    limits.drain(..seen.saturating_sub(1));
    limits.retain(|(from, _)| *from < clock);
    limits.push((clock, limit));
}

/// See the module.
#[derive(Debug)]
pub(super) struct Collector {
    rules: DecisionRules,
    /// The clock that is being decided.
    pub clock: Clock,
    pub limits: Limits,
    pub scaler: LossScaler,
    /// By chunk.
    measures: Vec<Option<f64>>,
    /// By shard.
    chunks: Vec<Vec<ChunkId>>,
    /// By shard: it measures nothing any more.
    finished: Vec<bool>,
    /// By shard: it has been told, or may be, that this is known.
    parted: Vec<bool>,
    /// Measures of unfinished shards that are not here yet.
    missing: usize,
    /// Measures that came.
    recorded: usize,
}

impl Collector {
    pub fn new(rules: DecisionRules, layout: &Layout, clock: Clock, live: &LiveState) -> Collector {
        let chunks = layout.shards.clone();
        let finished: Vec<bool> = chunks.iter().map(Vec::is_empty).collect();
        let (missing, measures) = (layout.chunks.len(), vec![None; layout.chunks.len()]);
        let (limits, scaler, parted) = (live.clip_norm.clone(), live.scaler(&rules.loss_scale), finished.clone());
        Collector { rules, clock, limits, scaler, measures, chunks, finished, parted, missing, recorded: 0 }
    }

    /// A shard's norm of a chunk. What is decided already, or was said before, is passed over.
    ///
    /// # Errors
    ///
    /// In words, what cannot be: a chunk of another shard, a clock ahead, another norm of the same chunk.
    pub fn record(&mut self, shard: usize, clock: Clock, chunk: ChunkId, squared_norm: f64) -> Result<(), String> {
        if !self.chunks[shard].contains(&chunk) {
            return Err(format!("a measure of chunk {}, which is not its", chunk.0));
        }
        if clock > self.clock {
            return Err(format!("a measure of clock {clock} while clock {} is being decided", self.clock));
        }
        if clock < self.clock || self.finished[shard] {
            return Ok(());
        }
        let is_same = |known: f64| known == squared_norm || known.is_nan() && squared_norm.is_nan();
        match &mut self.measures[chunk.index()] {
            Some(known) if is_same(*known) => {}
            Some(_) => return Err(format!("another measure of chunk {} at clock {clock}", chunk.0)),
            empty => {
                *empty = Some(squared_norm);
                self.missing -= 1;
                self.recorded += 1;
            }
        }
        Ok(())
    }

    /// The shard measures nothing any more. What it has measured of a clock that is not decided was empty: a worker that leaves
    /// completes positions of clocks that may never begin.
    pub fn finish(&mut self, shard: usize) {
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

    /// Both copies know that the shard measures nothing any more, where there are two.
    pub fn part(&mut self, shard: usize) {
        self.finish(shard);
        self.parted[shard] = true;
    }

    pub fn has_finished(&self, shard: usize) -> bool {
        self.finished[shard]
    }

    pub fn parted(&self) -> &[bool] {
        &self.parted
    }

    /// The first chunk of a shard whose norm is not here.
    pub fn lacking(&self, shard: usize) -> Option<ChunkId> {
        self.chunks[shard].iter().find(|chunk| self.measures[chunk.index()].is_none()).copied()
    }

    /// The decision about the clock, once it can be taken; the next clock is then looked at.
    pub fn poll(&mut self) -> Option<(Clock, Decision)> {
        if self.missing > 0 || self.recorded == 0 {
            return None;
        }
        let squared_norm = self.measures.iter_mut().map(|measure| measure.take().unwrap_or(0.0)).sum();
        let unfinished = self.chunks.iter().zip(&self.finished).filter(|(_, finished)| !**finished);
        (self.missing, self.recorded) = (unfinished.map(|(chunks, _)| chunks.len()).sum(), 0);
        let live = self.limits.iter().rev().find(|(from, _)| *from <= self.clock).map(|(_, limit)| *limit);
        let rules = DecisionRules { norm_limit: live.or(self.rules.norm_limit), ..self.rules };
        self.clock += 1;
        let decision = rules.decide(squared_norm, self.scaler.scale);
        self.scaler.update(&rules.loss_scale, decision.is_finite());
        Some((self.clock - 1, Decision { loss_scale: self.scaler.scale, ..decision }))
    }

    /// What has changed of the rules since the job began: limits of the norm, and a dynamic loss scale.
    pub fn changed(&self) -> (Limits, Option<LossScaler>) {
        let is_dynamic = self.rules.loss_scale.is_dynamic();
        (self.limits.clone(), is_dynamic.then_some(self.scaler))
    }
}
