//! A job whose servers are on hosts of their own and hold two copies of each shard: servers are killed and stopped, and links are cut for a
//! moment and for longer, again and again; the job ends with the bits of the undisturbed run.
//!
//! The hosts are network namespaces (`switch.rs`): the launcher, the workers and server 0 on the first, servers 1 and 2 on others.
//! `GRADWIRE_FAULTS` says how many faults hit something (10 without it), `GRADWIRE_FAULT_SEED` where the dice begin.
//!
//! Invariant: a fault is injected only while `gradwire status` says that redundancy is full, and counts only if bytes were on their way that it
//! kept from arriving or from being read.

use std::{
    fmt,
    fs::{self, File},
    io::Read,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::transport::sim::SimRandom;
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    broken_paths::{Process, faults, ranks},
    jobs::{PATIENCE, digests, home},
    namespaces::{Ended, worker},
    switch::Switch,
};

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Where the launcher listens.
const PORT: u16 = 7331;

/// Clocks that are trained after the last fault.
const LAST_CLOCKS: u64 = 200;

/// What is done to the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    Stop,
    /// A host's link is cut for less time than silence may last.
    Blink,
    /// A host's link is cut for longer.
    Cut,
    /// Servers 1 and 2 lose each other for longer, and nobody else.
    Apart,
    /// One of them loses the workers and server 0 for longer, and nobody else.
    Aside,
}

impl Fault {
    const ALL: [Fault; 6] = [Fault::Kill, Fault::Stop, Fault::Blink, Fault::Cut, Fault::Apart, Fault::Aside];

    /// Whether another copy takes over.
    fn is_long(self) -> bool {
        self != Fault::Blink
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Kill => "killed",
            Fault::Stop => "stopped",
            Fault::Blink => "cut off for a moment",
            Fault::Cut => "cut off",
            Fault::Apart => "parted from the other",
            Fault::Aside => "parted from the workers' host",
        })
    }
}

/// What a job has written, read as it grows.
struct Log {
    files: Vec<(File, String)>,
    /// The last clock that a worker has said to begin.
    clock: u64,
    /// Changes of tenure.
    tenures: u64,
    /// Servers that the job went on without.
    gone: u64,
    /// All but the clocks.
    text: String,
}

impl Log {
    fn new(paths: &[PathBuf]) -> Log {
        let files = paths.iter().map(|path| (File::open(path).unwrap(), String::new())).collect();
        Log { files, clock: 0, tenures: 0, gone: 0, text: String::new() }
    }

    fn read(&mut self) {
        for (file, rest) in &mut self.files {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            rest.push_str(&String::from_utf8_lossy(&bytes));
            let Some(end) = rest.rfind('\n') else { continue };
            let lines: String = rest.drain(..=end).collect();
            for line in lines.lines() {
                if let Some((_, clock)) = line.split_once("begins clock ") {
                    self.clock = self.clock.max(clock.trim().parse().unwrap_or(0));
                    continue;
                }
                self.tenures += u64::from(line.contains(" serves since epoch "));
                self.gone += u64::from(line.contains("its shards go on with"));
                self.text += line;
                self.text += "\n";
            }
        }
    }
}

struct Job<'a> {
    switch: &'a Switch,
    home: tempfile::TempDir,
    launcher: Ended,
    log: Log,
    name: &'static str,
}

