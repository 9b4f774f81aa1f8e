//! Dealing a host's cores to the ranks of a job.
//!
//! Invariant: ranks of this job and of others share a core only when none is free.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::{crew::Crew, hosts::MapBy};
use crate::{
    Error, Result,
    mem::{
        Topology,
        topology::{Demand, DeviceKind},
    },
    session::{DeviceChoice, JobConfig},
    types::{Rank, Role},
};

/// What a rank is dealt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Dealt {
    pub cores: Vec<usize>,
    /// The one GPU that it is to see, by its place on the PCI bus.
    pub gpu: Option<usize>,
}

/// Deals a host's cores to its ranks: a server has one for each lane, the workers share what is left, at least one each. `taken`
/// are the cores that other jobs use, each as often as it is used.
///
/// # Errors
///
/// [`Error::Config`] if workers are to go to GPUs and the machine has none.
pub(super) fn deal(crew: &Crew, machine: &Topology, taken: &[usize]) -> Result<BTreeMap<Rank, Dealt>> {
    let shards = usize::from(crew.config.lanes_per_server());
    let of = |role| crew.ranks.iter().copied().filter(move |rank: &Rank| rank.role == role);
    let left = machine.cores.len().saturating_sub(of(Role::Server).count() * shards);
    let for_worker = (left / of(Role::Worker).count().max(1)).max(1);
    let gpus = gpus(machine);
    let mut demands = Vec::new();
    for rank in of(Role::Server) {
        demands.push((rank, Demand { cores: shards, near: near(&crew.config, &gpus, rank) }, None));
    }
    for (place, rank) in of(Role::Worker).enumerate() {
        let (near, gpu) = match crew.map_by {
            MapBy::Slot | MapBy::Node => (None, None),
            MapBy::Numa if machine.nodes.is_empty() => (None, None),
            MapBy::Numa => (Some(machine.nodes[place % machine.nodes.len()].os_index), None),
            MapBy::Gpu if gpus.is_empty() => {
                return Err(Error::Config(format!("--map-by gpu, but no GPU is found here ({})", machine.source)));
            }
            MapBy::Gpu => (gpus[place % gpus.len()], Some(place % gpus.len())),
        };
        demands.push((rank, Demand { cores: for_worker, near }, gpu));
    }
    let placements = machine.assign_cores(&demands.iter().map(|(_, demand, _)| *demand).collect::<Vec<_>>(), taken);
    let dealt = demands.into_iter().zip(placements);
    Ok(dealt.map(|((rank, _, gpu), placement)| (rank, Dealt { cores: placement.cores, gpu })).collect())
}

/// The node of each GPU, in the order of the PCI bus.
fn gpus(machine: &Topology) -> Vec<Option<u32>> {
    machine.devices.iter().filter(|device| device.kind == DeviceKind::Gpu).map(|device| device.node).collect()
}

/// The node of a server's GPU, where its first shard's is the one that the PCI bus shows at that place: a hint, since only the
/// server asks the driver for the real order, and a lane whose core is elsewhere moves.
fn near(job: &JobConfig, gpus: &[Option<u32>], rank: Rank) -> Option<u32> {
    let chosen: Vec<u32> = match &job.device {
        DeviceChoice::Cpu => return None,
        DeviceChoice::Gpu(numbers) if !numbers.is_empty() => numbers.clone(),
        DeviceChoice::Gpu(_) | DeviceChoice::Auto => (0..gpus.len() as u32).collect(),
    };
    let shard = usize::from(rank.index) * usize::from(job.shards_per_server);
    let gpu = chosen.get(shard.checked_rem(chosen.len())?)?;
    *gpus.get(*gpu as usize)?
}

/// All cores of the NUMA nodes that these are on; all of the machine's where nodes are not known.
pub(super) fn node_of(cores: &[usize], machine: &Topology) -> Vec<usize> {
    let nodes: Vec<Option<u32>> =
        machine.cores.iter().filter(|core| cores.contains(&core.os_index)).map(|core| core.node).collect();
    machine.cores.iter().filter(|core| nodes.contains(&core.node)).map(|core| core.os_index).collect()
}

