//! Which device, port and address to use: read from /sys/class/infiniband, chosen by wish and by nearness.
//!
//! Invariant: the choice is a function of what the folder says and of the options; what was asked for is had or refused, never
//! silently replaced.
#![forbid(unsafe_code)]

use std::{fs, path::Path};

use super::{
    VerbsOptions,
    address::{Gid, Link},
};

/// Where the kernel describes RDMA devices.
pub(super) const SYSFS: &str = "/sys/class/infiniband";

/// An address of a port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) device: String,
    pub(super) port: u8,
    pub(super) gid_index: u8,
    pub(super) gid: Gid,
    pub(super) link: Link,
    pub(super) is_active: bool,
    /// Where the device is attached, if the kernel knows.
    pub(super) numa_node: Option<u32>,
}

/// Every address of every port, by device, port and place.
pub(super) fn candidates(root: &Path) -> Vec<Candidate> {
    let mut found = Vec::new();
    for device in names(root) {
        let folder = root.join(&device);
        let numa_node = read(&folder.join("device/numa_node")).and_then(|text| text.parse().ok());
        for port in numbers(&folder.join("ports")) {
            let port_folder = folder.join("ports").join(port.to_string());
            let is_active = read(&port_folder.join("state")).is_some_and(|state| state.contains("ACTIVE"));
            let is_infiniband = read(&port_folder.join("link_layer")).is_some_and(|layer| layer == "InfiniBand");
            for gid_index in numbers(&port_folder.join("gids")) {
                let Some(gid) = read(&port_folder.join(format!("gids/{gid_index}"))).and_then(|text| parse(&text))
                else {
                    continue;
                };
                // The kernel answers EINVAL for the type of a place that is not used.
                let kind = read(&port_folder.join(format!("gid_attrs/types/{gid_index}")));
                let link = match (is_infiniband, kind.as_deref()) {
                    (true, _) => Link::InfiniBand,
                    (false, Some("RoCE v2")) => Link::RoceV2,
                    (false, _) => Link::RoceV1,
                };
                if !gid.is_zero() {
                    let device = device.clone();
                    found.push(Candidate { device, port, gid_index, gid, link, is_active, numa_node });
                }
            }
        }
    }
    found
}

/// The best of them, or why there is none.
pub(super) fn choose(candidates: &[Candidate], options: &VerbsOptions) -> Result<Candidate, String> {
    let wanted = |candidate: &&Candidate| {
        options.hca.as_ref().is_none_or(|hca| *hca == candidate.device)
            && options.port.is_none_or(|port| port == candidate.port)
            && options.gid_index.is_none_or(|index| index == candidate.gid_index)
    };
    let best = candidates.iter().filter(wanted).filter(|candidate| candidate.is_active).min_by_key(|candidate| {
        let is_far = match (options.numa_node, candidate.numa_node) {
            (Some(wish), Some(node)) => wish != node,
            _ => false,
        };
        (is_far, rank(candidate), candidate.device.clone(), candidate.port, candidate.gid_index)
    });
    best.cloned().ok_or_else(|| refusal(candidates, options))
}

/// 0 for what we would rather have: what is routed before what is not, IPv4 before IPv6.
fn rank(candidate: &Candidate) -> u8 {
    match candidate.link {
        Link::InfiniBand => 0,
        Link::RoceV2 if candidate.gid.ipv4().is_some() => 0,
        Link::RoceV2 if !candidate.gid.is_link_local() => 1,
        Link::RoceV2 => 2,
        Link::RoceV1 => 3,
    }
}

fn refusal(candidates: &[Candidate], options: &VerbsOptions) -> String {
    let mut ports: Vec<String> = candidates
        .iter()
        .map(|candidate| {
            let state = if candidate.is_active { "up" } else { "down" };
            format!("{}:{} ({state})", candidate.device, candidate.port)
        })
        .collect();
    ports.dedup();
    if ports.is_empty() {
        return "no port of an RDMA device has an address: is its network interface up?".into();
    }
    let mut wish = String::new();
    if let Some(hca) = &options.hca {
        wish.push_str(&format!(" of {hca}"));
        options.port.iter().for_each(|port| wish.push_str(&format!(":{port}")));
    }
    options.gid_index.iter().for_each(|index| wish.push_str(&format!(" with an address at place {index}")));
    format!("no port{wish} is up; there are {}", ports.join(", "))
}

