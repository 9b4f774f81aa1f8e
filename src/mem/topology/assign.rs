//! Dealing cores to ranks.
//!
//! Invariant: pure; the same demands on the same machine give the same placements, and no core is dealt a second time while one
//! that the rank could use is unused.
#![forbid(unsafe_code)]

use std::cmp::Reverse;

use super::{Core, Topology};

/// What a rank (or a shard) wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// How many cores.
    pub cores: usize,
    /// The NUMA node to be on, as [`Topology::node_near`] tells it of a device; `None` for wherever there is room.
    pub near: Option<u32>,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Cores to pin to, each once, by the number that `sched_setaffinity` takes: as many as were asked for or as the machine has.
    pub cores: Vec<usize>,
    /// The node to put this rank's memory on; `None` if nodes are not known.
    pub node: Option<u32>,
}

/// How often a core was dealt, and how often its physical core.
struct Loads<'a> {
    cores: &'a [Core],
    dealt: Vec<usize>,
}

impl Topology {
    /// Deals cores to ranks, in their order. `already_taken` are the cores that others use (each as often as it is used).
    ///
    /// An unused core anywhere is preferred to a shared one nearby; a nearby one to a far one; one whose hardware sibling is
    /// unused to one whose sibling works. With more ranks than cores, dealing starts over, so that loads differ by one at most.
    pub fn assign_cores(&self, ranks: &[Demand], already_taken: &[usize]) -> Vec<Placement> {
        let mut loads = Loads { cores: &self.cores, dealt: vec![0; self.cores.len()] };
        for taken in already_taken {
            if let Some(index) = self.cores.iter().position(|core| core.os_index == *taken) {
                loads.dealt[index] += 1;
            }
        }
        ranks.iter().map(|demand| loads.deal(*demand)).collect()
    }
}

impl Loads<'_> {
    fn deal(&mut self, demand: Demand) -> Placement {
        let home = self.home(demand);
        let mut dealt: Vec<usize> = Vec::with_capacity(demand.cores);
        // One by one: each core dealt changes what its sibling is worth.
        while let Some(index) = self.best(home, &dealt).filter(|_| dealt.len() < demand.cores) {
            self.dealt[index] += 1;
            dealt.push(index);
        }
        let on_home = home.is_some() && dealt.iter().any(|&index| self.cores[index].node == home);
        let node = if on_home || dealt.is_empty() { home } else { self.cores[dealt[0]].node };
        Placement { cores: dealt.into_iter().map(|index| self.cores[index].os_index).collect(), node }
    }

    /// The core that costs least, of those not in `except`.
    fn best(&self, home: Option<u32>, except: &[usize]) -> Option<usize> {
        let candidates = (0..self.cores.len()).filter(|index| !except.contains(index));
        candidates.min_by_key(|&index| (self.dealt[index], self.cores[index].node != home, self.physical_load(index)))
    }

    fn physical_load(&self, index: usize) -> usize {
        let physical = self.cores[index].physical;
        self.cores.iter().zip(&self.dealt).filter(|(core, _)| core.physical == physical).map(|(_, dealt)| dealt).sum()
    }

    /// The node wanted; for a rank that does not care the node where its cores are least shared, then the one with most room.
    fn home(&self, demand: Demand) -> Option<u32> {
        if demand.near.is_some_and(|near| self.cores.iter().any(|core| core.node == Some(near))) {
            return demand.near;
        }
        let mut nodes: Vec<u32> = self.cores.iter().filter_map(|core| core.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.into_iter().min_by_key(|&node| {
            let mut costs: Vec<_> = (0..self.cores.len())
                .filter(|&index| self.cores[index].node == Some(node))
                .map(|index| (self.dealt[index], self.physical_load(index)))
                .collect();
            costs.sort_unstable();
            let unused = costs.iter().filter(|cost| cost.1 == 0).count();
            costs.truncate(demand.cores.max(1));
            let missing = demand.cores.saturating_sub(costs.len());
            let shared: usize = costs.iter().map(|cost| cost.0).sum();
            (missing, shared, Reverse(unused), costs)
        })
    }
}
