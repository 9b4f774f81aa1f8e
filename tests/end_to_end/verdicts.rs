//! Who keeps a job waiting: stopped, gone with its host, or computing; told in one line, and the job goes on with the same bits.
//!
//! Invariant: every verdict that is told names the victim, whatever moment it was given at.

use std::process::Command;

use gradwire::{
    launch::{Job, JobOptions},
    types::Rank,
};
use nix::sys::signal::Signal as OsSignal;

use crate::{
    failures::undisturbed,
    jobs::{end, home, options, stored, wait_for_text, with_variable},
    program::model,
};

/// A job that tells of waits soon and ends by silence late.
fn watched(home: &std::path::Path, part: &str) -> JobOptions {
    let mut options = options(home, part);
    (options.config.heartbeat_ms, options.config.warn_ms, options.config.deadline_ms) = (200, 1000, 60_000);
    options
}

/// The verdicts that the launcher has told.
fn verdicts(output: &str) -> Vec<&str> {
    output
        .lines()
        .filter(|line| {
            line.contains("gradwire: job test:") && line.contains("for it since") || line.contains("for them since")
        })
        .collect()
}

/// Stops these ranks until a verdict has been told, and lets them go on: the verdict, what `gradwire status` said meanwhile, and all
/// output. The bits are those of a job that nobody disturbed.
fn stopped(options: JobOptions, home: &std::path::Path, victims: &[Rank]) -> (String, String, String) {
    let mut options = options;
    with_variable(&mut options, "WORKER_PAUSE_MS", 20);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    victims.iter().for_each(|victim| job.kill(*victim, OsSignal::SIGSTOP));
    wait_for_text(&job, "no sign of life for");
    let status = |arguments: &[&str]| {
        let mut status = Command::new(env!("CARGO_BIN_EXE_gradwire"));
        let output = status.arg("status").arg("test").args(arguments).env("GRADWIRE_HOME", home).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (shown, json) = (status(&[]), status(&["--json"]));
    assert!(shown.contains("waiting: ") && shown.contains("no sign of life for"), "{shown}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["verdict"]["finding"], "silent", "{json}");
    victims.iter().for_each(|victim| job.kill(*victim, OsSignal::SIGCONT));
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert_eq!(stored(home, &vec![model(); 2]), undisturbed(), "after {victims:?} were stopped for a while");
    let output = job.output();
    let verdict = verdicts(&output).into_iter().find(|line| line.contains("no sign of life")).unwrap().to_string();
    (verdict, shown, output)
}

#[test]
fn a_stopped_worker_is_told_and_the_job_goes_on_with_the_same_bits() {
    let home = home();
    let (verdict, shown, output) = stopped(watched(home.path(), "train"), home.path(), &[Rank::worker(1)]);
    for part in
        ["worker 1 (host ", "has not pushed clock 1", "over shm", "3 others wait for it", "it is stopped, or its host"]
    {
        assert!(verdict.contains(part), "no `{part}` in {verdict}");
    }
    assert!(shown.contains("worker 1 (host "), "{shown}");
    assert!(verdicts(&output).iter().all(|line| line.contains("test: worker 1 (host ")), "{output}");
}

#[test]
fn a_stopped_server_is_told_and_the_job_goes_on_with_the_same_bits() {
    let home = home();
    let mut options = watched(home.path(), "train");
    options.config.transports = vec![gradwire::session::Fabric::Tcp];
    let (verdict, _, output) = stopped(options, home.path(), &[Rank::server(1)]);
    for part in [
        "server 1 (host ",
        "has not answered with the parameters of clock 1",
        "over tcp",
        "wait for it",
        "it is stopped",
    ] {
        assert!(verdict.contains(part), "no `{part}` in {verdict}");
    }
    assert!(verdicts(&output).iter().all(|line| line.contains("test: server 1 (host ")), "{output}");
}

/// Rank 1 of each role runs where the host has another name.
const ON_TWO_HOSTS: &str = r#"
if [ "$GRADWIRE_RANK" = 1 ]; then exec unshare --uts sh -c 'hostname host-b && exec "$@"' sh "$@"; fi
exec "$@"
"#;

#[test]
fn a_host_that_is_gone_is_told_as_one() {
    let can =
        Command::new("unshare").args(["--uts", "hostname", "host-b"]).output().is_ok_and(|out| out.status.success());
    if !can {
        assert!(std::env::var_os("CI").is_none(), "CI must be able to make namespaces of host names");
        println!("NOT RUN: a host's name of one's own needs root and util-linux");
        return;
    }
    let home = home();
    let script = home.path().join("on-two-hosts");
    std::fs::write(&script, ON_TWO_HOSTS).unwrap();
    let mut options = watched(home.path(), "train");
    with_variable(&mut options, "WORKER_PAUSE_MS", 20);
    for command in [&mut options.command, &mut options.server_command] {
        command.splice(0..0, ["sh".into(), script.clone().into()]);
    }
    let victims = [Rank::server(1), Rank::worker(1)];
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    victims.iter().for_each(|victim| job.kill(*victim, OsSignal::SIGSTOP));
    wait_for_text(&job, "all ranks of host host-b (server 1 and worker 1) have not");
    victims.iter().for_each(|victim| job.kill(*victim, OsSignal::SIGCONT));
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
}

#[test]
fn a_worker_that_computes_for_long_is_told_from_one_that_is_silent() {
    let home = home();
    let mut job = Job::start(watched(home.path(), "nap")).unwrap();
    let outcome = end(&mut job);
    let output = job.output();
    assert_eq!(outcome.code, 0, "{:?}\n{output}", outcome.reason);
    let told = verdicts(&output);
    assert!(!told.is_empty(), "{output}");
    for line in told {
        for part in ["worker 1 (host ", "has not pushed clock 10", "last sign of life 0.", "it is alive and computing"]
        {
            assert!(line.contains(part), "no `{part}` in {line}");
        }
    }
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
}

#[test]
fn a_rank_that_never_joins_is_told_before_the_job_gives_up() {
    let home = home();
    let mut options = watched(home.path(), "train");
    options.by_hand = std::collections::BTreeSet::from([Rank::worker(1)]);
    options.config.join_ms = 3_000;
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert!(reason.contains("worker 1 has not joined within 3 s"), "{reason}");
    let output = job.output();
    let told = verdicts(&output);
    assert!(told.iter().all(|line| line.contains("worker 1 has not joined; 3 others wait for it since")), "{output}");
    assert!(!told.is_empty(), "{output}");
}

/// Nobody is left to report: the launcher says so by itself.
#[test]
fn a_job_all_of_whose_ranks_are_stopped_is_told_by_the_launcher() {
    let home = home();
    let mut options = watched(home.path(), "train");
    with_variable(&mut options, "WORKER_PAUSE_MS", 20);
    let all: Vec<Rank> = options.config.ranks().collect();
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    all.iter().for_each(|rank| job.kill(*rank, OsSignal::SIGSTOP));
    wait_for_text(&job, "have not reported anything to the launcher; no sign of life for");
    let told = job.output();
    all.iter().for_each(|rank| job.kill(*rank, OsSignal::SIGCONT));
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert!(told.contains("(server 0, server 1, worker 0 and worker 1) have not reported"), "{told}");
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
}
