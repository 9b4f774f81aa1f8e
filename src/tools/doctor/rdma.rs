//! RDMA devices: the library and device files that reach them, each port's state, the GID to use, packet size, flow control,
//! and the NUMA node.
//!
//! Invariant: everything is read from /sys; no library is loaded, so that what keeps one from working can be said.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use super::{Item, Tree};
use crate::{
    mem::{Topology, topology::DeviceKind},
    transport::verbs::RAILS_MAX,
};

const DEVICES: &str = "/sys/class/infiniband";

/// Bytes that RoCE v2 may need around its payload: GRH 40, UDP 8, BTH 12, XRC 4, atomic 28, ICRC 4 (Linux, ib_addr.h,
/// `iboe_get_mtu`).
const ROCE_HEADERS: u64 = 96;

/// The payloads that an RDMA packet can have (`enum ib_mtu`).
const MTUS: [u64; 5] = [4096, 2048, 1024, 512, 256];

/// Where Debian, Red Hat and SUSE put libraries.
const LIBRARIES: [&str; 5] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"];

/// Names of the RDMA devices.
pub(super) fn devices(tree: &Tree) -> Vec<String> {
    tree.names(DEVICES)
}

pub(super) fn look(tree: &Tree, topology: &Topology) -> Vec<Item> {
    let devices = devices(tree);
    if devices.is_empty() {
        let mend = "load the NIC's driver (modprobe mlx5_ib), or make a soft one: modprobe rdma_rxe && rdma link add rxe0 \
                    type rxe netdev INTERFACE";
        let found = "no RDMA device in /sys/class/infiniband; tcp is used";
        return vec![Item::not_here("rdma devices", found).mend(mend)];
    }
    let mut items = vec![Item::fine("rdma devices", devices.join(", ")), library(tree)];
    for device in &devices {
        items.push(device_file(tree, device).of(device));
        for port in tree.names(&format!("{DEVICES}/{device}/ports")) {
            let port = Port { tree, device, folder: format!("{DEVICES}/{device}/ports/{port}"), number: port };
            items.extend(port.look());
        }
        items.push(near(tree, topology, device).of(device));
    }
    items.extend(rails(tree, &devices));
    items
}

/// Ports that are up, of one kind of link and on one NUMA node: a job may use several at once, and uses one unless it is told.
fn rails(tree: &Tree, devices: &[String]) -> Option<Item> {
    let mut alike: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for device in devices {
        let folder = format!("{DEVICES}/{device}");
        let node = tree.text(&format!("{folder}/device/numa_node")).unwrap_or_default();
        for port in tree.names(&format!("{folder}/ports")) {
            let read = |file: &str| tree.text(&format!("{folder}/ports/{port}/{file}")).unwrap_or_default();
            if read("state").contains("ACTIVE") {
                alike.entry((node.clone(), read("link_layer"))).or_default().push(format!("{device}:{port}"));
            }
        }
    }
    let ports = alike.into_values().max_by_key(Vec::len).filter(|ports| ports.len() > 1)?;
    let several = &ports[..ports.len().min(RAILS_MAX)];
    let told = format!("GRADWIRE_RAILS={} or GRADWIRE_HCA={}", several.len(), several.join(","));
    Some(Item::fine("rails", format!("{} are alike; a job uses one of them, several with {told}", ports.join(", "))))
}

/// Programs find devices through libibverbs and a provider for each kind of device.
fn library(tree: &Tree) -> Item {
    let found = LIBRARIES.iter().map(|folder| format!("{folder}/libibverbs.so.1")).find(|path| tree.exists(path));
    match found {
        Some(path) => Item::fine("libibverbs", path),
        None => Item::wrong(
            "libibverbs",
            "there are RDMA devices, but no libibverbs.so.1 in the usual places",
            "apt install ibverbs-providers (dnf install libibverbs)",
        ),
    }
}

/// The character device through which a process reaches the RDMA device. In a container it is often missing.
fn device_file(tree: &Tree, device: &str) -> Item {
    let classes = "/sys/class/infiniband_verbs";
    let verbs = tree.names(classes);
    let own = verbs.iter().find(|verb| tree.text(&format!("{classes}/{verb}/ibdev")).as_deref() == Some(device));
    match own {
        None => Item::wrong("device file", "the kernel has no user access to it", "modprobe ib_uverbs"),
        Some(verb) if tree.exists(&format!("/dev/infiniband/{verb}")) => {
            Item::fine("device file", format!("/dev/infiniband/{verb}"))
        }
        Some(verb) => Item::wrong(
            "device file",
            format!("/dev/infiniband/{verb} is missing, as in a container that was not given it"),
            "docker run --device=/dev/infiniband --cap-add=IPC_LOCK ... (Kubernetes: the RDMA device plugin)",
        ),
    }
}

