//! Processes killed and stopped at random, on every fabric: each time the report names the victim within the deadline, and
//! nothing is left behind.
//!
//! `GRADWIRE_FAULTS` says how many (10 without it), `GRADWIRE_FAULT_SEED` where the dice begin.

use std::{
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{launch::Job, session::Fabric, transport::sim::SimRandom, types::Rank};
use nix::sys::signal::Signal;

use crate::{
    fabrics::mixed,
    jobs::{end, home, options, wait_for_text, with_variable},
};

/// When a victim is hit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// So long after the job's start: joining, declaring, connecting.
    Starting(Duration),
    /// So long after a worker's tenth step.
    Training(Duration),
}

/// Everything of a job that could stay behind: processes by the variable that marks them, descriptors of this process, files.
#[derive(Debug, PartialEq)]
struct Traces {
    processes: Vec<String>,
    shared_files: Vec<String>,
    files: usize,
}

fn traces(home: &Path) -> Traces {
    let wanted = format!("GRADWIRE_TOKEN_FILE={}/", home.display());
    let marked = |pid: &str| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let ours = environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(wanted.as_bytes()));
        ours.then(|| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default())
    };
    let names = |path: &str| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let processes =
        names("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok()).filter_map(|pid| marked(&pid));
    let shared_files = names("/dev/shm").into_iter().filter(|name| name.contains("gradwire"));
    Traces {
        processes: processes.collect(),
        shared_files: shared_files.collect(),
        files: names(home.to_str().unwrap()).iter().filter(|name| *name != "checkpoints").count(),
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn once(random: &mut SimRandom, number: u64) {
    let fabrics: [&[Fabric]; 4] = [&[Fabric::Tcp], &[Fabric::Shm], &[Fabric::Soft], &[]];
    let chosen = fabrics[(number % 4) as usize];
    let signal = if random.below(2) == 0 { Signal::SIGKILL } else { Signal::SIGSTOP };
    let index = random.below(2) as u16;
    let victim = if random.below(2) == 0 { Rank::worker(index) } else { Rank::server(index) };
    let phase = match random.below(4) {
        0 => Phase::Starting(Duration::from_millis(random.below(60))),
        _ => Phase::Training(Duration::from_millis(random.below(150))),
    };
    let name = match chosen {
        [] => "shm+soft+tcp".to_string(),
        list => list.iter().map(|fabric| fabric.name()).collect(),
    };
    let home = home();
    let mut options = options(home.path(), "train");
    match chosen {
        [] => mixed(&mut options),
        list => options.config.transports = list.to_vec(),
    }
    with_variable(&mut options, "WORKER_PAUSE_MS", 10);
    (options.config.join_ms, options.config.setup_ms) = (10_000, 10_000);
    let deadline = match phase {
        // A rank that is stopped while others connect to it is waited for as long as connecting may take.
        Phase::Starting(_) => Duration::from_secs(30),
        Phase::Training(_) => options.config.deadline(),
    };
    let mut job = Job::start(options).unwrap();
    match phase {
        Phase::Starting(after) => std::thread::sleep(after),
        Phase::Training(after) => {
            wait_for_text(&job, "at clock 10");
            std::thread::sleep(after);
        }
    }
    let clock = job.output().contains("at clock 10");
    let since = Instant::now();
    job.kill(victim, signal);
    let outcome = end(&mut job);
    let took = since.elapsed();
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let reason = outcome.reason.clone().unwrap_or_default();
    println!(
        "fault {number} at {at}: {signal} to {victim} on {name}, {phase:?}, past clock 10: {clock}; over after {:.2} s, code {}: \
         {reason}",
        took.as_secs_f64(),
        outcome.code
    );
    assert_ne!(outcome.code, 0, "the fault hit nothing: the job ended well\n{}", job.output());
    assert!(reason.contains(&victim.to_string()), "the report does not name {victim}: {reason}\n{}", job.output());
    // Detection, the report and the launcher's grace; generous, for a busy machine.
    assert!(took < deadline + Duration::from_secs(20), "it took {took:?}");
    drop(job);
    let left = traces(home.path());
    assert!(left.processes.is_empty() && left.shared_files.is_empty() && left.files == 0, "left behind: {left:?}");
}

#[test]
fn random_kills_and_stops_are_reported_by_name_and_leave_nothing() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let count = number("GRADWIRE_FAULTS").unwrap_or(10);
    let seed = number("GRADWIRE_FAULT_SEED").unwrap_or(1);
    let mut random = SimRandom::new(seed);
    once(&mut random, 0);
    let before = descriptors();
    for number in 1..count {
        once(&mut random, number);
    }
    // Other tests of this program open and close descriptors too; a leak of one a job would still be seen in a hundred.
    let after = descriptors();
    println!("descriptors of the launcher: {before} before, {after} after {count} faults");
    assert!(after < before + count as usize / 2 + 20, "the launcher leaks descriptors: {before} before, {after} after");
}
