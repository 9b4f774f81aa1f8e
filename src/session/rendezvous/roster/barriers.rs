//! Barriers: where all ranks wait for one another.
//!
//! Invariant: a barrier opens once, for all that wait at it, and waits for nobody who has finished or whose process is gone.

use super::*;

impl Roster {
    /// A rank waits at a barrier.
    pub(super) fn barrier(&mut self, rank: Rank, name: String, now: Instant) -> Result<(), String> {
        if name.len() > 64 || (self.barriers.len() >= BARRIERS_MAX && !self.barriers.contains_key(&name)) {
            return Err(format!("a barrier's name has at most 64 bytes, and at most {BARRIERS_MAX} are open at once"));
        }
        let gathering =
            self.barriers.entry(name.clone()).or_insert_with(|| Gathering { here: BTreeSet::new(), since: now });
        if !gathering.here.insert(rank) {
            return Err(format!("it waits at barrier `{name}` already"));
        }
        self.pass_barriers();
        Ok(())
    }

    /// Opens the barriers at which all are who have not finished and whose processes are there.
    pub(super) fn pass_barriers(&mut self) {
        let present = |rank: &Rank| !self.seats[rank].finished && self.seats[rank].presence != Presence::Gone;
        let is_full = |gathering: &Gathering| {
            self.seats.keys().filter(|rank| present(rank)).all(|rank| gathering.here.contains(rank))
        };
        let full = self.barriers.iter().filter(|(_, gathering)| is_full(gathering)).map(|(name, _)| name.clone());
        for name in full.collect::<Vec<_>>() {
            self.barriers.remove(&name);
            self.send(self.everybody(), FromLauncher::BarrierPassed(name));
        }
    }
}
