//! Which devices, ports and addresses to use as rails: read from /sys/class/infiniband, chosen by wish and by nearness.
//!
//! Named ports are rails in the order of their names. Otherwise the nearest port is, and with it, if several rails are asked for,
//! the ports that are as near as it is, by device and port.
//!
//! Invariant: the choice is a function of what the folder says and of the options; what was asked for is had or refused, never
//! silently replaced; no port is two rails.
#![forbid(unsafe_code)]

use std::{fs, path::Path};

use super::{
    PortName, RAILS_MAX, VerbsOptions,
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

/// What was chosen.
#[derive(Debug)]
pub(super) struct Choice {
    /// The rails, in their order; at least one.
    pub(super) rails: Vec<Candidate>,
    /// Ports that could be rails too, if more were asked for.
    pub(super) spare: Vec<String>,
}

/// The best of them, or why there is none.
pub(super) fn choose(candidates: &[Candidate], options: &VerbsOptions) -> Result<Choice, String> {
    if options.hca.is_empty() {
        return nearest(candidates, options);
    }
    if let Some(wish) = options.rails.filter(|wish| usize::from(*wish) != options.hca.len()) {
        return Err(format!(
            "{wish} rails are asked for and {} ports are named (GRADWIRE_RAILS, GRADWIRE_HCA)",
            options.hca.len()
        ));
    }
    let mut rails: Vec<Candidate> = Vec::with_capacity(options.hca.len());
    for name in &options.hca {
        let best = ports(candidates, options).into_iter().find(|candidate| name.is_of(candidate));
        let best = best.ok_or_else(|| refusal(candidates, options, Some(name)))?;
        if rails.iter().any(|rail| rail.is_same_port(best)) {
            return Err(format!("{} is named twice; a port is one rail", best.name()));
        }
        rails.push(best.clone());
    }
    Ok(Choice { rails, spare: Vec::new() })
}

/// The nearest port, and as many that are as near as are asked for.
fn nearest(candidates: &[Candidate], options: &VerbsOptions) -> Result<Choice, String> {
    let ports = ports(candidates, options);
    let best = *ports.first().ok_or_else(|| refusal(candidates, options, None))?;
    let is_alike = |port: &&Candidate| {
        let key = |of: &Candidate| (is_far(of, options), rank(of), of.link, of.numa_node);
        key(port) == key(best)
    };
    let alike: Vec<&Candidate> = ports.into_iter().filter(is_alike).collect();
    let wish = usize::from(options.rails.unwrap_or(1));
    if alike.len() < wish {
        let names: Vec<String> = alike.iter().map(|port| port.name()).collect();
        return Err(format!(
            "{wish} rails are asked for (GRADWIRE_RAILS), and only {} up, near and of one kind: name the ports with GRADWIRE_HCA",
            if names.len() == 1 { format!("{} is", names[0]) } else { format!("{} are", names.join(", ")) }
        ));
    }
    let (rails, spare) = alike.split_at(wish);
    let spare = spare.iter().map(|port| port.name()).take(RAILS_MAX - rails.len()).collect();
    Ok(Choice { rails: rails.iter().map(|rail| (*rail).clone()).collect(), spare })
}

/// Every port that is up, at its best address, the nearest first.
fn ports<'a>(candidates: &'a [Candidate], options: &VerbsOptions) -> Vec<&'a Candidate> {
    let is_wanted = |candidate: &&Candidate| options.gid_index.is_none_or(|index| index == candidate.gid_index);
    let mut found: Vec<&Candidate> =
        candidates.iter().filter(|candidate| candidate.is_active).filter(is_wanted).collect();
    found.sort_by_key(|port| (is_far(port, options), rank(port), &port.device, port.port, port.gid_index));
    let mut ports: Vec<&Candidate> = Vec::new();
    for candidate in found {
        if !ports.iter().any(|port| port.is_same_port(candidate)) {
            ports.push(candidate);
        }
    }
    ports
}

fn is_far(candidate: &Candidate, options: &VerbsOptions) -> bool {
    matches!((options.numa_node, candidate.numa_node), (Some(wish), Some(node)) if wish != node)
}

impl Candidate {
    /// Device and port.
    pub(super) fn name(&self) -> String {
        format!("{}:{}", self.device, self.port)
    }

    fn is_same_port(&self, other: &Candidate) -> bool {
        (&self.device, self.port) == (&other.device, other.port)
    }
}

