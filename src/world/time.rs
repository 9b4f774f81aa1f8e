//! What runs when: time passes, and nodes rest for a while or for good.
//!
//! Invariant: time never goes back, and a node that rests does nothing.

use super::*;

impl World<'_> {
    /// A little time passes while anybody is busy; otherwise, mostly, it jumps to the next thing that happens.
    pub(super) fn pass_time(&mut self, busy: bool) {
        let resting = self.resting();
        if busy || !self.network.is_quiet(&resting) || self.random.once_in(8) {
            self.now += Duration::from_micros(self.random.below(50));
            return;
        }
        // Whoever does not run has nothing to do before it does again.
        let runs = |peer: PeerId| !resting.contains(&peer);
        let servers = self.servers.iter().filter(|node| runs(node.me));
        let servers = servers.filter_map(|node| node.replica.as_ref()?.next_deadline());
        let trainers = (0u16..).zip(&self.trainers).filter(|(worker, _)| runs(PeerId::worker(*worker)));
        let trainers = trainers.filter_map(|(_, trainer)| trainer.next_deadline());
        let wakes = self.asleep.iter().map(|(_, until)| *until);
        let relay = self.relay.iter().filter(|(_, to, _)| runs(*to)).map(|(due, ..)| *due);
        let next = self.network.next_due().into_iter().chain(servers).chain(trainers).chain(relay).chain(wakes);
        let next = next.chain(self.copies_due()).chain(self.moves_due()).min();
        let soon = self.now + Duration::from_micros(1);
        self.now = next.map_or(soon, |next| next.max(soon));
    }

    /// Where paths are rebuilt, a node does not run now and then: what comes meanwhile comes to it all at once.
    pub(super) fn doze(&mut self) {
        let now = self.now;
        self.asleep.retain(|(_, until)| *until > now);
        if matches!(self.options.chaos, Chaos::Rebuilding { .. } | Chaos::Copies | Chaos::Moves)
            && self.random.once_in(50)
        {
            let nodes = self.nodes();
            let node = nodes[self.random.below(nodes.len() as u64) as usize];
            self.asleep.push((node, now + Duration::from_micros(self.random.below(80_000))));
        }
    }

    /// The nodes that do nothing now.
    pub(super) fn resting(&self) -> Vec<PeerId> {
        self.asleep.iter().map(|(node, _)| *node).chain(self.halted.iter().copied()).collect()
    }

    /// Whether a node does nothing now.
    pub(super) fn rests(&self, node: PeerId) -> bool {
        self.halted.contains(&node) || self.asleep.iter().any(|(asleep, _)| *asleep == node)
    }
}
