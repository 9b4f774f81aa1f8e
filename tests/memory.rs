//! Regions under the limits of ordinary users and of machines: little lockable memory, huge pages there and not there.
//!
//! Invariant: limits and privileges are changed in child processes only (this test, run again with `CHILD` set), and what is
//! changed for the machine is put back; what cannot be tried here is said on stderr.

use std::{
    fs,
    process::{Command, Output},
    sync::Mutex,
};

use gradwire::{
    Error,
    mem::{HugePages, Locking, Region, RegionOptions},
};
use nix::{
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid},
};

const CHILD: &str = "GRADWIRE_TEST_CHILD";
const HUGE_BYTES: usize = 2 << 20;
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Tests that change the machine's number of huge pages, or need it to stay, take turns.
static MACHINE: Mutex<()> = Mutex::new(());

/// Whether this process is the child of `test`.
fn is_child(test: &str) -> bool {
    std::env::var_os(CHILD).is_some_and(|name| name == test)
}

/// Runs `test` alone in a child process; its stdout holds the log.
fn run_child(test: &str) -> String {
    let Output { status, stdout, stderr } = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, test)
        .output()
        .unwrap();
    let stdout = String::from_utf8(stdout).unwrap();
    assert!(status.success(), "child: {stdout}\n{}", String::from_utf8_lossy(&stderr));
    assert!(stdout.contains("1 passed"), "the child ran something else: {stdout}");
    stdout
}

fn log_to_stdout() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stdout).init();
}

/// From here on an ordinary user who may lock `soft` bytes and raise that to `hard`.
fn become_nobody(soft: u64, hard: u64) {
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
    if geteuid().is_root() {
        setgroups(&[]).unwrap();
        setgid(Gid::from_raw(65534)).unwrap();
        setuid(Uid::from_raw(65534)).unwrap();
    }
}

fn locked_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

fn options(lock: Locking) -> RegionOptions {
    RegionOptions { name: "slots".into(), lock, huge_pages: HugePages::Never, ..Default::default() }
}

#[test]
fn a_user_without_root_runs_unlocked_and_is_told_once() {
    if !is_child("a_user_without_root_runs_unlocked_and_is_told_once") {
        let log = run_child("a_user_without_root_runs_unlocked_and_is_told_once");
        assert_eq!(log.matches("memory may be swapped out").count(), 1, "{log}");
        assert!(log.contains("`slots`") && log.contains("1048576 bytes soft"), "{log}");
        return;
    }
    log_to_stdout();
    become_nobody(1 << 20, 1 << 20);
    for _ in 0..2 {
        let (region, mut lease) = Region::allocate(4 << 20, &options(Locking::BestEffort)).unwrap();
        assert!(!region.report().locked);
        lease.bytes_mut().fill(1);
    }
    // What fits is locked, silently.
    let (region, _lease) = Region::allocate(256 << 10, &options(Locking::BestEffort)).unwrap();
    assert!(region.report().locked);
    assert_eq!(locked_kib(), 256);
    let (region, _lease) = Region::allocate(256 << 10, &options(Locking::None)).unwrap();
    assert!(!region.report().locked);
    assert_eq!(locked_kib(), 256);
}

#[test]
fn what_a_device_must_reach_is_refused_with_limit_need_and_line_to_change() {
    if !is_child("what_a_device_must_reach_is_refused_with_limit_need_and_line_to_change") {
        run_child("what_a_device_must_reach_is_refused_with_limit_need_and_line_to_change");
        return;
    }
    become_nobody(1 << 20, 8 << 20);
    let (region, _lease) = Region::allocate(512 << 10, &options(Locking::Required)).unwrap();
    assert!(region.report().locked);
    // The sum counts, not the single region.
    let error = Region::allocate(768 << 10, &options(Locking::Required)).unwrap_err();
    match &error {
        Error::Memlock { subject, needed_bytes, limit_bytes, hard_limit_bytes } => {
            assert_eq!(subject, "region `slots`");
            assert_eq!((*needed_bytes, *limit_bytes, *hard_limit_bytes), (1280 << 10, 1 << 20, 8 << 20));
        }
        other => panic!("{other}"),
    }
    assert!(error.to_string().contains("`ulimit -l 1280`"), "{error}");
    let error = Region::allocate(64 << 20, &options(Locking::Required)).unwrap_err();
    assert!(error.to_string().contains("limits.d"), "{error}");
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).unwrap();
    let error = Region::allocate(4096, &options(Locking::Required)).unwrap_err();
    assert!(matches!(error, Error::Memlock { limit_bytes: 0, .. }), "{error}");
}

