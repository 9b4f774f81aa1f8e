//! No thread on the data path allocates while an undisturbed epoch runs: not a shard's, not a worker's progress thread, not the
//! program's own as it calls the worker.
//!
//! This program is its own ranks: started with a command it is the gradwire program under an allocator that counts every allocation
//! of every thread in a file that the worker reads.
//!
//! Invariant: a count of zero is believed only if the same counters move when a thread does allocate.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering},
};

use gradwire::{TensorSpec, Worker};

/// Threads that a process may have in its life.
const THREADS: usize = 256;

/// A thread's line in the file: its number for the kernel, and how often it has allocated.
#[repr(C)]
struct Line {
    thread: AtomicU64,
    count: AtomicU64,
}

struct Counting;

static LINES: AtomicPtr<Line> = AtomicPtr::new(std::ptr::null_mut());
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
}

fn count() {
    let lines = LINES.load(Ordering::Acquire);
    if lines.is_null() {
        return;
    }
    let Ok(mut mine) = MINE.try_with(Cell::get) else { return };
    if mine == usize::MAX {
        mine = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(mine < THREADS, "more threads than were thought of");
        MINE.set(mine);
        // SAFETY: the file has `THREADS` lines and is never unmapped.
        unsafe { &*lines.add(mine) }.thread.store(nix::unistd::gettid().as_raw() as u64, Ordering::Relaxed);
    }
    // SAFETY: as above.
    unsafe { &*lines.add(mine) }.count.fetch_add(1, Ordering::Relaxed);
}

// SAFETY: the system's allocator does all of it; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Where the counts of all processes lie.
const FOLDER: &str = "DATA_PATH_COUNTS";

/// From here on this process counts in a file of its own.
fn begin_counting(folder: &Path) {
    let path = folder.join(std::process::id().to_string());
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len((THREADS * size_of::<Line>()) as u64).unwrap();
    // SAFETY: nobody shortens the file; all of it is read and written as atomics.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    LINES.store(map.as_mut_ptr().cast(), Ordering::Release);
    std::mem::forget(map);
}

/// Allocations so far of every thread of ours on the data path, by process and name.
fn counts(folder: &Path) -> BTreeMap<(String, String), u64> {
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let process = entry.unwrap().file_name().into_string().unwrap();
        let bytes = std::fs::read(folder.join(&process)).unwrap();
        for line in bytes.chunks_exact(size_of::<Line>()) {
            let [thread, count] = [0, 8].map(|at| u64::from_le_bytes(line[at..at + 8].try_into().unwrap()));
            let name = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/comm")).unwrap_or_default();
            let name = name.trim();
            if name.starts_with("shard-") || name == "gradwire" {
                *counts.entry((process.clone(), name.to_string())).or_default() += count;
            }
        }
    }
    counts
}

/// Allocations so far of the thread that asks.
fn own_count() -> u64 {
    // SAFETY: see `count`.
    unsafe { &*LINES.load(Ordering::Acquire).add(MINE.get()) }.count.load(Ordering::Relaxed)
}

/// Rounds of a measurement.
const ROUNDS: usize = 100;

/// How often each thread allocates in [`ROUNDS`] rounds. A long wait on a busy machine is reported and so allocates: the fewest of
/// five measurements count, since what the data path itself allocates is in all of them.
fn measure(folder: &Path, mut round: impl FnMut() -> gradwire::Result<()>) -> gradwire::Result<BTreeMap<String, u64>> {
    let mut fewest: Option<BTreeMap<String, u64>> = None;
    for _ in 0..5 {
        let before = counts(folder);
        let own = own_count();
        for _ in 0..ROUNDS {
            round()?;
        }
        let own = own_count() - own;
        let grown = counts(folder).into_iter().map(|(thread, count)| {
            let grown = count - before.get(&thread).copied().unwrap_or(0);
            (format!("{} of process {}", thread.1, thread.0), grown)
        });
        let grown: BTreeMap<_, _> = grown.chain([("the program".to_string(), own)]).collect();
        if fewest.as_ref().is_none_or(|fewest| grown.values().sum::<u64>() < fewest.values().sum()) {
            fewest = Some(grown);
        }
    }
    Ok(fewest.unwrap_or_default())
}

fn work(folder: &Path) -> gradwire::Result<()> {
    let mut worker = Worker::join(vec![TensorSpec::new("first", [40_000]), TensorSpec::new("second", [300])])?;
    let gradients = [vec![0.5f32; 40_000], vec![0.25f32; 300]];
    let mut parameters = vec![0f32; 40_000];
    let mut round = || {
        for (tensor, gradient) in gradients.iter().enumerate().rev() {
            worker.push_pull(tensor, gradient)?;
        }
        worker.wait()?;
        worker.parameters(0, &mut parameters)
    };
    for _ in 0..ROUNDS {
        round()?;
    }
    let grown = measure(folder, &mut round)?;
    assert_eq!(grown.len(), 4, "two shards, a progress thread and the program were to be seen: {grown:?}");
    assert!(grown.values().all(|count| *count == 0), "allocations in {ROUNDS} rounds: {grown:?}");
    // The counters do count.
    let grown = measure(folder, || {
        std::hint::black_box(Box::new(1));
        round()
    })?;
    assert_eq!(grown.values().sum::<u64>(), ROUNDS as u64, "an allocation a round: {grown:?}");
    worker.finish()
}

/// Runs a job of one worker and two servers on `transport`.
fn job(transport: &str, tcp_io: &str) {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let counts = tempfile::tempdir().unwrap();
    let me = std::env::current_exe().unwrap();
    let output = Command::new(&me)
        .args(["run", "-n", "1", "-s", "2", "--transport", transport, "--set", "chunk_bytes=32768", "--"])
        .arg(&me)
        .arg("work")
        .env(FOLDER, counts.path())
        .env("GRADWIRE_HOME", home.path())
        .env("GRADWIRE_TCP_IO", tcp_io)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    assert!(output.status.success(), "{transport}, {tcp_io}: {text}");
    println!("{transport} ({tcp_io}): no allocation in {ROUNDS} rounds");
}

fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    match (command.as_deref(), std::env::var_os(FOLDER)) {
        (Some("--list"), _) => ExitCode::SUCCESS,
        (Some("work"), Some(folder)) => {
            begin_counting(Path::new(&folder));
            if let Err(error) = work(Path::new(&folder)) {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        (Some(_), Some(folder)) => {
            begin_counting(Path::new(&folder));
            gradwire::cli::main()
        }
        _ => {
            for (transport, tcp_io) in [("tcp", "epoll"), ("tcp", "uring"), ("shm", "epoll")] {
                job(transport, tcp_io);
            }
            ExitCode::SUCCESS
        }
    }
}
