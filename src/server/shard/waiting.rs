//! What the shard waits for, to be named when a path breaks or somebody asks.
//!
//! Invariant: nothing in here changes anything; what has arrived is never said to be awaited.

use super::*;
use crate::session::Owed;

/// One thing that a shard waits for: of whom, what, of which chunk, at which clock.
pub type Lacking = (PeerId, Owed, Option<ChunkId>, Option<Clock>);

impl Shard {
    /// What the shard waits for: of the workers that are furthest behind each the first chunk that it lacks, and of other shards
    /// what a step's decision needs.
    pub fn waits(&self) -> Vec<Lacking> {
        let working = self.contributors.iter().filter(|contributor| contributor.may_owe() && contributor.own > 0);
        let mut lacking: Vec<Lacking> = Vec::new();
        for contributor in working {
            match contributor.parameters {
                None => lacking.push((contributor.peer, Owed::Path, None, None)),
                Some(_) => lacking.extend(
                    self.lacking(contributor.peer.rank.index)
                        .map(|(clock, _, chunk)| (contributor.peer, Owed::Push, Some(chunk), Some(clock))),
                ),
            }
        }
        let least = lacking.iter().filter_map(|(.., clock)| *clock).min();
        lacking.retain(|(.., clock)| clock.is_none() || *clock == least);
        lacking.extend(self.lanes().into_iter().filter_map(|lane| {
            let (chunk, clock) = self.lacking_of_lane(lane)?;
            (!self.lane_has_left(lane)).then_some((lane, Owed::Decision, chunk, Some(clock)))
        }));
        lacking
    }

    /// What the shard waits for from `peer`, if anything, in words: of a worker the first chunk and clock that it lacks.
    pub fn awaited_from(&self, peer: PeerId) -> Option<String> {
        if peer.rank.role == Role::Server {
            let (chunk, clock) = self.lacking_of_lane(peer)?;
            return Some(match chunk {
                Some(chunk) => format!("the norm of its chunk {} of clock {clock}", chunk.0),
                None => format!("the decision about clock {clock}"),
            });
        }
        if !self.contributors[usize::from(peer.rank.index)].may_owe() {
            return None;
        }
        self.lacking(peer.rank.index).map(|(clock, _, chunk)| format!("its chunk {} of clock {clock}", chunk.0))
    }

    /// The lowest clock, and of that the first place and chunk, that a worker has not pushed although it is waited for.
    fn lacking(&self, worker: u16) -> Option<(Clock, usize, ChunkId)> {
        if self.contributors[usize::from(worker)].finished {
            return None;
        }
        let lacks = self.chunks.iter().enumerate().filter_map(|(place, chunk)| {
            let index = chunk.contributors.binary_search(&worker).ok()?;
            let waits = !chunk.replies.is_empty() || self.config.consistency.aggregates();
            let clock = chunk.gate.clock_of(index);
            let is_awaited = self.contributors[usize::from(worker)].is_awaited(clock);
            (waits && is_awaited && !self.is_here(worker, place, clock)).then_some((clock, place, chunk.id))
        });
        lacks.min()
    }

    /// Whether a worker's contribution has come and waits for the others, or for its step.
    fn is_here(&self, worker: u16, place: usize, clock: Clock) -> bool {
        if !self.config.consistency.aggregates() {
            let mut arrived = self.chunks[place].arrived.iter();
            return self.chunks[place].busy || arrived.any(|arrival| arrival.worker == worker);
        }
        let position = position(clock, self.chunks.len(), place);
        let open = (self.window.base()..self.window.end()).contains(&position);
        // A position below the window has been given up; one beyond it cannot have come.
        position < self.window.base() || open && self.window.has(position, worker.into())
    }
}
