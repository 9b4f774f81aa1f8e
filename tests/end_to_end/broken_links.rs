//! A link between two hosts that is cut and comes back, again and again, in the middle of a job over tcp: it ends with the bits of the
//! undisturbed run.
//!
//! The hosts are network namespaces (`namespaces.rs`), with the servers and a worker on one and a worker on the other. `GRADWIRE_FAULTS`
//! says how many cuts hit something (10 without it), `GRADWIRE_FAULT_SEED` where the dice begin.
//!
//! Invariant: a cut counts only if it hit something: if there were bytes on their way that could not arrive before the link was back.

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::transport::sim::SimRandom;

use crate::{
    broken_paths::faults,
    jobs::{PATIENCE, digests, home},
    namespaces::{Ended, Hosts, worker},
};

/// A job whose ranks are on both hosts.
struct Job<'a> {
    hosts: &'a Hosts,
    home: tempfile::TempDir,
    launcher: Ended,
    _by_hand: Ended,
}

impl<'a> Job<'a> {
    fn start(hosts: &'a Hosts, port: u16, steps: u64) -> Job<'a> {
        let home = home();
        let log = |name: &str| std::fs::File::create(home.path().join(name)).unwrap();
        let mut launcher = hosts.command(0, env!("CARGO_BIN_EXE_gradwire"));
        let listen = format!("10.77.0.1:{port}");
        launcher.args(["run", "-s", "2", "-n", "2", "--name", "links", "--listen", &listen, "--by-hand", "w1"]);
        launcher.args(["--interface", &hosts.interface, "--transport", "tcp", "--set", "chunk_bytes=1024"]);
        launcher.args(["--set", "heartbeat_ms=500", "--set", "deadline_ms=20000"]);
        launcher.args(["--set", r#"optimizer.groups=[{name="other"}]"#, "--"]);
        let prepared = |command: &mut std::process::Command, name: &str| {
            let command = worker(command).env("WORKER_STEPS", steps.to_string()).env("WORKER_TELLS", "1");
            // Which mean something to this test alone.
            let command = command.env_remove("GRADWIRE_FAULTS").env_remove("GRADWIRE_FAULT_SEED");
            Ended(command.stdout(log(name)).stderr(log(&format!("{name}-errors"))).spawn().unwrap())
        };
        let launcher = prepared(launcher.env("GRADWIRE_HOME", home.path()), "launcher");
        let (token, limit) = (home.path().join("links/token"), Instant::now() + PATIENCE);
        while !token.exists() {
            assert!(Instant::now() < limit, "the launcher has not begun: {}", written(home.path()));
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut by_hand = hosts.command(1, env!("CARGO_BIN_EXE_gradwire"));
        by_hand.args(["node", "--rendezvous", &listen, "--role", "worker", "--rank", "1", "--"]);
        by_hand.env("GRADWIRE_TOKEN_FILE", &token).stdin(Stdio::null());
        let by_hand = prepared(&mut by_hand, "by-hand");
        Job { hosts, home, launcher, _by_hand: by_hand }
    }

    /// The last clock that a worker has said to begin.
    fn clock(&self) -> u64 {
        let text = written(self.home.path());
        let last = text.rsplit("begins clock ").next().and_then(|rest| rest.split_whitespace().next());
        last.and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    fn wait_for_clock(&self, clock: u64) {
        let limit = Instant::now() + PATIENCE;
        while self.clock() < clock {
            assert!(Instant::now() < limit, "clock {clock} does not come: {}", written(self.home.path()));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Bytes that ranks have handed to the kernels at both ends and that have not arrived.
    fn on_their_way(&self) -> u64 {
        let count = |host| {
            let text = self.hosts.command(host, "cat").arg("/proc/net/tcp").output().unwrap().stdout;
            let text = String::from_utf8(text).unwrap();
            let queues = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(4)?.split(':').next());
            queues.map(|bytes| u64::from_str_radix(bytes, 16).unwrap()).sum::<u64>()
        };
        count(0) + count(1)
    }

    /// What the workers say at the end.
    fn digests(mut self) -> Vec<String> {
        let (mut seen, mut limit) = (0, Instant::now() + PATIENCE);
        let status = loop {
            if let Some(status) = self.launcher.0.try_wait().unwrap() {
                break status;
            }
            let clock = self.clock();
            if clock > seen {
                (seen, limit) = (clock, Instant::now() + PATIENCE);
            }
            assert!(Instant::now() < limit, "the job does not end: {}", written(self.home.path()));
            std::thread::sleep(Duration::from_millis(200));
        };
        let text = written(self.home.path());
        assert!(status.success(), "{status}: {text}");
        digests(&text)
    }
}

/// What everybody has written.
fn written(home: &Path) -> String {
    let names = ["launcher", "launcher-errors", "by-hand", "by-hand-errors"];
    names.map(|name| std::fs::read_to_string(home.join(name)).unwrap_or_default()).concat()
}

#[test]
fn broken_links_between_hosts_change_no_bit() {
    let Some(hosts) = Hosts::new('l') else { return };
    let (count, seed) = faults();
    let steps = 50 + 150 * count;
    let undisturbed = Job::start(&hosts, 7321, steps).digests();
    let job = Job::start(&hosts, 7322, steps);
    job.wait_for_clock(3);
    let (mut random, mut hits, mut missed) = (SimRandom::new(seed), 0, 0);
    while hits < count {
        std::thread::sleep(Duration::from_millis(random.below(40)));
        let (at_clock, down_ms) = (job.clock(), 20 + random.below(300));
        assert!(at_clock + 10 < steps, "the job was over after {hits} of {count} hits: give it more steps");
        hosts.set_link("down");
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        std::thread::sleep(Duration::from_millis(down_ms));
        let bytes = job.on_their_way();
        hosts.set_link("up");
        // It gets on: what was lost has come.
        job.wait_for_clock(job.clock() + 2);
        hits += u64::from(bytes > 0);
        missed += u64::from(bytes == 0);
        println!(
            "{at:.3}: the link was down for {down_ms} ms while training, clock {at_clock}, {bytes} bytes on their way{}",
            if bytes > 0 { "" } else { ": does not count" }
        );
    }
    let disturbed = job.digests();
    println!("{hits} hits, {missed} that hit nothing; digests {disturbed:?}, undisturbed {undisturbed:?}");
    assert!(disturbed.len() == 2 && disturbed == undisturbed);
}
