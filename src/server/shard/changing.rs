//! Settings that change while the job runs: from one clock on, the same on every shard.
//!
//! Invariant: from being told to prepare until the change is settled nothing of the clock that was named, or of a later one, is
//! begun or decided here.

use super::*;

impl Shard {
    /// What was promised to this change when it was asked for before. All are asked once more when another lane serves some shard: then
    /// the change may have been settled by what was said at first, and that holds.
    pub fn promised(&self, number: u64) -> Option<Clock> {
        self.held.filter(|(held, _)| *held == number).map(|(_, from)| from)
    }

    /// Begins nothing of `clock` and later clocks until [`Shard::settle_change`]; of a later one if that clock has begun here. Gives
    /// the first clock that is held.
    pub fn prepare_change(&mut self, number: u64, clock: Clock) -> Clock {
        let begun =
            self.chunks.iter().filter_map(|chunk| chunk.reduced.map(|reduced| reduced.clock + 1)).max().unwrap_or(0);
        let possible = begun.max(self.clock_max + u64::from(self.computing > 0)).max(self.decided_here());
        let from = clock.max(possible);
        self.held = Some((number, from));
        from
    }

    /// A change that was prepared has been made, or given up: what was held goes on.
    pub fn settle_change(&mut self, number: u64) {
        if self.held.is_none_or(|(held, _)| held != number) {
            return; // given up before this shard had heard of it
        }
        self.held = None;
        (0..self.chunks.len()).for_each(|index| self.touch(index));
        self.decide();
    }

    /// Whether what belongs to `clock` must wait for a change to be settled.
    pub(super) fn is_held(&self, clock: Clock) -> bool {
        self.held.is_some_and(|(_, from)| clock >= from)
    }
}
