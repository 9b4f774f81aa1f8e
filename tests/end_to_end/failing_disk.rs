//! A job on a disk that fails: every single write, sync, rename, link, removal and making of a name fails once, in real processes. What
//! was complete stays, training goes on with the same bits, and the checkpoints after it are whole.
//!
//! Invariant: which calls there are is learnt from what the processes did, and the test fails if one of them was never refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use gradwire::checkpoint::{self, Checkpoint};

use crate::{
    every_step::{Undisturbed, ended, every_step, launch, printed},
    jobs::home,
};

/// Enough for the N-th call to fail at clock 14 + 2N, for every call that there is, and for some checkpoints that nothing disturbs.
const STEPS: u64 = 90;

/// What was called in a checkpoint: number and name of a call, and whether it was made to fail.
type Calls = Vec<(i64, String, bool)>;

/// The library that makes calls fail, built for this test.
fn library(home: &Path) -> PathBuf {
    let library = home.join("failing_disk.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/c/failing_disk.c");
    let mut command = Command::new("cc");
    command
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&library)
        .arg(source)
        .arg("-ldl");
    let built = command.output().unwrap_or_else(|error| panic!("cc: {error}"));
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

/// By clock, of the processes of one part.
fn calls(log: &Path, part: &str) -> BTreeMap<u64, Calls> {
    let mut all: BTreeMap<u64, Calls> = BTreeMap::new();
    for line in std::fs::read_to_string(log).unwrap().lines() {
        let [by, clock, number, name, outcome] =
            line.split(' ').collect::<Vec<_>>().try_into().unwrap_or_else(|_| panic!("{line}"));
        if by == part {
            let call = (number.parse().unwrap(), name.to_string(), outcome == "failed");
            all.entry(clock.parse().unwrap()).or_default().push(call);
        }
    }
    all
}

/// Asserts that every call of an undisturbed checkpoint has been refused. The names of those that were, counted.
fn check_refused(part: &str, calls: &BTreeMap<u64, Calls>) -> BTreeMap<String, usize> {
    // The last one, when nothing is left to be cleared up after a failure.
    let (_, undisturbed) = calls.last_key_value().expect("there are checkpoints");
    assert!(undisturbed.iter().all(|(.., failed)| !failed), "{undisturbed:?}");
    let wanted: BTreeSet<i64> = undisturbed.iter().map(|(number, ..)| *number).collect();
    let failed = || calls.values().flatten().filter(|(.., failed)| *failed);
    let refused: BTreeSet<i64> = failed().map(|(number, ..)| *number).collect();
    let mut names = BTreeMap::new();
    failed().for_each(|(_, name, _)| *names.entry(name.clone()).or_default() += 1);
    assert!(wanted.len() > 6, "a checkpoint of the {part} takes {} calls only", wanted.len());
    assert!(refused.is_superset(&wanted), "{part}: of the calls {wanted:?} these were refused: {refused:?}");
    println!("{part}: a checkpoint takes {} calls, each of them failed: {names:?}", wanted.len());
    names
}

#[test]
fn every_call_of_a_checkpoint_fails_once_and_nothing_is_lost() {
    fail_every_call("train", false);
}

/// Most chunks change at every eighth clock only.
#[test]
fn every_call_of_an_incremental_checkpoint_fails_once_and_nothing_is_lost() {
    fail_every_call("rare", true);
}

fn fail_every_call(part: &str, incremental: bool) {
    let undisturbed = Undisturbed::new(part, STEPS);
    let home = home();
    let (dir, log) = (home.path().join("checkpoints"), home.path().join("calls"));
    let mut config = every_step(home.path(), 3);
    config.checkpoint.incremental = incremental;
    let mut command = launch(home.path(), &config, STEPS, 0, false);
    command
        .env("WORKER_PART", part)
        .env("LD_PRELOAD", library(home.path()))
        .env("FAILING_DISK", &dir)
        .env("FAILING_LOG", &log);
    let mut job = command.spawn().unwrap();
    let mut newest = None;
    // Whatever fails: what was there is there, and is right.
    let is_well = loop {
        let found = checkpoint::latest(&dir).unwrap().checkpoint;
        let clock = found.as_ref().map(Checkpoint::clock);
        assert!(clock >= newest, "clock {clock:?} was found after {newest:?}");
        if let Some(found) = found.filter(|_| clock > newest) {
            undisturbed.assert_same(&found);
        }
        newest = clock;
        match job.try_wait().unwrap() {
            Some(status) => break status.success(),
            None => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    };
    assert!(is_well && ended(&mut job, home.path()), "{}", printed(home.path()));

    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    for part in ["launcher", "server"] {
        let names = check_refused(part, &calls(&log, part));
        names.into_iter().for_each(|(name, count)| *refused.entry(name).or_default() += count);
    }
    let link = incremental.then_some("link");
    for name in ["mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"].into_iter().chain(link) {
        assert!(refused.contains_key(name), "no {name} was refused: {refused:?}");
    }

    let complete: Vec<Checkpoint> = checkpoint::list(&dir).unwrap().map(|(_, opened)| opened.unwrap()).collect();
    assert_eq!(complete.iter().map(Checkpoint::clock).collect::<Vec<_>>(), [STEPS, STEPS - 1, STEPS - 2]);
    complete.iter().for_each(|checkpoint| undisturbed.assert_same(checkpoint));
    let told = printed(home.path()).matches("a checkpoint failed").count();
    println!(
        "{} calls were refused; the launcher told of {told} checkpoints that failed",
        refused.values().sum::<usize>()
    );
    assert!(told > 9, "{}", printed(home.path()));
}
