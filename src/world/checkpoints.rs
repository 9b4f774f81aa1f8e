//! The launcher's part in checkpoints on demand, and the disk's in all of them.
//!
//! Invariant: a clock that a shard has passed is asked for again, further ahead; a disk gives a snapshot's memory back once.

use super::*;

/// A node's disk: takes what is there to be stored, and has stored it some turns later.
pub(super) fn store(node: &mut Node, seed: u64, stored: &mut [Vec<Snapshot>]) {
    let Some(serving) = node.replica.as_mut().and_then(Replica::serves) else {
        node.storing = None;
        return;
    };
    if let Some((turns, _)) = &mut node.storing {
        *turns = turns.saturating_sub(1);
    }
    if let Some((_, chunks)) = node.storing.take_if(|(turns, _)| *turns == 0) {
        serving.handle_stored(chunks);
    }
    if let Some(snapshot) = serving.take_snapshot() {
        assert!(node.storing.is_none(), "a second copy of the state, before the first was stored");
        // Dice of its own: the same seed gives the same world, with checkpoints and without.
        let mut random = SimRandom::new(seed ^ snapshot.clock << 8 ^ node.shard as u64);
        let turns = if random.once_in(2) { 1 } else { 1 + random.below(40) };
        node.storing = Some((turns, snapshot.chunks.clone()));
        stored[node.shard].push(snapshot);
    }
}

impl World<'_> {
    /// Plays the launcher's part in checkpoints on demand: asks every shard, each a little later than the one before, and asks
    /// again further ahead when one had passed the clock.
    pub(super) fn request(&mut self, round: u64) {
        if self.options.requests && self.orders.is_empty() && self.random.once_in(200) {
            let reached = self.served().map(|server| server.shard().clock_max()).max().unwrap_or(0);
            let ahead = self.random.below(3);
            self.order(round, reached + ahead);
        }
        let due = |order: &mut (u64, usize, Clock)| order.0 <= round;
        for (_, server, clock) in self.orders.extract_if(.., due).collect::<Vec<_>>() {
            let Some(server) = self.server(server) else { continue };
            if let Err(reached) = server.request_checkpoint(clock, false) {
                self.orders.clear();
                self.order(round, reached.max(clock) + 1);
            }
        }
    }

    fn order(&mut self, round: u64, clock: Clock) {
        for server in 0..usize::from(self.options.servers) {
            self.orders.push((round + 1 + self.random.below(50), server, clock));
        }
    }
}
