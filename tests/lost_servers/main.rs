//! The launcher of a job with two copies of each shard, with real processes: servers that are killed, stopped or cannot come again.
//!
//! Ranks are this test program itself, started again (see `rank_process`): they claim as lanes would, and hold nothing.
//!
//! Invariant: every test ends all that it started, also when it fails.

mod cluster;
mod stores;

use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use gradwire::{
    TensorSpec,
    launch::{Job, JobOptions, Outcome, OutputTo},
    session::{self, Claim, JobConfig, Member, Report, Reporter, Tenure, pair, shard_of},
    types::{PeerId, Rank, Role, ShardId},
};
use nix::sys::signal::Signal;

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Long enough for a busy machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

fn options(home: &Path) -> JobOptions {
    let config = JobConfig { name: "test".into(), servers: 2, replicas: 2, join_ms: 30_000, ..JobConfig::default() };
    let program = std::env::current_exe().unwrap();
    let line = format!("exec {} --exact rank_process --nocapture --test-threads=1", program.display());
    let command: Vec<OsString> = ["sh", "-c", &line].map(OsString::from).to_vec();
    let mut options = JobOptions::new(config, command.clone(), GRADWIRE);
    options.server_command = command;
    options.environment = vec![("RANK_FILES".into(), home.to_str().unwrap().into())];
    options.home = Some(home.into());
    options.output = OutputTo::Collect;
    options.grace = Duration::from_secs(1);
    options
}

/// A job whose worker runs.
fn running(home: &Path) -> Job {
    start(options(home))
}

fn start(options: JobOptions) -> Job {
    let job = Job::start(options).unwrap();
    wait_for_text(&job, "running as worker 0");
    job
}

fn end(job: &mut Job) -> Outcome {
    job.wait_for(PATIENCE).unwrap_or_else(|| panic!("the job did not end; it has written:\n{}", job.output()))
}

fn wait_for_text(job: &Job, text: &str) {
    wait_until(job, text, || job.output().contains(text));
}

fn wait_until(job: &Job, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}; the job has written:\n{}", job.output());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn status(home: &Path, flags: &[&str]) -> Output {
    let mut command = Command::new(GRADWIRE);
    command.args(["status", "test"]).args(flags).env("GRADWIRE_HOME", home).stdin(Stdio::null());
    command.output().unwrap()
}

fn status_text(home: &Path) -> String {
    String::from_utf8(status(home, &[]).stdout).unwrap()
}

/// Not a test: the part of a rank in the jobs of the tests below. Started by the test runner it does nothing.
#[test]
fn rank_process() {
    let Ok(files) = std::env::var("RANK_FILES") else { return };
    let files = Path::new(&files);
    if std::env::var("GRADWIRE_ROLE").is_ok_and(|role| role == "server") && files.join("no-servers").exists() {
        std::process::exit(3);
    }
    let outcome = Member::from_environment().and_then(|member| match member.rank().role {
        Role::Server => serve(member, files),
        Role::Worker => work(member, files),
    });
    let code = outcome.unwrap_or_else(|error| {
        println!("rank process: {error}");
        1
    });
    std::process::exit(code);
}

