//! Placement on machines that this one is not: a box of two sockets, eight GPUs and eight NICs, and synthetic ones.
//!
//! Invariant: a test that needs libhwloc says so where it is not installed, and fails without it under CI.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BOX: &str = include_str!("../../../tests/data/two-socket-8gpu-8nic.xml");

/// Whether libhwloc is there; aloud where not.
fn hwloc_is_here(test: &str) -> bool {
    match hwloc::table() {
        Ok(_) => true,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "under CI libhwloc must be installed: {why}");
            eprintln!("SKIPPED {test}: {why}");
            false
        }
    }
}

/// A machine without libhwloc: cores `0..nodes * cores * threads`, numbered as Linux does (first threads first).
fn machine(nodes: usize, cores: usize, threads: usize) -> Topology {
    let physical = nodes * cores;
    let mut all = Vec::new();
    for physical_index in 0..physical {
        for thread in 0..threads {
            let node = Some((physical_index / cores) as u32);
            all.push(Core { os_index: physical_index + thread * physical, physical: physical_index, node });
        }
    }
    let nodes = (0..nodes as u32).map(|os_index| Node { os_index, memory_bytes: 1 << 30 }).collect();
    Topology { cores: all, nodes, devices: Vec::new(), source: Source::Description }
}

fn anywhere(cores: usize) -> Demand {
    Demand { cores, near: None }
}

#[test]
fn this_machine_has_cores_that_we_may_run_on() {
    let topology = Topology::discover();
    let found: BTreeSet<_> = topology.cores.iter().map(|core| core.os_index).collect();
    assert!(!found.is_empty() && !topology.nodes.is_empty());
    assert!(found.is_subset(&flat::allowed_cores()));
    if hwloc_is_here("this_machine_has_cores_that_we_may_run_on (by hwloc)") {
        assert_eq!(topology.source, Source::Hwloc);
        assert_eq!(found, flat::allowed_cores());
        let nodes: Vec<_> = topology.nodes.iter().map(|node| Some(node.os_index)).collect();
        assert!(topology.cores.iter().all(|core| nodes.contains(&core.node)));
    }
}

#[test]
fn a_thread_that_may_use_one_core_sees_one() {
    let core = *flat::allowed_cores().first().unwrap();
    let pinned = std::thread::spawn(move || {
        let mut mask = nix::sched::CpuSet::new();
        mask.set(core).unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &mask).unwrap();
        Topology::discover()
    });
    let topology = pinned.join().unwrap();
    assert_eq!(topology.cores.iter().map(|core| core.os_index).collect::<Vec<_>>(), [core]);
}

#[test]
fn without_hwloc_the_topology_is_flat_and_says_why() {
    let topology = Topology::discover_with(Err("it is a test".to_owned()));
    assert_eq!(topology.source, Source::Flat("it is a test".to_owned()));
    assert_eq!(topology.cores.len(), flat::allowed_cores().len());
    let error = topology.node_near("mlx5_0").unwrap_err().to_string();
    assert!(error.contains("no device at all (flat topology: it is a test)"), "{error}");
}

