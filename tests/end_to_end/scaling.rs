//! Servers that join a running job and leave it, by `gradwire scale`: the job ends with the bits of the one whose servers stayed, in
//! parameters and optimizer state, and so does a checkpoint on the way.
//!
//! Invariant: what is compared was trained while shards moved; the test says so from what the launcher told.

use std::{
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use gradwire::{
    checkpoint::Checkpoint,
    launch::{Job, JobOptions},
    optim::LiveChange,
    session::Fabric,
    types::ChunkId,
    world::WorldOptions,
};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    bits::{same, simulate, world_options},
    broken_paths::{clock, ranks},
    decisions::scaling,
    jobs::{PATIENCE, digests, end, home, options, run, stored, wait_for_text, with_variable},
    live::{changed, set},
    program::{model, spoilt_gradient},
};

const STEPS: u64 = 900;

fn job(home: &Path, part: &str, fabric: Fabric) -> JobOptions {
    let mut options = options(home, part);
    options.config.transports = vec![fabric];
    options.config.checkpoint.every = Some(150);
    options.config.checkpoint.keep = 100;
    with_variable(&mut options, "WORKER_STEPS", STEPS);
    with_variable(&mut options, "WORKER_PAUSE_MS", 8);
    with_variable(&mut options, "WORKER_TELLS", 1);
    options
}

fn gradwire(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gradwire")).args(arguments).env("GRADWIRE_HOME", home).output().unwrap()
}

