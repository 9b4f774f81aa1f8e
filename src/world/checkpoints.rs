//! The launcher's part in checkpoints on demand.
//!
//! Invariant: a clock that a shard has passed is asked for again, further ahead.

use super::*;

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
