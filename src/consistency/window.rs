//! The window over the agreed chunk order, with its arrival bits.
//!
//! All contributors of a shard push its chunks in one agreed order; a *position* counts along that order over all clocks
//! (clock x chunks + place in the order). Only positions `[base, base + slots)` may be pushed, and position p lands in slot
//! p mod slots. Since everybody may always push the base position, the base position always completes: no deadlock.
//!
//! Invariant: a contribution is recorded at most once, and only while its position is inside the window.

use crate::types::Clock;

/// Why a contribution was not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowRefusal {
    /// The position lies before or behind the window.
    #[error("position {position} is outside the window [{base}, {end})")]
    Outside {
        /// What was pushed.
        position: u64,
        /// The oldest unfinished position.
        base: u64,
        /// The first position that is not yet open.
        end: u64,
    },
    /// The contributor has given its contribution to this position already.
    #[error("position {position} was pushed twice")]
    Duplicate {
        /// What was pushed.
        position: u64,
    },
}

/// A sliding window of positions with a bit per contributor.
#[derive(Clone, Debug)]
pub struct Window {
    base: u64,
    slots: u64,
    /// 64-bit words per position.
    words: usize,
    /// `slots * words` words: a bit per contributor that has arrived.
    bits: Vec<u64>,
    /// By slot: nothing more is to be done for the position in it.
    finished: Vec<bool>,
}

impl Window {
    /// A window of `slots` positions for `contributors`, with `base` as the oldest unfinished position.
    pub fn new(slots: u32, contributors: usize, base: u64) -> Window {
        assert!(slots >= 1 && contributors >= 1, "a window needs a slot and a contributor");
        let words = contributors.div_ceil(64);
        Window {
            base,
            slots: slots.into(),
            words,
            bits: vec![0; words * slots as usize],
            finished: vec![false; slots as usize],
        }
    }

    /// The oldest unfinished position.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The first position that may not yet be pushed.
    pub fn end(&self) -> u64 {
        self.base + self.slots
    }

    /// The slot in which a position lands.
    pub fn slot(&self, position: u64) -> usize {
        (position % self.slots) as usize
    }

    /// Records the contribution of `contributor` to `position`.
    ///
    /// # Errors
    ///
    /// [`WindowRefusal`] if the position is not open or the contribution is there already; nothing is changed then.
    pub fn record(&mut self, position: u64, contributor: usize) -> Result<(), WindowRefusal> {
        if position < self.base || position >= self.end() {
            return Err(WindowRefusal::Outside { position, base: self.base, end: self.end() });
        }
        let word = self.slot(position) * self.words + contributor / 64;
        let bit = 1u64 << (contributor % 64);
        if self.bits[word] & bit != 0 || self.finished[self.slot(position)] {
            return Err(WindowRefusal::Duplicate { position });
        }
        self.bits[word] |= bit;
        Ok(())
    }

    /// Whether the contribution of `contributor` to an open `position` has been recorded.
    pub fn has(&self, position: u64, contributor: usize) -> bool {
        debug_assert!((self.base..self.end()).contains(&position));
        self.bits[self.slot(position) * self.words + contributor / 64] & (1 << (contributor % 64)) != 0
    }

    /// Takes back what was recorded of `contributor` at an open `position`: it may be recorded again.
    pub fn forget(&mut self, position: u64, contributor: usize) {
        debug_assert!((self.base..self.end()).contains(&position));
        let word = self.slot(position) * self.words + contributor / 64;
        self.bits[word] &= !(1 << (contributor % 64));
    }

    /// Whether an open `position` is finished already, and waits only for those before it.
    pub fn is_finished(&self, position: u64) -> bool {
        debug_assert!((self.base..self.end()).contains(&position));
        self.finished[self.slot(position)]
    }

    /// The slot of `position` is free again; moves the base over all that is finished and says whether it moved.
    pub fn finish(&mut self, position: u64) -> bool {
        assert!((self.base..self.end()).contains(&position), "finished {position} outside the window");
        let slot = self.slot(position);
        self.finished[slot] = true;
        let before = self.base;
        while self.finished[self.slot(self.base)] {
            let slot = self.slot(self.base);
            self.finished[slot] = false;
            self.bits[slot * self.words..(slot + 1) * self.words].fill(0);
            self.base += 1;
        }
        self.base != before
    }
}

/// The position of the chunk at `place` of `chunks` at `clock`.
pub fn position(clock: Clock, chunks: usize, place: usize) -> u64 {
    clock * chunks as u64 + place as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn base_moves_over_finished_positions_only() {
        let mut window = Window::new(3, 2, 0);
        window.record(1, 0).unwrap();
        window.record(1, 1).unwrap();
        assert!(!window.finish(1));
        assert_eq!(window.record(3, 0), Err(WindowRefusal::Outside { position: 3, base: 0, end: 3 }));
        window.record(0, 0).unwrap();
        assert_eq!(window.record(0, 0), Err(WindowRefusal::Duplicate { position: 0 }));
        window.record(0, 1).unwrap();
        assert!(window.finish(0));
        assert_eq!(window.base(), 2);
        assert_eq!(window.record(1, 0), Err(WindowRefusal::Outside { position: 1, base: 2, end: 5 }));
        window.record(4, 1).unwrap();
        assert!(window.has(4, 1) && !window.has(4, 0));
    }

    proptest! {
        /// Against a model that keeps every position ever seen.
        #[test]
        fn agrees_with_a_set(slots in 1u32..6, steps in prop::collection::vec((0u64..12, 0usize..70, any::<bool>()), 0..200)) {
            let mut window = Window::new(slots, 70, 0);
            let mut seen = std::collections::HashSet::new();
            let mut done = std::collections::HashSet::new();
            for (ahead, contributor, finish) in steps {
                let position = window.base() + ahead;
                if finish && ahead < u64::from(slots) && !done.contains(&position) {
                    window.finish(position);
                    done.insert(position);
                } else {
                    let open = ahead < u64::from(slots);
                    let fresh = !done.contains(&position) && !seen.contains(&(position, contributor));
                    prop_assert_eq!(window.record(position, contributor).is_ok(), open && fresh);
                    if open { seen.insert((position, contributor)); }
                }
                prop_assert!(!done.contains(&window.base()));
            }
        }
    }
}