/// Has the job have so many servers; what is said of it.
pub fn scale(home: &Path, servers: &str) -> String {
    let told = gradwire(home, &["scale", "test", "--servers", servers]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
    assert!(told.status.success(), "{text}");
    text
}

/// By shard, who serves it; and how every server stands.
fn standing(home: &Path) -> (Vec<String>, Vec<String>) {
    let shown = gradwire(home, &["status", "test", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let list = |of: &str, key: &str| -> Vec<String> {
        shown[of].as_array().unwrap().iter().map(|each| each[key].to_string()).collect()
    };
    (list("shards", "primary"), list("ranks", "state"))
}

/// Steps, parameters and optimizer state of every chunk.
type State = Vec<(u64, Vec<u32>, Vec<u32>, Vec<u32>)>;

fn state(path: &Path) -> State {
    let checkpoint = Checkpoint::open(path).unwrap();
    checkpoint.verify().unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    // A file of an older checkpoint may hold chunks that have moved since, and are in another file too.
    let chunks = checkpoint.manifest().layout.chunks.len();
    let chunk = |id| {
        let data = checkpoint.chunk(ChunkId(id)).unwrap();
        (data.steps, bits(data.master), bits(data.first), bits(data.second))
    };
    (0..chunks as u32).map(chunk).collect()
}

fn states(home: &Path) -> Vec<(u64, State)> {
    let directory = home.join("checkpoints");
    let all = gradwire::checkpoint::list(&directory).unwrap();
    // Of one that came too late for some shard there is only a beginning.
    let complete = all.into_iter().filter_map(|(path, opened)| Some((opened.ok()?.clock(), state(&path))));
    let mut states: Vec<_> = complete.collect();
    states.sort_by_key(|(clock, _)| *clock);
    states
}

/// Files of the last checkpoint that were not written for it.
fn linked(home: &Path) -> usize {
    let last = gradwire::checkpoint::latest(&home.join("checkpoints")).unwrap().checkpoint.unwrap();
    last.manifest().files.iter().filter(|file| file.since.is_some()).count()
}

/// What has not changed is not written again where `incremental` says so; what it is compared with is written whole.
fn grows_and_shrinks(fabric: Fabric, incremental: bool) {
    let (home_of, calm_home) = (home(), home());
    let part = if incremental { "frozen" } else { "train" };
    let undisturbed = run(job(calm_home.path(), part, fabric));
    let mut options = job(home_of.path(), part, fabric);
    options.config.max_servers = 4;
    options.config.checkpoint.incremental = incremental;
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 20");
    let told = scale(home_of.path(), "4");
    assert!(told.contains("2 shards are to move") && told.ends_with("test has 4 servers\n"), "{told}");
    let (primaries, _) = standing(home_of.path());
    let distinct: std::collections::BTreeSet<_> = primaries.iter().collect();
    assert_eq!((primaries.len(), distinct.len()), (4, 4), "{primaries:?}");
    let grown = clock(&job);
    let told = gradwire(home_of.path(), &["checkpoint", "now", "test"]);
    assert!(told.status.success(), "{told:?}");
    let told = scale(home_of.path(), "1");
    assert!(told.contains("(3 of 3)"), "{told}");
    let (primaries, states_of) = standing(home_of.path());
    assert!(primaries.iter().all(|rank| *rank == primaries[0]), "{primaries:?}");
    assert_eq!(states_of[1..4], ["\"free\""; 3], "{states_of:?}");
    let shrunk = clock(&job);
    assert!(20 <= grown && grown < shrunk && shrunk + 20 < STEPS, "clocks {grown}, {shrunk}: give it more steps");
    let told = scale(home_of.path(), "3");
    assert!(told.ends_with("test has 3 servers\n"), "{told}");
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (ours, theirs) = (digests(&job.output()), digests(&undisturbed));
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}\n{}", job.output());
    let all = vec![model(); 2];
    assert!(stored(home_of.path(), &all) == stored(calm_home.path(), &all), "the last checkpoints differ");
    let (ours, theirs) = (states(home_of.path()), states(calm_home.path()));
    let both = ours.iter().filter_map(|one| Some((one, theirs.iter().find(|other| other.0 == one.0)?)));
    let clocks: Vec<u64> =
        both.inspect(|(one, other)| assert!(one == other, "clock {}", one.0)).map(|(one, _)| one.0).collect();
    assert_eq!(clocks, [150, 300, 450, 600, 750, 900], "all that were to be written");
    assert_eq!((linked(home_of.path()) > 0, linked(calm_home.path())), (incremental, 0));
}

#[test]
fn a_job_that_grows_and_shrinks_and_stores_changes_has_the_undisturbed_jobs_bits_over_tcp() {
    grows_and_shrinks(Fabric::Tcp, true);
}

#[test]
fn a_job_that_grows_and_shrinks_has_the_undisturbed_jobs_bits_in_shared_memory() {
    grows_and_shrinks(Fabric::Shm, false);
}

/// Steps are clipped and skipped under a loss scale that moves, and settings change while shards move: the bits are those of the simulated job
/// that knew of the change.
fn decides_and_changes(fabric: Fabric) {
    let home = home();
    let mut options = job(home.path(), "spoilt", fabric);
    options.config.max_servers = 4;
    options.config.optimizer.clip.global_norm = Some(3.0);
    options.config.loss_scale = scaling();
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 20");
    let path = home.path().to_path_buf();
    let asking = std::thread::spawn(move || scale(&path, "4"));
    wait_for_text(&job, "2 shards move");
    let told = set(home.path(), &["lr=0.003", "clip-norm=1.5"]);
    let (text, changed_at) = changed(&told, "lr = 0.003, clip-norm = 1.5");
    let told = asking.join().unwrap();
    assert!(told.ends_with("test has 4 servers\n"), "{told}");
    let told = scale(home.path(), "1");
    assert!(told.contains("(3 of 3)"), "{told}");
    let (shrunk, told) = (clock(&job), scale(home.path(), "3"));
    assert!(told.ends_with("test has 3 servers\n"), "{told}");
    assert!(20 < changed_at && shrunk + 20 < STEPS, "{text}; clock {shrunk}: give it more steps");
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let change = LiveChange { learning_rate: Some(0.003), clip_norm: Some(1.5), ..LiveChange::default() };
    let all = vec![model(); 2];
    let mut world =
        WorldOptions { change_from: Some((changed_at, change)), clocks: STEPS, ..world_options(all.clone()) };
    world.optimizer.clip.global_norm = Some(3.0);
    world.loss_scale = scaling();
    same(&simulate(world, spoilt_gradient), &stored(home.path(), &all), fabric.name());
}

#[test]
fn steps_are_decided_upon_and_settings_change_while_shards_move_over_tcp() {
    decides_and_changes(Fabric::Tcp);
}

#[test]
fn steps_are_decided_upon_and_settings_change_while_shards_move_in_shared_memory() {
    decides_and_changes(Fabric::Shm);
}

/// A server that dies as it joins: the job goes on without it, says so, and may be scaled again.
#[test]
fn a_server_that_cannot_join_is_gone_on_without() {
    let home_of = home();
    let mut options = job(home_of.path(), "train", Fabric::Tcp);
    options.config.max_servers = 3;
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "begins clock 3");
    for (servers, why) in [("0", "room for 1 to 3"), ("4", "room for 1 to 3")] {
        let told = gradwire(home_of.path(), &["scale", "test", "--servers", servers]);
        let text = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(!told.status.success() && text.contains(why), "{text}");
    }
    let path = home_of.path().to_path_buf();
    let asking = std::thread::spawn(move || gradwire(&path, &["scale", "test", "--servers", "3"]));
    let deadline = Instant::now() + PATIENCE;
    let victim = loop {
        assert!(Instant::now() < deadline, "server 2 was not started\n{}", job.output());
        match ranks(home_of.path()).into_iter().find(|rank| rank.name == "server 2") {
            Some(victim) => break victim,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    nix::sys::signal::kill(Pid::from_raw(victim.pid), Signal::SIGKILL).unwrap();
    let told = asking.join().unwrap();
    let text = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && text.contains("server 2") && text.contains("shards had moved"), "{text}");
    let told = scale(home_of.path(), "3");
    assert!(told.ends_with("test has 3 servers\n"), "{told}");
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
}

/// A server that serves has no second copy: the job ends by name, and goes on from its checkpoint with another number of servers.
#[test]
fn a_server_that_serves_and_dies_ends_the_job_by_name_and_it_resumes() {
    let (home_of, calm_home) = (home(), home());
    let undisturbed = run(job(calm_home.path(), "train", Fabric::Tcp));
    let mut options = job(home_of.path(), "train", Fabric::Tcp);
    options.config.max_servers = 3;
    let mut first = Job::start(options).unwrap();
    wait_for_text(&first, "begins clock 20");
    scale(home_of.path(), "3");
    wait_for_text(&first, "begins clock 160");
    let victim = ranks(home_of.path()).into_iter().find(|rank| rank.name == "server 2").unwrap();
    nix::sys::signal::kill(Pid::from_raw(victim.pid), Signal::SIGKILL).unwrap();
    let outcome = end(&mut first);
    let reason = outcome.reason.clone().unwrap_or_default();
    assert!(outcome.code != 0 && reason.contains("is lost: server 2"), "{reason}\n{}", first.output());
    drop(first);
    let mut again = job(home_of.path(), "train", Fabric::Tcp);
    (again.config.servers, again.config.max_servers) = (1, 2);
    again.config.resume = Some(home_of.path().join("checkpoints"));
    let mut again = Job::start(again).unwrap();
    wait_for_text(&again, "begins clock 200");
    scale(home_of.path(), "2");
    let outcome = end(&mut again);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, again.output());
    assert_eq!(digests(&again.output()), digests(&undisturbed), "{}", again.output());
}