impl PortName {
    fn is_of(&self, candidate: &Candidate) -> bool {
        self.device == candidate.device && self.port.is_none_or(|port| port == candidate.port)
    }
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

fn refusal(candidates: &[Candidate], options: &VerbsOptions, name: Option<&PortName>) -> String {
    let state = |candidate: &Candidate| if candidate.is_active { "up" } else { "down" };
    let mut ports: Vec<String> = candidates.iter().map(|port| format!("{} ({})", port.name(), state(port))).collect();
    ports.dedup();
    if ports.is_empty() {
        return "no port of an RDMA device has an address: is its network interface up?".into();
    }
    let mut wish = name.map(|name| format!(" of {name}")).unwrap_or_default();
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

    fn hca(text: &str) -> VerbsOptions {
        options().with_environment(|name| (name == "GRADWIRE_HCA").then(|| text.into())).unwrap()
    }

    const GIDS: [(&str, &str); 5] = [
        ("fe80:0000:0000:0000:0000:00ff:fe00:0001", "IB/RoCE v1"),
        ("fe80:0000:0000:0000:0000:00ff:fe00:0001", "RoCE v2"),
        ("0000:0000:0000:0000:0000:ffff:0a09:0001", "IB/RoCE v1"),
        ("0000:0000:0000:0000:0000:ffff:0a09:0001", "RoCE v2"),
        ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
    ];

    fn add(machine: &Path, device: &str, port: u8, node: &str, state: &str, layer: &str) {
        let folder = machine.join(device);
        write(&folder.join("device/numa_node"), node);
        let folder = folder.join(format!("ports/{port}"));
        write(&folder.join("state"), state);
        write(&folder.join("link_layer"), layer);
        for (at, (gid, kind)) in GIDS.iter().enumerate() {
            write(&folder.join(format!("gids/{at}")), gid);
            if !kind.is_empty() {
                write(&folder.join(format!("gid_attrs/types/{at}")), kind);
            }
        }
    }

    /// A machine with a RoCE device on node 0, one on node 1 and an InfiniBand device that is down.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        add(dir.path(), "mlx5_0", 1, "0", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_1", 1, "1", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_2", 1, "-1", "1: DOWN", "InfiniBand");
        dir
    }

    /// A machine of four ports on node 0: two of one device, one of another, one on InfiniBand; and one on node 1.
    fn wide_machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        add(dir.path(), "mlx5_0", 1, "0", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_0", 2, "0", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_1", 1, "0", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_2", 1, "1", "4: ACTIVE", "Ethernet");
        add(dir.path(), "mlx5_3", 1, "0", "4: ACTIVE", "InfiniBand");
        dir
    }

    fn names(choice: &Choice) -> Vec<String> {
        choice.rails.iter().map(Candidate::name).collect()
    }

    #[test]
    fn the_nearest_port_and_the_best_address_are_chosen() {
        let machine = machine();
        let all = candidates(machine.path());
        assert_eq!(all.len(), 12, "{all:?}");
        let of = |options: VerbsOptions| {
            let choice = choose(&all, &options).unwrap();
            assert_eq!((choice.rails.len(), choice.spare.len()), (1, 0));
            (choice.rails[0].name(), choice.rails[0].gid_index, choice.rails[0].link)
        };
        let near = |node| VerbsOptions { numa_node: Some(node), ..options() };
        assert_eq!(of(near(0)), ("mlx5_0:1".into(), 3, Link::RoceV2));
        assert_eq!(of(near(1)), ("mlx5_1:1".into(), 3, Link::RoceV2));
        // Nobody says what is near: the first, and the other is on another node than it.
        assert_eq!(of(options()), ("mlx5_0:1".into(), 3, Link::RoceV2));
        let pinned = VerbsOptions { gid_index: Some(0), ..hca("mlx5_1") };
        assert_eq!(of(pinned), ("mlx5_1:1".into(), 0, Link::RoceV1));
    }

    #[test]
    fn several_rails_are_had_by_name_or_by_number() {
        let machine = wide_machine();
        let all = candidates(machine.path());
        let rails = |rails| VerbsOptions { rails: Some(rails), numa_node: Some(0), ..options() };
        for (options, chosen, spare) in [
            (rails(1), &["mlx5_0:1"][..], &["mlx5_0:2", "mlx5_1:1"][..]),
            (rails(2), &["mlx5_0:1", "mlx5_0:2"], &["mlx5_1:1"]),
            (rails(3), &["mlx5_0:1", "mlx5_0:2", "mlx5_1:1"], &[]),
            (hca("mlx5_1, mlx5_0:2"), &["mlx5_1:1", "mlx5_0:2"], &[]),
            (hca("mlx5_2,mlx5_3"), &["mlx5_2:1", "mlx5_3:1"], &[]),
        ] {
            let choice = choose(&all, &options).unwrap();
            assert_eq!(names(&choice), chosen);
            assert_eq!(choice.spare, spare);
        }
        let of_node_0 = choose(&all, &VerbsOptions { rails: None, ..rails(1) }).unwrap();
        assert_eq!((names(&of_node_0).len(), of_node_0.spare.len()), (1, 2), "one, as long as nobody asks for more");
        for (options, what) in [
            (rails(4), "mlx5_0:1, mlx5_0:2, mlx5_1:1 are up, near"),
            (hca("mlx5_0,mlx5_0:1"), "mlx5_0:1 is named twice"),
            (VerbsOptions { rails: Some(3), ..hca("mlx5_0,mlx5_1") }, "3 rails are asked for and 2 ports are named"),
        ] {
            let error = choose(&all, &options).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn what_was_asked_for_and_is_not_there_is_told_with_what_is() {
        let machine = machine();
        let all = candidates(machine.path());
        for name in ["mlx5_9", "mlx5_2", "mlx5_0:2", "mlx5_0,mlx5_9:3"] {
            let error = choose(&all, &hca(name)).unwrap_err();
            let missing = name.rsplit(',').next().unwrap();
            assert!(error.contains(missing) && error.contains("mlx5_2:1 (down)"), "{error}");
        }
        assert!(candidates(Path::new("/nonexistent")).is_empty());
        assert!(choose(&[], &options()).unwrap_err().contains("interface up"));
    }
}
