//! Workers that leave a running job and come to it on a command: at the clocks that are printed, with the bits of a job that was told
//! of them from the start.
//!
//! Invariant: what is right is what the simulator makes of the job that was told, also where servers are killed, join and leave meanwhile; nobody who was
//! told to leave counts as lost.

use std::{
    path::Path,
    process::{Command, Output},
};

use gradwire::{
    Consistency,
    launch::Job,
    session::{Fabric, WorkerTurn},
    types::{Clock, Rank},
    world::{ElasticOptions, WorldOptions},
};
use nix::sys::signal::Signal;

use crate::{
    bits::{same, simulate, world_options},
    broken_paths::clock,
    jobs::{digests, end, home, options, stored, wait_for_text, with_variable},
    program::{STEPS, gradient, model},
    replicas::{is_full, said, wait_until},
    scaling::scale,
};

fn call(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.args(arguments).env("GRADWIRE_HOME", home).output().unwrap()
}

/// What a command that must go well says of a worker.
fn turn(job: &Job, home: &Path, arguments: &[&str]) -> WorkerTurn {
    let told = call(home, &[arguments, &["--json"]].concat());
    let why = || format!("{arguments:?}: {}\n{}", String::from_utf8_lossy(&told.stderr), job.output());
    assert!(told.status.success(), "{}", why());
    serde_json::from_slice(&told.stdout).unwrap_or_else(|_| panic!("{}", why()))
}

/// Kills a server of a job whose shards have two copies, and waits until training goes on without it.
fn kill(job: &Job, server: u16) {
    wait_until(job, "both copies of every shard", || is_full(job));
    let (at, gone) = (clock(job), said(job, "its shards go on with"));
    job.kill(Rank::server(server), Signal::SIGKILL);
    let goes_on = || said(job, "its shards go on with") > gone && clock(job) > at + 2;
    wait_until(job, "a clock after the take-over", goes_on);
}

/// What becomes of the servers.
#[derive(Clone, Copy, PartialEq)]
enum Servers {
    Stay,
    /// Every shard has two copies.
    AreKilled,
    /// There are four of them, and then one.
    JoinAndLeave,
}

impl Servers {
    /// Lets it happen, for the first time or the second.
    fn disturb(self, time: u16, job: &Job, home: &Path) {
        match self {
            Servers::Stay => {}
            Servers::AreKilled => kill(job, time),
            Servers::JoinAndLeave => drop(scale(home, ["4", "1"][usize::from(time)])),
        }
    }
}