/// The NUMA node of a core, as the kernel numbers both; `None` where it has only one.
pub fn numa_node_of(core: usize) -> Option<u32> {
    let entries = names(Path::new(&format!("/sys/devices/system/cpu/cpu{core}")));
    entries.iter().find_map(|name| name.strip_prefix("node")?.parse().ok())
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn numbers(folder: &Path) -> Vec<u8> {
    let mut numbers: Vec<u8> = names(folder).iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

fn read(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_string())
}

fn parse(text: &str) -> Option<Gid> {
    text.parse::<std::net::Ipv6Addr>().ok().map(|address| Gid(address.octets()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        types::PeerId,
        wire::{JobToken, handshake::Identity},
    };

    fn options() -> VerbsOptions {
        let token = JobToken::random().unwrap();
        VerbsOptions::new(Identity { job: 1, token, me: PeerId::worker(0), epoch: 0 })
    }

    fn write(file: &Path, text: &str) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, format!("{text}\n")).unwrap();
    }

    /// A machine with a RoCE device on node 0, one on node 1 and an InfiniBand device that is down.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let gids = [
            ("fe80:0000:0000:0000:0000:00ff:fe00:0001", "IB/RoCE v1"),
            ("fe80:0000:0000:0000:0000:00ff:fe00:0001", "RoCE v2"),
            ("0000:0000:0000:0000:0000:ffff:0a09:0001", "IB/RoCE v1"),
            ("0000:0000:0000:0000:0000:ffff:0a09:0001", "RoCE v2"),
            ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
        ];
        for (device, node, state, layer) in [
            ("mlx5_0", "0", "4: ACTIVE", "Ethernet"),
            ("mlx5_1", "1", "4: ACTIVE", "Ethernet"),
            ("mlx5_2", "-1", "1: DOWN", "InfiniBand"),
        ] {
            let folder = dir.path().join(device);
            write(&folder.join("device/numa_node"), node);
            write(&folder.join("ports/1/state"), state);
            write(&folder.join("ports/1/link_layer"), layer);
            for (at, (gid, kind)) in gids.iter().enumerate() {
                write(&folder.join(format!("ports/1/gids/{at}")), gid);
                if !kind.is_empty() {
                    write(&folder.join(format!("ports/1/gid_attrs/types/{at}")), kind);
                }
            }
        }
        dir
    }

    #[test]
    fn the_nearest_port_and_the_best_address_are_chosen() {
        let machine = machine();
        let all = candidates(machine.path());
        assert_eq!(all.len(), 12, "{all:?}");
        let of = |options: VerbsOptions| choose(&all, &options).map(|c| (c.device, c.gid_index, c.link));
        assert_eq!(of(options()).unwrap(), ("mlx5_0".into(), 3, Link::RoceV2));
        let near = VerbsOptions { numa_node: Some(1), ..options() };
        assert_eq!(of(near).unwrap(), ("mlx5_1".into(), 3, Link::RoceV2));
        let pinned = VerbsOptions { hca: Some("mlx5_1".into()), gid_index: Some(0), ..options() };
        assert_eq!(of(pinned).unwrap(), ("mlx5_1".into(), 0, Link::RoceV1));
    }

    #[test]
    fn what_was_asked_for_and_is_not_there_is_told_with_what_is() {
        let machine = machine();
        let all = candidates(machine.path());
        for (hca, port) in [("mlx5_9", None), ("mlx5_2", None), ("mlx5_0", Some(2))] {
            let error = choose(&all, &VerbsOptions { hca: Some(hca.into()), port, ..options() }).unwrap_err();
            assert!(error.contains(hca) && error.contains("mlx5_2:1 (down)"), "{error}");
        }
        assert!(candidates(Path::new("/nonexistent")).is_empty());
        assert!(choose(&[], &options()).unwrap_err().contains("interface up"));
    }
}
