//! Payloads of a running job that are damaged between its processes: all of them are caught, sent again, and change no bit; without
//! checksums the same damage reaches the parameters.
//!
//! Workers live behind a wire of the test's own (`wire.rs`). `GRADWIRE_FAULTS` says how many payloads are damaged (10 without it),
//! `GRADWIRE_FAULT_SEED` where the dice begin.
//!
//! Invariant: what was damaged is counted where it is done, and compared with what the ranks say they have found.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use gradwire::{
    launch::{Job, JobOptions},
    session::{Fabric, PayloadChecksums, PortRange},
    types::Rank,
    wire::NoteKind,
};
use serde_json::Value;

use crate::{
    broken_paths::faults,
    jobs::{PATIENCE, digests, end, home, options, run, with_variable},
    wire::{Damage, Wire},
};

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Ports that the servers choose from.
const PORTS: u16 = 16;

/// A worker that was started by hand; it ends with its test.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a disturbed job has come to.
struct Seen {
    digests: Vec<String>,
    /// Payloads that the ranks say were damaged, by `gradwire status` shortly before the end.
    counted: u64,
    /// Lines in which a server tells of a wrong checksum.
    told: usize,
}

fn job(home: &Path, checksums: PayloadChecksums, steps: u64) -> JobOptions {
    let mut options = options(home, "train");
    options.config.transports = vec![Fabric::Tcp];
    options.config.payload_checksums = checksums;
    // Held back until it is counted what was found, the job shows no sign of life to itself.
    options.config.deadline_ms = 60_000;
    with_variable(&mut options, "WORKER_STEPS", steps);
    options
}

/// Damaged payloads, by what the ranks say of themselves.
fn counted(home: &Path) -> u64 {
    let output = Command::new(GRADWIRE).args(["status", "test", "--json"]).env("GRADWIRE_HOME", home).output().unwrap();
    let Ok(status) = serde_json::from_slice::<Value>(&output.stdout) else { return 0 };
    let ranks = status["ranks"].as_array().unwrap();
    ranks.iter().map(|rank| rank["path_counts"]["corrupt"].as_u64().unwrap()).sum()
}

/// Runs a job whose workers are behind the wire.
fn across(wire: &Wire, checksums: PayloadChecksums, steps: u64, wanted: usize) -> Seen {
    let home = home();
    let mut options = job(home.path(), checksums, steps);
    let first = 12_000 + (std::process::id() % 1_250) as u16 * PORTS;
    options.config.ports = Some(PortRange { first, last: first + PORTS - 1 });
    options.by_hand = [Rank::worker(0), Rank::worker(1)].into();
    let command = options.command.clone();
    let mut job = Job::start(options).unwrap();
    let rendezvous = job.address().to_string();
    let port = rendezvous.rsplit(':').next().unwrap().parse().unwrap();
    (first..first + PORTS).chain([port]).for_each(|port| wire.carry(port));
    let start = |rank: u16| {
        let log = std::fs::File::create(home.path().join(format!("worker-{rank}"))).unwrap();
        let mut worker = wire.command(GRADWIRE);
        worker.args(["node", "--rendezvous", &format!("127.0.0.1:{port}"), "--role", "worker"]);
        worker.args(["--rank", &rank.to_string(), "--"]).args(&command);
        worker.env("GRADWIRE_TOKEN_FILE", job.directory().join("token")).stdin(Stdio::null());
        Started(worker.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    };
    let workers = [start(0), start(1)];
    let written = |job: &Job| {
        let logs = [0, 1].map(|rank| std::fs::read_to_string(home.path().join(format!("worker-{rank}"))).unwrap());
        job.output() + &logs.concat()
    };
    let until = Instant::now() + PATIENCE;
    let expected = if checksums == PayloadChecksums::Off { 0 } else { wanted as u64 };
    // Told once a heartbeat, so that what was found last is heard of last.
    let mut found = 0;
    while wire.damaged().len() < wanted || found < expected {
        assert!(Instant::now() < until, "{found} found of {:#?}\n{}", wire.damaged(), written(&job));
        std::thread::sleep(Duration::from_millis(100));
        found = counted(home.path());
    }
    wire.let_go();
    let outcome = end(&mut job);
    drop(workers);
    let output = written(&job);
    assert_eq!(outcome.code, 0, "{:?}\n{output}", outcome.reason);
    let told = output.lines().filter(|line| line.contains("came with a wrong checksum")).count();
    Seen { digests: digests(&output), counted: found, told }
}

fn damage(count: usize, seed: u64, steps: u64) -> Damage {
    let kinds = &[NoteKind::Push, NoteKind::Parameters];
    Damage { count, one_in: 100, kinds, clocks: 3..steps - 5, goes_on: false, seed }
}

#[test]
fn damaged_payloads_are_caught_and_change_no_bit() {
    let (count, seed) = faults();
    let steps = 50 + 20 * count;
    let calm_home = home();
    let undisturbed = digests(&run(job(calm_home.path(), PayloadChecksums::Auto, steps)));
    let Some(wire) = Wire::new(damage(count as usize, seed, steps)) else { return };
    let seen = across(&wire, PayloadChecksums::Auto, steps, count as usize);
    let injected = wire.damaged();
    injected.iter().for_each(|line| println!("{line}"));
    println!(
        "{} payloads damaged, {} found by the ranks, {} of them told by servers; digests {:?}, undisturbed {undisturbed:?}",
        injected.len(),
        seen.counted,
        seen.told,
        seen.digests
    );
    assert!(injected.len() as u64 == count && count >= 5, "{injected:#?}");
    // Servers tell of what came to them, in the launcher's log.
    let gradients = injected.iter().filter(|line| line.contains("gradient of")).count();
    assert_eq!((seen.counted, seen.told), (count, gradients), "{injected:#?}");
    assert!(undisturbed.len() == 2 && seen.digests == undisturbed);
}

/// The control: without checksums the damage reaches the parameters, and nobody notices.
#[test]
fn without_checksums_damaged_payloads_reach_the_parameters() {
    let (count, seed) = (10, faults().1 + 1000);
    let steps = 100;
    let calm_home = home();
    let undisturbed = digests(&run(job(calm_home.path(), PayloadChecksums::Off, steps)));
    let kinds = &[NoteKind::Push];
    let Some(wire) = Wire::new(Damage { goes_on: true, kinds, ..damage(count, seed, steps) }) else { return };
    let seen = across(&wire, PayloadChecksums::Off, steps, count);
    let injected = wire.damaged();
    injected.iter().for_each(|line| println!("{line}"));
    println!("{} payloads damaged; digests {:?}, undisturbed {undisturbed:?}", injected.len(), seen.digests);
    assert_eq!((injected.len(), seen.counted, seen.told), (count, 0, 0));
    assert!(seen.digests.len() == 2 && seen.digests != undisturbed, "the damage hit nothing");
}
