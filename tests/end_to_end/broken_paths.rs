//! Connections of running jobs that are broken from outside, again and again: the job goes on and ends with the bits of the
//! undisturbed run.
//!
//! A connection is broken as a network or a firewall does it, with neither end's program having a part in it: this process takes a
//! copy of a rank's socket (pidfd_getfd) and shuts it down. `GRADWIRE_FAULTS` says how many (10 without it), `GRADWIRE_FAULT_SEED`
//! where the dice begin.
//!
//! Invariant: an injection counts only if it hit something: over tcp, bytes that were on their way; through shared memory, where
//! that cannot be seen from outside, a job in the middle of its training.

use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{
    launch::{Job, JobOptions},
    session::{Fabric, PayloadChecksums},
    transport::sim::SimRandom,
};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockname, getsockopt, shutdown,
    sockopt,
};

use crate::{
    jobs::{PATIENCE, digests, end, home, options, run, stored, wait_for_text, with_variable},
    program::model,
};

/// A rank's process, and what it is.
pub struct Process {
    pub pid: i32,
    pub name: String,
}

/// The ranks of the job in `home`.
pub fn ranks(home: &Path) -> Vec<Process> {
    let mark = format!("GRADWIRE_TOKEN_FILE={}/", home.display());
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let rank = |pid: i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let variables: Vec<_> = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let of = |name: &str| variables.iter().find_map(|variable| variable.strip_prefix(name).map(str::to_string));
        variables.iter().find(|variable| variable.starts_with(&mark))?;
        Some(Process { pid, name: format!("{} {}", of("GRADWIRE_ROLE=")?, of("GRADWIRE_RANK=")?) })
    };
    pids.filter_map(rank).collect()
}

/// Our own copies of those descriptors of a process that lead to what begins with `kind`.
pub fn descriptors(process: &Process, kind: &str) -> Vec<OwnedFd> {
    // SAFETY: no memory is passed; the answer is a new descriptor or -1.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, process.pid, 0) };
    if pidfd < 0 {
        return Vec::new(); // it has ended
    }
    // SAFETY: the kernel has just made it for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    let entries = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
    let is_wanted =
        |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with(kind));
    let numbers: Vec<i32> =
        entries.filter(is_wanted).filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let copies = numbers.into_iter().filter_map(|number| {
        // SAFETY: as above.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        // SAFETY: as above.
        (copy >= 0).then(|| unsafe { OwnedFd::from_raw_fd(copy as i32) })
    });
    copies.collect()
}

/// Our own copies of the sockets over which a process has paths.
fn sockets(process: &Process, fabric: Fabric, rendezvous: u16) -> Vec<OwnedFd> {
    let sockets = descriptors(process, "socket:").into_iter();
    sockets.filter(|socket| carries_a_path(socket, fabric, rendezvous)).collect()
}

fn carries_a_path(socket: &OwnedFd, fabric: Fabric, rendezvous: u16) -> bool {
    let (Ok(here), Ok(there)) =
        (getsockname::<SockaddrStorage>(socket.as_raw_fd()), getpeername::<SockaddrStorage>(socket.as_raw_fd()))
    else {
        return false; // nobody is at the other end
    };
    let port = |address: &SockaddrStorage| address.as_sockaddr_in().map(|address| address.port());
    match fabric {
        Fabric::Tcp => {
            here.family() == Some(AddressFamily::Inet) && ![port(&here), port(&there)].contains(&Some(rendezvous))
        }
        _ => {
            here.family() == Some(AddressFamily::Unix)
                && getsockopt(socket, sockopt::SockType).is_ok_and(|kind| kind == SockType::SeqPacket)
        }
    }
}

/// Bytes that the other end has not acknowledged, and bytes that this end has not read.
fn on_their_way(socket: &OwnedFd) -> i32 {
    let mut bytes = [0i32; 2];
    for (request, place) in [libc::TIOCOUTQ, libc::FIONREAD].into_iter().zip(&mut bytes) {
        // SAFETY: both requests write one int, and the place for it lives as long as the call.
        unsafe { libc::ioctl(socket.as_raw_fd(), request, place) };
    }
    bytes.iter().sum()
}

fn job(home: &Path, fabric: Fabric, steps: u64) -> JobOptions {
    let mut options = options(home, "train");
    options.config.transports = vec![fabric];
    with_variable(&mut options, "WORKER_STEPS", steps);
    with_variable(&mut options, "WORKER_TELLS", 1);
    options
}

