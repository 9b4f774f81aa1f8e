//! Dealing the machine's cores to the ranks of a job.
//!
//! Invariant: ranks of this job and of others share a core only when none is free.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::{
    mem::{Topology, topology::Demand},
    session::JobConfig,
    types::{Rank, Role},
};

/// Deals cores to the ranks: a server has one for each shard, the workers share what is left, at least one each. `taken` are the
/// cores that other jobs use, each as often as it is used.
pub(super) fn deal(job: &JobConfig, machine: &Topology, taken: &[usize]) -> BTreeMap<Rank, Vec<usize>> {
    let shards = usize::from(job.shards_per_server);
    let left = machine.cores.len().saturating_sub(usize::from(job.servers) * shards);
    let for_worker = (left / usize::from(job.workers)).max(1);
    let cores = |rank: Rank| if rank.role == Role::Server { shards } else { for_worker };
    let demands: Vec<Demand> = job.ranks().map(|rank| Demand { cores: cores(rank), near: None }).collect();
    let placements = machine.assign_cores(&demands, taken);
    job.ranks().zip(placements).map(|(rank, placement)| (rank, placement.cores)).collect()
}

/// "0,1,5": the form in which cores stand in `GRADWIRE_CORES`.
pub(super) fn text(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::topology::{Core, Source};

    fn machine(cores: usize) -> Topology {
        let cores = (0..cores).map(|index| Core { os_index: index, physical: index, node: None }).collect();
        Topology { cores, nodes: Vec::new(), devices: Vec::new(), source: Source::Flat("a test".into()) }
    }

    fn job(servers: u16, workers: u16) -> JobConfig {
        JobConfig { servers, workers, ..JobConfig::default() }
    }

    #[test]
    fn nobody_shares_while_there_is_room() {
        let dealt = deal(&job(2, 2), &machine(8), &[]);
        let mut all: Vec<usize> = dealt.values().flatten().copied().collect();
        assert_eq!(dealt[&Rank::server(0)].len(), 1);
        assert_eq!(dealt[&Rank::worker(1)].len(), 3);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_small_machine_is_shared_evenly() {
        let dealt = deal(&job(2, 2), &machine(2), &[]);
        let count = |core| dealt.values().flatten().filter(|&&c| c == core).count();
        assert_eq!((count(0), count(1)), (2, 2));
    }

    #[test]
    fn a_second_job_begins_where_the_first_one_is_not() {
        let dealt = deal(&job(1, 1), &machine(4), &[0, 1, 1, 99]);
        let mut used: Vec<usize> = dealt.values().flatten().copied().collect();
        used.truncate(2);
        used.sort_unstable();
        assert_eq!(used, [2, 3]);
    }
}