#[test]
fn root_is_bound_by_no_limit() {
    if !geteuid().is_root() {
        eprintln!("SKIPPED root_is_bound_by_no_limit: not root");
        return;
    }
    if !is_child("root_is_bound_by_no_limit") {
        run_child("root_is_bound_by_no_limit");
        return;
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, 4096, 4096).unwrap();
    match Region::allocate(4 << 20, &options(Locking::Required)) {
        Ok((region, _lease)) => assert!(region.report().locked),
        // Root of a container without CAP_IPC_LOCK is an ordinary user here.
        Err(error) => assert!(matches!(error, Error::Memlock { limit_bytes: 4096, .. }), "{error}"),
    }
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[test]
fn where_huge_pages_are_missing_ordinary_ones_do_and_the_reason_is_told_once() {
    if !is_child("where_huge_pages_are_missing_ordinary_ones_do_and_the_reason_is_told_once") {
        let _turn = MACHINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let log = run_child("where_huge_pages_are_missing_ordinary_ones_do_and_the_reason_is_told_once");
        assert_eq!(log.matches("ordinary pages for region `big`").count(), 1, "{log}");
        return;
    }
    log_to_stdout();
    // More than there are, wherever this runs; nothing is touched, so nothing is used.
    let len = (read_number(FREE_HUGE_PAGES).unwrap_or(0) as usize + 1) * HUGE_BYTES;
    let lock = Locking::None;
    let options = |huge_pages| RegionOptions { name: "big".into(), huge_pages, lock, ..Default::default() };
    for _ in 0..2 {
        let (region, lease) = Region::allocate(len, &options(HugePages::Auto)).unwrap();
        assert!(region.report().page_bytes < HUGE_BYTES && lease.len() == len);
    }
    let error = Region::allocate(len, &options(HugePages::Always)).unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("`big`") && (text.contains("sysctl -w vm.nr_hugepages=") || text.contains("no huge pages")),
        "{text}"
    );
}

/// Puts the machine's number of huge pages back.
struct Restore(String);

impl Drop for Restore {
    fn drop(&mut self) {
        if let Err(error) = fs::write(HUGE_PAGES, &self.0) {
            eprintln!("{HUGE_PAGES} could not be set back to {}: {error}", self.0);
        }
    }
}

#[test]
fn where_there_are_huge_pages_they_are_used() {
    let test = "where_there_are_huge_pages_they_are_used";
    let _turn = MACHINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(before) = read_number(HUGE_PAGES) else {
        eprintln!("SKIPPED {test}: this kernel has none");
        return;
    };
    let free = || read_number(FREE_HUGE_PAGES).unwrap_or(0);
    let mut restore = None;
    if free() < 6 {
        if let Err(error) = fs::write(HUGE_PAGES, (before + 6).to_string()) {
            eprintln!("SKIPPED {test}: {} huge pages are free, and {HUGE_PAGES} is not ours to write: {error}", free());
            return;
        }
        restore = Some(Restore(before.to_string()));
    }
    if free() < 6 {
        eprintln!("SKIPPED {test}: the kernel found no room for six huge pages");
        return;
    }
    let options = |huge_pages, lock, numa_node| RegionOptions { huge_pages, lock, numa_node, ..Default::default() };
    let one = Region::allocate(2 * HUGE_BYTES - 5, &options(HugePages::Auto, Locking::BestEffort, Some(0))).unwrap();
    let two = Region::allocate(1, &options(HugePages::Always, Locking::None, None)).unwrap();
    for (region, mut lease) in [one, two] {
        let report = region.report();
        assert_eq!((report.page_bytes, report.bytes % HUGE_BYTES, lease.len()), (HUGE_BYTES, 0, report.bytes));
        assert!(report.locked && report.prefaulted, "{report}");
        assert!(lease.bytes().iter().all(|&byte| byte == 0));
        lease.bytes_mut().fill(3);
        assert_eq!(lease.bytes()[report.bytes - 1], 3);
        // The page tables agree with the report.
        let address = format!("{:x}-", lease.bytes().as_ptr() as usize);
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let entry = maps.split_once(&format!("\n{address}")).unwrap().1;
        assert!(
            entry.lines().any(|line| line.split_whitespace().eq(["KernelPageSize:", "2048", "kB"])),
            "{entry:.900}"
        );
    }
    // Less than a page is not worth one.
    let (small, _lease) = Region::allocate(HUGE_BYTES / 2, &RegionOptions::default()).unwrap();
    assert!(small.report().page_bytes < HUGE_BYTES);
    drop(restore);
}
