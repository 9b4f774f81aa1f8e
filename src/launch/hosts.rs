//! The hosts of a job: `--hosts a,b:4` and hostfiles, and which rank goes to which host.
//!
//! Invariant: pure; every rank goes to exactly one host, and to a full one only where that was allowed.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    session::JobConfig,
    types::{Rank, Role},
};

/// A host that a job may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// As ssh takes it: a name, an address, or `user@name`. `localhost` is this machine, without ssh.
    pub name: String,
    /// How many workers it takes; one for each of its cores if nothing is said.
    pub slots: Option<u16>,
}

/// How workers go to hosts, and to parts of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapBy {
    /// Host after host, each until its slots are full.
    #[default]
    Slot,
    /// To the hosts in turn.
    Node,
    /// As by slot; the workers of a host go to its NUMA nodes in turn.
    Numa,
    /// As by slot; the workers of a host go to its GPUs in turn, each near its own and seeing only that one.
    Gpu,
}

/// What a worker's process may run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BindTo {
    /// Every core; it is told which are its own.
    #[default]
    None,
    /// Its own cores.
    Core,
    /// All cores of the NUMA node on which its own are.
    Numa,
}

impl Host {
    /// This machine.
    pub fn here() -> Host {
        Host { name: "localhost".into(), slots: None }
    }

    /// Whether its ranks are started without ssh.
    pub(super) fn is_here(&self) -> bool {
        let own = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        self.name == "localhost" || Some(&self.name) == own.as_ref()
    }
}

/// Reads `a,b:4,user@c`.
///
/// # Errors
///
/// [`Error::Config`] naming the part that is no host.
pub fn parse_hosts(text: &str) -> Result<Vec<Host>> {
    let mut hosts = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        // An IPv6 address has colons of its own: [::1]:4, or ::1 without slots.
        let (name, slots) = match part.rsplit_once(':') {
            Some((name, slots)) if !name.contains(':') || name.ends_with(']') => (name, Some(slots)),
            _ => (part, None),
        };
        push(&mut hosts, name, slots.map(|slots| (slots, part)), "--hosts")?;
    }
    not_empty(hosts, "--hosts")
}

/// Reads a hostfile: a host a line, with `slots=4` behind it or not (`max_slots` is passed over); `#` begins a comment.
///
/// # Errors
///
/// [`Error::File`] if it cannot be read; [`Error::Config`] naming file and line.
pub fn read_hostfile(path: &Path) -> Result<Vec<Host>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file("read", path, e))?;
    let mut hosts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{}:{}", path.display(), index + 1);
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(first) = words.next() else { continue };
        let (name, mut slots) = match first.rsplit_once(':') {
            Some((name, slots)) if !name.contains(':') || name.ends_with(']') => (name, Some(slots)),
            _ => (first, None),
        };
        for word in words {
            match word.split_once('=') {
                Some(("slots", count)) => slots = Some(count),
                Some(("max_slots" | "max-slots", _)) => {}
                _ => return Err(Error::Config(format!("{place}: `{word}` means nothing here; write `HOST slots=4`"))),
            }
        }
        push(&mut hosts, name, slots.map(|slots| (slots, line)), &place)?;
    }
    not_empty(hosts, &path.display().to_string())
}

fn push(hosts: &mut Vec<Host>, name: &str, slots: Option<(&str, &str)>, place: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.@:%".contains(c);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    // A name that begins with a dash would be an option of ssh's.
    if name.is_empty() || name.starts_with('-') || !name.chars().all(fits) {
        return Err(Error::Config(format!("{place}: `{name}` is no host; write names as ssh takes them")));
    }
    let slots = match slots {
        None => None,
        Some((count, whole)) => match count.parse() {
            Ok(count @ 1..) => Some(count),
            _ => return Err(Error::Config(format!("{place}: `{whole}` gives no number of slots from 1"))),
        },
    };
    if hosts.iter().any(|host: &Host| host.name == name) {
        return Err(Error::Config(format!("{place}: `{name}` is named twice; give it all its slots at once")));
    }
    hosts.push(Host { name: name.into(), slots });
    Ok(())
}

fn not_empty(hosts: Vec<Host>, place: &str) -> Result<Vec<Host>> {
    match hosts.is_empty() {
        true => Err(Error::Config(format!("{place} names no host"))),
        false => Ok(hosts),
    }
}

