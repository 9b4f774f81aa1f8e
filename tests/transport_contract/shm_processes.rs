//! Shared memory between processes: what becomes of a path when its other process is killed or stopped, and what is left then.
//!
//! The other process is this very test program, told by its environment to play a part.
//!
//! Invariant: every process started here is killed and waited for by whoever started it, and ends by itself before long.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::{fd::AsFd, unix::fs::FileExt},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{HugePages, Lease, Locking, Region, RegionOptions},
    transport::{
        Completion, Endpoint, RemoteSlot, Transport, Waiter,
        shm::{ShmOptions, ShmTransport},
    },
    types::PeerId,
    wire::{Attachment, JobToken, Note, NoteKind, handshake::Identity, job_id},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{ForkResult, Pid, fork},
};

use crate::{
    shm_users,
    world::{note, write},
};

pub const SERVER: PeerId = PeerId::server(0, 0);
pub const WORKER: PeerId = PeerId::worker(0);
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn end(token: &JobToken, me: PeerId) -> ShmTransport {
    let identity = Identity { job: job_id("processes", "1"), token: token.clone(), me, epoch: 0 };
    ShmTransport::new(ShmOptions::new(identity)).unwrap()
}

pub fn address(end: &mut ShmTransport) -> String {
    end.offer(WORKER).unwrap().on("shm").unwrap().to_string()
}

