//! Dealing the machine's cores to the ranks of a job.
//!
//! Invariant: pure but for the one question to the kernel; no core is dealt a second time while one is unused.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::Pid,
};

use crate::{session::JobConfig, types::Rank};

/// The cores on which this process may run.
pub(super) fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let cores = (0..CpuSet::count()).filter(|&core| set.is_set(core).unwrap_or(false)).collect::<Vec<_>>();
    if cores.is_empty() { vec![0] } else { cores }
}

/// Deals `allowed` cores to the ranks: a server has one for each shard, the workers share what is left, at least one each.
/// `taken` are the cores that other jobs use, each as often as it is used: the least used go first.
pub(super) fn deal(job: &JobConfig, allowed: &[usize], taken: &[usize]) -> BTreeMap<Rank, Vec<usize>> {
    let mut load: BTreeMap<usize, usize> = allowed.iter().map(|&core| (core, 0)).collect();
    for core in taken {
        load.entry(*core).and_modify(|count| *count += 1);
    }
    let shards = usize::from(job.shards_per_server);
    let left = allowed.len().saturating_sub(usize::from(job.servers) * shards);
    let for_worker = (left / usize::from(job.workers)).max(1);
    let mut dealt = BTreeMap::new();
    for rank in job.ranks() {
        let wanted = if rank.role == crate::types::Role::Server { shards } else { for_worker };
        let mut least: Vec<usize> = load.keys().copied().collect();
        least.sort_by_key(|core| (load[core], *core));
        least.truncate(wanted.min(allowed.len()));
        least.iter().for_each(|core| drop(load.entry(*core).and_modify(|count| *count += 1)));
        dealt.insert(rank, least);
    }
    dealt
}

/// "0,1,5": the form in which cores stand in `GRADWIRE_CORES`.
pub(super) fn text(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(servers: u16, workers: u16) -> JobConfig {
        JobConfig { servers, workers, ..JobConfig::default() }
    }

    #[test]
    fn nobody_shares_while_there_is_room() {
        let dealt = deal(&job(2, 2), &[0, 1, 2, 3, 4, 5, 6, 7], &[]);
        let mut all: Vec<usize> = dealt.values().flatten().copied().collect();
        assert_eq!(dealt[&Rank::server(0)].len(), 1);
        assert_eq!(dealt[&Rank::worker(1)].len(), 3);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_small_machine_is_shared_evenly() {
        let dealt = deal(&job(2, 2), &[4, 9], &[]);
        let count = |core| dealt.values().flatten().filter(|&&c| c == core).count();
        assert_eq!((count(4), count(9)), (2, 2));
    }

    #[test]
    fn a_second_job_begins_where_the_first_one_is_not() {
        let dealt = deal(&job(1, 1), &[0, 1, 2, 3], &[0, 1, 1, 99]);
        assert_eq!(dealt[&Rank::server(0)], [2]);
        assert_eq!(dealt[&Rank::worker(0)], [3, 0, 2]);
    }
}
