//! Where in the machine things are: cores, NUMA nodes, and which node each NIC and GPU hangs off.
//!
//! From libhwloc where it can be loaded, else flat (every core alike), with the reason said once. hwloc also reads machines
//! described in words or in XML, so placement can be tried for a machine that one does not have.
//!
//! Invariant: a `Topology` is plain data; of [`Topology::discover`] it holds at least one core, and only cores that this process
//! may run on.

mod assign;
mod flat;
mod walk;

use std::{fmt, path::Path, sync::Once};

pub use assign::{Demand, Placement};

use crate::{Error, Result, sys::hwloc};

/// A machine, as far as placement cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Ascending by physical core, so that threads of one core are neighbours.
    pub cores: Vec<Core>,
    /// Ascending by number.
    pub nodes: Vec<Node>,
    /// NICs, RDMA devices and GPUs, by PCI address; none in a flat topology.
    pub devices: Vec<Device>,
    /// Whence this is known.
    pub source: Source,
}

/// What the operating system calls a CPU: something that a thread can be pinned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core {
    /// The number that `sched_setaffinity` takes.
    pub os_index: usize,
    /// Which physical core this is a hardware thread of; two of one core share its units.
    pub physical: usize,
    /// The nearest NUMA node; `None` if that is not known.
    pub node: Option<u32>,
}

/// A NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// The number that `mbind` and [`crate::mem::RegionOptions::numa_node`] take.
    pub os_index: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// A PCI device that moves or works on tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `eth0`, `mlx5_0`, `cuda0`; a GPU without a name is called by its PCI address.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The nearest NUMA node; `None` if that is not known.
    pub node: Option<u32>,
    /// `0000:17:00.0`; `None` if it is not behind PCI.
    pub pci: Option<String>,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceKind {
    /// A network interface of the kernel.
    Nic,
    /// An RDMA device; the same hardware is often a NIC too, and then listed twice.
    Rdma,
    /// A GPU or accelerator.
    Gpu,
}

/// Whence a topology is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// libhwloc looked at this machine.
    Hwloc,
    /// libhwloc read a description.
    Description,
    /// /proc and /sys, for the reason given.
    Flat(String),
}

impl Topology {
    /// This machine, restricted to the cores that the calling thread may run on (cpuset, taskset): call it before pinning. Never
    /// fails: where hwloc cannot be used the topology is flat, and a warning says why, once a process.
    pub fn discover() -> Topology {
        Topology::discover_with(hwloc::table().map_err(str::to_owned))
    }

    fn discover_with(table: Result<&hwloc::Table, String>) -> Topology {
        static FLAT: Once = Once::new();
        let allowed = flat::allowed_cores();
        let looked = table.and_then(|table| walk::load(table, walk::Input::ThisMachine)).and_then(|mut topology| {
            topology.cores.retain(|core| allowed.contains(&core.os_index));
            if topology.cores.is_empty() {
                return Err(format!("hwloc knows none of the cores {allowed:?} that we may run on"));
            }
            Ok(topology)
        });
        looked.unwrap_or_else(|why| {
            FLAT.call_once(|| tracing::warn!("flat topology (all cores alike, no devices): {why}"));
            flat::topology(&allowed, why)
        })
    }

    /// A machine in hwloc's words, as in `package:2 numa:1 core:8 pu:2`. Synthetic machines have no devices.
    pub fn from_synthetic(description: &str) -> Result<Topology> {
        described(walk::Input::Synthetic(description))
    }

    /// A machine in hwloc's XML, as `lstopo --of xml` prints it.
    pub fn from_xml(xml: &str) -> Result<Topology> {
        described(walk::Input::Xml(xml))
    }

    /// A machine in a file of hwloc's XML.
    pub fn from_xml_file(path: &Path) -> Result<Topology> {
        Topology::from_xml(&std::fs::read_to_string(path).map_err(|e| Error::file("read", path, e))?)
    }

    /// The node nearest to a device, by the device's name or PCI address; `Ok(None)` where that is not known. A device that is
    /// not there is an error that lists those that are.
    pub fn node_near(&self, device: &str) -> Result<Option<u32>> {
        let found = self.devices.iter().find(|known| known.name == device || known.pci.as_deref() == Some(device));
        found.map(|known| known.node).ok_or_else(|| {
            let known: Vec<_> = self.devices.iter().map(|known| known.name.as_str()).collect();
            let known = if known.is_empty() { "no device at all".to_owned() } else { known.join(", ") };
            Error::Config(format!("no NIC or GPU `{device}` here; this machine has {known} ({})", self.source))
        })
    }
}

fn described(input: walk::Input<'_>) -> Result<Topology> {
    hwloc::table()
        .map_err(str::to_owned)
        .and_then(|table| walk::load(table, input))
        .map_err(|why| Error::Config(format!("cannot read a machine's description: {why}")))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Hwloc => write!(f, "found by hwloc"),
            Source::Description => write!(f, "from a description"),
            Source::Flat(why) => write!(f, "flat topology: {why}"),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Nic => "NIC",
            DeviceKind::Rdma => "RDMA",
            DeviceKind::Gpu => "GPU",
        })
    }
}

#[cfg(test)]
mod tests;
