//! A change while the job runs, from the launcher's side, of a setting or of who is of the job: it takes effect at one clock on
//! every shard.
//!
//! First every lane is asked to prepare: it begins nothing of a clock ahead, and says which. The latest of their clocks is one that
//! nobody has begun; then every lane is told to change at it, and goes on. A lane that takes a shard over meanwhile is asked too, and
//! the answer of the one before counts no more; of all that was settled earlier it is told before it serves.
//!
//! Invariant: pure; a change is settled once, when whoever serves each shard has prepared, at a clock that none of them has begun.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    optim::LiveChange,
    types::{Clock, Rank, ShardId},
};

/// What changes from one clock on, on every shard.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Settings.
    Settings(LiveChange),
    /// This worker is not of the job any more: it was lost, and nothing more is taken from it.
    Lost(u16),
    /// This worker is of the job until then, as it was told to be: what it gives of earlier clocks counts, all of it.
    Leaves(u16),
    /// The process of this worker has finished, and another one may take its seat.
    Opens(u16),
    /// This worker is of the job from then on, again or for the first time.
    Joins(u16),
}

/// The clock of a change that cannot be made.
pub const NEVER: Clock = Clock::MAX;

/// How far ahead of the last reported clock the first question lies: reports lag by about one clock.
const MARGIN: Clock = 2;

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Settings(change) => change.fmt(f),
            Change::Lost(worker) | Change::Leaves(worker) => write!(f, "{} is out", Rank::worker(*worker)),
            Change::Opens(worker) => write!(f, "the seat of {} is open", Rank::worker(*worker)),
            Change::Joins(worker) => write!(f, "{} is in", Rank::worker(*worker)),
        }
    }
}

#[derive(Debug)]
struct Open {
    change: Change,
    /// For which clock every lane was asked to prepare.
    clock: Clock,
    prepared: BTreeMap<ShardId, Clock>,
}

/// The changes of one job, one at a time.
#[derive(Debug)]
pub struct Changes {
    shards: usize,
    open: Option<Open>,
    /// All that has changed, in order: the number of the change, the clock from which on it holds, and what it is.
    made: Vec<(u64, Clock, Change)>,
    /// The number of the change that is open, or of the last one.
    number: u64,
}

impl Changes {
    /// Of a job with so many shards.
    pub fn new(shards: usize) -> Changes {
        Changes { shards, open: None, made: Vec::new(), number: 0 }
    }

    /// Begins a change at `at` or the first later clock that is possible: its number, and the clock for which every lane is to
    /// prepare. `reached` is the furthest clock reported.
    ///
    /// # Errors
    ///
    /// In words, while another change is under way.
    pub fn begin(&mut self, change: Change, at: Clock, reached: Clock) -> Result<(u64, Clock), String> {
        if self.open.is_some() {
            return Err("another change is being made; try again in a moment".into());
        }
        self.number += 1;
        // Who waits for a worker that is gone, or for one that is there again, holds as early as is possible.
        let waits = matches!(change, Change::Lost(_) | Change::Opens(_) | Change::Joins(_));
        let clock = if waits { at } else { at.max(reached.saturating_add(MARGIN)) };
        self.open = Some(Open { change, clock, prepared: BTreeMap::new() });
        Ok((self.number, clock))
    }

    /// Another lane serves a shard: what it, and with it everybody, is to be asked to prepare for, if a change is under way.
    pub fn displaced(&mut self, shard: ShardId) -> Option<(u64, Clock, Change)> {
        let open = self.open.as_mut()?;
        open.prepared.remove(&shard);
        Some((self.number, open.clock, open.change))
    }

    /// All changes that were made, in order, with their numbers.
    pub fn made(&self) -> &[(u64, Clock, Change)] {
        &self.made
    }

    /// Whether a change is under way.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The change that is under way.
    pub fn open(&self) -> Option<Change> {
        self.open.as_ref().map(|open| open.change)
    }

    /// Whoever serves a shard begins nothing of `from` and later clocks: the change and its clock, if it was the last one; [`NEVER`] if
    /// any of them cannot make it.
    pub fn prepared(&mut self, number: u64, shard: ShardId, from: Clock) -> Option<(Clock, Change)> {
        let open = self.open.as_mut().filter(|_| number == self.number)?;
        open.prepared.insert(shard, from);
        if open.prepared.len() < self.shards {
            return None;
        }
        let clock = open.prepared.values().copied().max()?;
        let change = self.open.take().map(|open| open.change)?;
        if clock != NEVER {
            self.made.push((number, clock, change));
        }
        Some((clock, change))
    }

    /// Gives up the change that is open: its number, by which every lane goes on without it.
    pub fn cancel(&mut self) -> Option<u64> {
        self.open.take().map(|_| self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_settled_at_the_latest_clock_and_once() {
        let change = Change::Settings(LiveChange { learning_rate: Some(0.5), ..LiveChange::default() });
        let mut changes = Changes::new(2);
        let (one, two) = (ShardId(0), ShardId(1));
        assert_eq!(changes.begin(change, 0, 7), Ok((1, 9)));
        assert!(changes.begin(change, 0, 7).unwrap_err().contains("another change"));
        assert_eq!(changes.prepared(1, one, 12), None);
        assert_eq!(changes.prepared(1, one, 12), None, "the same lane twice");
        assert_eq!(changes.prepared(0, two, 9), None, "an older change");
        assert_eq!(changes.prepared(1, two, 9), Some((12, change)));
        assert_eq!(changes.prepared(1, two, 9), None);
        assert_eq!(changes.made(), [(1, 12, change)]);
        changes.begin(change, 30, 20).unwrap();
        assert_eq!(changes.cancel(), Some(2));
        assert_eq!((changes.cancel(), changes.prepared(2, one, 30)), (None, None));
    }

    /// Whoever has taken a shard over has promised nothing yet.
    #[test]
    fn what_a_lane_has_said_counts_no_more_when_another_serves() {
        let change = Change::Settings(LiveChange { learning_rate: Some(0.5), ..LiveChange::default() });
        let mut changes = Changes::new(2);
        assert_eq!(changes.displaced(ShardId(0)), None);
        changes.begin(change, 0, 7).unwrap();
        changes.prepared(1, ShardId(0), 9);
        assert_eq!(changes.displaced(ShardId(0)), Some((1, 9, change)));
        assert_eq!(changes.prepared(1, ShardId(1), 9), None);
        assert_eq!(changes.prepared(1, ShardId(0), 11), Some((11, change)));
    }
}
