//! A training job with two copies of each shard whose tenures are kept in etcd, three members on loopback that are killed: one of them, the
//! one that leads, and two at once.
//!
//! Invariant: without a majority nobody takes over, and training waits; with one the job ends with the bits of the undisturbed run.

use std::{path::Path, time::Duration};

use gradwire::{
    launch::{Job, JobOptions},
    session::{Fabric, StoreChoice},
    types::Rank,
};
use nix::sys::signal::Signal;

use crate::{
    broken_paths::clock,
    cluster::Cluster,
    jobs::{digests, end, home, options, run, wait_for_text, with_variable},
    replicas::{is_full, said, wait_until},
};

fn job(home: &Path, replicas: u16) -> JobOptions {
    let mut options = options(home, "train");
    options.config.servers = 3;
    options.config.replicas = replicas;
    options.config.transports = vec![Fabric::Tcp];
    options.config.suspect_ms = 1500;
    // Members of etcd take their time to come back.
    (options.config.deadline_ms, options.config.rebuild_ms) = (60_000, 60_000);
    with_variable(&mut options, "WORKER_TELLS", 1);
    options
}

/// Kills a server that serves a shard, and waits until it is there again.
fn lose(job: &Job, server: u16) {
    let before = said(job, "redundancy is full again");
    job.kill(Rank::server(server), Signal::SIGKILL);
    wait_until(job, "a backup again", || said(job, "redundancy is full again") > before && is_full(job));
}

#[test]
fn training_outlives_members_of_etcd_and_waits_for_their_majority() {
    let mut cluster = Cluster::start();
    let (home_of, calm_home) = (home(), home());
    let mut options = job(home_of.path(), 2);
    options.config.store = StoreChoice::Etcd(cluster.urls());
    let last = home_of.path().join("last");
    with_variable(&mut options, "WORKER_LAST", last.display());
    with_variable(&mut options, "WORKER_PAUSE_MS", 4);
    let mut job_of = Job::start(options).unwrap();
    wait_for_text(&job_of, "begins clock 3");
    let first = cluster.leader();
    let follower = (first + 1) % 3;
    cluster.kill(follower);
    lose(&job_of, 0);
    println!("clock {}: server 0 was lost with a member of etcd, and is back", clock(&job_of));
    cluster.start_member(follower);
    cluster.wait_until_it_serves();
    let leader = cluster.leader();
    cluster.kill(leader);
    lose(&job_of, 1);
    println!("clock {}: server 1 was lost with the leader of etcd, and is back", clock(&job_of));
    let second = cluster.leader();
    cluster.kill(second);
    let before = clock(&job_of);
    wait_until(&job_of, "training without etcd", || clock(&job_of) > before + 20);
    let tenures = said(&job_of, "serves since epoch");
    job_of.kill(Rank::server(2), Signal::SIGKILL);
    wait_for_text(
        &job_of,
        "no copy of a shard can take over, since that cannot be written down: etcd has not answered",
    );
    let stands = clock(&job_of);
    std::thread::sleep(Duration::from_secs(2));
    let (now, told) = (clock(&job_of), said(&job_of, "serves since epoch"));
    assert!(now <= stands + 1, "training went on without a shard, from clock {stands} to {now}");
    assert_eq!(told, tenures, "somebody took over without a majority:\n{}", job_of.output());
    println!("clock {stands}: server 2 was lost without a majority of etcd, and nobody took over in 2 s");
    let full = said(&job_of, "redundancy is full again");
    cluster.start_member(second);
    wait_until(&job_of, "a backup again", || said(&job_of, "redundancy is full again") > full && is_full(&job_of));
    let until = clock(&job_of) + 100;
    println!("clock {}: etcd has its majority again, and every shard its copies", until - 100);
    std::fs::write(last.with_extension("partial"), until.to_string()).unwrap();
    std::fs::rename(last.with_extension("partial"), &last).unwrap();
    let outcome = end(&mut job_of);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job_of.output());
    let mut calm = job(calm_home.path(), 1);
    with_variable(&mut calm, "WORKER_STEPS", until);
    let (ours, theirs) = (digests(&job_of.output()), digests(&run(calm)));
    println!("{until} clocks; digests {ours:?}, undisturbed {theirs:?}");
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}\n{}", job_of.output());
}
