//! Who can share memory with whom: what an end says of itself in its address, and what two addresses say together.
//!
//! Invariant: [`reachable`] is symmetric, so that the two ends of a path, each asking with its own address first, never decide
//! differently.
#![forbid(unsafe_code)]

use std::{fmt, fs, os::unix::fs::MetadataExt};

use crate::{Error, Result, wire::random_bytes};

/// Digits of the random name of a socket.
const NAME_DIGITS: usize = 32;

/// Where an end of the fabric is found, as text `BOOT/UID/NET/PID/NAME` (docs/wire.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// The boot of the kernel: another for each host, and after each restart.
    boot: String,
    /// The user: whoever may kill a process may as well write into its memory, so nothing is given away.
    pub(super) uid: u32,
    /// The network namespace's inode: in it lies the abstract socket's name.
    network: u64,
    /// The process namespace's inode: in it the peer's process has a number to be watched by.
    processes: u64,
    /// The abstract socket's name, random.
    name: String,
}

impl Address {
    /// Our own address, with a fresh name.
    pub(super) fn fresh() -> Result<Address> {
        let boot_file = "/proc/sys/kernel/random/boot_id";
        let boot = fs::read_to_string(boot_file).map_err(|e| Error::file("read", boot_file, e))?.trim().to_string();
        let namespace = |file: &str| fs::metadata(file).map(|it| it.ino()).map_err(|e| Error::file("read", file, e));
        let name = random_bytes::<{ NAME_DIGITS / 2 }>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let (network, processes) = (namespace("/proc/self/ns/net")?, namespace("/proc/self/ns/pid")?);
        Ok(Address { boot, uid: nix::unistd::geteuid().as_raw(), network, processes, name })
    }

    pub(super) fn parse(text: &str) -> Result<Address, String> {
        let defect = || {
            let shown: String = text.chars().take(200).collect();
            format!("`{}` is not an address of shm: BOOT/UID/NET/PID/NAME", shown.escape_debug())
        };
        let parts: Vec<&str> = text.split('/').collect();
        let &[boot, uid, network, processes, name] = &parts[..] else { return Err(defect()) };
        let is_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b'-'));
        if !(is_hex(boot) && (1..=64).contains(&boot.len()) && is_hex(name) && name.len() == NAME_DIGITS) {
            return Err(defect());
        }
        let number = |text: &str| text.parse::<u64>().map_err(|_| defect());
        Ok(Address {
            boot: boot.into(),
            uid: uid.parse().map_err(|_| defect())?,
            network: number(network)?,
            processes: number(processes)?,
            name: name.into(),
        })
    }

    /// The name to bind, without the NUL that the kernel puts before an abstract one.
    pub(super) fn socket_name(&self) -> String {
        format!("gradwire-{}", self.name)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { boot, uid, network, processes, name } = self;
        write!(f, "{boot}/{uid}/{network}/{processes}/{name}")
    }
}

/// Whether the two ends with these addresses can share memory; the reason, in words, if they cannot. Symmetric.
pub fn reachable(own: &str, remote: &str) -> Result<(), String> {
    let (own, remote) = (Address::parse(own)?, Address::parse(remote)?);
    let differs = if own.boot != remote.boot {
        "on different hosts"
    } else if own.uid != remote.uid {
        "of different users"
    } else if own.network != remote.network {
        "in different network namespaces (containers)"
    } else if own.processes != remote.processes {
        "in different process namespaces (containers)"
    } else {
        return Ok(());
    };
    Err(format!("they run {differs}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let address = Address::fresh().unwrap();
        assert_eq!(Address::parse(&address.to_string()), Ok(address.clone()));
        assert_ne!(address, Address::fresh().unwrap(), "a name is used once");
        for text in ["", "a/1/2/3", "a/1/2/3/4/5", "g/1/2/3/00112233445566778899aabbccddeeff", "//1/2/3\0"] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_difference_is_told_and_both_ends_agree() {
        let one = Address::fresh().unwrap();
        let text = |address: &Address| address.to_string();
        let same = Address::fresh().unwrap();
        assert_eq!(reachable(&text(&one), &text(&same)), Ok(()));
        let others = [
            (Address { boot: "0".into(), ..one.clone() }, "hosts"),
            (Address { uid: one.uid + 1, ..one.clone() }, "users"),
            (Address { network: one.network + 1, ..one.clone() }, "network namespaces"),
            (Address { processes: one.processes + 1, ..one.clone() }, "process namespaces"),
        ];
        for (other, word) in others {
            let there = reachable(&text(&one), &text(&other)).unwrap_err();
            let back = reachable(&text(&other), &text(&one)).unwrap_err();
            assert!(there.contains(word) && there == back, "{there} / {back}");
        }
        assert!(reachable(&text(&one), "").is_err() && reachable("", &text(&one)).is_err());
    }
}
