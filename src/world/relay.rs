//! The rendezvous' part in rebuilding paths: it carries the offers. Here they come late, out of order, and some of them twice.
//!
//! Invariant: every offer arrives; what it means is for its receiver to judge.

use super::*;

impl World<'_> {
    /// Delivers the offers that are due.
    pub(super) fn pass_on(&mut self) {
        let now = self.now;
        let resting = self.resting();
        let due: Vec<_> = self.relay.extract_if(.., |(due, to, _)| *due <= now && !resting.contains(to)).collect();
        for (_, to, proposal) in due {
            match self.servers.iter_mut().find(|node| node.me == to) {
                Some(Node { replica: Some(replica), .. }) => replica.proposed(proposal, now),
                Some(_) => {}
                None => {
                    let trainer = &mut self.trainers[usize::from(to.rank.index)];
                    trainer.engine.paths().proposed(proposal, now);
                }
            }
        }
    }

    /// Takes the offers that have been made.
    pub(super) fn take_offers(&mut self) {
        let now = self.now;
        for node in self.nodes() {
            let Some(paths) = self.paths_of(node) else { continue };
            let proposals: Vec<Proposal> = paths.take_proposals().collect();
            if self.is_cut_off(node) {
                continue;
            }
            for Proposal { peer, generation, life, endpoint } in proposals {
                let copies = 1 + usize::from(self.random.once_in(4));
                for _ in 0..copies {
                    let due = now + Duration::from_micros(self.random.below(50_000));
                    let proposal = Proposal { peer: node, generation, life, endpoint: endpoint.clone() };
                    self.relay.push((due, peer, proposal));
                }
            }
        }
    }

    /// What all ends say of their paths, together.
    pub(super) fn path_counts(&mut self) -> PathCounts {
        let mut sum = PathCounts::default();
        for node in self.nodes() {
            sum = sum.and(self.paths_of(node).map(|paths| paths.counts()).unwrap_or_default());
        }
        sum
    }

    pub(super) fn nodes(&self) -> Vec<PeerId> {
        let servers = self.servers.iter().map(|node| node.me);
        servers.chain((0..self.trainers.len()).map(|worker| PeerId::worker(worker as u16))).collect()
    }

    /// The paths of a node that runs.
    fn paths_of(&mut self, node: PeerId) -> Option<&mut Paths<SimTransport>> {
        let index = usize::from(node.rank.index);
        match node {
            _ if self.halted.contains(&node) => None,
            node if self.is_server(node) => {
                let mut nodes = self.servers.iter_mut().filter(|known| known.me == node);
                nodes.find_map(|node| node.replica.as_mut()).map(Replica::paths)
            }
            _ => self.trainers.get_mut(index).map(|trainer| trainer.engine.paths()),
        }
    }
}
