//! What /proc and /sys tell of a machine without libhwloc: which cores we may use, and that there is memory.
//!
//! Invariant: never fails; what cannot be read is assumed to be as simple as possible.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, fs, thread};

use super::{Core, Node, Source, Topology};

/// The cores that the calling thread may run on (cpuset and affinity). Read as text, because the system call needs a buffer whose
/// size nobody knows beforehand.
pub(super) fn allowed_cores() -> BTreeSet<usize> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.and_then(parse_list).unwrap_or_else(|| (0..thread::available_parallelism().map_or(1, usize::from)).collect())
}

/// One node, no devices, and `why`.
pub(super) fn topology(allowed: &BTreeSet<usize>, why: String) -> Topology {
    let online = fs::read_to_string("/sys/devices/system/node/online").ok();
    // On a machine of several nodes "node 0" would be wrong for most cores; better not to bind memory there at all.
    let several_nodes = online.as_deref().and_then(parse_list).is_some_and(|nodes| nodes.len() > 1);
    let node = if several_nodes { None } else { Some(0) };
    let mut cores: Vec<_> =
        allowed.iter().map(|&os_index| Core { os_index, physical: first_sibling(os_index), node }).collect();
    cores.sort_by_key(|core| (core.physical, core.os_index));
    let nodes = vec![Node { os_index: 0, memory_bytes: memory_bytes() }];
    Topology { cores, nodes, devices: Vec::new(), source: Source::Flat(why) }
}

/// The lowest number among the hardware threads of a core stands for the core.
fn first_sibling(os_index: usize) -> usize {
    let path = format!("/sys/devices/system/cpu/cpu{os_index}/topology/thread_siblings_list");
    let siblings = fs::read_to_string(path).ok().as_deref().and_then(parse_list);
    siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(os_index)
}

fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0u64) * 1024
}

/// The kernel's way to write a set, `0-3,8`; `None` if it is empty or something else.
fn parse_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut set = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // No kernel counts a million CPUs; a number beyond is not from one.
        if first > last || last >= 1 << 20 {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let list = |text: &str| parse_list(text).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(list("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(list("\t5"), Some(vec![5]));
        for wrong in ["", "\n", "a", "3-1", "1,", "0-99999999999", "0-4000000000"] {
            assert_eq!(list(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_cores_are_those_of_the_affinity_mask() {
        let mask = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
        let expected: BTreeSet<usize> =
            (0..nix::sched::CpuSet::count()).filter(|&core| mask.is_set(core).unwrap()).collect();
        assert_eq!(allowed_cores(), expected);
    }

    #[test]
    fn a_flat_topology_has_our_cores_one_node_and_its_reason() {
        let allowed = allowed_cores();
        let topology = topology(&allowed, "a test".to_owned());
        assert_eq!(topology.cores.iter().map(|core| core.os_index).collect::<BTreeSet<_>>(), allowed);
        assert_eq!(topology.nodes.len(), 1);
        assert!(topology.nodes[0].memory_bytes > 1 << 20);
        assert_eq!(topology.source.to_string(), "flat topology: a test");
    }
}
