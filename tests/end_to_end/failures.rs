//! What ends a job, by name and within its deadline; and that a job that ended goes on from its checkpoint with the same bits.

use std::time::{Duration, Instant};

use gradwire::{
    Consistency,
    checkpoint::latest,
    launch::{EXIT_PREEMPTED, Job, Signal},
    optim::{GroupConfig, OptimizerConfig, OptimizerKind},
    types::{ChunkId, Rank},
};
use nix::sys::signal::Signal as OsSignal;

use crate::{
    jobs::{end, home, options, run, stored, wait_for_text, with_variable},
    program::model,
};

/// The bits of an undisturbed run.
pub fn undisturbed() -> std::collections::BTreeMap<String, Vec<u32>> {
    let home = home();
    run(options(home.path(), "train"));
    stored(home.path(), &vec![model(); 2])
}

fn killed(victim: Rank, signal: OsSignal) {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.checkpoint.every = Some(4);
    with_variable(&mut options, "WORKER_PAUSE_MS", 20);
    let deadline = options.config.deadline();
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let since = Instant::now();
    job.kill(victim, signal);
    let outcome = end(&mut job);
    // Detection, the report, and the launcher's grace; generous, for a busy machine.
    assert!(since.elapsed() < deadline + Duration::from_secs(20), "it took {:?}", since.elapsed());
    let reason = outcome.reason.clone().unwrap_or_default();
    println!("{victim}, {signal}: the job had ended after {:.2} s: {reason}", since.elapsed().as_secs_f64());
    assert_ne!(outcome.code, 0, "{reason}");
    assert!(reason.contains(&victim.to_string()), "the report does not name {victim}: {reason}");
    let clock = outcome.checkpoint.expect("a checkpoint before the failure");
    assert!(clock >= 4, "{clock}");
    drop(job);
    let mut options = crate::jobs::options(home.path(), "train");
    options.config.resume = Some(home.path().join("checkpoints"));
    let output = run(options);
    assert!(output.contains(&format!("training from clock {clock}")), "{output}");
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed(), "resumed after {victim} was killed");
}

#[test]
fn a_killed_worker_ends_the_job_by_name_and_it_resumes_with_the_same_bits() {
    killed(Rank::worker(1), OsSignal::SIGKILL);
}

#[test]
fn a_killed_server_ends_the_job_by_name_and_it_resumes_with_the_same_bits() {
    killed(Rank::server(1), OsSignal::SIGKILL);
}

#[test]
fn a_stopped_worker_is_noticed_by_its_heartbeat() {
    killed(Rank::worker(0), OsSignal::SIGSTOP);
}

#[test]
fn a_stopped_server_is_noticed_by_its_heartbeat() {
    killed(Rank::server(0), OsSignal::SIGSTOP);
}

#[test]
fn preemption_stores_the_next_clock_and_the_job_resumes_with_the_same_bits() {
    let home = home();
    let mut options = options(home.path(), "train");
    with_variable(&mut options, "WORKER_PAUSE_MS", 20);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    job.signal(Signal::Preempt(OsSignal::SIGTERM as i32));
    let outcome = end(&mut job);
    assert_eq!(outcome.code, EXIT_PREEMPTED, "{:?}\n{}", outcome.reason, job.output());
    let clock = outcome.checkpoint.expect("the checkpoint of the preemption");
    assert!(job.output().contains(&format!("preempted at clock {clock}")), "{}", job.output());
    drop(job);
    let mut options = crate::jobs::options(home.path(), "train");
    options.config.resume = Some(home.path().join("checkpoints"));
    // Another number of servers may load it.
    options.config.servers = 3;
    let output = run(options);
    assert!(output.contains(&format!("training from clock {clock}")), "{output}");
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
}

#[test]
fn a_worker_that_hangs_is_named_by_those_who_wait_for_it() {
    let home = home();
    let mut options = options(home.path(), "hang");
    options.config.wait_ms = 2_000;
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert_ne!(outcome.code, 0, "{reason}");
    for part in ["waited 2.0 s", "server", "chunk", "clock 10"] {
        assert!(job.output().contains(part) || reason.contains(part), "no `{part}` in: {reason}\n{}", job.output());
    }
}

/// Updates of workers that were ahead were in the checkpoint, and were applied once more when these pushed them again: after a
/// resume under `ssp` or `asp` the model had seen some gradients twice.
#[test]
fn what_a_fast_worker_had_pushed_before_a_checkpoint_is_not_applied_again() {
    for consistency in [Consistency::Ssp { bound: 3 }, Consistency::Asp] {
        let job = |home: &std::path::Path| {
            let mut options = options(home, "ones");
            options.config.consistency = consistency;
            // Each push takes 1 off every parameter, so that the order does not matter and the number does.
            let group = GroupConfig { name: "other".into(), learning_rate: None, weight_decay: None };
            options.config.optimizer = OptimizerConfig::new(OptimizerKind::SGD, 1.0);
            options.config.optimizer.groups = vec![group];
            (options.config.checkpoint.every, options.config.checkpoint.keep) = (Some(1), 100);
            options
        };
        let (calm, home) = (home(), crate::jobs::home());
        run(job(calm.path()));
        let undisturbed = stored(calm.path(), &vec![model(); 2]);
        let mut killed = Job::start(job(home.path())).unwrap();
        wait_for_checkpoint(&home.path().join("checkpoints"), 12);
        killed.kill(Rank::server(0), OsSignal::SIGKILL);
        assert_ne!(end(&mut killed).code, 0);
        drop(killed);
        let found = latest(&home.path().join("checkpoints")).unwrap().checkpoint.unwrap();
        let (clock, chunks) = (found.clock(), found.manifest().layout.chunks.len() as u32);
        let clocks: Vec<_> = (0..chunks).map(|chunk| found.chunk(ChunkId(chunk)).unwrap().clocks.to_vec()).collect();
        println!("{consistency}: resumed at {clock}, where the workers' clocks were {clocks:?}");
        assert!(clocks.iter().all(|clocks| clocks.iter().min() >= Some(&clock)), "{clocks:?}");
        assert!(clocks.iter().any(|clocks| clocks.iter().max() > Some(&clock)), "nobody was ahead: {clocks:?}");
        let mut options = job(home.path());
        options.config.resume = Some(home.path().join("checkpoints"));
        run(options);
        assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed, "{consistency}, resumed at {clock}");
    }
}

fn wait_for_checkpoint(dir: &std::path::Path, clock: u64) {
    let since = Instant::now();
    while latest(dir).unwrap().checkpoint.is_none_or(|checkpoint| checkpoint.clock() < clock) {
        assert!(since.elapsed() < crate::jobs::PATIENCE, "waited in vain for a checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
}