/// "0,1,5": the form in which cores stand in `GRADWIRE_CORES`.
pub(super) fn text(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        launch::hosts::BindTo,
        mem::topology::{Core, Device, Node, Source},
    };

    fn machine(cores: usize) -> Topology {
        let cores = (0..cores).map(|index| Core { os_index: index, physical: index, node: None }).collect();
        Topology { cores, nodes: Vec::new(), devices: Vec::new(), source: Source::Flat("a test".into()) }
    }

    fn job(servers: u16, workers: u16) -> JobConfig {
        JobConfig { servers, workers, ..JobConfig::default() }
    }

    fn crew(config: JobConfig, map_by: MapBy) -> Crew {
        Crew {
            ranks: config.ranks().collect(),
            config,
            command: Vec::new(),
            server_command: Vec::new(),
            rendezvous: String::new(),
            map_by,
            bind_to: BindTo::None,
            environment: Vec::new(),
            directory: None,
            pass_output: false,
        }
    }

    fn dealt(config: JobConfig, machine: &Topology, taken: &[usize]) -> BTreeMap<Rank, Vec<usize>> {
        let all = deal(&crew(config, MapBy::Slot), machine, taken).unwrap();
        all.into_iter().map(|(rank, dealt)| (rank, dealt.cores)).collect()
    }

    #[test]
    fn nobody_shares_while_there_is_room() {
        let dealt = dealt(job(2, 2), &machine(8), &[]);
        let mut all: Vec<usize> = dealt.values().flatten().copied().collect();
        assert_eq!(dealt[&Rank::server(0)].len(), 1);
        assert_eq!(dealt[&Rank::worker(1)].len(), 3);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    /// Two nodes of four cores, and a GPU on each, the first on the second node.
    fn two_nodes() -> Topology {
        let mut machine = machine(8);
        for core in &mut machine.cores {
            core.node = Some(core.os_index as u32 / 4);
        }
        machine.nodes = [0, 1].map(|os_index| Node { os_index, memory_bytes: 1 << 30 }).into();
        let gpu = |node: u32| Device {
            name: format!("gpu{node}"),
            kind: DeviceKind::Gpu,
            pci: Some(format!("0000:{node:02x}:00.0")),
            node: Some(node),
        };
        machine.devices = vec![gpu(1), gpu(0)];
        machine
    }

    #[test]
    fn servers_on_gpus_run_beside_them() {
        let machine = two_nodes();
        let job = |device| JobConfig { device, ..job(2, 1) };
        let on = |device, server| dealt(job(device), &machine, &[])[&Rank::server(server)][0] / 4;
        let all = DeviceChoice::Gpu(vec![]);
        assert_eq!((on(all.clone(), 0), on(all, 1)), (1, 0));
        let second = DeviceChoice::Gpu(vec![1]);
        assert_eq!((on(second.clone(), 0), on(second, 1)), (0, 0));
    }

    #[test]
    fn workers_go_to_nodes_or_gpus_in_turn() {
        let deal = |map_by| deal(&crew(job(1, 3), map_by), &two_nodes(), &[]).unwrap();
        let nodes = |map_by| {
            let dealt = deal(map_by);
            [0, 1, 2].map(|worker| dealt[&Rank::worker(worker)].cores[0] / 4)
        };
        assert_eq!(nodes(MapBy::Numa), [0, 1, 0]);
        assert_eq!(nodes(MapBy::Gpu), [1, 0, 1]);
        let seen = deal(MapBy::Gpu);
        assert_eq!([0, 1, 2].map(|worker| seen[&Rank::worker(worker)].gpu), [Some(0), Some(1), Some(0)]);
        let none = super::deal(&crew(job(1, 1), MapBy::Gpu), &machine(2), &[]).unwrap_err().to_string();
        assert!(none.contains("no GPU is found here"), "{none}");
    }

    #[test]
    fn a_node_has_all_its_cores() {
        assert_eq!(node_of(&[5], &two_nodes()), [4, 5, 6, 7]);
        assert_eq!(node_of(&[1], &machine(2)), [0, 1]);
    }

    #[test]
    fn a_small_machine_is_shared_evenly() {
        let dealt = dealt(job(2, 2), &machine(2), &[]);
        let count = |core| dealt.values().flatten().filter(|&&c| c == core).count();
        assert_eq!((count(0), count(1)), (2, 2));
    }

    #[test]
    fn a_second_job_begins_where_the_first_one_is_not() {
        let dealt = dealt(job(1, 1), &machine(4), &[0, 1, 1, 99]);
        let mut used: Vec<usize> = dealt.values().flatten().copied().collect();
        used.truncate(2);
        used.sort_unstable();
        assert_eq!(used, [2, 3]);
    }
}