struct Port<'a> {
    tree: &'a Tree,
    device: &'a str,
    number: String,
    folder: String,
}

/// A GID that is set, and what /sys says of it.
struct Gid {
    index: String,
    address: Ipv6Addr,
    is_v2: bool,
    interface: Option<String>,
}

impl Gid {
    /// Lower is better: RoCE v2 with an IPv4 address goes through any router and firewall that IPv4 goes through.
    fn rank(&self) -> u8 {
        match (self.is_v2, self.address.to_ipv4_mapped().is_some(), self.address.is_unicast_link_local()) {
            (true, true, _) => 0,
            (true, false, false) => 1,
            (true, false, true) => 2,
            (false, ..) => 3,
        }
    }

    fn text(&self) -> String {
        let address = self.address.to_ipv4_mapped().map_or_else(|| self.address.to_string(), |ip| ip.to_string());
        format!("index {} ({address}, {})", self.index, if self.is_v2 { "RoCE v2" } else { "IB/RoCE v1" })
    }
}

impl Port<'_> {
    fn read(&self, file: &str) -> Option<String> {
        self.tree.text(&format!("{}/{file}", self.folder))
    }

    fn is_ethernet(&self) -> bool {
        self.read("link_layer").as_deref() == Some("Ethernet")
    }

    fn interface(&self) -> Option<String> {
        let of_gids = self.tree.names(&format!("{}/gid_attrs/ndevs", self.folder));
        let of_gids = of_gids.iter().find_map(|index| self.read(&format!("gid_attrs/ndevs/{index}")));
        // A soft device names its interface itself; hardware has its interfaces beside it, numbered from 0 where ports count
        // from 1.
        of_gids.or_else(|| self.tree.text(&format!("{DEVICES}/{}/parent", self.device))).or_else(|| {
            let folder = format!("{DEVICES}/{}/device/net", self.device);
            let port: u64 = self.number.parse().ok()?;
            self.tree.names(&folder).into_iter().find(|name| {
                self.tree.number(&format!("{folder}/{name}/dev_port")).is_none_or(|number| number + 1 == port)
            })
        })
    }

    fn look(&self) -> Vec<Item> {
        let (interface, subject) = (self.interface(), format!("{}/{}", self.device, self.number));
        let mut items = vec![self.state(interface.as_deref())];
        // What is said of a port that is down would only repeat it.
        if items[0].verdict == super::Verdict::Fine {
            items.push(self.gid(interface.as_deref()));
            if let Some(interface) = interface.filter(|_| self.is_ethernet()) {
                items.push(self.packet(&interface));
                items.push(self.flow_control(&interface));
            }
        }
        items.into_iter().map(|item| item.of(&subject)).collect()
    }

    /// `state` reads as in "4: ACTIVE", `phys_state` as in "5: LinkUp".
    fn state(&self, interface: Option<&str>) -> Item {
        let word =
            |text: Option<String>| text.map(|t| t.split_once(": ").map_or(t.clone(), |(_, word)| word.to_string()));
        let state = word(self.read("state")).unwrap_or_else(|| "unknown".into());
        let physical = word(self.read("phys_state")).unwrap_or_else(|| "unknown".into());
        let layer = self.read("link_layer").unwrap_or_else(|| "unknown link".into());
        let rate = self.read("rate").map(|rate| format!(", {rate}")).unwrap_or_default();
        let found = format!("{state} (link {physical}), {layer}{rate}");
        match (state.as_str(), self.is_ethernet(), interface) {
            ("ACTIVE", ..) => Item::fine("port", found),
            (_, true, Some(name)) => Item::wrong(
                "port",
                found,
                format!(
                    "ip link set {name} up; then the cable, the transceiver and the switch's port (ethtool {name})"
                ),
            ),
            ("INIT", false, _) => {
                Item::wrong("port", found, "no subnet manager has configured it: start opensm, or the switch's own")
            }
            _ => {
                Item::wrong("port", found, format!("look at the cable and the switch's port (ibstat {})", self.device))
            }
        }
    }

    fn gids(&self) -> Vec<Gid> {
        let indices = self.tree.names(&format!("{}/gids", self.folder));
        let gids = indices.into_iter().filter_map(|index| {
            let address: Ipv6Addr = self.read(&format!("gids/{index}"))?.parse().ok()?;
            let is_v2 = self.read(&format!("gid_attrs/types/{index}")).is_some_and(|kind| kind == "RoCE v2");
            let interface = self.read(&format!("gid_attrs/ndevs/{index}"));
            (!address.is_unspecified()).then_some(Gid { index, address, is_v2, interface })
        });
        gids.collect()
    }

    fn gid(&self, interface: Option<&str>) -> Item {
        let gids = self.gids();
        let (count, name) = (gids.len(), interface.unwrap_or("INTERFACE"));
        let address = format!("give {name} an IPv4 address: ip address add ADDRESS/PREFIX dev {name}");
        let Some(best) = gids.into_iter().min_by_key(Gid::rank) else {
            return Item::wrong("gid", "the GID table is empty", address);
        };
        let on = best.interface.as_ref().map(|name| format!(" on {name}")).unwrap_or_default();
        let found = format!("of {count} we would use {}{on}", best.text());
        match (self.is_ethernet(), best.rank()) {
            (false, _) | (true, 0 | 1) => Item::fine("gid", found),
            (true, 2) => {
                Item::wrong("gid", format!("{found}: a link-local address, which no router forwards"), address)
            }
            (true, _) => Item::wrong("gid", format!("{found}: there is no RoCE v2"), address),
        }
    }

    /// The active MTU follows the interface's: the largest that leaves room for the headers.
    fn packet(&self, interface: &str) -> Item {
        let Some(mtu) = self.tree.number(&format!("/sys/class/net/{interface}/mtu")) else {
            return Item::not_here("mtu", format!("{interface} tells no MTU"));
        };
        let active = MTUS.into_iter().find(|size| size + ROCE_HEADERS <= mtu);
        let mend = format!("ip link set {interface} mtu 4200 (or 9000), on every host, and as much on the switch");
        match active {
            Some(4096) => Item::fine("mtu", format!("{interface} has {mtu}: RDMA packets of 4096 bytes")),
            Some(size) => {
                Item::wrong("mtu", format!("{interface} has {mtu}: RDMA packets of {size} bytes instead of 4096"), mend)
            }
            None => Item::wrong("mtu", format!("{interface} has {mtu}: too small for any RDMA packet"), mend),
        }
    }

    /// What the vendors' drivers show in /sys; others tell it over netlink only.
    fn flow_control(&self, interface: &str) -> Item {
        let enabled = |folder: &str| -> Option<Vec<String>> {
            let folder = format!("/sys/class/net/{interface}/{folder}");
            let all = self.tree.names(&folder);
            let on =
                all.iter().filter(|priority| self.tree.number(&format!("{folder}/{priority}")) == Some(1)).cloned();
            (!all.is_empty()).then(|| on.collect())
        };
        let (Some(notify), Some(react)) = (enabled("ecn/roce_np/enable"), enabled("ecn/roce_rp/enable")) else {
            let found = format!("{interface}'s driver shows neither PFC nor ECN in /sys");
            return Item::not_here("pfc/ecn", found)
                .mend(format!("to see them: dcb pfc show dev {interface}, mlnx_qos -i {interface}"));
        };
        let both: Vec<String> = notify.into_iter().filter(|priority| react.contains(priority)).collect();
        match both.is_empty() {
            false => Item::fine("pfc/ecn", format!("ECN is on for priorities {}", both.join(","))),
            true => Item::wrong(
                "pfc/ecn",
                format!("ECN is off for every priority of {interface}: a congested switch drops packets"),
                format!(
                    "echo 1 > /sys/class/net/{interface}/ecn/roce_np/enable/3, and the same in roce_rp; mark on the switch"
                ),
            ),
        }
    }
}