impl<'a> Job<'a> {
    /// With copies on three hosts, and trained until told to stop; or, with `steps`, without copies on the first.
    fn start(switch: &'a Switch, name: &'static str, steps: Option<u64>) -> Job<'a> {
        let home = home();
        let mut launcher = switch.command(0, GRADWIRE);
        let port = PORT + u16::from(steps.is_some());
        launcher.args(["run", "-s", "3", "-n", "2", "--name", name, "--transport", "tcp"]);
        launcher.args(["--listen", &format!("{}:{port}", Switch::address(0)), "--set", "chunk_bytes=1024"]);
        launcher.args([
            "--optimizer",
            "adamw",
            "--lr",
            "0.01",
            "--checkpoint-every",
            "500",
            "--set",
            "deadline_ms=20000",
        ]);
        launcher.arg("--checkpoint-dir").arg(home.path().join("checkpoints"));
        if steps.is_none() {
            let ssh = switch.write_ssh(home.path());
            launcher.args(["--replicas", "2", "--hosts", "localhost:2,h1:1,h2:1", "--ssh"]).arg(ssh);
            if !is_alone() {
                launcher.args(["--set", "suspect_ms=1500"]); // other tests run beside this one
            }
        }
        launcher.args(["--set", r#"optimizer.groups=[{name="other"}]"#, "--"]);
        let paths = ["output", "errors"].map(|name| home.path().join(name));
        let [output, errors] = [0, 1].map(|index: usize| File::create(&paths[index]).unwrap());
        worker(&mut launcher).env("GRADWIRE_HOME", home.path()).env("WORKER_TELLS", "1").stdout(output).stderr(errors);
        match steps {
            Some(steps) => launcher.env("WORKER_STEPS", steps.to_string()),
            None => launcher.env("WORKER_LAST", home.path().join("last")).env("WORKER_PAUSE_MS", "2"),
        };
        // Which mean something to this test alone.
        launcher.env_remove("GRADWIRE_FAULTS").env_remove("GRADWIRE_FAULT_SEED");
        let launcher = Ended(launcher.spawn().unwrap());
        Job { switch, log: Log::new(&paths), home, launcher, name }
    }

    fn clock(&mut self) -> u64 {
        self.log.read();
        self.log.clock
    }

    /// Waits until `met`, and says how long that took.
    fn wait_until(&mut self, what: &str, mut met: impl FnMut(&mut Job<'a>) -> bool) -> Duration {
        let since = Instant::now();
        loop {
            self.log.read();
            if met(self) {
                return since.elapsed();
            }
            let runs = self.launcher.0.try_wait().unwrap().is_none();
            assert!(runs && since.elapsed() < PATIENCE, "waited in vain for {what}:\n{}", self.log.text);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_full(&self) -> bool {
        let mut status = self.switch.command(0, GRADWIRE);
        let output = status.args(["status", self.name]).env("GRADWIRE_HOME", self.home.path()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("redundancy: full\n")
    }

    fn server(&self, index: usize) -> Process {
        let name = format!("server {index}");
        let found = ranks(self.home.path()).into_iter().find(|rank| rank.name == name);
        found.unwrap_or_else(|| panic!("{name} is not there"))
    }

    /// Waits for the job's end, as long as it gets on; what the workers say.
    fn digests(mut self) -> Vec<String> {
        let (mut seen, mut limit) = (0, Instant::now() + PATIENCE);
        let status = loop {
            if let Some(status) = self.launcher.0.try_wait().unwrap() {
                break status;
            }
            if self.clock() > seen {
                (seen, limit) = (self.log.clock, Instant::now() + PATIENCE);
            }
            assert!(Instant::now() < limit, "the job does not end:\n{}", self.log.text);
            std::thread::sleep(Duration::from_millis(50));
        };
        self.log.read();
        assert!(status.success(), "{status}:\n{}", self.log.text);
        digests(&self.log.text)
    }
}

/// Whether nothing else runs on this machine, so that it may be measured.
fn is_alone() -> bool {
    std::env::var_os("GRADWIRE_FAULTS").is_some()
}

/// A socket of a host: its address there and abroad, and bytes that the other end has not acknowledged and that this one has not read.
struct Socket {
    to: u32,
    unsent: u64,
    unread: u64,
    inode: String,
}

/// The sockets of the host on which a process runs, but for those to the launcher.
fn sockets(pid: i32) -> Vec<Socket> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let ((_, from_port), (to, to_port)) = (fields[1].split_once(':')?, fields[2].split_once(':')?);
        let (unsent, unread) = fields[4].split_once(':')?;
        let is_path = fields[3] != "0A" && ![from_port, to_port].map(number).contains(&PORT.into());
        let to = u32::from_be(number(to) as u32);
        let (unsent, unread) = (number(unsent), number(unread));
        is_path.then(|| Socket { to, unsent, unread, inode: fields[9].into() })
    };
    text.lines().skip(1).filter_map(socket).collect()
}

/// Bytes that a process has not read, and bytes of its own that nobody has acknowledged.
fn bytes_of(pid: i32) -> (u64, u64) {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()));
    let own: Vec<String> =
        links.filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_string())).collect();
    let all = sockets(pid);
    let own = || all.iter().filter(|socket| own.contains(&socket.inode));
    (own().map(|socket| socket.unread).sum(), own().map(|socket| socket.unsent).sum())
}

