//! Jobs beside each other, and processes that fork: nobody disturbs anybody.
//!
//! Invariant: what is right is what a job gives that is alone.

use gradwire::launch::Job;

use crate::{
    failures::undisturbed,
    jobs::{end, home, options, run, stored, with_variable},
    program::model,
};

#[test]
fn two_jobs_on_one_host_do_not_disturb_each_other() {
    let (one, two) = (home(), home());
    let start = |home: &std::path::Path, name: &str| {
        let mut options = options(home, "train");
        options.config.name = name.into();
        // They know of each other's cores.
        options.home = Some(one.path().join("home"));
        with_variable(&mut options, "WORKER_PAUSE_MS", 5);
        Job::start(options).unwrap()
    };
    let mut jobs = [start(one.path(), "first"), start(two.path(), "second")];
    for job in &mut jobs {
        let outcome = end(job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    }
    for home in [&one, &two] {
        assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
    }
}

/// A copy of a worker that fork has made answers every call with an error and is dropped without a trace.
#[test]
fn a_forked_child_cannot_touch_its_parents_job() {
    let home = home();
    let mut options = options(home.path(), "fork");
    options.config.metrics = Some("127.0.0.1:0".parse().unwrap());
    run(options);
    assert_eq!(stored(home.path(), &vec![model(); 2]), undisturbed());
}
