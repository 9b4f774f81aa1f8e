//! GPUs, whether servers can compute on them, and whether an RDMA device can reach their memory.
//!
//! Invariant: `look` reads /proc and /sys alone; `ask` asks the driver, and makes no context.

use super::{Item, Tree, rdma};
use crate::{
    cuda,
    mem::{Topology, topology::DeviceKind},
};

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

/// What the driver says. A kernel module without its library is a common half of an installation, in containers above all.
pub(super) fn ask(tree: &Tree) -> Item {
    match (cuda::devices(), cuda::driver_version()) {
        (Ok(devices), Ok(version)) => {
            let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
            let one = |info: &cuda::DeviceInfo| format!("{info}, {:.1} GiB", gib(info.memory_bytes));
            let names: Vec<String> = devices.iter().map(one).collect();
            Item::fine("cuda", format!("{}; driver for CUDA {version}", names.join(", ")))
        }
        (Err(why), _) | (_, Err(why)) if tree.exists(VERSION) => Item::wrong(
            "cuda",
            format!("the kernel module is loaded, but {why}"),
            "install libcuda.so.1 of the module's version (Debian: libcuda1), or start the container with its GPUs (--gpus all)",
        ),
        (Err(why), _) | (_, Err(why)) => Item::not_here("cuda", why.to_string()),
    }
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
