//! Ranks on two hosts: two network namespaces joined by a veth pair, a launcher and servers in one, a worker that joins by hand
//! from the other.
//!
//! It needs root and iproute2. Where they are missing it says so; under CI that is a failure.

use std::{
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::jobs::{PATIENCE, home};

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Two namespaces with one address each, joined by a link; they are gone when this is dropped.
pub struct Hosts {
    names: [String; 2],
    /// Its end in the first.
    pub interface: String,
}

fn ip(arguments: &[&str]) -> Output {
    Command::new("ip").args(arguments).output().unwrap_or_else(|error| panic!("ip {arguments:?}: {error}"))
}

impl Hosts {
    /// `tag`, a letter, tells the hosts of one test from those of another.
    pub fn new(tag: char) -> Option<Hosts> {
        let usable = nix::unistd::geteuid().is_root() && Command::new("ip").arg("-V").output().is_ok();
        let pid = std::process::id();
        let names = [format!("gw-a-{tag}{pid}"), format!("gw-b-{tag}{pid}")];
        if !usable || !ip(&["netns", "add", &names[0]]).status.success() {
            assert!(std::env::var_os("CI").is_none(), "CI must be able to make network namespaces");
            println!("NOT RUN: network namespaces need root and iproute2");
            return None;
        }
        let (va, vb) = (format!("gwa{tag}{pid}"), format!("gwb{tag}{pid}"));
        let hosts = Hosts { names, interface: va.clone() };
        let [a, b] = &hosts.names;
        let steps: [&[&str]; 8] = [
            &["netns", "add", b],
            &["link", "add", &va, "netns", a, "type", "veth", "peer", "name", &vb, "netns", b],
            &["-n", a, "addr", "add", "10.77.0.1/24", "dev", &va],
            &["-n", b, "addr", "add", "10.77.0.2/24", "dev", &vb],
            &["-n", a, "link", "set", &va, "up"],
            &["-n", b, "link", "set", &vb, "up"],
            &["-n", a, "link", "set", "lo", "up"],
            &["-n", b, "link", "set", "lo", "up"],
        ];
        for step in steps {
            let done = ip(step);
            assert!(done.status.success(), "ip {step:?}: {}", String::from_utf8_lossy(&done.stderr));
        }
        Some(hosts)
    }

    /// Takes the link down or brings it up.
    pub fn set_link(&self, state: &str) {
        let done = ip(&["-n", &self.names[0], "link", "set", &self.interface, state]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// A command in one of them.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]).stdin(Stdio::null());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| drop(ip(&["netns", "del", name])));
    }
}

/// A process that ends with its test.
pub struct Ended(pub Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets a command that ends in `--` start workers that train.
pub fn worker(command: &mut Command) -> &mut Command {
    let program = std::env::current_exe().unwrap();
    command
        .arg(program)
        .args(["--exact", "worker_process", "--nocapture", "--test-threads=1"])
        .env("WORKER_PART", "train")
}

#[test]
fn a_worker_joins_by_hand_from_another_host() {
    let Some(hosts) = Hosts::new('h') else { return };
    let home = home();
    let mut launcher = hosts.command(0, GRADWIRE);
    launcher.args(["run", "-s", "2", "-n", "2", "--name", "hosts", "--listen", "10.77.0.1:7311", "--by-hand", "w1"]);
    launcher.args(["--interface", &hosts.interface, "--set", "chunk_bytes=1024", "--set", "optimizer.kind=sgd"]);
    launcher.args(["--set", r#"optimizer.groups=[{name="other"}]"#, "--"]);
    let launcher = worker(&mut launcher).env("GRADWIRE_HOME", home.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut launcher = Ended(launcher);
    let token = home.path().join("hosts/token");
    let deadline = Instant::now() + PATIENCE;
    while !token.exists() {
        assert!(Instant::now() < deadline && launcher.0.try_wait().unwrap().is_none(), "the launcher has not begun");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut by_hand = hosts.command(1, GRADWIRE);
    by_hand.args(["node", "--rendezvous", "10.77.0.1:7311", "--role", "worker", "--rank", "1", "--"]);
    let output = worker(&mut by_hand).env("GRADWIRE_TOKEN_FILE", &token).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("digest "), "{text}");
    let status = loop {
        match launcher.0.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < deadline, "the launcher does not end"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    let mut printed = String::new();
    std::io::Read::read_to_string(&mut launcher.0.stdout.take().unwrap(), &mut printed).unwrap();
    let digest = |text: &str| text.split("digest ").nth(1).map(|rest| rest[..8].to_string());
    assert!(digest(&text).is_some() && digest(&text) == digest(&printed), "{text}\n{printed}");
}

/// Removes libibverbs from what this mount namespace shows, by a layer in memory over its folder; then runs the arguments.
const WITHOUT_LIBIBVERBS: &str = r#"
set -e
for library in /usr/lib/*/libibverbs.so.1 /usr/lib64/libibverbs.so.1 /usr/lib/libibverbs.so.1; do
    [ -e "$library" ] || continue
    folder=$(dirname "$(readlink -f "$library")")
    mount -t tmpfs tmpfs "$LAYER"
    mkdir "$LAYER/files" "$LAYER/work"
    mount -t overlay -o "lowerdir=$folder,upperdir=$LAYER/files,workdir=$LAYER/work" overlay "$folder"
    rm "$folder"/libibverbs.so.1*
    break
done
exec "$@"
"#;

/// One binary for every machine: where libibverbs is missing a job goes on with the next fabric, and says so in one line.
#[test]
fn a_job_without_libibverbs_goes_on_and_says_so_once() {
    let (home, layer) = (home(), home());
    let can = Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|output| output.status.success());
    if !can {
        assert!(std::env::var_os("CI").is_none(), "CI must be able to make mount namespaces");
        println!("NOT RUN: mount namespaces need root and util-linux");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", WITHOUT_LIBIBVERBS, "sh", GRADWIRE, "run"])
        .args(["--servers", "2", "--workers", "2", "--transport", "verbs,tcp"])
        .args(["--set", r#"optimizer.groups=[{name="other"}]"#, "--"])
        .arg(program)
        .args(["--exact", "worker_process", "--nocapture", "--test-threads=1"])
        .env("LAYER", layer.path())
        .env("GRADWIRE_HOME", home.path())
        .env("WORKER_PART", "train")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    let told: Vec<&str> = text.lines().filter(|line| line.contains("gradwire doctor")).collect();
    let [line] = told[..] else { panic!("{} lines name the doctor: {text}", told.len()) };
    for part in
        ["over tcp only", "no verbs here", "libibverbs.so.1 cannot be loaded", "No such file", "apt-get install"]
    {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(text.contains("paths between workers and shards: 4 over tcp"), "{text}");
}
