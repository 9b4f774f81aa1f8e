//! A checkpoint at every step, and processes killed at random, the launcher among them: every time what is found is the state of
//! the undisturbed run at that clock, and from it the job goes on to the undisturbed run's bits.
//!
//! `GRADWIRE_KILLS` says how many (10 without it), `GRADWIRE_KILL_SEED` where the dice begin.
//!
//! Invariant: a kill counts only if the job had not ended by then; what is compared was written by other processes than ours.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{
    checkpoint::{self, Checkpoint, ChunkData},
    launch::Job,
    session::JobConfig,
    transport::sim::SimRandom,
    types::{ChunkId, Clock},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    jobs::{PATIENCE, end, home, options, with_variable},
    processes::processes,
};

/// The settings of a job that stores every step.
pub fn every_step(home: &Path, keep: u32) -> JobConfig {
    let mut config = options(home, "train").config;
    (config.checkpoint.every, config.checkpoint.keep) = (Some(1), keep);
    config
}

/// `gradwire run` with these settings, as a process of its own; what it prints goes to the file `output` in its home.
pub fn launch(home: &Path, config: &JobConfig, steps: Clock, pause_ms: u64, resume: bool) -> Command {
    let file = home.join("job.toml");
    let mut settings = toml::Table::try_from(config).unwrap();
    // What the launcher sets itself.
    settings.retain(|name, _| !["instance", "start_clock"].contains(&name));
    std::fs::write(&file, settings.to_string()).unwrap();
    let output = std::fs::File::options().create(true).append(true).open(home.join("output")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.arg("run").arg("--config").arg(file);
    if resume {
        command.arg("--resume").arg(home.join("checkpoints"));
    }
    command.arg("--").arg(std::env::current_exe().unwrap());
    command.args(["--exact", "worker_process", "--nocapture", "--test-threads=1"]);
    command.env("WORKER_PART", "train").env("WORKER_STEPS", steps.to_string());
    command.env("WORKER_PAUSE_MS", pause_ms.to_string()).env("GRADWIRE_HOME", home).stdin(Stdio::null());
    command.stdout(output.try_clone().unwrap()).stderr(output);
    command
}

pub fn printed(home: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(home.join("output")).unwrap_or_default()).into_owned()
}

/// Waits until a process of ours has ended; whether it ended well.
pub fn ended(child: &mut Child, home: &Path) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the job did not end; it has written:\n{}", printed(home));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The undisturbed run, which keeps the checkpoint of every clock.
pub struct Undisturbed {
    _home: tempfile::TempDir,
    dir: PathBuf,
}