/// Trains until it is told by a file to finish.
fn work(mut member: Member, files: &Path) -> gradwire::Result<i32> {
    member.declare(vec![TensorSpec::new("w", [1 << 20])])?;
    member.exchange(Vec::new())?;
    // On a line of its own: the test runner has begun one.
    println!("\nrunning as {}", member.rank());
    while !files.join("finish").exists() {
        if let Some(session::Command::JobFailed { .. }) = member.poll_command()? {
            return Ok(1);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    member.reporter().report(Report::Finished { summary: "trained".into() })?;
    Ok(0)
}

/// The lanes of a server as far as claims go.
struct Lanes {
    rank: Rank,
    reporter: Reporter,
    tenures: [Tenure; 2],
    /// By shard: the other lane is gone, and that has not been granted yet.
    alone: [bool; 2],
}

impl Lanes {
    /// Claims what must be so of each shard; again and again, since a claim may be refused.
    fn claim(&self) -> gradwire::Result<()> {
        for lane in [0, 1].map(|lane| PeerId { rank: self.rank, lane }) {
            let shard = shard_of(lane, 2, 1);
            let Tenure { epoch, primary, is_paired, .. } = self.tenures[usize::from(shard.0)];
            let claim = match (primary == lane, is_paired, self.alone[usize::from(shard.0)]) {
                (true, true, true) => Claim::GoAlone,
                (false, true, true) => Claim::TakeOver,
                // It is refused until the other one is there.
                (true, false, _) => Claim::Pair,
                _ => continue,
            };
            self.reporter.report(Report::Claim { lane: lane.lane, shard, epoch, claim })?;
        }
        Ok(())
    }

    fn hear(&mut self, shard: ShardId, tenure: Tenure) {
        let shard = usize::from(shard.0);
        self.alone[shard] &= tenure.epoch == self.tenures[shard].epoch;
        self.tenures[shard] = tenure;
    }
}

fn serve(mut member: Member, files: &Path) -> gradwire::Result<i32> {
    member.view()?;
    member.exchange(Vec::new())?;
    let tenures = [0, 1].map(|shard| Tenure::first(pair(ShardId(shard), 2, 1)));
    let mut lanes = Lanes { rank: member.rank(), reporter: member.reporter(), tenures, alone: [false; 2] };
    let suspects = files.join("suspect");
    let mut claimed = Instant::now();
    loop {
        match member.poll_command()? {
            Some(session::Command::Tenure { shard, tenure }) => lanes.hear(shard, tenure),
            Some(session::Command::Gone { .. }) => {
                lanes.alone = [true; 2];
                lanes.claim()?;
            }
            Some(session::Command::Stop { .. } | session::Command::End { .. }) => {
                lanes.reporter.report(Report::Finished { summary: "served".into() })?;
                return Ok(0);
            }
            Some(session::Command::JobFailed { .. }) => return Ok(1),
            Some(_) => {}
            None if lanes.rank.index == 0 && suspects.exists() => {
                let _ = std::fs::remove_file(&suspects);
                lanes.alone = [true; 2];
                lanes.claim()?;
            }
            None if claimed.elapsed() > Duration::from_millis(300) => {
                claimed = Instant::now();
                lanes.claim()?;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

const S0: Rank = Rank::server(0);
const S1: Rank = Rank::server(1);

#[test]
fn servers_that_are_killed_one_after_the_other_are_started_again() {
    let home = home();
    let mut job = running(home.path());
    assert!(status_text(home.path()).ends_with("redundancy: full\n"), "{}", status_text(home.path()));
    for (count, victim) in [S1, S0, S1].into_iter().enumerate() {
        job.kill(victim, Signal::SIGKILL);
        let full = || job.output().matches("redundancy is full again").count() > count;
        wait_until(&job, "redundancy after a server was killed", full);
        assert!(status_text(home.path()).contains("redundancy: full\n"));
    }
    let output = job.output();
    let line = "was killed by signal 9 (SIGKILL); its shards go on with server";
    assert_eq!(output.matches(line).count(), 3, "{output}");
    assert!(output.contains("server 1 (process ") && output.contains("shard 1: server 0 serves since epoch 1"));
    let shown: serde_json::Value = serde_json::from_slice(&status(home.path(), &["--json"]).stdout).unwrap();
    assert!(shown["shards"][1]["epoch"].as_u64().is_some_and(|epoch| epoch >= 4), "{shown}");
    assert_eq!(shown["shards"][1]["backup_state"], "complete");
    std::fs::write(home.path().join("finish"), "").unwrap();
    let outcome = end(&mut job);
    assert_eq!((outcome.code, outcome.reason.as_deref()), (0, None), "{}", job.output());
    assert_eq!(outcome.summaries[&S1], "served", "who came again counts like any");
}

#[test]
fn a_server_that_is_stopped_is_put_out_and_started_again() {
    let home = home();
    let mut job = running(home.path());
    job.kill(S1, Signal::SIGSTOP);
    std::fs::write(home.path().join("suspect"), "").unwrap();
    wait_for_text(&job, "redundancy is full again");
    let output = job.output();
    assert!(
        output.contains("was not heard by the other servers of its shards; its shards go on with server 0"),
        "{output}"
    );
    std::fs::write(home.path().join("finish"), "").unwrap();
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
}

#[test]
fn a_shard_that_loses_both_copies_ends_the_job_by_name() {
    let home = home();
    let mut job = running(home.path());
    // Neither may come again and bring a second copy in between.
    std::fs::write(home.path().join("no-servers"), "").unwrap();
    job.kill(S1, Signal::SIGKILL);
    wait_for_text(&job, "shard 1: server 0 serves since epoch 1, without a backup");
    let shown = status_text(home.path());
    assert!(shown.contains("shards without a backup: 0, 1") || shown.contains("backup server 1: gone"), "{shown}");
    job.kill(S0, Signal::SIGABRT);
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap();
    assert!(reason.contains("has lost both copies: server "), "{reason}");
    assert!(reason.contains("server 0 was killed by signal 6") && reason.contains("server 1 "), "{reason}");
    assert_eq!(outcome.code, 1);
}

#[test]
fn a_server_that_cannot_come_again_is_given_up_aloud() {
    let home = home();
    let mut job = running(home.path());
    std::fs::write(home.path().join("no-servers"), "").unwrap();
    job.kill(S0, Signal::SIGKILL);
    wait_for_text(&job, "it is not started again, and its shards stay without a backup");
    let tries = job.output().matches("server 0 ended with exit code 3 before it had joined").count();
    assert_eq!(tries, 6, "{}", job.output());
    std::fs::write(home.path().join("finish"), "").unwrap();
    let outcome = end(&mut job);
    assert_eq!((outcome.code, outcome.reason.as_deref()), (0, None), "{}", job.output());
}
