//! `gradwire plan` with real processes: what it prints, what it refuses, and that servers allocate what it says and no more.
//!
//! Invariant: what a plan says of memory is held against the mappings of a running job, not against the code that made the plan.

use std::{
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

#[path = "support/processes.rs"]
mod processes;

use processes::processes;

/// How long a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Regions are rounded up to pages, at most huge ones.
const PAGE_MAX: u64 = 2 << 20;

fn home() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

fn gradwire(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn plan(arguments: &[&str]) -> Value {
    let output = gradwire(&[&["plan", "--json", "--host-memory", "1000G"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_plan_names_memory_queue_pairs_and_the_bottleneck() {
    let of = ["--params", "70e9", "--workers", "64", "--servers", "8", "--dtype", "bf16", "--link-gbps", "400"];
    let plan = plan(&of);
    let elements = number(&plan["shard"]["elements"]);
    let share = 70_000_000_000 / 8;
    assert!((share..share + (1 << 18)).contains(&elements), "{plan}");
    // Master, two arrays of AdamW, two copies for replies in bf16, and the landing budget.
    assert_eq!(number(&plan["server_bytes"]), 16 * elements + (1 << 30));
    assert_eq!(number(&plan["queue_pairs"]), 2 * 64 * 8);
    assert_eq!(plan["fits"], true);
    assert!(plan["step"]["costs"].as_str().unwrap().starts_with("assumed"), "{plan}");
    let stages = plan["step"]["stages"].as_array().unwrap();
    assert_eq!(plan["step"]["bottleneck"], stages[0]["name"], "the busiest is named: {plan}");
    let page = gradwire(&[&["plan", "--host-memory", "1000G"], &of[..]].concat());
    let page = text(&page.stdout);
    assert!(page.contains("it waits for: ") && page.contains("fits       yes"), "{page}");
    let scale = text(&gradwire(&["plan", "--params", "7B", "--scale"]).stdout);
    assert!(scale.contains("links of 400 Gb/s") && scale.contains("1024 ") && scale.contains("assumed"), "{scale}");
}

#[test]
fn what_cannot_be_is_refused_and_what_does_not_fit_is_said() {
    let small = ["plan", "--params", "7B", "--host-memory", "1G"];
    let output = gradwire(&small);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("NO: a host has 1.00 GiB"), "{}", text(&output.stdout));
    for (arguments, hint) in [
        (&["plan"][..], "--params"),
        (&["plan", "--params", "many"], "7B"),
        (
            &["plan", "--params", "7B", "--landing", "1M", "--workers", "4"],
            "2 x 4 workers x 1048576 bytes a chunk = 8388608",
        ),
        (&["plan", "--params", "7B", "--transport", "pigeon"], "verbs, tcp, shm and soft"),
        (&["plan", "--params", "7B", "--optimizer", "adaam"], "did you mean `adam`"),
        (&["plan", "--params", "7B", "--costs", "/nonexistent/costs.json"], "/nonexistent/costs.json"),
        (&["plan", "--params", "7B", "--link-gbps", "0"], "above 0"),
        (&["plan", "--params", "7B", "--replicas", "0"], "replicas"),
    ] {
        let output = gradwire(arguments);
        assert!(
            !output.status.success() && text(&output.stderr).contains(hint),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
}

/// Costs that were measured once are taken from a file, and said to be those.
#[test]
fn costs_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("costs.json");
    let costs = serde_json::json!({
        "transport": "tcp", "source": "measured by hand", "worker_message_s": 0.0, "server_message_s": 0.0,
        "worker_byte_s": 0.0, "server_byte_s": 0.0, "step_bytes_per_s": 1e9, "host_step_bytes_per_s": 1e12, "round_s": 0.0,
    });
    std::fs::write(&path, costs.to_string()).unwrap();
    let plan = plan(&["--params", "1048576", "--link-gbps", "1e6", "--costs", path.to_str().unwrap()]);
    // 28 bytes for each of 2^20 parameters at 1 GB/s.
    let seconds = plan["step"]["step_s"].as_f64().unwrap();
    assert!((seconds / (28.0 * 1048576.0 / 1e9) - 1.0).abs() < 1e-9, "{plan}");
    assert_eq!(
        (&plan["step"]["costs"], &plan["step"]["bottleneck"]),
        (&"measured by hand".into(), &"server thread".into())
    );
    std::fs::write(&path, "{}").unwrap();
    let output = gradwire(&["plan", "--params", "7B", "--costs", path.to_str().unwrap()]);
    assert!(text(&output.stderr).contains("gradwire plan --measure"), "{}", text(&output.stderr));
}

/// Bytes of the memfds with this name that a process has mapped for itself.
fn mapped(pid: u32, name: &str) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let file = format!("/memfd:gradwire-{name} (deleted)");
    let lines = maps.lines().filter(|line| line.ends_with(&file));
    lines
        .map(|line| {
            let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
            let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
            address(end) - address(start)
        })
        .sum()
}

/// A server's regions are the sums of the plan, rounded up to pages; so are a worker's.
#[test]
fn servers_allocate_what_the_plan_says() {
    let home = home();
    // 24 MiB of gradients are 12,582,912 parameters: 48 chunks, 24 on each server; the budget has room for 4 slots.
    let plan = plan(&["-n", "2", "-s", "2", "--dtype", "bf16", "--params", "12582912", "--landing", "4MiB"]);
    assert_eq!((number(&plan["slots"]), number(&plan["shard"]["chunks"])), (4, 24), "{plan}");
    let program = env!("CARGO_BIN_EXE_gradwire");
    let mut command = Command::new(program);
    command.args(["run", "-n", "2", "-s", "2", "--transport", "tcp", "--set", "landing_bytes=4MiB"]);
    command.args(["--gradient-dtype", "bf16", "--parameter-dtype", "bf16", "--", program, "bench", "worker"]);
    command
        .args(["--round", "push-pull", "--bytes", "25165824", "--rounds", "1000000"])
        .env("GRADWIRE_HOME", home.path());
    let mut job = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let memory = &plan["shard_memory"];
    let state = ["master", "state", "accumulator"].map(|part| number(&memory[part])).iter().sum::<u64>();
    let wanted = [
        ("node", "shard-0", state),
        ("node", "shard-0-landing", number(&memory["landing"])),
        ("node", "shard-0-replies", number(&memory["replies"])),
        ("bench worker", "worker-0-gradients", number(&plan["worker_bytes"]) / 2),
        ("bench worker", "worker-0-parameters", number(&plan["worker_bytes"]) / 2),
    ];
    let deadline = Instant::now() + PATIENCE;
    let found = loop {
        let all = processes(home.path());
        let of = |part: &str, name: &str| {
            all.iter()
                .filter(|(_, command)| command.contains(part))
                .map(|(pid, _)| mapped(*pid, name))
                .max()
                .unwrap_or(0)
        };
        let found = wanted.map(|(part, name, _)| of(part, name));
        if found.iter().all(|bytes| *bytes > 0) || Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    job.kill().unwrap();
    job.wait().unwrap();
    for ((_, name, wanted), found) in wanted.into_iter().zip(found) {
        assert!(
            found >= wanted && found < wanted + PAGE_MAX,
            "{name}: {found} bytes are mapped, the plan says {wanted}"
        );
    }
    let gone = Instant::now() + PATIENCE;
    while !processes(home.path()).is_empty() {
        assert!(Instant::now() < gone, "processes are left: {:?}", processes(home.path()));
        std::thread::sleep(Duration::from_millis(10));
    }
}
