//! Workers that are lost while real processes train: the job goes on with the others, the lost one comes again, and the bits are those
//! of a job that was told of it from the start.
//!
//! Invariant: a loss that hit a clock in the middle has no told counterpart here, and the job is run again.

use gradwire::{
    launch::{EXIT_WITHOUT_WORKERS, Job},
    session::{Fabric, OnWorkerLoss},
    types::{Clock, Rank},
    world::{ElasticOptions, WorldOptions},
};
use nix::sys::signal::Signal;

use crate::{
    bits::{same, simulate, world_options},
    broken_paths::clock,
    jobs::{digests, end, home, options, stored, wait_for_text, with_variable},
    program::{STEPS, gradient, model},
    replicas::wait_until,
    scaling::scale,
};

/// Every step is decided upon.
const CLIP: f32 = 3.0;

/// How a job went: the clocks from which on worker 1 was out and in again, how many there were, and what it wrote.
struct Told {
    out: Clock,
    again: Option<Clock>,
    clocks: Clock,
    output: String,
}

/// What happens to the servers as the worker is lost.
#[derive(Clone, Copy, PartialEq)]
enum Servers {
    Stay,
    /// Every shard has two copies, and this one is killed at the same moment.
    Dies(u16),
    /// Shards are on their way to two more.
    Join,
}

/// The clock in `worker 1 is WHAT from clock N on`.
fn clock_of(output: &str, what: &str) -> Option<Clock> {
    let told = output.lines().find_map(|line| line.split_once(&format!("worker 1 is {what} from clock ")))?.1;
    Some(told.trim_end_matches(" on").parse().expect("a clock"))
}

/// Runs a job of three workers whose worker 1 gets a signal at clock 12, until the loss hit no clock in the middle.
fn lose(
    policy: OnWorkerLoss,
    fabric: Fabric,
    part: &str,
    (signal, servers): (Option<Signal>, Servers),
    home: &std::path::Path,
) -> Told {
    let clocks = if servers == Servers::Join { 3 * STEPS } else { STEPS };
    for _ in 0..5 {
        let mut options = options(home, part);
        if part == "nap" {
            (options.config.heartbeat_ms, options.config.warn_ms) = (100, 300);
            options.config.straggler_deadline_ms = 800;
        }
        options.config.optimizer.clip.global_norm = Some(CLIP);
        options.config.workers = 3;
        options.config.on_worker_loss = policy;
        options.config.transports = vec![fabric];
        match servers {
            Servers::Stay => {}
            Servers::Dies(_) => (options.config.replicas, options.config.suspect_ms) = (2, 1500),
            Servers::Join => {
                options.config.max_servers = 4;
                with_variable(&mut options, "WORKER_TELLS", 1);
            }
        }
        with_variable(&mut options, "WORKER_STEPS", clocks);
        with_variable(&mut options, "WORKER_PAUSE_MS", 40);
        let mut job = Job::start(options).unwrap();
        wait_for_text(&job, "at clock 10");
        let path = home.to_path_buf();
        let asking = (servers == Servers::Join).then(|| std::thread::spawn(move || scale(&path, "4")));
        if asking.is_some() {
            wait_for_text(&job, "shard 2 has moved");
            let at = clock(&job);
            wait_until(&job, "a clock after that", || clock(&job) > at);
        }
        signal.into_iter().for_each(|signal| job.kill(Rank::worker(1), signal));
        if let Servers::Dies(server) = servers {
            job.kill(Rank::server(server), Signal::SIGKILL);
        }
        asking.into_iter().for_each(|asking| drop(asking.join().unwrap()));
        let outcome = end(&mut job);
        let output = job.output();
        let missing: Vec<Rank> = outcome.missing.keys().copied().collect();
        let (out, again) = (clock_of(&output, "out"), clock_of(&output, "in"));
        if output.contains("went on without worker 1, which was lost while it gave them") {
            continue;
        }
        match again {
            None => {
                assert_eq!((outcome.code, &missing[..]), (EXIT_WITHOUT_WORKERS, &[Rank::worker(1)][..]), "{output}")
            }
            Some(_) => assert_eq!((outcome.code, &missing[..]), (0, &[][..]), "{output}"),
        }
        return Told { out: out.unwrap_or_else(|| panic!("nobody was out:\n{output}")), again, clocks, output };
    }
    panic!("five losses in the middle of a clock");
}

