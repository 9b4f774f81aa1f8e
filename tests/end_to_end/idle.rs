//! What a job costs while nothing happens.

use gradwire::launch::Job;
use nix::unistd::{SysconfVar, sysconf};

use crate::{
    fabrics::mixed,
    jobs::{end, home, options, wait_for_text, with_variable},
};

/// Processor time that the process and its threads have used so far, in seconds.
fn processor_time(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything; user and system time are the 12th and 13th field behind it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().ok()? + fields[12].parse::<f64>().ok()?;
    Some(ticks / sysconf(SysconfVar::CLK_TCK).ok()?? as f64)
}

/// Every process of the job named `test`, by its mark in the environment.
fn processes(home: &std::path::Path) -> Vec<(u32, String)> {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_gradwire"))
        .args(["status", "test", "--json"])
        .env("GRADWIRE_HOME", home)
        .output()
        .unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rank = |rank: &serde_json::Value| (rank["pid"].as_u64().unwrap() as u32, rank["rank"].to_string());
    status["ranks"].as_array().unwrap().iter().map(rank).collect()
}

/// A step a second on three fabrics at once: heartbeats, timers and the steps themselves, and no process takes a hundredth of a
/// core. (What the kernel counts, not how long anything took.)
#[test]
fn between_steps_of_a_second_a_process_uses_less_than_a_hundredth_of_a_core() {
    let home = home();
    let mut options = options(home.path(), "train");
    mixed(&mut options);
    with_variable(&mut options, "WORKER_PAUSE_MS", 1000);
    with_variable(&mut options, "WORKER_STEPS", 18);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "training from clock 0");
    std::thread::sleep(std::time::Duration::from_secs(2));
    let ranks = processes(home.path());
    assert_eq!(ranks.len(), 4, "{ranks:?}");
    let since = std::time::Instant::now();
    let before: Vec<f64> = ranks.iter().map(|(pid, _)| processor_time(*pid).unwrap()).collect();
    std::thread::sleep(std::time::Duration::from_secs(12));
    let after: Vec<f64> = ranks.iter().map(|(pid, _)| processor_time(*pid).unwrap()).collect();
    let time = since.elapsed().as_secs_f64();
    for ((_, rank), (before, after)) in ranks.iter().zip(before.into_iter().zip(after)) {
        let share = (after - before) / time;
        println!("{rank}: {:.2} % of a core over {time:.1} s", 100.0 * share);
        assert!(share < 0.01, "{rank} used {:.2} % of a core while idle", 100.0 * share);
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
}
