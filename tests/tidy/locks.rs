//! Locks, and who may meet them on the way of data.
//!
//! Invariant: a module with a lock says here whom it may keep waiting; one that has none any more is an error.

use super::{complain, source::read_all};

/// Modules with a lock, and what may wait for it.
const LOCKS: &[(&str, &str)] = &[
    ("src/ffi/handle.rs", "a C program's calls look up their worker: one thread, unless the program shares a handle"),
    ("src/launch/agent.rs", "the launcher and its agents: no data pass there"),
    ("src/launch/fleet.rs", "the launcher: no data pass there"),
    ("src/launch/job.rs", "the launcher: no data pass there"),
    ("src/launch/pipes.rs", "the launcher: no data pass there"),
    ("src/launch/remote.rs", "the launcher: no data pass there"),
    ("src/observe/meter.rs", "who reads the metrics, and a thread that meets a new peer; counting takes none"),
    ("src/session/rendezvous/member.rs", "reports to the launcher, some each second"),
    (
        "src/worker/progress.rs",
        "the program and its progress thread: one over commands and events, held for the moves of a few words, never over a \
         system call; one over the engine, for whoever turns it, which the other is asked to let go. Servers have no such lock.",
    ),
];

#[test]
fn every_lock_is_known() {
    let mut broken = Vec::new();
    let mut found = Vec::new();
    for source in read_all(&["src"]) {
        let of_tests =
            source.path.ends_with("tests.rs") || source.path.contains("/tests/") || source.path.ends_with("fake.rs");
        let inner = source.test_lines();
        let lines = ["Mutex", "RwLock"].into_iter().flat_map(|word| source.lines_with(&[word]));
        if of_tests || lines.into_iter().all(|line| inner.iter().any(|range| range.contains(&line))) {
            continue;
        }
        match LOCKS.iter().find(|(path, _)| *path == source.path) {
            Some((path, _)) => found.push(*path),
            None => broken.push(source.path),
        }
    }
    complain("whoever has a lock says in tests/tidy/locks.rs whom it may keep waiting", broken);
    let needless = LOCKS.iter().filter(|(path, _)| !found.contains(path));
    complain("a module without a lock any more", needless.map(|(path, _)| path.to_string()).collect());
}