/// The parameters are those of the simulated job that was told.
fn compare(told: &Told, home: &std::path::Path, how: &str) {
    let all = vec![model(); 3];
    let elastic = ElasticOptions { told: vec![(1, told.out, told.again)], ..ElasticOptions::default() };
    let mut world = WorldOptions { elastic, clocks: told.clocks, ..world_options(all.clone()) };
    world.optimizer.clip.global_norm = Some(CLIP);
    same(&simulate(world, gradient), &stored(home, &all), how);
    let digests = digests(&told.output);
    assert!(digests.len() >= 2 && digests.iter().all(|digest| *digest == digests[0]), "{}", told.output);
}

#[test]
fn a_killed_worker_is_gone_on_without() {
    for fabric in [Fabric::Tcp, Fabric::Shm] {
        let home = home();
        let told = lose(OnWorkerLoss::Continue, fabric, "train", (Some(Signal::SIGKILL), Servers::Stay), home.path());
        assert!(told.out > 10 && told.out < STEPS && told.again.is_none(), "{}", told.output);
        let text = "was killed by signal 9 (SIGKILL); the job goes on without it";
        assert!(told.output.contains(text), "{}", told.output);
        compare(&told, home.path(), fabric.name());
    }
}

/// Whoever takes a shard over has never heard of the worker that died with the server.
#[test]
fn a_worker_is_killed_with_a_server_and_both_come_again() {
    for (fabric, server) in [(Fabric::Tcp, 0), (Fabric::Shm, 1)] {
        let home = home();
        let signals = (Some(Signal::SIGKILL), Servers::Dies(server));
        let told = lose(OnWorkerLoss::Restart, fabric, "train", signals, home.path());
        assert!(told.again.is_some() && told.output.contains("its shards go on with"), "{}", told.output);
        compare(&told, home.path(), fabric.name());
    }
}

/// Whoever takes a shard is told of all turns before it serves; the worker is started again, where servers are not.
#[test]
fn a_worker_is_killed_while_shards_move_and_comes_again() {
    for fabric in [Fabric::Tcp, Fabric::Shm] {
        let home = home();
        let told = lose(OnWorkerLoss::Restart, fabric, "train", (Some(Signal::SIGKILL), Servers::Join), home.path());
        assert!(told.again.is_some() && told.output.contains("has moved from server 1 to server 3"), "{}", told.output);
        compare(&told, home.path(), fabric.name());
    }
}

/// Its process is there, and says nothing: those who wait for it notice, and it is ended.
#[test]
fn a_stopped_worker_is_gone_on_without() {
    let home = home();
    let told = lose(OnWorkerLoss::Continue, Fabric::Tcp, "train", (Some(Signal::SIGSTOP), Servers::Stay), home.path());
    assert!(told.output.contains("no sign of life"), "{}", told.output);
    compare(&told, home.path(), "stopped");
}

/// A program that ends well without having finished leaves as much behind as one that crashes.
#[test]
fn a_worker_that_ends_without_finishing_is_gone_on_without() {
    let home = home();
    let told = lose(OnWorkerLoss::Continue, Fabric::Tcp, "forget", (None, Servers::Stay), home.path());
    assert_eq!(told.out, 10, "{}", told.output);
    compare(&told, home.path(), "forgot");
}

/// It computes, and all others wait for it.
#[test]
fn a_straggler_is_dropped() {
    let home = home();
    let told = lose(OnWorkerLoss::Continue, Fabric::Shm, "nap", (None, Servers::Stay), home.path());
    assert_eq!(told.out, 10, "{}", told.output);
    assert!(
        told.output.contains("worker 1") && told.output.contains("kept the others waiting at clock 10"),
        "{}",
        told.output
    );
    compare(&told, home.path(), "straggler");
}

/// What had been said of the process before was held against the one that came after it.
#[test]
fn a_straggler_is_dropped_once_and_comes_again() {
    let home = home();
    let told = lose(OnWorkerLoss::Restart, Fabric::Tcp, "nap", (None, Servers::Stay), home.path());
    assert!(told.again.is_some(), "{}", told.output);
    assert_eq!(told.output.matches("kept the others waiting").count(), 1, "{}", told.output);
    compare(&told, home.path(), "straggler");
}

#[test]
fn a_worker_that_is_started_again_takes_part_from_a_later_clock_on() {
    for fabric in [Fabric::Tcp, Fabric::Shm] {
        let home = home();
        let told = lose(OnWorkerLoss::Restart, fabric, "train", (Some(Signal::SIGKILL), Servers::Stay), home.path());
        let again = told.again.unwrap_or_else(|| panic!("it did not come again:\n{}", told.output));
        assert!(again > told.out && again < STEPS, "{}", told.output);
        assert!(told.output.contains(&format!("training from clock {again}")), "{}", told.output);
        assert_eq!(digests(&told.output).len(), 3, "{}", told.output);
        compare(&told, home.path(), fabric.name());
    }
}