/// The ranks of each host. `hosts` are names and slots; ranks of `by_hand` are started by somebody else and go nowhere. Servers go to
/// the hosts in turn and take no slot.
///
/// # Errors
///
/// [`Error::Config`] with the sum if there are more workers than slots, unless `oversubscribe`.
pub(super) fn place(
    config: &JobConfig,
    by_hand: &BTreeSet<Rank>,
    hosts: &[(&str, usize)],
    map_by: MapBy,
    oversubscribe: bool,
) -> Result<Vec<Vec<Rank>>> {
    let slots: usize = hosts.iter().map(|(_, slots)| slots).sum();
    let mut placed = vec![Vec::new(); hosts.len()];
    let ours = |role| config.ranks().filter(move |rank| rank.role == role && !by_hand.contains(rank));
    for (turn, server) in ours(Role::Server).enumerate() {
        placed[turn % hosts.len()].push(server);
    }
    let workers: Vec<Rank> = ours(Role::Worker).collect();
    if workers.len() > slots && !oversubscribe {
        let list: Vec<String> = hosts.iter().map(|(name, slots)| format!("{name}:{slots}")).collect();
        return Err(Error::Config(format!(
            "{} workers do not fit into {slots} slots ({}); give hosts more slots, as in {}:{}, or say --oversubscribe",
            workers.len(),
            list.join(","),
            hosts[0].0,
            workers.len(),
        )));
    }
    // Seats in the order in which they are taken; with more workers than slots the same order again.
    let seats: Vec<usize> = match map_by {
        MapBy::Node => {
            let most = hosts.iter().map(|(_, slots)| *slots).max().unwrap_or(0);
            (0..most).flat_map(|round| (0..hosts.len()).filter(move |host| round < hosts[*host].1)).collect()
        }
        _ => hosts.iter().enumerate().flat_map(|(host, (_, slots))| std::iter::repeat_n(host, *slots)).collect(),
    };
    for (worker, seat) in workers.into_iter().zip(seats.iter().cycle()) {
        placed[*seat].push(worker);
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hosts: &[Host]) -> Vec<(&str, Option<u16>)> {
        hosts.iter().map(|host| (host.name.as_str(), host.slots)).collect()
    }

    #[test]
    fn hosts_have_slots_or_not() {
        let hosts = parse_hosts("a, b:4,me@c:1,::1,[fe80::1%eth0]:2").unwrap();
        let wanted = [("a", None), ("b", Some(4)), ("me@c", Some(1)), ("::1", None), ("fe80::1%eth0", Some(2))];
        assert_eq!(names(&hosts), wanted);
        for (wrong, why) in [
            ("", "no host"),
            ("a:0", "slots"),
            ("a:x", "slots"),
            ("-oProxyCommand=x", "no host"),
            ("a;b", "no host"),
            ("a,a", "twice"),
        ] {
            let text = parse_hosts(wrong).unwrap_err().to_string();
            assert!(text.contains(why), "{wrong}: {text}");
        }
    }

    #[test]
    fn a_hostfile_is_read_as_mpirun_reads_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# nodes\nnode1 slots=8 max_slots=8\n\nnode2   # all of it\nnode3:2\n").unwrap();
        let hosts = read_hostfile(file.path()).unwrap();
        assert_eq!(names(&hosts), [("node1", Some(8)), ("node2", None), ("node3", Some(2))]);
        std::fs::write(file.path(), "node1\nnode2 cores=3\n").unwrap();
        let text = read_hostfile(file.path()).unwrap_err().to_string();
        assert!(text.contains(":2: `cores=3`"), "{text}");
    }

    fn indices(placed: &[Vec<Rank>], role: Role) -> Vec<Vec<u16>> {
        let of = |ranks: &Vec<Rank>| ranks.iter().filter(|rank| rank.role == role).map(|rank| rank.index).collect();
        placed.iter().map(of).collect()
    }

    #[test]
    fn workers_fill_slots_and_servers_take_turns() {
        let config = JobConfig { servers: 3, workers: 5, ..JobConfig::default() };
        let none = BTreeSet::new();
        let hosts = [("a", 2), ("b", 4)];
        let by = |map_by| place(&config, &none, &hosts, map_by, false).unwrap();
        assert_eq!(indices(&by(MapBy::Slot), Role::Worker), [vec![0, 1], vec![2, 3, 4]]);
        assert_eq!(indices(&by(MapBy::Node), Role::Worker), [vec![0, 2], vec![1, 3, 4]]);
        assert_eq!(indices(&by(MapBy::Slot), Role::Server), [vec![0, 2], vec![1]]);
        let by_hand = BTreeSet::from([Rank::worker(1), Rank::server(0)]);
        let placed = place(&config, &by_hand, &hosts, MapBy::Slot, false).unwrap();
        assert_eq!(indices(&placed, Role::Worker), [vec![0, 2], vec![3, 4]]);
        assert_eq!(indices(&placed, Role::Server), [vec![1], vec![2]]);
    }

    #[test]
    fn too_many_workers_are_refused_with_the_sum_unless_that_is_wanted() {
        let config = JobConfig { workers: 5, ..JobConfig::default() };
        let hosts = [("a", 1), ("b", 2)];
        let place = |over| place(&config, &BTreeSet::new(), &hosts, MapBy::Slot, over);
        let text = place(false).unwrap_err().to_string();
        assert!(text.contains("5 workers do not fit into 3 slots (a:1,b:2)"), "{text}");
        assert_eq!(indices(&place(true).unwrap(), Role::Worker), [vec![0, 3], vec![1, 2, 4]]);
    }
}