/// Bytes that hosts have for each other and that have not arrived; `by` are a process of each and its host.
fn bytes_between(by: [(i32, usize); 2]) -> u64 {
    let to = |pid, host| {
        let address = u32::from(Switch::address(host));
        sockets(pid).iter().filter(|socket| socket.to == address).map(|socket| socket.unsent).sum::<u64>()
    };
    to(by[0].0, by[1].1) + to(by[1].0, by[0].1)
}

fn signal(pid: i32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid), signal).unwrap();
}

/// Joins again what was cut.
type Back = Box<dyn Fn(&Switch)>;

/// What was found as a fault was injected.
struct Hit {
    /// Whom it hit.
    who: String,
    /// What was under way.
    found: String,
    since: Instant,
    clock: u64,
    /// Changes of tenure before.
    tenures: u64,
    /// When the link is to come back, and what to call then.
    ends: Option<(Instant, Back)>,
}

/// Injects a fault; `None` if it has hit nothing, and is undone already.
fn inject(job: &mut Job<'_>, fault: Fault, random: &mut SimRandom) -> Option<Hit> {
    let suspicion = if is_alone() { 500 } else { 1500 };
    let length = match fault {
        Fault::Blink => 20 + random.below(250),
        _ => suspicion + 300 + random.below(1500),
    };
    let (clock, tenures, since) = (job.clock(), job.log.tenures, Instant::now());
    let ends_at = since + Duration::from_millis(length);
    let hit = |who: String, found: String, ends| Some(Hit { who, found, since, clock, tenures, ends });
    match fault {
        Fault::Kill | Fault::Stop => {
            let victim = job.server(random.below(3) as usize);
            signal(victim.pid, Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(10));
            let (unread, unsent) = bytes_of(victim.pid);
            if unread + unsent == 0 {
                signal(victim.pid, Signal::SIGCONT);
                return None;
            }
            if fault == Fault::Kill {
                signal(victim.pid, Signal::SIGKILL);
            }
            hit(victim.name, format!("{unread} bytes not read by it and {unsent} of its own not arrived"), None)
        }
        Fault::Blink | Fault::Cut => {
            let host = 1 + random.below(2) as usize;
            let (victim, other) = (job.server(host).pid, job.server(0).pid);
            job.switch.set_link(host, false);
            std::thread::sleep(Duration::from_millis(20));
            let others = [0, 1, 2].into_iter().filter(|other| *other != host);
            let bytes: u64 = others.map(|there| bytes_between([(victim, host), (other, there)])).sum();
            if bytes == 0 {
                job.switch.set_link(host, true);
                return None;
            }
            let back: Back = Box::new(move |switch| switch.set_link(host, true));
            hit(format!("host {host}"), format!("{bytes} bytes on their way, for {length} ms"), Some((ends_at, back)))
        }
        Fault::Apart | Fault::Aside => {
            let one = 1 + random.below(2) as usize;
            let other = if fault == Fault::Apart { 3 - one } else { 0 };
            let by = [(job.server(one).pid, one), (job.server(other).pid, other)];
            job.switch.set_way(one, other, false);
            std::thread::sleep(Duration::from_millis(20));
            let bytes = bytes_between(by);
            if bytes == 0 {
                job.switch.set_way(one, other, true);
                return None;
            }
            let back: Back = Box::new(move |switch| switch.set_way(one, other, true));
            let found = format!("{bytes} bytes on their way, for {length} ms");
            hit(format!("host {one}"), found, Some((ends_at, back)))
        }
    }
}

