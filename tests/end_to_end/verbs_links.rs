//! Jobs over verbs across a real link, which loses packets, is cut for a while or for good, or has one of its ends killed; and over
//! two rails, of which one dies or whose network carries nothing any more: in virtual machines with a veth pair or with two devices (`scripts/test-rdma`); elsewhere these
//! tests say that they do nothing.
//!
//! Invariant: what a fault has hit is counted, so that one which hit nothing does not pass.

use std::{
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{
    launch::{Job, JobOptions},
    session::Fabric,
    transport::sim::SimRandom,
    types::Rank,
};
use nix::sys::signal::Signal;

use crate::{
    bits::{same, simulated},
    jobs::{PATIENCE, digests, end, home, options, run, stored, wait_for_text, with_variable},
    program::{STEPS, model},
};

/// Whether the soft-RDMA devices rxa and rxb, and rxc and rxd, are the ends of a veth pair each here.
fn is_there() -> bool {
    let there = std::env::var("RDMA_VM").is_ok_and(|network| network == "veth");
    if !there {
        println!("NOT RUN: no veth pair with soft-RDMA devices (scripts/test-rdma has one)");
    }
    there
}

/// A job whose servers are at one end of the link and whose workers are at the other.
fn across(home: &std::path::Path) -> JobOptions {
    over(home, "rxa", "rxb")
}

/// A job whose servers and workers use these devices.
pub fn over(home: &std::path::Path, of_servers: &str, of_workers: &str) -> JobOptions {
    let mut options = options(home, "train");
    options.config.transports = vec![Fabric::Verbs];
    with_variable(&mut options, "GRADWIRE_HCA", of_workers);
    let words = ["env".into(), format!("GRADWIRE_HCA={of_servers}").into()];
    options.server_command = words.into_iter().chain(options.server_command).collect();
    options
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Packets that the link has lost so far.
fn dropped() -> u64 {
    dropped_by("va") + dropped_by("vb")
}

fn dropped_by(device: &str) -> u64 {
    let text = output("tc", &["-s", "qdisc", "show", "dev", device]);
    let number = text.split("dropped ").nth(1).and_then(|rest| rest.split(',').next()).expect("netem's count");
    number.parse().unwrap()
}

#[test]
fn verbs_across_a_link_that_loses_packets_gives_the_same_bits() {
    if !is_there() {
        return;
    }
    let home = home();
    let before = dropped();
    let mut job = Job::start(across(home.path())).unwrap();
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert_eq!(outcome.paths.get("verbs"), Some(&4), "{:?}", outcome.paths);
    let lost = dropped() - before;
    println!("the link lost {lost} packets");
    assert!(lost > 5, "the link lost only {lost} packets: nothing was tried");
    let all = vec![model(); 2];
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "verbs under loss");
}

/// Runs a job to its tenth clock, does something to it, and gives the reason with which it ended, in time.
fn disturbed(disturb: impl FnOnce(&Job)) -> String {
    let home = home();
    let mut options = across(home.path());
    with_variable(&mut options, "WORKER_PAUSE_MS", 50);
    let deadline = options.config.deadline();
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let since = Instant::now();
    disturb(&job);
    let outcome = end(&mut job);
    let (took, reason) = (since.elapsed(), outcome.reason.unwrap_or_default());
    println!("over after {:.2} s, code {}: {reason}", took.as_secs_f64(), outcome.code);
    assert_ne!(outcome.code, 0, "{reason}");
    // The machine is emulated, and slow.
    assert!(took < deadline + Duration::from_secs(30), "it took {took:?}");
    reason
}

#[test]
fn verbs_whose_link_is_cut_end_the_job_by_name() {
    if !is_there() {
        return;
    }
    let reason = disturbed(|_| cut());
    mend();
    assert!(reason.contains("the path to ") && reason.contains("worker"), "{reason}");
}

fn cut() {
    output("ip", &["link", "set", "va", "down"]);
}

/// The link is there again, with what the kernel has forgotten of it (scripts/rdma-vm.d/network).
fn mend() {
    output("ip", &["link", "set", "va", "up"]);
    output("ip", &["neighbour", "replace", "10.8.0.2", "lladdr", &address("vb"), "dev", "va", "nud", "permanent"]);
    output("ip", &["route", "replace", "10.8.0.2", "dev", "va", "src", "10.8.0.1", "table", "101"]);
}

/// How often an end says that its path was rebuilt.
pub fn rebuilt(job: &Job) -> usize {
    job.output().matches("and was rebuilt after").count()
}

/// The last clock that a worker has said to begin.
pub fn clock(job: &Job) -> u64 {
    let output = job.output();
    let last = output.rsplit("begins clock ").next().and_then(|rest| rest.split_whitespace().next());
    last.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Waits until `count` ends have said that their path was rebuilt, and the workers get on.
pub fn until_rebuilt(job: &Job, count: usize) {
    let (since, begun) = (Instant::now(), clock(job));
    while rebuilt(job) < count || clock(job) < begun + 2 {
        assert!(since.elapsed() < PATIENCE, "{} ends, clock {}\n{}", rebuilt(job), clock(job), job.output());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Packets that have crossed the link so far.
fn crossed() -> u64 {
    let count = |device: &str| {
        let file = format!("/sys/class/net/{device}/statistics/tx_packets");
        std::fs::read_to_string(file).unwrap().trim().parse::<u64>().unwrap()
    };
    count("va") + count("vb")
}

#[test]
fn verbs_whose_link_comes_back_change_no_bit() {
    if !is_there() {
        return;
    }
    const STEPS: u64 = 200;
    let (home, calm_home) = (home(), home());
    let prepared = |home: &std::path::Path| {
        let mut options = across(home);
        with_variable(&mut options, "WORKER_TELLS", 1);
        with_variable(&mut options, "WORKER_STEPS", STEPS);
        // Emulated: what takes a moment elsewhere takes seconds here.
        (options.config.rebuild_ms, options.config.deadline_ms) = (60_000, 30_000);
        options
    };
    let undisturbed = run(prepared(calm_home.path()));
    let mut job = Job::start(prepared(home.path())).unwrap();
    wait_for_text(&job, "begins clock 3");
    let (mut random, mut hits) = (SimRandom::new(crate::broken_paths::faults().1), 0);
    while hits < 3 {
        std::thread::sleep(Duration::from_millis(random.below(300)));
        let (before, at_clock, down_ms) = (rebuilt(&job), clock(&job), 50 + random.below(500));
        assert!(at_clock + 10 < STEPS, "the job is nearly over: nothing would be hit\n{}", job.output());
        let packets = crossed();
        std::thread::sleep(Duration::from_millis(5));
        let packets = crossed() - packets;
        cut();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        std::thread::sleep(Duration::from_millis(down_ms));
        mend();
        // Both servers' paths to both workers cross the link.
        until_rebuilt(&job, before + 4);
        hits += u64::from(packets > 0);
        println!(
            "{at:.3}: the link was down for {down_ms} ms while training, clock {at_clock}, {packets} packets on it in the 5 ms before"
        );
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (ours, theirs) = (digests(&job.output()), digests(&undisturbed));
    println!("{hits} hits, {} ends of paths rebuilt; digests {ours:?}, undisturbed {theirs:?}", rebuilt(&job));
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}");
    let all = vec![model(); 2];
    assert!(stored(home.path(), &all) == stored(calm_home.path(), &all), "the checkpoints differ");
}

/// One of two rails dies for good: the job goes on over the other, and says so.
#[test]
fn verbs_one_of_whose_rails_dies_go_on_over_the_other() {
    if std::env::var("RDMA_VM").as_deref() != Ok("dummy") {
        println!("NOT RUN: no two soft-RDMA devices that belong to this test (scripts/test-rdma has them)");
        return;
    }
    let home = home();
    let mut options = over(home.path(), "rxe0,rxe1", "rxe0,rxe1");
    with_variable(&mut options, "WORKER_TELLS", 1);
    (options.config.rebuild_ms, options.config.deadline_ms) = (60_000, 30_000);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 10");
    let at_clock = clock(&job);
    assert!(at_clock + 10 < STEPS, "the job is nearly over: nothing would be hit\n{}", job.output());
    output("ip", &["link", "set", "dummy1", "down"]);
    until_rebuilt(&job, 4);
    println!("rail rxe1:1 died at clock {at_clock}, at clock {} all four paths were there again", clock(&job));
    let outcome = end(&mut job);
    output("ip", &["link", "set", "dummy1", "up"]);
    let text = job.output();
    assert_eq!(outcome.code, 0, "{:?}\n{text}", outcome.reason);
    for part in
        ["rail rxe1:1: its port went down", "rail rxe1:1: its port is down; paths that are built now go without it"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let all = vec![model(); 2];
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "verbs after a rail has died");
    text.lines().filter(|line| line.contains("rail rxe1:1")).for_each(|line| println!("{line}"));
}

/// The network between the second rail's ports loses everything, and the ports stay up.
#[test]
fn verbs_one_of_whose_rails_carries_nothing_go_on_over_the_other() {
    if !is_there() {
        return;
    }
    let home = home();
    let mut options = over(home.path(), "rxa,rxc", "rxb,rxd");
    with_variable(&mut options, "WORKER_TELLS", 1);
    (options.config.rebuild_ms, options.config.deadline_ms) = (60_000, 30_000);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 10");
    let at_clock = clock(&job);
    assert!(at_clock + 10 < STEPS, "the job is nearly over: nothing would be hit\n{}", job.output());
    let lose = |share| {
        for device in ["vc", "vd"] {
            output("tc", &["qdisc", "replace", "dev", device, "root", "netem", "loss", share]);
        }
    };
    lose("100%");
    let since = Instant::now();
    until_rebuilt(&job, 4);
    let (took, over_at) = (since.elapsed(), clock(&job));
    assert!(
        took < Duration::from_secs(25),
        "it took {took:?}: the rail was found out by the hellos only\n{}",
        job.output()
    );
    println!(
        "the network of rail 1 was cut at clock {at_clock}; all four paths were there again {took:.1?} later, at clock {over_at}"
    );
    let outcome = end(&mut job);
    let lost = dropped_by("vc") + dropped_by("vd");
    lose("1%");
    let text = job.output();
    text.lines().filter(|line| line.contains("rails: ")).for_each(|line| println!("{line}"));
    assert_eq!(outcome.code, 0, "{:?}\n{text}", outcome.reason);
    assert!(lost > 5, "the rail lost only {lost} packets: nothing was tried");
    let told = text.matches("goes over 1 of 2 rails: RoCE v2 from 10.8.0.").count();
    assert!(
        told >= 4 && text.contains("; not rail 1: one end does not offer it"),
        "{told} paths are said to go over rail 0\n{text}"
    );
    assert!(!text.contains("not rail 0"), "the other rail was doubted too\n{text}");
    let all = vec![model(); 2];
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "verbs after a rail has carried nothing");
}

fn address(device: &str) -> String {
    std::fs::read_to_string(format!("/sys/class/net/{device}/address")).unwrap().trim().into()
}

#[test]
fn verbs_whose_server_is_killed_end_the_job_by_name() {
    if !is_there() {
        return;
    }
    let reason = disturbed(|job| job.kill(Rank::server(1), Signal::SIGKILL));
    assert!(reason.contains("server 1"), "{reason}");
}
