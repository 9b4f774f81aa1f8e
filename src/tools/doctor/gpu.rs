//! GPUs, and whether an RDMA device can reach their memory.
//!
//! Invariant: read from /proc and /sys alone; no driver is asked.

use super::{Item, Tree, rdma};
use crate::mem::{Topology, topology::DeviceKind};

const VERSION: &str = "/proc/driver/nvidia/version";

pub(super) fn look(tree: &Tree, topology: &Topology) -> Vec<Item> {
    if !tree.exists(VERSION) && !tree.exists("/sys/module/nvidia") {
        return vec![Item::not_here("gpu", "no NVIDIA driver is loaded")];
    }
    let nodes = topology
        .devices
        .iter()
        .filter(|device| device.kind == DeviceKind::Gpu)
        .map(|gpu| gpu.node.map_or_else(|| gpu.name.clone(), |node| format!("{} on node {node}", gpu.name)));
    let nodes: Vec<String> = nodes.collect();
    let found = match nodes.is_empty() {
        true => "the NVIDIA driver is loaded".to_string(),
        false => nodes.join(", "),
    };
    vec![Item::fine("gpu", found), direct(tree)]
}

/// dma-buf is the way of the open kernel modules, nvidia-peermem that of the others.
fn direct(tree: &Tree) -> Item {
    if tree.exists("/sys/module/nvidia_peermem") {
        return Item::fine("gpu memory", "nvidia-peermem is loaded: an RDMA device reaches GPU memory");
    }
    let open = tree.text(VERSION).is_some_and(|text| text.contains("Open Kernel Module"));
    match (open, rdma::devices(tree).is_empty()) {
        (true, _) => Item::fine("gpu memory", "the open kernel module exports it as dma-buf"),
        (false, true) => Item::not_here("gpu memory", "no RDMA device would reach it"),
        (false, false) => Item::wrong(
            "gpu memory",
            "neither nvidia-peermem nor the open kernel module (dma-buf): every byte goes through host memory",
            "modprobe nvidia-peermem, and its name in /etc/modules-load.d/",
        ),
    }
}