impl Undisturbed {
    pub fn new(part: &str, steps: Clock) -> Undisturbed {
        let home = home();
        let mut options = options(home.path(), part);
        options.config = every_step(home.path(), 100_000);
        with_variable(&mut options, "WORKER_STEPS", steps);
        let mut job = Job::start(options).unwrap();
        let outcome = end(&mut job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
        drop(job);
        let dir = home.path().join("checkpoints");
        let stored = checkpoint::list(&dir).unwrap().filter(|(_, opened)| opened.is_ok()).count();
        assert_eq!(stored as Clock, steps, "every clock of the undisturbed run is stored");
        Undisturbed { _home: home, dir }
    }

    /// Asserts that a checkpoint is what this run had stored at that clock, in every bit of parameters and optimizer state.
    pub fn assert_same(&self, found: &Checkpoint) {
        let clock = found.clock();
        found.verify().unwrap();
        let wanted = Checkpoint::open(&self.dir.join(format!("clock-{clock:012}"))).unwrap();
        let chunks = wanted.manifest().layout.chunks.len();
        assert_eq!(found.manifest().layout, wanted.manifest().layout);
        assert_eq!(found.manifest().state, wanted.manifest().state);
        for chunk in (0..chunks as u32).map(ChunkId) {
            let [there, here] = [&wanted, found].map(|checkpoint| bits(&checkpoint.chunk(chunk).unwrap()));
            assert_eq!(here, there, "chunk {} at clock {clock}", chunk.0);
        }
    }
}

fn bits(data: &ChunkData<'_>) -> (u64, u64, [Vec<u32>; 3]) {
    let bits = |array: &[f32]| array.iter().map(|value| value.to_bits()).collect();
    (data.version, data.steps, [bits(data.master), bits(data.first), bits(data.second)])
}

/// What lies in the directory of checkpoints, files of unfinished ones too.
fn lies(dir: &Path) -> Vec<String> {
    let names = |path: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let mut all = Vec::new();
    for name in names(dir) {
        let is_open = !name.rsplit('-').next().unwrap().bytes().all(|byte| byte.is_ascii_digit());
        let inside = if is_open { names(&dir.join(&name)).join(" ") } else { String::new() };
        all.push(if is_open { format!("{name} [{inside}]") } else { name });
    }
    all.sort();
    all
}

/// One segment of the job: it goes on, somebody dies; what became of it is told. Whether the job had not ended before.
fn segment(home: &Path, steps: Clock, random: &mut SimRandom, number: u64) -> bool {
    let dir = home.join("checkpoints");
    let latest = || checkpoint::latest(&dir).unwrap().checkpoint.map(|checkpoint| checkpoint.clock());
    let before = latest();
    let mut job = launch(home, &every_step(home, 2), steps, 10, before.is_some()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Once a checkpoint is under way in this segment: kills that hit nothing prove nothing.
    while latest() <= before && job.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no checkpoint came:\n{}", printed(home));
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_micros(random.below(150_000)));
    let launcher = job.id();
    let ranks = processes(home).into_iter().filter(|(pid, _)| *pid != launcher);
    let mut victims: Vec<(u32, &str)> = vec![(launcher, "launcher")];
    for (pid, line) in ranks {
        match line {
            line if line.contains("worker_process") => victims.push((pid, "worker")),
            line if line.contains("--role server") => victims.push((pid, "server")),
            _ => {}
        }
    }
    let kind = ["launcher", "server", "server", "worker"][random.below(4) as usize];
    victims.retain(|(_, what)| *what == kind);
    let alive = job.try_wait().unwrap().is_none() && !victims.is_empty();
    if alive {
        let (pid, _) = victims[random.below(victims.len() as u64) as usize];
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let there = lies(&dir);
    let well = ended(&mut job, home);
    while !processes(home).is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", processes(home));
        std::thread::sleep(Duration::from_millis(5));
    }
    println!(
        "kill {number} at {at}: {kind}, hit: {}; there was {there:?}, and in the end {:?}",
        alive && !well,
        lies(&dir)
    );
    alive && !well
}

#[test]
fn a_checkpoint_at_every_step_survives_kills_at_random() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let kills = number("GRADWIRE_KILLS").unwrap_or(10);
    let mut random = SimRandom::new(number("GRADWIRE_KILL_SEED").unwrap_or(1));
    let steps = 12 * kills + 20;
    let undisturbed = Undisturbed::new("train", steps);
    let home = home();
    let dir = home.path().join("checkpoints");
    let (mut hit, mut newest) = (0, None);
    while hit < kills {
        let is_hit = segment(home.path(), steps, &mut random, hit);
        let latest = checkpoint::latest(&dir).unwrap();
        let found = latest
            .checkpoint
            .unwrap_or_else(|| panic!("nothing is left: {:?}\n{}", latest.passed_over, printed(home.path())));
        undisturbed.assert_same(&found);
        assert!(Some(found.clock()) >= newest, "clock {} was found after {newest:?}", found.clock());
        newest = Some(found.clock());
        if !is_hit {
            break;
        }
        hit += 1;
    }
    let config = every_step(home.path(), 2);
    let mut job = launch(home.path(), &config, steps, 0, true).spawn().unwrap();
    assert!(ended(&mut job, home.path()), "{}", printed(home.path()));
    let found = checkpoint::latest(&dir).unwrap().checkpoint.unwrap();
    assert_eq!(found.clock(), steps);
    undisturbed.assert_same(&found);
    assert_eq!(lies(&dir).len(), 2, "two are kept, and nothing else is left: {:?}", lies(&dir));
    println!("{hit} of {kills} kills hit a job that was under way");
    assert!(hit * 2 > kills, "only {hit} kills of {kills} hit anything");
}
