//! The staleness gate: is a worker too far ahead to be answered yet?
//!
//! Invariant: a reply for clock c is released only when every contributor's updates of all clocks up to c - bound have been
//! applied (Ho et al. 2013, section 3: a worker at clock c+1 sees all updates up to c - bound), and its own of clock c among them.

use crate::types::Clock;

/// The clocks of one chunk's contributors and how far apart they may be.
#[derive(Clone, Debug)]
pub struct StalenessGate {
    /// By contributor: how many clocks of its have been applied.
    applied: Vec<Clock>,
    /// By contributor: whether it will never push again.
    finished: Vec<bool>,
    bound: Option<u64>,
    /// Bounds that hold from a clock on instead, each with that clock; the clocks ascend.
    later: Vec<(Clock, u64)>,
}

impl StalenessGate {
    /// A gate over `contributors` that have all applied `start` clocks; `bound` `None` never holds anyone back.
    pub fn new(contributors: usize, bound: Option<u64>, start: Clock) -> StalenessGate {
        StalenessGate {
            applied: vec![start; contributors],
            finished: vec![false; contributors],
            bound,
            later: Vec::new(),
        }
    }

    /// Contributors of which more has been applied than of others: by contributor, how many clocks.
    pub fn resume(&mut self, applied: &[Clock]) {
        self.applied.iter_mut().zip(applied).for_each(|(now, stored)| *now = (*now).max(*stored));
    }

    /// Bounds that hold from a clock on instead of the first one, each with that clock, in the order of the clocks; those that were
    /// given before are forgotten.
    pub fn rebound(&mut self, bounds: &[(Clock, u64)]) {
        self.later.clear();
        self.later.extend_from_slice(bounds);
    }

    fn bound_at(&self, clock: Clock) -> Option<u64> {
        let later = self.later.iter().rev().find(|(from, _)| *from <= clock);
        later.map_or(self.bound, |(_, bound)| Some(*bound))
    }

    /// Contributor `index`'s update of `clock` has been applied.
    pub fn on_applied(&mut self, index: usize, clock: Clock) {
        self.applied[index] = self.applied[index].max(clock + 1);
    }

    /// Every contributor's update of `clock` has been applied.
    pub fn on_all_applied(&mut self, clock: Clock) {
        self.applied.iter_mut().for_each(|applied| *applied = (*applied).max(clock + 1));
    }

    /// Contributor `index` will never push again and holds nobody back.
    pub fn on_finished(&mut self, index: usize) {
        self.finished[index] = true;
    }

    /// Whether contributor `index`, which pushed `clock`, may have the parameters and go on to the next clock. It always sees
    /// its own update.
    pub fn released(&self, index: usize, clock: Clock) -> bool {
        let own = self.finished[index] || self.applied[index] > clock;
        own && self.bound_at(clock).is_none_or(|bound| self.slowest().saturating_add(bound) > clock)
    }

    /// How many clocks of contributor `index` have been applied.
    pub fn clock_of(&self, index: usize) -> Clock {
        self.applied[index]
    }

    /// How many clocks of each contributor have been applied.
    pub fn clocks(&self) -> &[Clock] {
        &self.applied
    }

    /// The number of clocks that every contributor that has not finished has applied.
    pub fn slowest(&self) -> Clock {
        let unfinished = self.applied.iter().zip(&self.finished).filter(|(_, finished)| !**finished);
        unfinished.map(|(applied, _)| *applied).min().unwrap_or(Clock::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_zero_waits_for_all() {
        let mut gate = StalenessGate::new(2, Some(0), 0);
        gate.on_applied(0, 0);
        assert!(!gate.released(0, 0));
        gate.on_applied(1, 0);
        assert!(gate.released(0, 0) && gate.released(1, 0));
        assert!(!gate.released(0, 1));
    }

    #[test]
    fn a_bound_is_reached_and_not_passed() {
        let mut gate = StalenessGate::new(2, Some(2), 0);
        for clock in 0..5 {
            gate.on_applied(0, clock);
        }
        // The slow one has applied nothing: the fast one may finish clocks 0 and 1 and hold there.
        assert!(gate.released(0, 0) && gate.released(0, 1) && !gate.released(0, 2));
        gate.on_applied(1, 0);
        assert!(gate.released(0, 2) && !gate.released(0, 3));
        gate.on_finished(1);
        assert!(gate.released(0, 4));
    }

    #[test]
    fn what_was_applied_before_a_resume_counts_and_finishing_does_not_change_it() {
        let mut gate = StalenessGate::new(3, Some(1), 4);
        gate.resume(&[6, 4, 2]);
        assert_eq!((gate.clocks(), gate.slowest()), (&[6, 4, 4][..], 4));
        assert!(gate.released(0, 4) && !gate.released(0, 5) && !gate.released(1, 4));
        gate.on_finished(1);
        gate.on_finished(2);
        assert_eq!((gate.clocks(), gate.slowest()), (&[6, 4, 4][..], 6));
    }

    #[test]
    fn a_later_bound_holds_from_its_clock_on() {
        let mut gate = StalenessGate::new(2, Some(2), 0);
        gate.rebound(&[(1, 0), (3, 4)]);
        for clock in 0..6 {
            gate.on_applied(0, clock);
        }
        // The slow one has applied nothing.
        let released: Vec<bool> = (0..6).map(|clock| gate.released(0, clock)).collect();
        assert_eq!(released, [true, false, false, true, false, false]);
    }

    #[test]
    fn no_bound_never_waits() {
        let mut gate = StalenessGate::new(2, None, 0);
        assert!(!gate.released(0, 7), "its own update comes first");
        gate.on_applied(0, 7);
        assert!(gate.released(0, 7));
    }
}
