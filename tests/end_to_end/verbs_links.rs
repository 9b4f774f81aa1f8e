//! Jobs over verbs across a real link, which loses packets, is cut, or has one of its ends killed: in a virtual machine with a veth
//! pair (`scripts/test-rdma`); elsewhere these tests say that they do nothing.
//!
//! Invariant: what a fault has hit is counted, so that one which hit nothing does not pass.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use gradwire::{
    launch::{Job, JobOptions},
    session::Fabric,
    types::Rank,
};
use nix::sys::signal::Signal;

use crate::{
    bits::{same, simulated},
    jobs::{end, home, options, stored, wait_for_text, with_variable},
    program::model,
};

/// Whether the soft-RDMA devices rxa and rxb are the two ends of a veth pair here.
fn is_there() -> bool {
    let there = std::env::var("RDMA_VM").is_ok_and(|network| network == "veth");
    if !there {
        println!("NOT RUN: no veth pair with soft-RDMA devices (scripts/test-rdma has one)");
    }
    there
}

/// A job whose servers are at one end of the link and whose workers are at the other.
fn across(home: &std::path::Path) -> JobOptions {
    let mut options = options(home, "train");
    options.config.transports = vec![Fabric::Verbs];
    with_variable(&mut options, "GRADWIRE_HCA", "rxb");
    let words = ["env".into(), "GRADWIRE_HCA=rxa".into()];
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
    let count = |device: &str| {
        let text = output("tc", &["-s", "qdisc", "show", "dev", device]);
        let number = text.split("dropped ").nth(1).and_then(|rest| rest.split(',').next()).expect("netem's count");
        number.parse::<u64>().unwrap()
    };
    count("va") + count("vb")
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
    let reason = disturbed(|_| drop(output("ip", &["link", "set", "va", "down"])));
    output("ip", &["link", "set", "va", "up"]);
    output("ip", &["neighbour", "replace", "10.8.0.2", "lladdr", &address("vb"), "dev", "va", "nud", "permanent"]);
    output("ip", &["route", "replace", "10.8.0.2", "dev", "va", "src", "10.8.0.1", "table", "101"]);
    assert!(reason.contains("the path to ") && reason.contains("worker"), "{reason}");
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
