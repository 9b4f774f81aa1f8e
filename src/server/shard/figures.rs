//! A shard's state in numbers, for whoever watches.
//!
//! Invariant: looking changes nothing.

use super::*;

/// How a shard stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// How many clocks the furthest worker is ahead of the slowest; workers that have finished do not count.
    pub staleness: u64,
    /// Gradients that have landed and wait for others, or for their step.
    pub landed: u64,
    /// Pushes and pulls that wait for their answer.
    pub replies: u64,
    /// Steps that a decision has skipped.
    pub skipped: u64,
}

impl Shard {
    /// How it stands now.
    pub fn figures(&self) -> Figures {
        let clocks = |chunk: &ChunkState| {
            let unfinished = |index: &usize| !self.is_over(&self.contributors[usize::from(chunk.contributors[*index])]);
            let clocks = (0..chunk.contributors.len()).filter(unfinished).map(|index| chunk.gate.clock_of(index));
            Some(clocks.clone().max()? - clocks.min()?)
        };
        let arrived = self.chunks.iter().map(|chunk| chunk.arrived.len()).sum::<usize>();
        let waiting = self.chunks.iter().map(|chunk| chunk.replies.len() + chunk.pulls.len()).sum::<usize>();
        Figures {
            staleness: self.chunks.iter().filter_map(clocks).max().unwrap_or(0),
            landed: (self.landed.iter().flatten().count() + arrived) as u64,
            replies: waiting as u64,
            skipped: self.skipped,
        }
    }

    /// Of each worker that has not finished: positions that it may push beyond what has come from it.
    pub fn rooms(&self) -> impl Iterator<Item = (PeerId, u64)> {
        let aggregates = self.config.consistency.aggregates();
        self.contributors.iter().filter(|contributor| !self.is_over(contributor)).map(move |contributor| {
            let window = if aggregates { &self.window } else { &contributor.window };
            let index = if aggregates { contributor.peer.rank.index.into() } else { 0 };
            let open = (window.base()..window.end()).filter(|position| !window.has(*position, index));
            (contributor.peer, open.count() as u64)
        })
    }
}