#[test]
fn a_description_that_is_none_is_refused() {
    if !hwloc_is_here("a_description_that_is_none_is_refused") {
        return;
    }
    for text in ["a box", "node:2 \0 core:2", ""] {
        let error = Topology::from_synthetic(text).unwrap_err().to_string();
        assert!(error.contains("cannot read a machine's description"), "{text:?}: {error}");
    }
    for text in ["", "<topology/>", "no XML", &BOX[..BOX.len() / 2]] {
        assert!(Topology::from_xml(text).is_err(), "{text:?}");
    }
    let error = Topology::from_xml_file(Path::new("/nowhere/box.xml")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/box.xml"), "{error}");
}

#[test]
fn synthetic_machines_are_read() {
    if !hwloc_is_here("synthetic_machines_are_read") {
        return;
    }
    let topology = Topology::from_synthetic("package:2 numa:1(memory=4GB) core:3 pu:2").unwrap();
    assert_eq!(topology.cores.len(), 12);
    let node_of = |physical: usize| Some((physical / 3) as u32);
    for (index, core) in topology.cores.iter().enumerate() {
        assert_eq!((core.physical, core.node), (index / 2, node_of(index / 2)));
    }
    assert_eq!(topology.nodes, [0, 1].map(|os_index| Node { os_index, memory_bytes: 4_000_000_000 }));
    assert_eq!((topology.devices.len(), topology.source), (0, Source::Description));
    // Clusters within a socket: a node each.
    let clusters = Topology::from_synthetic("package:2 group:2 numa:1 core:2 pu:1").unwrap();
    assert_eq!(clusters.nodes.len(), 4);
    assert_eq!(clusters.cores[7].node, Some(3));
}

#[test]
fn the_box_has_its_nics_and_gpus_where_they_are() {
    if !hwloc_is_here("the_box_has_its_nics_and_gpus_where_they_are") {
        return;
    }
    let topology = Topology::from_xml(BOX).unwrap();
    assert_eq!((topology.cores.len(), topology.nodes.len()), (128, 2));
    assert_eq!(topology.cores[65], Core { os_index: 96, physical: 32, node: Some(1) });
    let of = |kind| topology.devices.iter().filter(move |device| device.kind == kind);
    // The onboard NIC is a NIC; the management processor's screen is no GPU.
    assert_eq!([DeviceKind::Nic, DeviceKind::Rdma, DeviceKind::Gpu].map(|kind| of(kind).count()), [9, 8, 8]);
    for (index, (rdma, gpu)) in of(DeviceKind::Rdma).zip(of(DeviceKind::Gpu)).enumerate() {
        let node = Some(index as u32 / 4);
        assert_eq!((rdma.name.as_str(), rdma.node), (format!("mlx5_{index}").as_str(), node));
        assert_eq!((Some(&gpu.name), gpu.node), (gpu.pci.as_ref(), node));
    }
    let last = topology.devices.last().unwrap();
    assert_eq!((last.name.as_str(), last.pci.as_deref()), ("mlx5_7", Some("0000:c3:00.0")));
    assert_eq!(topology.node_near("ibs5").unwrap(), Some(1));
    assert_eq!(topology.node_near("0000:12:00.0").unwrap(), Some(0));
    let error = topology.node_near("mlx5_8").unwrap_err().to_string();
    assert!(error.contains("no NIC or GPU `mlx5_8`") && error.contains("mlx5_7"), "{error}");
}

#[test]
fn a_device_of_the_whole_machine_is_near_no_node() {
    if !hwloc_is_here("a_device_of_the_whole_machine_is_near_no_node") {
        return;
    }
    // The same box with firmware that puts the first switch under the machine instead of the socket.
    let begin = BOX.find("<object type=\"Bridge\"").unwrap();
    let end = BOX[begin..].find("</object></object>").unwrap() + begin + "</object></object>\n".len();
    let close = BOX.rfind("</object>").unwrap();
    let moved = [&BOX[..begin], &BOX[end..close], &BOX[begin..end], &BOX[close..]].concat();
    let topology = Topology::from_xml(&moved).unwrap();
    assert_eq!(topology.node_near("mlx5_0").unwrap(), None);
    assert_eq!(topology.node_near("mlx5_1").unwrap(), Some(0));
}

#[test]
fn eight_servers_near_eight_nics_get_cores_of_their_own_on_the_right_socket() {
    if !hwloc_is_here("eight_servers_near_eight_nics_get_cores_of_their_own_on_the_right_socket") {
        return;
    }
    let topology = Topology::from_xml(BOX).unwrap();
    let near = |nic: usize| topology.node_near(&format!("mlx5_{nic}")).unwrap();
    let demands: Vec<_> = (0..8).map(|nic| Demand { cores: 4, near: near(nic) }).collect();
    let placements = topology.assign_cores(&demands, &[]);
    let mut physical = BTreeSet::new();
    for (nic, placement) in placements.iter().enumerate() {
        assert_eq!((placement.node, placement.cores.len()), (near(nic), 4));
        for core in &placement.cores {
            let core = topology.cores.iter().find(|known| known.os_index == *core).unwrap();
            assert_eq!(core.node, near(nic));
            assert!(physical.insert(core.physical), "two ranks on physical core {}", core.physical);
        }
    }
    // A second job that knows of the first stays off its physical cores.
    let taken: Vec<usize> = placements.iter().flat_map(|placement| placement.cores.clone()).collect();
    for placement in topology.assign_cores(&demands, &taken) {
        for core in placement.cores {
            assert!(physical.insert(core % 64), "both jobs on physical core {}", core % 64);
        }
    }
}

#[test]
fn ranks_without_a_wish_spread_over_the_sockets_and_stay_whole() {
    let placements = machine(2, 4, 2).assign_cores(&[anywhere(2); 4], &[]);
    assert_eq!(placements.iter().map(|placement| placement.node.unwrap()).collect::<Vec<_>>(), [0, 1, 0, 1]);
    let cores: Vec<_> = placements.iter().map(|placement| placement.cores.clone()).collect();
    assert_eq!(cores, [[0, 1], [4, 5], [2, 3], [6, 7]], "no two on one physical core");
}

#[test]
fn hardware_siblings_are_dealt_last_and_dealing_starts_over_when_all_are_used() {
    let placements = machine(1, 2, 2).assign_cores(&[anywhere(1); 6], &[]);
    let cores: Vec<_> = placements.iter().map(|placement| placement.cores[0]).collect();
    assert_eq!(cores, [0, 1, 2, 3, 0, 1]);
}

#[test]
fn a_full_socket_lends_from_the_other_and_memory_stays_at_home() {
    let demand = Demand { cores: 3, near: Some(1) };
    let placements = machine(2, 2, 1).assign_cores(&[demand], &[]);
    assert_eq!(placements, [Placement { cores: vec![2, 3, 0], node: Some(1) }]);
    // Nothing left at home: memory goes where the rank runs.
    let placements = machine(2, 2, 1).assign_cores(&[Demand { cores: 2, near: Some(1) }], &[2, 3]);
    assert_eq!(placements, [Placement { cores: vec![0, 1], node: Some(0) }]);
}

#[test]
fn a_rank_gets_each_core_once_however_many_it_wants() {
    let placements = machine(1, 2, 1).assign_cores(&[anywhere(5), anywhere(0)], &[]);
    assert_eq!(placements[0].cores, [0, 1]);
    assert!(placements[1].cores.is_empty());
    let unknown_node = machine(1, 2, 1).assign_cores(&[Demand { cores: 1, near: Some(9) }], &[77]);
    assert_eq!(unknown_node, [Placement { cores: vec![0], node: Some(0) }]);
}

proptest! {
    #[test]
    fn loads_never_differ_by_more_than_one(
        nodes in 1..3usize, cores in 1..5usize, threads in 1..3usize,
        demands in prop::collection::vec((0..6usize, prop::option::of(0..4u32)), 0..12),
        taken in 0..5usize,
    ) {
        let topology = machine(nodes, cores, threads);
        let total = topology.cores.len();
        let demands: Vec<_> = demands.into_iter().map(|(cores, near)| Demand { cores, near }).collect();
        let taken: Vec<usize> = (0..taken.min(total)).collect();
        let placements = topology.assign_cores(&demands, &taken);
        prop_assert_eq!(placements.len(), demands.len());
        let mut loads: BTreeMap<usize, usize> = topology.cores.iter().map(|core| (core.os_index, 0)).collect();
        for (placement, demand) in placements.iter().zip(&demands) {
            prop_assert_eq!(placement.cores.len(), demand.cores.min(total));
            prop_assert_eq!(placement.cores.iter().collect::<BTreeSet<_>>().len(), placement.cores.len());
        }
        for core in placements.iter().flat_map(|placement| &placement.cores).chain(&taken) {
            *loads.get_mut(core).unwrap() += 1;
        }
        let (least, most) = (loads.values().min().unwrap(), loads.values().max().unwrap());
        prop_assert!(most - least <= 1, "{:?}", loads);
        prop_assert_eq!(placements, topology.assign_cores(&demands, &taken), "the same demands, another answer");
    }
}
