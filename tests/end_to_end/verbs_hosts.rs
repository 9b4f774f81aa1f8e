//! A job over verbs on two machines, one of which is switched off: in two virtual machines that a cable joins (`scripts/test-rdma`);
//! elsewhere this test says that it does nothing.
//!
//! The same program runs on both. The first has the launcher, server 0 and worker 0; the second starts server 1 and worker 1 by
//! hand, as a user would on another host, and is switched off in the middle.
//!
//! Invariant: a machine is switched off in the middle of training, never before both ranks of it have joined.

use std::{
    ffi::OsString,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use gradwire::{launch::Job, session::Fabric, types::Rank};

use crate::jobs::{PATIENCE, end, home, options, wait_for_text, with_variable};

/// What both machines and their keeper see.
const SHARED: &str = "/run/vm";

/// Written by the first machine for the second: the rendezvous, and the job's token.
const INVITATION: &str = "/run/vm/invitation";

/// Something of which there is enough until the machine is gone.
const STEPS: u32 = 1_000_000;

#[test]
fn verbs_whose_machine_is_switched_off_end_the_job_by_name() {
    let is_pair = std::env::var("RDMA_VM").is_ok_and(|network| network == "pair");
    match std::env::var("RDMA_VM_SIDE").as_deref() {
        Ok("0") if is_pair => survive(),
        Ok("1") if is_pair => be_switched_off(),
        _ => println!("NOT RUN: no second machine (scripts/test-rdma has one)"),
    }
}

fn survive() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Verbs];
    options.listen = "10.7.0.1:0".parse().unwrap();
    options.by_hand = [Rank::server(1), Rank::worker(1)].into();
    with_variable(&mut options, "WORKER_STEPS", STEPS);
    let deadline = options.config.deadline();
    let mut job = Job::start(options).unwrap();
    let token = std::fs::read_to_string(job.directory().join("token")).unwrap();
    std::fs::write(format!("{INVITATION}.new"), format!("{}\n{token}", job.address())).unwrap();
    std::fs::rename(format!("{INVITATION}.new"), INVITATION).unwrap();
    wait_for_text(&job, "at clock 10");
    let since = Instant::now();
    std::fs::write(Path::new(SHARED).join("kill-1"), "").unwrap();
    let outcome = end(&mut job);
    let (took, reason) = (since.elapsed(), outcome.reason.unwrap_or_default());
    println!("over after {:.2} s, code {}: {reason}", took.as_secs_f64(), outcome.code);
    assert_ne!(outcome.code, 0, "{reason}");
    let names_it = ["the path to worker 1 broke", "the path to server 1"].iter().any(|text| reason.contains(text));
    assert!(names_it, "the machine of server 1 and worker 1 is gone: {reason}\n{}", job.output());
    // The machine is emulated, and slow.
    assert!(took < deadline + Duration::from_secs(30), "it took {took:?}");
}

fn be_switched_off() {
    let limit = Instant::now() + PATIENCE;
    let invitation = loop {
        match std::fs::read_to_string(INVITATION) {
            Ok(text) => break text,
            Err(error) => assert!(Instant::now() < limit, "no invitation came: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let (rendezvous, token) = invitation.split_once('\n').unwrap();
    let node = |role: &str, command: &[OsString]| -> Child {
        let mut process = Command::new(env!("CARGO_BIN_EXE_gradwire"));
        process.args(["node", "--rank", "1", "--rendezvous", rendezvous, "--role", role]).args(command);
        process.env("GRADWIRE_TOKEN", token.trim()).env("WORKER_PART", "train").env("WORKER_STEPS", STEPS.to_string());
        process.spawn().unwrap()
    };
    let program = std::env::current_exe().unwrap().into_os_string();
    let words = ["--exact", "worker_process", "--nocapture", "--test-threads=1"].map(OsString::from);
    let worker: Vec<OsString> = ["--".into(), program].into_iter().chain(words).collect();
    let mut children = [node("server", &[]), node("worker", &worker)];
    // The machine goes away below us; if it does not, the other side says why.
    while Instant::now() < limit {
        for child in &mut children {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("a rank ended before its machine did: {status}");
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("nobody switched this machine off");
}
