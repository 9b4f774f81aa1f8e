//! What breaks in a simulated job, and when.
//!
//! Invariant: an injection that hits nothing is not made, but waits for a better moment.

use super::*;

impl World<'_> {
    /// Breaks what is to be broken.
    pub(super) fn wreak(&mut self, round: u64) {
        if self.chaos_at.is_none_or(|at| round < at) {
            return;
        }
        if matches!(self.options.chaos, Chaos::Copies | Chaos::Moves) {
            let wreaks = if self.options.moves { World::wreak_on_moves } else { World::wreak_on_copies };
            let later = if wreaks(self) { 1 + self.random.below(2000) } else { 1 };
            self.chaos_at = Some(round + later);
            return;
        }
        let lane = PeerId::server(self.random.below(self.options.servers.into()) as u16, 0);
        let mut worker = PeerId::worker(self.random.below(self.trainers.len() as u64) as u16);
        let lanes = self.lanes_of(lane.rank.index.into());
        if !lanes.is_empty() && self.random.once_in(2) {
            worker = lanes[self.random.below(lanes.len() as u64) as usize]; // the path between two servers, this time
        }
        let victim = if self.random.once_in(2) { lane } else { worker };
        self.chaos_at = None;
        match self.options.chaos {
            Chaos::Calm | Chaos::Copies | Chaos::Moves => {}
            Chaos::Partitions(longest) => {
                let length = Duration::from_micros(self.random.below(longest.as_micros() as u64 + 1));
                self.network.cut(lane, worker, self.now + length);
                self.chaos_at = Some(round + 1 + self.random.below(200));
            }
            // An injection that hits nothing in flight proves nothing: wait for a moment when there is something.
            _ if self.network.in_flight(lane, worker) == 0 => self.chaos_at = Some(round + 1),
            Chaos::Rebuilding { .. } => {
                match self.random.below(8) {
                    0 => self.network.cut(lane, worker, self.now + Duration::from_micros(self.random.below(3_000_000))),
                    1..5 => self.network.break_path(lane, worker),
                    _ => {
                        let other = if victim == lane { worker } else { lane };
                        self.network.break_end(victim, other);
                    }
                }
                self.chaos_at = Some(round + 1 + self.random.below(1500));
            }
            Chaos::BrokenPath => {
                self.network.break_path(lane, worker);
                self.victims = Some((lane, worker));
            }
            Chaos::Death => {
                self.halted.push(victim);
                for peer in self.peers_of(victim) {
                    self.network.break_path(victim, peer);
                }
                self.victims = Some((victim, victim));
            }
            Chaos::Stop => {
                self.halted.push(victim);
                self.victims = Some((victim, victim));
            }
        }
    }
}
