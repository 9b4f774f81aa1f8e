//! Queue pairs of running jobs that are moved to ERROR from outside, again and again: the paths are rebuilt, and the job ends with
//! the bits of the undisturbed run. In a virtual machine with soft-RDMA devices (`scripts/test-rdma`); elsewhere the test says
//! that it does nothing.
//!
//! A rank has no part in it: this process takes a copy of the descriptor through which the rank talks to its device (pidfd_getfd),
//! and asks the kernel over it to change a pair's state, by the call that libibverbs makes (`RDMA_VERBS_IOCTL` with
//! `UVERBS_METHOD_INVOKE_WRITE`; numbers from the kernel's rdma/ib_user_verbs.h and ib_user_ioctl_cmds.h).
//!
//! Invariant: an injection counts only if the kernel has changed a pair, and packets were on their way.

use std::{
    mem::size_of,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use gradwire::{launch::Job, transport::sim::SimRandom};

use crate::{
    broken_paths::{descriptors, faults, ranks},
    jobs::{PATIENCE, digests, end, home, run, stored, wait_for_text, with_variable},
    program::model,
    verbs_links::{clock, over, rebuilt, until_rebuilt},
};

/// `struct ib_uverbs_modify_qp` without the two addresses that lead it, which a change of state does not read.
#[repr(C)]
struct ModifyPair {
    addresses: [u64; 8],
    handle: u32,
    attributes: u32,
    numbers: [u32; 5],
    pkeys: [u16; 2],
    state: u8,
    others: [u8; 15],
}

/// `struct ib_uverbs_attr`.
#[repr(C)]
struct Attribute {
    id: u16,
    length: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

/// `struct ib_uverbs_ioctl_hdr` with two attributes.
#[repr(C)]
struct Request {
    length: u16,
    object: u16,
    method: u16,
    attributes: u16,
    reserved_1: u64,
    driver: u32,
    reserved_2: u32,
    input: Attribute,
    command: Attribute,
}

const _: () = assert!(size_of::<ModifyPair>() == 112 && size_of::<Request>() == 56);

/// Moves the pair with that handle to ERROR; whether there was one.
fn break_pair(device: &OwnedFd, handle: u32) -> bool {
    const RDMA_VERBS_IOCTL: libc::c_ulong = 0xc018_1b01;
    const DRIVER_RXE: u32 = 14;
    const MODIFY_QP: u64 = 26;
    const STATE: u32 = 1;
    const ERROR: u8 = 6;
    let change = ModifyPair {
        addresses: [0; 8],
        handle,
        attributes: STATE,
        numbers: [0; 5],
        pkeys: [0; 2],
        state: ERROR,
        others: [0; 15],
    };
    let attribute = |id, length: usize, data| Attribute { id, length: length as u16, flags: 1, reserved: 0, data };
    let request = Request {
        length: size_of::<Request>() as u16,
        object: 0,
        method: 0,
        attributes: 2,
        reserved_1: 0,
        driver: DRIVER_RXE,
        reserved_2: 0,
        input: attribute(0, size_of::<ModifyPair>(), &raw const change as u64),
        command: attribute(2, size_of::<u64>(), MODIFY_QP),
    };
    // SAFETY: the request and what it points to have the kernel's layout, and outlive the call, which only reads them.
    unsafe { libc::ioctl(device.as_raw_fd(), RDMA_VERBS_IOCTL, &raw const request) == 0 }
}

/// Packets that the device has sent.
fn sent() -> u64 {
    let file = "/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts";
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

/// Moves a random pair of a random rank to ERROR, at a moment when packets are sent; tells of which rank, and how many were seen.
fn break_one(home: &Path, random: &mut SimRandom) -> Option<(String, u32, u64)> {
    let ranks = ranks(home);
    let victim = ranks.get(random.below(ranks.len().max(1) as u64) as usize)?;
    let devices = descriptors(victim, "/dev/infiniband/uverbs");
    let (before, patience) = (sent(), Instant::now() + Duration::from_secs(2));
    while sent() == before && Instant::now() < patience {
        std::thread::sleep(Duration::from_micros(100));
    }
    // Handles are small numbers, given to objects of all kinds in their order; one of another kind is refused.
    let first = random.below(64) as u32;
    let handles = (0..64).map(|at| (first + at) % 64);
    let pairs = handles.flat_map(|handle| devices.iter().map(move |device| (device, handle)));
    let broken = pairs.into_iter().find(|(device, handle)| break_pair(device, *handle));
    broken.map(|(_, handle)| (victim.name.clone(), handle, sent() - before))
}

#[test]
fn verbs_whose_queue_pairs_fail_change_no_bit() {
    if std::env::var("RDMA_VM").as_deref() != Ok("dummy") {
        println!("NOT RUN: no soft-RDMA device that belongs to this test (scripts/test-rdma has one)");
        return;
    }
    let (count, seed) = faults();
    // A rebuilt path takes seconds on an emulated machine.
    let count = (count / 2).max(1);
    let steps = 100 + 20 * count;
    let (home, calm_home) = (home(), home());
    let prepared = |home: &Path| {
        let mut options = over(home, "rxe0", "rxe0");
        with_variable(&mut options, "WORKER_TELLS", 1);
        with_variable(&mut options, "WORKER_STEPS", steps);
        // Emulated: what takes a moment elsewhere takes seconds here.
        (options.config.rebuild_ms, options.config.deadline_ms) = (60_000, 30_000);
        options
    };
    let undisturbed = run(prepared(calm_home.path()));
    let mut job = Job::start(prepared(home.path())).unwrap();
    wait_for_text(&job, "begins clock 3");
    let (mut random, mut hits) = (SimRandom::new(seed), 0);
    let until = Instant::now() + PATIENCE;
    while hits < count {
        assert!(Instant::now() < until, "{hits} of {count} hits\n{}", job.output());
        std::thread::sleep(Duration::from_millis(random.below(200)));
        let (before, at_clock) = (rebuilt(&job), clock(&job));
        assert!(at_clock + 10 < steps, "the job is nearly over after {hits} of {count} hits\n{}", job.output());
        let Some((victim, handle, packets)) = break_one(home.path(), &mut random) else { continue };
        hits += u64::from(packets > 0);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        println!(
            "{at:.3}: queue pair {handle} of {victim} was moved to ERROR while training, clock {at_clock}, {packets} packets sent meanwhile{}",
            if packets > 0 { "" } else { ": does not count" }
        );
        // The server's end says so.
        until_rebuilt(&job, before + 1);
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (ours, theirs) = (digests(&job.output()), digests(&undisturbed));
    println!("{hits} hits, {} ends of paths rebuilt; digests {ours:?}, undisturbed {theirs:?}", rebuilt(&job));
    assert!(ours.len() == 2 && ours == theirs, "{ours:?} instead of {theirs:?}");
    let all = vec![model(); 2];
    assert!(stored(home.path(), &all) == stored(calm_home.path(), &all), "the checkpoints differ");
}