/// How long the job stood still, and how long it had not all its copies.
fn see_through(job: &mut Job<'_>, fault: Fault, hit: &mut Hit) -> [Duration; 2] {
    let (mut went_on, since) = (None, hit.since);
    let clock = hit.clock;
    job.wait_until("training to go on, and redundancy", |job| {
        if let Some((_, back)) = hit.ends.take_if(|(at, _)| *at <= Instant::now()) {
            back(job.switch);
        }
        // The chunks of the clock that is under way need whoever serves them.
        let is_decided = job.log.tenures > hit.tenures || !fault.is_long();
        if went_on.is_none() && is_decided && job.log.clock > clock + 2 {
            went_on = Some(since.elapsed());
        }
        went_on.is_some() && hit.ends.is_none() && job.is_full()
    });
    [went_on.expect("waited for"), since.elapsed()]
}

fn median_and_longest(times: &mut [Duration]) -> String {
    times.sort();
    let longest = times.last().copied().unwrap_or_default();
    format!("{} ms (median), {} ms (longest)", times[times.len() / 2].as_millis(), longest.as_millis())
}

#[test]
fn servers_that_die_stop_or_are_cut_off_change_no_bit() {
    let Some(switch) = Switch::new('r', 3) else { return };
    let (count, seed) = faults();
    let mut random = SimRandom::new(seed);
    let mut job = Job::start(&switch, "cut", None);
    job.wait_until("the first clocks", |job| job.log.clock > 3);
    let (mut seen, mut missed): (Vec<(Fault, [Duration; 2])>, u64) = (Vec::new(), 0);
    while (seen.len() as u64) < count {
        job.wait_until("both copies of every shard", |job| job.is_full());
        std::thread::sleep(Duration::from_millis(random.below(150)));
        // Each kind in turn, so that a short run has them all.
        let fault = Fault::ALL[seen.len() % Fault::ALL.len()];
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let Some(mut hit) = inject(&mut job, fault, &mut random) else {
            missed += 1;
            continue;
        };
        let gone = job.log.gone;
        let times = see_through(&mut job, fault, &mut hit);
        println!(
            "{at:.3}: {} was {fault} while training, clock {}: {}; training went on within {} ms, {} gone, \
             both copies of every shard after {} ms",
            hit.who,
            hit.clock,
            hit.found,
            times[0].as_millis(),
            if job.log.gone > gone { "a server counted as" } else { "nobody was" },
            times[1].as_millis()
        );
        seen.push((fault, times));
    }
    let last = job.clock() + LAST_CLOCKS;
    let (partial, file) = (job.home.path().join("last.partial"), job.home.path().join("last"));
    fs::write(&partial, last.to_string()).unwrap();
    fs::rename(partial, file).unwrap();
    let disturbed = job.digests();
    let undisturbed = Job::start(&switch, "calm", Some(last)).digests();
    for kind in Fault::ALL {
        let of = |which: usize| seen.iter().filter(|(fault, _)| *fault == kind).map(move |(_, times)| times[which]);
        let (mut outages, mut gaps): (Vec<_>, Vec<_>) = (of(0).collect(), of(1).collect());
        if !outages.is_empty() {
            let (number, outages) = (outages.len(), median_and_longest(&mut outages));
            println!("{number} {kind}: went on after {outages}; whole again after {}", median_and_longest(&mut gaps));
        }
    }
    println!(
        "{} faults, {missed} that hit nothing, {last} clocks; digests {disturbed:?}, undisturbed {undisturbed:?}",
        seen.len()
    );
    assert!(disturbed.len() == 2 && disturbed == undisturbed, "{disturbed:?} instead of {undisturbed:?}");
}
