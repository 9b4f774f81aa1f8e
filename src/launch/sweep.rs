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

/// How long processes without an environment are looked at again when no marked one is left: a process that is in the middle of
/// starting a program shows an empty one for a moment, one that was started with an empty one shows it for ever.
const STARTING_TIME: Duration = Duration::from_millis(500);

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Kills every process that carries the mark, again and again until none is found or `time` is up; gives the number still there.
pub(super) fn sweep(mark: &str, time: Duration) -> usize {
    let begun = Instant::now();
    let mut quiet_since = begun;
    loop {
        let Found { marked, undecided } = look(mark);
        // A process could end, and its number be given to another, between the look at its environment and this call; numbers are
        // reused only after all others have been, which takes longer than that.
        for &pid in &marked {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let now = Instant::now();
        if !marked.is_empty() {
            quiet_since = now;
        }
        let settled = marked.is_empty() && (!undecided || now >= quiet_since + STARTING_TIME);
        if settled || now >= begun + time {
            return marked.len();
        }
        std::thread::sleep(PAUSE);
    }
}

/// What one look at all processes has shown.
struct Found {
    /// The living processes that carry the mark.
    marked: Vec<Pid>,
    /// Whether some living process shows no environment at all.
    undecided: bool,
}

fn look(mark: &str) -> Found {
    let wanted = format!("{MARK_VARIABLE}={mark}").into_bytes();
    let mut found = Found { marked: Vec::new(), undecided: false };
    let Ok(entries) = std::fs::read_dir("/proc") else { return found };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    for pid in pids.filter(|pid| *pid != getpid()) {
        // The environment of another user's process cannot be read.
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else { continue };
        if environment.split(|&byte| byte == 0).any(|variable| variable == wanted) {
            found.marked.push(pid);
        }
        found.undecided |= environment.is_empty() && is_program(pid);
    }
    found
}

/// Whether a process is a program that runs: neither a zombie nor a thread of the kernel, both of which have no environment.
fn is_program(pid: Pid) -> bool {
    /// Linux's mark of its own threads in the flags of /proc/PID/stat.
    const PF_KTHREAD: u64 = 0x0020_0000;
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name may hold anything, brackets too; state and flags are the first and the seventh field behind it.
    let Some((_, fields)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = fields.split_ascii_whitespace().take(7).collect();
    let flags = fields.get(6).and_then(|flags| flags.parse::<u64>().ok()).unwrap_or(PF_KTHREAD);
    !matches!(fields.first(), Some(&"Z" | &"X")) && flags & PF_KTHREAD == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::ExitStatusExt, process::Command};

    #[test]
    fn only_the_marked_are_killed() {
        let ours = mark("sweep-test", u64::from(std::process::id()));
        let other = mark("sweep-test", u64::from(std::process::id()) + 1);
        let start = |mark: &str| Command::new("sleep").arg("60").env(MARK_VARIABLE, mark).spawn().unwrap();
        let mut unmarked = start(&other);
        // Its environment is empty most of the times when the sweep looks for it first: it has only just been started.
        let mut marked = start(&ours);
        assert_eq!(sweep(&ours, Duration::from_secs(30)), 0);
        assert_eq!(marked.wait().unwrap().signal(), Some(Signal::SIGKILL as i32), "the marked one was killed");
        assert!(unmarked.try_wait().unwrap().is_none(), "another run's process lives on");
        unmarked.kill().unwrap();
        unmarked.wait().unwrap();
    }
}
