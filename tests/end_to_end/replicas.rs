//! Servers of running jobs with two copies of each shard that are killed or stopped, again and again: the other copy takes over, a new
//! backup is built while training goes on, and the job ends with the bits of the undisturbed run.
//!
//! `GRADWIRE_FAULTS` says how many (5 a job without it), `GRADWIRE_FAULT_SEED` where the dice begin.
//!
//! Invariant: a fault is injected only while every shard has both its copies and training is under way, and only into a server that
//! serves a shard at that moment.

use std::{
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{
    launch::{Job, JobOptions},
    session::Fabric,
    transport::sim::SimRandom,
};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    broken_paths::{clock, ranks},
    decisions::scaling,
    jobs::{PATIENCE, digests, end, home, options, run, stored, wait_for_text, with_variable},
    program::model,
};

/// Steps for each fault: its end comes long after the backup is back.
const STEPS: u64 = 300;

/// Of which job.
#[derive(Clone, Copy)]
enum Kind {
    Plain,
    /// Every step is clipped, some are skipped, and the loss scale moves.
    Decided,
}

fn job(home: &Path, (fabric, kind): (Fabric, Kind), replicas: u16, faults: u64) -> JobOptions {
    let mut options = match kind {
        Kind::Plain => options(home, "train"),
        Kind::Decided => options(home, "spoilt"),
    };
    if let Kind::Decided = kind {
        options.config.optimizer.clip.global_norm = Some(3.0);
        options.config.loss_scale = scaling();
    }
    options.config.servers = 3;
    options.config.replicas = replicas;
    options.config.transports = vec![fabric];
    options.config.checkpoint.every = Some(200);
    if std::env::var_os("GRADWIRE_FAULTS").is_none() {
        options.config.suspect_ms = 1500; // other tests run beside this one
    }
    with_variable(&mut options, "WORKER_STEPS", STEPS * (faults + 1));
    with_variable(&mut options, "WORKER_PAUSE_MS", 4);
    with_variable(&mut options, "WORKER_TELLS", 1);
    options
}

/// How often the launcher has said something.
pub fn said(job: &Job, text: &str) -> u64 {
    job.output().matches(text).count() as u64
}

/// Whether every shard has both its copies.
pub fn is_full(job: &Job) -> bool {
    let output = job.output();
    output.rfind("without a backup") <= output.rfind("redundancy is full again")
}

/// Waits until `met`, and says how long that took.
pub fn wait_until(job: &Job, what: &str, met: impl Fn() -> bool) -> Duration {
    let since = Instant::now();
    while !met() {
        assert!(since.elapsed() < PATIENCE, "waited in vain for {what}\n{}", job.output());
        std::thread::sleep(Duration::from_millis(2));
    }
    since.elapsed()
}

fn disturbed((fabric, kind): (Fabric, Kind), signals: &[Signal], seed: u64, count: u64) {
    let mut random = SimRandom::new(seed);
    let (home_of, calm_home) = (home(), home());
    let undisturbed = run(job(calm_home.path(), (fabric, kind), 1, count));
    let options = job(home_of.path(), (fabric, kind), 2, count);
    let steps = STEPS * (count + 1);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 3");
    let mut outages = Vec::new();
    for fault in 0..count {
        std::thread::sleep(Duration::from_millis(20 + random.below(200)));
        wait_until(&job, "both copies of every shard", || is_full(&job));
        let servers: Vec<_> =
            ranks(home_of.path()).into_iter().filter(|rank| rank.name.starts_with("server")).collect();
        let victim = &servers[random.below(servers.len() as u64) as usize];
        let signal = signals[random.below(signals.len() as u64) as usize];
        let (at_clock, gone) = (clock(&job), said(&job, "its shards go on with"));
        assert!(at_clock + 100 < steps, "the job was over after {fault} of {count} faults: give it more steps");
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        nix::sys::signal::kill(Pid::from_raw(victim.pid), signal).unwrap();
        // The chunks of the clock that is under way need whoever serves them: two further clocks are begun without the victim.
        let lost = wait_until(&job, "a clock after the take-over", || {
            said(&job, "its shards go on with") > gone && clock(&job) > at_clock + 2
        });
        outages.push(lost);
        println!(
            "{:.3}: {} got {signal} over {} while training, clock {at_clock}; training went on within {} ms",
            at.as_secs_f64(),
            victim.name,
            fabric.name(),
            lost.as_millis()
        );
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (ours, theirs) = (digests(&job.output()), digests(&undisturbed));
    outages.sort();
    println!(
        "{count} faults; digests {ours:?}, undisturbed {theirs:?}; went on after {} ms (median), {} ms (longest)",
        outages[outages.len() / 2].as_millis(),
        outages[outages.len() - 1].as_millis()
    );
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}\n{}", job.output());
    let all = vec![model(); 2];
    assert!(stored(home_of.path(), &all) == stored(calm_home.path(), &all), "the checkpoints differ");
}

fn faults() -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    (number("GRADWIRE_FAULTS").unwrap_or(5), number("GRADWIRE_FAULT_SEED").unwrap_or(1))
}

#[test]
fn killed_and_stopped_servers_change_no_bit_over_tcp() {
    let (count, seed) = faults();
    disturbed((Fabric::Tcp, Kind::Plain), &[Signal::SIGKILL, Signal::SIGSTOP], seed, count);
}

#[test]
fn killed_and_stopped_servers_change_no_bit_where_steps_are_decided_upon() {
    let (count, seed) = faults();
    disturbed((Fabric::Tcp, Kind::Decided), &[Signal::SIGKILL, Signal::SIGSTOP], seed + 2, count);
}

#[test]
fn killed_and_stopped_servers_change_no_bit_in_shared_memory() {
    let (count, seed) = faults();
    disturbed((Fabric::Shm, Kind::Plain), &[Signal::SIGKILL, Signal::SIGSTOP], seed + 1, count);
}

/// Both servers of a pair at once: the job ends by name, and goes on from its checkpoint.
#[test]
fn a_job_that_loses_both_copies_ends_by_name_and_resumes() {
    let (home_of, calm_home) = (home(), home());
    let undisturbed = run(job(calm_home.path(), (Fabric::Tcp, Kind::Plain), 1, 1));
    let mut first = Job::start(job(home_of.path(), (Fabric::Tcp, Kind::Plain), 2, 1)).unwrap();
    wait_for_text(&first, "begins clock 250");
    let servers =
        ranks(home_of.path()).into_iter().filter(|rank| rank.name != "server 2" && rank.name.starts_with("server"));
    servers.for_each(|server| nix::sys::signal::kill(Pid::from_raw(server.pid), Signal::SIGKILL).unwrap());
    let outcome = end(&mut first);
    let reason = outcome.reason.clone().unwrap_or_default();
    assert!(outcome.code != 0 && reason.contains("has lost both copies"), "{reason}\n{}", first.output());
    drop(first);
    let mut again = job(home_of.path(), (Fabric::Tcp, Kind::Plain), 2, 1);
    again.config.resume = Some(home_of.path().join("checkpoints"));
    let output = run(again);
    assert_eq!(digests(&output), digests(&undisturbed), "{output}");
}