/// A device is best served by threads and memory of its own NUMA node.
fn near(tree: &Tree, topology: &Topology, device: &str) -> Item {
    let told = tree.text(&format!("{DEVICES}/{device}/device/numa_node")).and_then(|node| node.parse::<i64>().ok());
    // The kernel says -1 where there is no such thing.
    let Some(node) = told.and_then(|node| u32::try_from(node).ok()) else {
        return Item::not_here("numa", "it belongs to no NUMA node");
    };
    let ours: BTreeSet<u32> = topology.cores.iter().filter_map(|core| core.node).collect();
    if !ours.is_empty() && !ours.contains(&node) {
        return Item::wrong(
            "numa",
            format!(
                "it is on node {node}, and this process may run on cores of {ours:?} only: every byte crosses sockets"
            ),
            format!("numactl --cpunodebind={node} --membind={node} ..., or the container's cpuset"),
        );
    }
    let gpus = topology.devices.iter().filter(|d| d.kind == DeviceKind::Gpu && d.node == Some(node));
    let gpus: Vec<&str> = gpus.map(|gpu| gpu.name.as_str()).collect();
    let near = if gpus.is_empty() { String::new() } else { format!(", with {}", gpus.join(", ")) };
    Item::fine("numa", format!("on node {node}{near}"))
}