/// Three workers; a fourth comes to a seat that was empty, worker 1 leaves at a clock that was named, and comes again. Something happens to the
/// servers when the clock has been named and not come, and after the worker has left.
fn run(fabric: Fabric, clip: Option<f32>, servers: Servers) {
    let home = home();
    let mut options = options(home.path(), "train");
    (options.config.workers, options.config.max_workers) = (3, 4);
    options.config.optimizer.clip.global_norm = clip;
    options.config.transports = vec![fabric];
    options.config.replicas = if servers == Servers::AreKilled { 2 } else { 1 };
    options.config.max_servers = if servers == Servers::JoinAndLeave { 4 } else { 0 };
    options.config.suspect_ms = 1500; // other tests run beside this one
    let are_disturbed = servers != Servers::Stay;
    let (steps, pause_ms) = if are_disturbed { (300, 40) } else { (STEPS, 60) };
    with_variable(&mut options, "WORKER_STEPS", steps);
    with_variable(&mut options, "WORKER_PAUSE_MS", pause_ms);
    if are_disturbed {
        with_variable(&mut options, "WORKER_TELLS", 1);
    }
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let came = turn(&job, home.path(), &["add-worker", "test"]);
    let at = came.clock + if are_disturbed { 40 } else { 3 };
    let left = turn(&job, home.path(), &["remove-worker", "test", "1", "--at", &at.to_string()]);
    assert_eq!((came.worker, came.is_in, left.worker, left.is_in), (3, true, 1, false));
    servers.disturb(0, &job, home.path());
    assert!(!are_disturbed || clock(&job) < left.clock, "that was too late: {}", job.output());
    wait_for_text(&job, &format!("leaves at clock {}", left.clock));
    servers.disturb(1, &job, home.path());
    let again = turn(&job, home.path(), &["add-worker", "test", "1"]);
    let outcome = end(&mut job);
    let output = job.output();
    assert_eq!((outcome.code, outcome.missing.len()), (0, 0), "{:?}\n{output}", outcome.reason);
    assert!(10 < came.clock && left.clock >= at && left.clock < again.clock && again.clock < steps, "{output}");
    for (worker, how, clock) in [(3, "in", came.clock), (1, "out", left.clock), (1, "in", again.clock)] {
        let line = format!("gradwire: job test: worker {worker} is {how} from clock {clock} on");
        assert!(output.contains(&line), "{line}\n{output}");
    }
    let digests = digests(&output);
    assert!(digests.len() == 4 && digests.iter().all(|digest| *digest == digests[0]), "{output}");
    let all = vec![model(); 4];
    let told: Vec<(u16, Clock, Option<Clock>)> = vec![(3, 0, Some(came.clock)), (1, left.clock, Some(again.clock))];
    let elastic = ElasticOptions { told, ..ElasticOptions::default() };
    let mut world = WorldOptions { elastic, clocks: steps, ..world_options(all.clone()) };
    world.optimizer.clip.global_norm = clip;
    same(&simulate(world, gradient), &stored(home.path(), &all), fabric.name());
}

#[test]
fn workers_come_and_go_over_tcp() {
    run(Fabric::Tcp, Some(3.0), Servers::Stay);
}

#[test]
fn workers_come_and_go_in_shared_memory() {
    run(Fabric::Shm, None, Servers::Stay);
}

#[test]
fn workers_come_and_go_while_servers_are_killed_over_tcp() {
    run(Fabric::Tcp, None, Servers::AreKilled);
}

#[test]
fn workers_come_and_go_while_servers_are_killed_in_shared_memory() {
    run(Fabric::Shm, Some(3.0), Servers::AreKilled);
}

#[test]
fn workers_come_and_go_while_servers_join_and_leave_over_tcp() {
    run(Fabric::Tcp, Some(3.0), Servers::JoinAndLeave);
}

#[test]
fn workers_come_and_go_while_servers_join_and_leave_in_shared_memory() {
    run(Fabric::Shm, None, Servers::JoinAndLeave);
}

#[test]
fn what_cannot_be_is_refused_and_the_job_goes_on() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.checkpoint.dir = None;
    with_variable(&mut options, "WORKER_PAUSE_MS", 40);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let refused = |arguments: &[&str], why: &str| {
        let told = call(home.path(), arguments);
        let text = String::from_utf8_lossy(&told.stderr);
        assert!(told.status.code() == Some(1) && text.contains(why), "{arguments:?}: {text}");
    };
    refused(
        &["add-worker", "test"],
        "all 2 seats for workers are taken; more are made at the start, with --max-workers",
    );
    refused(&["add-worker", "test", "2"], "there is no seat for worker 2");
    refused(&["add-worker", "test", "1"], "the seat of worker 1 is taken");
    refused(&["remove-worker", "test", "7"], "there is no worker 7");
    let left = turn(&job, home.path(), &["remove-worker", "test", "0"]);
    refused(&["remove-worker", "test", "1"], "worker 1 is the last one");
    let outcome = end(&mut job);
    assert_eq!((outcome.code, left.worker), (0, 0), "{:?}\n{}", outcome.reason, job.output());
}

#[test]
fn where_every_push_is_a_step_of_its_own_nobody_comes_or_goes() {
    let home = home();
    let mut options = options(home.path(), "slow");
    options.config.consistency = Consistency::Asp;
    options.config.checkpoint.dir = None;
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let told = call(home.path(), &["remove-worker", "test", "1"]);
    let text = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && text.contains("that needs `consistency` bsp"), "{text}");
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
}
