//! Hosts of a test: network namespaces joined by a bridge, which stands in the first of them. The way to any but the first can be cut, and
//! so can the way between two.
//!
//! It needs root and iproute2. Where they are missing it says so; under CI that is a failure.

use std::{
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

fn ip(arguments: &[&str]) -> Output {
    Command::new("ip").args(arguments).output().unwrap_or_else(|error| panic!("ip {arguments:?}: {error}"))
}

fn ip_or_panic(arguments: &[&str]) {
    let done = ip(arguments);
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Hosts with one address each; they are gone when this is dropped.
pub struct Switch {
    names: Vec<String>,
}

impl Switch {
    /// So many hosts; `tag`, a letter, tells those of one test from those of another.
    pub fn new(tag: char, count: usize) -> Option<Switch> {
        let usable = nix::unistd::geteuid().is_root() && Command::new("ip").arg("-V").output().is_ok();
        let names = (0..count).map(|host| format!("gw{host}-{tag}{}", std::process::id())).collect();
        let switch = Switch { names };
        if !usable || !ip(&["netns", "add", &switch.names[0]]).status.success() {
            assert!(std::env::var_os("CI").is_none(), "CI must be able to make network namespaces");
            println!("NOT RUN: network namespaces need root and iproute2");
            return None;
        }
        let middle = switch.names[0].as_str();
        let address = |host: usize| format!("{}/24", Switch::address(host));
        ip_or_panic(&["-n", middle, "link", "add", "bridge", "type", "bridge"]);
        ip_or_panic(&["-n", middle, "addr", "add", &address(0), "dev", "bridge"]);
        ip_or_panic(&["-n", middle, "link", "set", "bridge", "up"]);
        ip_or_panic(&["-n", middle, "link", "set", "lo", "up"]);
        for (host, name) in switch.names.iter().enumerate().skip(1) {
            let port = Switch::port(host);
            ip_or_panic(&["netns", "add", name]);
            let ends = ["link", "add", &port, "netns", middle, "type", "veth", "peer", "name", "up0", "netns", name];
            ip_or_panic(&ends);
            ip_or_panic(&["-n", middle, "link", "set", &port, "master", "bridge"]);
            ip_or_panic(&["-n", name, "addr", "add", &address(host), "dev", "up0"]);
            ip_or_panic(&["-n", name, "link", "set", "up0", "up"]);
            ip_or_panic(&["-n", name, "link", "set", "lo", "up"]);
            ip_or_panic(&["-n", middle, "link", "set", &port, "up"]);
        }
        Some(switch)
    }

    pub fn address(host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, host as u8 + 1)
    }

    fn port(host: usize) -> String {
        format!("port{host}")
    }

    /// Cuts a host off from all others, or joins it again.
    pub fn set_link(&self, host: usize, is_up: bool) {
        let state = if is_up { "up" } else { "down" };
        ip_or_panic(&["-n", &self.names[0], "link", "set", &Switch::port(host), state]);
    }

    /// Cuts two hosts off from each other, or lets them be heard again: nothing leaves the one for the other, in answer neither.
    pub fn set_way(&self, one: usize, other: usize, is_open: bool) {
        let what = if is_open { "del" } else { "add" };
        ip_or_panic(&["-n", &self.names[one], "route", what, "blackhole", &format!("{}/32", Switch::address(other))]);
    }

    /// A command on one of them.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]).stdin(Stdio::null());
        command
    }

    /// Writes a program that reaches the hosts `h1`, `h2` … as ssh would.
    pub fn write_ssh(&self, directory: &Path) -> PathBuf {
        let path = directory.join("ssh");
        let names: Vec<String> =
            self.names.iter().enumerate().map(|(host, name)| format!("h{host}) name={name} ;;")).collect();
        let script = format!(
            "#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done\ncase $2 in {} esac\nexec ip netns exec \"$name\" sh -c \"$3\"\n",
            names.join(" ")
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| drop(ip(&["netns", "del", name])));
    }
}
