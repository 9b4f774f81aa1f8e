//! Dealing the machine's cores to the ranks of a job.
//!
//! Invariant: ranks of this job and of others share a core only when none is free.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::{
    mem::{
        Topology,
        topology::{Demand, DeviceKind},
    },
    session::{DeviceChoice, JobConfig},
    types::{Rank, Role},
};

/// Deals cores to the ranks: a server has one for each shard, the workers share what is left, at least one each. `taken` are the
/// cores that other jobs use, each as often as it is used.
pub(super) fn deal(job: &JobConfig, machine: &Topology, taken: &[usize]) -> BTreeMap<Rank, Vec<usize>> {
    let shards = usize::from(job.shards_per_server);
    let left = machine.cores.len().saturating_sub(usize::from(job.servers) * shards);
    let for_worker = (left / usize::from(job.workers)).max(1);
    let cores = |rank: Rank| if rank.role == Role::Server { shards } else { for_worker };
    let demands: Vec<Demand> =
        job.ranks().map(|rank| Demand { cores: cores(rank), near: near(job, machine, rank) }).collect();
    let placements = machine.assign_cores(&demands, taken);
    job.ranks().zip(placements).map(|(rank, placement)| (rank, placement.cores)).collect()
}

/// The node of a server's GPU, where its first shard's is the one that the PCI bus shows at that place: a hint, since only the
/// server asks the driver for the real order, and a lane whose core is elsewhere moves.
fn near(job: &JobConfig, machine: &Topology, rank: Rank) -> Option<u32> {
    let gpus: Vec<Option<u32>> =
        machine.devices.iter().filter(|device| device.kind == DeviceKind::Gpu).map(|device| device.node).collect();
    let chosen: Vec<u32> = match &job.device {
        DeviceChoice::Cpu => return None,
        DeviceChoice::Gpu(numbers) if !numbers.is_empty() => numbers.clone(),
        DeviceChoice::Gpu(_) | DeviceChoice::Auto => (0..gpus.len() as u32).collect(),
    };
    let shard = usize::from(rank.index) * usize::from(job.shards_per_server);
    let gpu = chosen.get(shard.checked_rem(chosen.len())?)?;
    (rank.role == Role::Server).then_some(*gpus.get(*gpu as usize)?).flatten()
}

/// "0,1,5": the form in which cores stand in `GRADWIRE_CORES`.
pub(super) fn text(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::topology::{Core, Device, Source};

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
    fn servers_on_gpus_run_beside_them() {
        let mut machine = machine(8);
        for core in &mut machine.cores {
            core.node = Some(core.os_index as u32 / 4);
        }
        let gpu = |node: u32| Device {
            name: format!("gpu{node}"),
            kind: DeviceKind::Gpu,
            pci: Some(format!("0000:{node:02x}:00.0")),
            node: Some(node),
        };
        machine.devices = vec![gpu(1), gpu(0)];
        let job = |device| JobConfig { device, ..job(2, 1) };
        let on = |device, server| deal(&job(device), &machine, &[])[&Rank::server(server)][0] / 4;
        let all = DeviceChoice::Gpu(vec![]);
        assert_eq!((on(all.clone(), 0), on(all, 1)), (1, 0));
        let second = DeviceChoice::Gpu(vec![1]);
        assert_eq!((on(second.clone(), 0), on(second, 1)), (0, 0));
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