/// The last clock that a worker has said to begin.
pub fn clock(job: &Job) -> u64 {
    let output = job.output();
    let last = output.rsplit("begins clock ").next().and_then(|rest| rest.split_whitespace().next());
    last.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Breaks `count` connections of a job, and compares its end with that of the job that is left alone.
fn disturbed(fabric: Fabric, count: u64, seed: u64, steps: u64, prepare: impl Fn(&mut JobOptions)) {
    let mut random = SimRandom::new(seed);
    let (home_of, calm_home) = (home(), home());
    let prepared = |home: &Path| {
        let mut options = job(home, fabric, steps);
        prepare(&mut options);
        options
    };
    let undisturbed = run(prepared(calm_home.path()));
    let mut job = Job::start(prepared(home_of.path())).unwrap();
    wait_for_text(&job, "begins clock 3");
    let (mut hits, mut missed) = (0, 0);
    let until = Instant::now() + PATIENCE;
    while hits < count {
        assert!(Instant::now() < until, "{hits} of {count} hits\n{}", job.output());
        std::thread::sleep(Duration::from_millis(5 + random.below(30)));
        let ranks = ranks(home_of.path());
        assert!(!ranks.is_empty(), "the job was over after {hits} of {count} hits: give it more steps");
        let victim = &ranks[random.below(ranks.len() as u64) as usize];
        let sockets = sockets(victim, fabric, job.address().to_string().rsplit(':').next().unwrap().parse().unwrap());
        if sockets.is_empty() {
            continue; // just being rebuilt
        }
        let socket = &sockets[random.below(sockets.len() as u64) as usize];
        // A moment at which there is something on the way.
        let patience = Instant::now() + Duration::from_millis(200);
        let mut bytes = on_their_way(socket);
        while fabric == Fabric::Tcp && bytes == 0 && Instant::now() < patience {
            bytes = on_their_way(socket);
        }
        let at_clock = clock(&job);
        assert!(at_clock + 2 < steps, "the job was over after {hits} of {count} hits: give it more steps");
        let is_hit = fabric != Fabric::Tcp || bytes > 0;
        if shutdown(socket.as_raw_fd(), Shutdown::Both).is_err() {
            continue; // it had ended
        }
        hits += u64::from(is_hit);
        missed += u64::from(!is_hit);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        println!(
            "{:.3}: a connection of {} ({}) was shut down while training, clock {at_clock}, {bytes} bytes on their way{}",
            at.as_secs_f64(),
            victim.name,
            fabric.name(),
            if is_hit { "" } else { ": does not count" }
        );
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (ours, theirs) = (digests(&job.output()), digests(&undisturbed));
    println!("{hits} hits, {missed} that hit nothing; digests {ours:?}, undisturbed {theirs:?}");
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}\n{}", job.output());
    let all = vec![model(); 2];
    assert!(stored(home_of.path(), &all) == stored(calm_home.path(), &all), "the checkpoints differ");
    let rebuilt = job.output().lines().filter(|line| line.contains("and was rebuilt after")).count() as u64;
    assert!(rebuilt > 0, "nobody says that a path was rebuilt\n{}", job.output());
}

/// How many faults, and where the dice begin.
pub fn faults() -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    (number("GRADWIRE_FAULTS").unwrap_or(10), number("GRADWIRE_FAULT_SEED").unwrap_or(1))
}

#[test]
fn broken_tcp_connections_change_no_bit() {
    let (count, seed) = faults();
    disturbed(Fabric::Tcp, count, seed, 100 + 120 * count, |_| ());
}

#[test]
fn broken_shm_connections_change_no_bit() {
    let (count, seed) = faults();
    // A step takes a third of a millisecond, and a fault comes every twenty.
    disturbed(Fabric::Shm, count, seed, 100 + 300 * count, |_| ());
}

/// The same where servers have paths to each other, and every payload carries a checksum.
#[test]
fn broken_connections_change_no_decision() {
    let (count, seed) = faults();
    disturbed(Fabric::Tcp, count.min(20), seed + 1, 100 + 120 * count, |options| {
        options.config.payload_checksums = PayloadChecksums::On;
        options.config.optimizer.clip.global_norm = Some(0.5);
    });
}
