//! Settings that are changed while a job runs: at the clock that `gradwire set` prints, on every server and fabric.
//!
//! Invariant: what is right is what the simulator makes of a job that knew of the change from the start.

use std::process::{Command, Output};

use gradwire::{launch::Job, optim::LiveChange, session::Fabric, types::Clock, world::WorldOptions};

use crate::{
    bits::{same, simulate, world_options},
    broken_paths::ranks,
    jobs::{end, home, options, stored, wait_for_text, with_variable},
    program::{STEPS, gradient, model, spoilt_gradient},
};

pub fn set(home: &std::path::Path, settings: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.args(["set", "test"]).args(settings).env("GRADWIRE_HOME", home).output().unwrap()
}

/// The line that says what was changed, and from which clock on.
pub fn changed(told: &Output, what: &str) -> (String, Clock) {
    let text = String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
    let clock = text.strip_prefix(what).and_then(|rest| rest.strip_prefix(" from clock ")).expect(&text);
    let clock = clock.trim().strip_suffix(" on").expect(&text).parse().expect(&text);
    (text.trim().into(), clock)
}

#[test]
fn a_changed_setting_gives_the_bits_of_a_schedule_that_had_it_from_the_start() {
    let all = vec![model(); 2];
    for (fabric, shards) in [(Fabric::Shm, 1), (Fabric::Tcp, 2)] {
        let home = home();
        let mut options = options(home.path(), "train");
        options.config.transports = vec![fabric];
        options.config.shards_per_server = shards;
        options.config.optimizer.clip.global_norm = Some(3.0);
        with_variable(&mut options, "WORKER_PAUSE_MS", 30);
        let mut job = Job::start(options).unwrap();
        wait_for_text(&job, "at clock 10");
        let refused = set(home.path(), &["learning=1"]);
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(2) && text.contains("lr, weight-decay, clip-norm"), "{text}");
        let refused = set(home.path(), &["lr=-1"]);
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(1) && text.contains("`learning_rate` is -1"), "{text}");
        let told = set(home.path(), &["lr=0.003", "weight-decay=0.05", "clip-norm=1.5"]);
        let outcome = end(&mut job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
        let (text, clock) = changed(&told, "lr = 0.003, weight-decay = 0.05, clip-norm = 1.5");
        assert!(job.output().contains(&format!("gradwire: job test: {text}")), "{}", job.output());
        assert!(clock > 10 && clock < STEPS, "{text}");
        let (learning_rate, weight_decay, clip_norm) = (Some(0.003), Some(0.05), Some(1.5));
        let change = LiveChange { learning_rate, weight_decay, clip_norm, ..LiveChange::default() };
        let mut world = WorldOptions { change_from: Some((clock, change)), ..world_options(all.clone()) };
        world.optimizer.clip.global_norm = Some(3.0);
        same(&simulate(world, gradient), &stored(home.path(), &all), fabric.name());
    }
}

/// Whoever takes over holds what the one before it had promised to hold, and knows what was settled.
#[test]
fn settings_change_while_a_server_is_lost() {
    const CLOCKS: Clock = 300;
    let all = vec![model(); 2];
    for victim in ["server 0", "server 1"] {
        let home = home();
        let mut options = options(home.path(), "train");
        (options.config.servers, options.config.replicas) = (2, 2);
        options.config.transports = vec![Fabric::Tcp];
        options.config.optimizer.clip.global_norm = Some(3.0);
        with_variable(&mut options, "WORKER_STEPS", CLOCKS);
        with_variable(&mut options, "WORKER_PAUSE_MS", 10);
        let mut job = Job::start(options).unwrap();
        wait_for_text(&job, "at clock 10");
        let victim = ranks(home.path()).into_iter().find(|rank| rank.name == victim).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim.pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        let told = set(home.path(), &["lr=0.003", "clip-norm=1.5"]);
        let outcome = end(&mut job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
        let (text, clock) = changed(&told, "lr = 0.003, clip-norm = 1.5");
        assert!(clock > 10 && clock < CLOCKS, "{text}");
        let change = LiveChange { learning_rate: Some(0.003), clip_norm: Some(1.5), ..LiveChange::default() };
        let mut world =
            WorldOptions { change_from: Some((clock, change)), clocks: CLOCKS, ..world_options(all.clone()) };
        world.optimizer.clip.global_norm = Some(3.0);
        same(&simulate(world, gradient), &stored(home.path(), &all), &victim.name);
    }
}

/// The limit was forgotten with the job once.
#[test]
fn a_live_clip_norm_and_the_loss_scale_go_on_after_a_resume() {
    let all = vec![model(); 2];
    let home = home();
    let mut first = options(home.path(), "spoilt");
    first.config.optimizer.clip.global_norm = Some(3.0);
    first.config.loss_scale = crate::decisions::scaling();
    let mut second = options(home.path(), "spoilt");
    second.config = first.config.clone();
    second.config.resume = Some(home.path().join("checkpoints"));
    second.config.servers = 3;
    with_variable(&mut first, "WORKER_PAUSE_MS", 20);
    with_variable(&mut first, "WORKER_STEPS", 33);
    let mut job = Job::start(first).unwrap();
    wait_for_text(&job, "at clock 10");
    let told = set(home.path(), &["clip-norm=1.5"]);
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (text, clock) = changed(&told, "clip-norm = 1.5");
    assert!(clock < 33, "{text}");
    crate::jobs::run(second);
    let change = LiveChange { clip_norm: Some(1.5), ..LiveChange::default() };
    let mut world = WorldOptions { change_from: Some((clock, change)), ..world_options(all.clone()) };
    world.optimizer.clip.global_norm = Some(3.0);
    world.loss_scale = crate::decisions::scaling();
    same(&simulate(world, spoilt_gradient), &stored(home.path(), &all), "resumed");
}

#[test]
fn the_bound_of_staleness_is_set_where_there_is_one() {
    let home = home();
    let mut options = options(home.path(), "slow");
    options.config.consistency = gradwire::Consistency::Ssp { bound: 1 };
    options.config.checkpoint.dir = None;
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "at clock 10");
    let told = set(home.path(), &["staleness=6"]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert!(text.starts_with("staleness = 6 from clock "), "{text}");
    assert!(job.output().contains(&format!("gradwire: job test: {}", text.trim())), "{}", job.output());
}
