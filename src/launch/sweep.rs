//! Finding what a job has left behind: every process of a job carries its mark in the environment, and so do all that it starts,
//! whatever group or session they moved to.
//!
//! Invariant: only processes with the mark of this very run (its name and random instance) are ever killed.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, getpid},
};

/// The variable that carries the mark.
pub(super) const MARK_VARIABLE: &str = "GRADWIRE_JOB";

/// The mark of one run of a job.
pub(super) fn mark(name: &str, instance: u64) -> String {
    format!("{name}.{instance:016x}")
}

/// Kills every process that carries the mark, again and again until none is found or `time` is up; gives the number still there.
pub(super) fn sweep(mark: &str, time: Duration) -> usize {
    let deadline = Instant::now() + time;
    loop {
        let found = marked(mark);
        // A process could end, and its number be given to another, between the look at its environment and this call; numbers are
        // reused only after all others have been, which takes longer than that.
        for &pid in &found {
            let _ = kill(pid, Signal::SIGKILL);
        }
        if found.is_empty() || Instant::now() >= deadline {
            return found.len();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The living processes that carry the mark.
fn marked(mark: &str) -> Vec<Pid> {
    let wanted = format!("{MARK_VARIABLE}={mark}").into_bytes();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    // The environment of another user's process cannot be read, and that of a zombie is empty.
    let carries = |pid: &Pid| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == wanted)
    };
    pids.filter(|pid| *pid != getpid()).filter(carries).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_the_marked_are_killed() {
        let ours = mark("sweep-test", u64::from(std::process::id()));
        let other = mark("sweep-test", u64::from(std::process::id()) + 1);
        let start = |mark: &str| Command::new("sleep").arg("60").env(MARK_VARIABLE, mark).spawn().unwrap();
        let (mut marked, mut unmarked) = (start(&ours), start(&other));
        assert_eq!(sweep(&ours, Duration::from_secs(5)), 0);
        assert!(!marked.wait().unwrap().success());
        assert!(unmarked.try_wait().unwrap().is_none(), "another run's process lives on");
        unmarked.kill().unwrap();
        unmarked.wait().unwrap();
    }
}