/// Another process, which plays a part.
pub struct Process {
    pub child: Child,
    lines: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(part: &str, token: &JobToken, remote: &str, configure: impl FnOnce(&mut Command)) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "shm_processes::plays_its_part", "--nocapture", "--test-threads=1"]);
        command.env("SHM_PART", part).env("SHM_TOKEN", token.to_hex()).env("SHM_REMOTE", remote);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Process { child, lines }
    }

    /// What it says after `word`. The test harness writes into the same line.
    pub fn says(&mut self, word: &str) -> String {
        let mut line = String::new();
        while self.lines.read_line(&mut line).unwrap() > 0 {
            if let Some(at) = line.find(word) {
                return line[at + word.len()..].trim().to_string();
            }
            line.clear();
        }
        panic!("the process ended before it said {word}: {:?}", self.child.wait());
    }

    fn id(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn signal(&self, signal: Signal) {
        kill(self.id(), signal).unwrap();
    }

    /// Stops it and returns when all of it has stopped.
    fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let limit = Instant::now() + PATIENCE;
        let is_stopped = || {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
            tasks.flatten().all(|task| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
            })
        };
        while !is_stopped() {
            assert!(Instant::now() < limit, "process {} does not stop", self.id());
            std::thread::yield_now();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn plays_its_part() {
    let Ok(part) = std::env::var("SHM_PART") else { return };
    let token = JobToken::from_hex(&std::env::var("SHM_TOKEN").unwrap()).unwrap();
    let remote = std::env::var("SHM_REMOTE").unwrap();
    match part.as_str() {
        "writer" => play_writer(&token, &remote, false),
        "writer with an heir" => play_writer(&token, &remote, true),
        "cycles" => play_cycles(&token),
        "caller of another user" => shm_users::play_foreign_caller(&remote),
        "listener of another user" => shm_users::play_foreign_listener(),
        other => panic!("no part is called {other}"),
    }
}

/// A worker that writes its memory wherever an `Attach` tells it to, and connects anew whenever it is cut off.
fn play_writer(token: &JobToken, remote: &str, with_heir: bool) {
    let limit = Instant::now() + PATIENCE;
    let bytes: usize = std::env::var("SHM_BYTES").map_or(4096, |text| text.parse().unwrap());
    let (region, mut source) = Region::allocate(bytes, &unlocked()).unwrap();
    for mark in marks(bytes) {
        source.bytes_mut()[mark as usize] = 0xAA;
    }
    let mut source = Some(source);
    let mut worker = end(token, WORKER);
    worker.register(&region).unwrap();
    println!("ADDRESS {}", address(&mut worker));
    let mut path = 0;
    worker.connect(SERVER, &Endpoint::new("shm", remote), limit).unwrap();
    let waiter = Waiter::new().unwrap();
    let mut heard = Vec::new();
    while Instant::now() < limit {
        worker.flush().unwrap();
        worker.poll(Instant::now(), &mut heard).unwrap();
        for completion in heard.drain(..) {
            match completion {
                Completion::Connected { .. } if with_heir => leave_an_heir(),
                Completion::Arrived { note, .. } if note.kind == NoteKind::Attach => {
                    let to = Attachment::from_note(&note).unwrap();
                    let slot = RemoteSlot { rkey: to.rkey, offset: to.offset, len: to.slot_bytes };
                    let payload = source.take().expect("one write at a time").freeze();
                    worker.post(write(1, SERVER, payload, slot)).unwrap();
                }
                Completion::Sent { source: back, .. } | Completion::Failed { source: back, .. } => {
                    source = back.map(|back| back.thaw().unwrap()).or(source);
                }
                Completion::Broken { .. } => {
                    worker.fence(SERVER);
                    path += 1; // the server has fenced its end: its next offer
                    if worker.connect(SERVER, &Endpoint::new("shm", format!("{remote}#{path}")), limit).is_err() {
                        return;
                    }
                }
                _ => {}
            }
        }
        worker.flush().unwrap();
        waiter.wait(&mut [&mut worker], Some(limit)).unwrap();
    }
}

/// Where a copy has been once it is under way, and where it has not been before it is nearly over. Not the very ends of it: those
/// may be copied out of turn.
fn marks(bytes: usize) -> [u64; 2] {
    let margin = bytes as u64 / 64;
    [margin, bytes as u64 - 1 - margin]
}

/// A child process that inherits the sockets and holds them open until the test is over.
fn leave_an_heir() {
    // SAFETY: the child only reads its standard input and leaves by `_exit`, both of which a forked thread may do.
    if let ForkResult::Child = unsafe { fork() }.unwrap() {
        let mut byte = [0; 1];
        while nix::unistd::read(std::io::stdin().as_fd(), &mut byte).is_ok_and(|count| count > 0) {}
        // SAFETY: ends this process without running anything of it.
        unsafe { nix::libc::_exit(0) };
    }
}

fn unlocked() -> RegionOptions {
    RegionOptions { lock: Locking::None, huge_pages: HugePages::Never, ..Default::default() }
}

/// A server in this process, connected to a worker in another.
struct Pair {
    server: ShmTransport,
    worker: Process,
    heard: Vec<Completion>,
}

impl Pair {
    fn new(part: &str, configure: impl FnOnce(&mut Command)) -> Pair {
        let token = JobToken::random().unwrap();
        let mut server = end(&token, SERVER);
        let mut worker = Process::start(part, &token, &address(&mut server), configure);
        let there = worker.says("ADDRESS ");
        server.connect(WORKER, &Endpoint::new("shm", there), Instant::now() + PATIENCE).unwrap();
        let mut pair = Pair { server, worker, heard: Vec::new() };
        pair.until("Connected", |heard| heard.iter().any(|c| matches!(c, Completion::Connected { .. })));
        pair.heard.clear();
        pair
    }

    fn poll(&mut self) {
        self.server.flush().unwrap();
        self.server.poll(Instant::now(), &mut self.heard).unwrap();
        std::thread::yield_now();
    }

    fn until(&mut self, awaited: &str, reached: impl Fn(&[Completion]) -> bool) {
        let limit = Instant::now() + PATIENCE;
        while !reached(&self.heard) {
            assert!(Instant::now() < limit, "waited in vain for {awaited}: {:?}", self.heard);
            self.poll();
        }
    }

    fn broken(&self) -> Option<String> {
        self.heard.iter().find_map(|completion| match completion {
            Completion::Broken { peer: WORKER, error } => Some(error.to_string()),
            _ => None,
        })
    }

    fn assert_broken_by_its_end(&mut self) {
        let ended = format!("process {}", self.worker.id());
        self.until("Broken", |heard| heard.iter().any(|c| matches!(c, Completion::Broken { .. })));
        let told = self.broken().unwrap();
        assert!(told.contains("worker 0") && told.contains(&ended) && told.contains("ended"), "{told}");
        assert!(matches!(self.heard.last(), Some(Completion::Broken { .. })), "{:?}", self.heard);
    }
}

#[test]
fn a_killed_process_breaks_its_path() {
    let mut pair = Pair::new("writer", |_| {});
    pair.worker.stop();
    for id in 0..3000 {
        pair.server.post(note(id, WORKER, Note::new(NoteKind::Heartbeat))).unwrap();
    }
    for _ in 0..10 {
        pair.poll();
    }
    assert!(pair.broken().is_none(), "a process that is stopped is not at its end");
    pair.worker.signal(Signal::SIGKILL);
    pair.assert_broken_by_its_end();
    let failed = pair.heard.iter().filter(|completion| matches!(completion, Completion::Failed { .. }));
    assert_eq!(failed.count(), 3000 - 1024, "what was not in the ring");
}

/// A child of the killed process keeps its end of the socket open: nothing but the process's end itself tells.
#[test]
fn a_killed_process_breaks_its_path_though_its_socket_lives_on() {
    let mut pair = Pair::new("writer with an heir", |_| {});
    // Its answer comes after the fork.
    let (region, lease) = Region::allocate(4096, &unlocked()).unwrap();
    pair.server.register(&region).unwrap();
    attach(&mut pair, lease);
    pair.until("the write", |heard| heard.iter().any(|c| matches!(c, Completion::Arrived { .. })));
    let heir = pair.worker.child.stdin.take();
    pair.worker.signal(Signal::SIGKILL);
    pair.assert_broken_by_its_end();
    assert!(pair.broken().unwrap().contains("has ended"));
    drop(heir);
}

/// Arms `slot` for the worker and asks it to write there.
fn attach(pair: &mut Pair, slot: Lease) {
    let slot = pair.server.arm(WORKER, slot).unwrap();
    let where_to = Attachment { rkey: slot.rkey, offset: slot.offset, slot_bytes: slot.len, slots: 1, credit: 0 };
    pair.server.post(note(0, WORKER, where_to.to_note())).unwrap();
    pair.server.flush().unwrap();
}

/// A worker that is stopped in the middle of a copy, and the memory that it copies to, seen through its file.
fn stopped_in_a_copy() -> (Pair, fs::File, u64) {
    // Every page of both ends is touched for the first time by the copy, which takes it long enough to be caught.
    const BYTES: usize = 128 << 20;
    for _ in 0..20 {
        let mut pair = Pair::new("writer", |command| {
            command.env("SHM_BYTES", BYTES.to_string());
        });
        let (region, lease) = Region::allocate(BYTES, &unlocked()).unwrap();
        pair.server.register(&region).unwrap();
        let file = fs::File::from(region.as_fd().try_clone_to_owned().unwrap());
        attach(&mut pair, lease);
        let limit = Instant::now() + PATIENCE;
        let [early, late] = marks(BYTES);
        while byte(&file, early) == 0 {
            assert!(Instant::now() < limit, "nothing is copied");
        }
        pair.worker.stop();
        if byte(&file, late) == 0 {
            return (pair, file, late);
        }
    }
    panic!("twenty copies were all over before the writer was stopped");
}

fn byte(file: &fs::File, at: u64) -> u8 {
    let mut byte = [0; 1];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

fn assert_withheld(pair: &mut Pair) {
    assert!(pair.server.fence(WORKER).is_empty(), "a slot came back that is being written to");
    pair.heard.clear();
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        pair.poll();
    }
    assert!(pair.heard.iter().all(|c| matches!(c, Completion::Failed { .. })), "{:?}", pair.heard);
}

fn released(heard: &[Completion]) -> bool {
    heard.iter().any(|c| matches!(c, Completion::Released { peer: WORKER, slots } if slots.len() == 1))
}

#[test]
fn the_slot_of_a_writer_that_is_stopped_in_a_copy_comes_back_when_it_is_killed() {
    let (mut pair, file, late) = stopped_in_a_copy();
    assert_withheld(&mut pair);
    pair.worker.signal(Signal::SIGKILL);
    pair.until("Released", released);
    assert_eq!(byte(&file, late), 0, "it was killed before it got there");
}

#[test]
fn the_slot_of_a_writer_that_is_stopped_in_a_copy_comes_back_when_it_goes_on() {
    let (mut pair, file, late) = stopped_in_a_copy();
    assert_withheld(&mut pair);
    // A new path does not wait for the old one's slots.
    let there = pair.server.offer(WORKER).unwrap();
    pair.server.connect(WORKER, &there, Instant::now() + PATIENCE).unwrap();
    pair.worker.signal(Signal::SIGCONT);
    pair.until("Released and Connected", |heard| {
        released(heard) && heard.iter().any(|c| matches!(c, Completion::Connected { .. }))
    });
    assert_eq!(byte(&file, late), 0xAA, "it did go on, so the slot could not have come back before");
}

/// Descriptors and mappings of this process: all of the former, those of our files of the latter.
fn holdings() -> (usize, usize) {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (descriptors, maps.lines().filter(|line| line.contains("memfd:gradwire")).count())
}

#[test]
fn two_hundred_paths_leave_nothing_behind() {
    let token = JobToken::random().unwrap();
    let mut process = Process::start("cycles", &token, "", |_| {});
    assert_eq!(process.says("CYCLES "), "done");
    let mut rest = String::new();
    process.lines.read_to_string(&mut rest).unwrap();
    assert!(process.child.wait().unwrap().success(), "{rest}");
}

/// Alone in its process: connects and fences, to an end in this process and to one in another.
fn play_cycles(token: &JobToken) {
    let mut pair = Pair::new("writer", |_| {});
    let mut other = end(token, WORKER);
    let mut server = end(token, SERVER);
    let (region, _lease) = Region::allocate(4096, &unlocked()).unwrap();
    server.register(&region).unwrap();
    pair.server.register(&region).unwrap();
    let to_other = Endpoint::new("shm", address(&mut other));
    let foreign = pair.server.offer(WORKER).unwrap();
    let mut before = None;
    for cycle in 0..210 {
        let deadline = Instant::now() + PATIENCE;
        server.connect(WORKER, &to_other, deadline).unwrap();
        other.connect(SERVER, &server.offer(WORKER).unwrap(), deadline).unwrap();
        let (mut here, mut there) = (Vec::new(), Vec::new());
        while here.is_empty() || there.is_empty() {
            server.poll(Instant::now(), &mut here).unwrap();
            other.poll(Instant::now(), &mut there).unwrap();
        }
        assert!(matches!((&here[..], &there[..]), ([Completion::Connected { .. }], [Completion::Connected { .. }])));
        server.fence(WORKER);
        other.fence(SERVER);
        pair.server.fence(WORKER);
        pair.heard.clear();
        pair.server.connect(WORKER, &foreign, deadline).unwrap();
        pair.until("Connected", |heard| heard.iter().any(|c| matches!(c, Completion::Connected { .. })));
        if cycle == 9 {
            before = Some(holdings());
        }
    }
    assert_eq!(Some(holdings()), before);
    println!("CYCLES done");
}

#[test]
fn a_program_that_is_started_inherits_nothing() {
    let _pair = Pair::new("writer", |_| {});
    let mut list = Command::new("ls");
    list.args(["-l", "/proc/self/fd"]).stdin(Stdio::null()).stderr(Stdio::null());
    let inherited = String::from_utf8(list.output().unwrap().stdout).unwrap();
    assert!(inherited.contains("pipe:"), "its own output: {inherited}");
    for kind in ["memfd:", "socket:", "pidfd", "eventpoll"] {
        assert!(!inherited.contains(kind), "{kind} in {inherited}");
    }
}
