//! How workers leave: in the middle of a clock, without a word, at the very moment at which the job is preempted.

use gradwire::launch::{Job, Signal};
use nix::sys::signal::Signal as OsSignal;

use crate::{
    jobs::{end, home, options, run, stored, wait_for_text, with_variable},
    program::{STEPS, model},
};

/// The clock of the stop lies ahead of the last clock that the workers train: nobody ever told the servers to go, and the job
/// ended by force minutes later, without its last checkpoint.
#[test]
fn a_preemption_in_the_last_clock_lets_the_job_finish() {
    let home = home();
    let mut options = options(home.path(), "linger");
    options.config.setup_ms = 60_000;
    with_variable(&mut options, "WORKER_PAUSE_MS", 5);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "lingering");
    job.signal(Signal::Preempt(OsSignal::SIGTERM as i32));
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert_eq!(outcome.checkpoint, Some(STEPS));
    assert_eq!(stored(home.path(), &vec![model(); 2]).len(), model().len());
}

/// The servers' broken paths were all that was told of it.
#[test]
fn a_worker_that_ends_without_finishing_is_named_with_what_it_left_out() {
    let home = home();
    let mut job = Job::start(options(home.path(), "forget")).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert_ne!(outcome.code, 0, "{reason}");
    assert!(reason.starts_with("worker 1 ended with exit code 0 without having finished"), "{reason}");
}

/// Pushes of a clock that nobody ended stayed behind in the worker, for want of the rest of the clock, until `finish` gave up.
#[test]
fn finishing_in_the_middle_of_a_clock_ends_the_clock() {
    let home = home();
    let mut options = options(home.path(), "midway");
    options.config.landing_bytes = 2 * 1024 * 2;
    options.config.wait_ms = 15_000;
    run(options);
}

/// A pull waited for the gradients pushed before it as well, which wait for those that are to be pushed after it.
#[test]
fn a_pull_in_the_middle_of_pushing_brings_what_there_is() {
    let home = home();
    let mut options = options(home.path(), "pull midway");
    options.config.landing_bytes = 2 * 1024 * 2;
    run(options);
}

/// A scheduler in the training program that sets the rate at every clock: the 4097th change was refused, and ended the servers.
#[test]
fn a_learning_rate_for_every_clock() {
    let home = home();
    let mut options = options(home.path(), "schedule");
    with_variable(&mut options, "WORKER_STEPS", 4200);
    run(options);
}
