//! `gradwire bench` with real processes: what it prints for machines and for people, what it counts, and what it refuses.

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

#[path = "support/processes.rs"]
mod processes;

use processes::processes;

/// How long a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);

fn home() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

fn start(home: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.arg("bench").args(arguments).env("GRADWIRE_HOME", home).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn bench(home: &Path, arguments: &[&str]) -> Output {
    start(home, arguments).wait_with_output().unwrap()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn objects(output: &Output) -> Vec<serde_json::Value> {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The fields that whoever reads the objects relies on.
const NAMES: [&str; 13] = [
    "benchmark",
    "transport",
    "bytes",
    "workers",
    "servers",
    "goodput_bytes_per_s",
    "latency_us_p50",
    "latency_us_p99",
    "latency_us_p999",
    "ceiling_bytes_per_s",
    "ceiling_latency_us",
    "cpu_s",
    "bytes_copied_per_byte_sent",
];

/// The rows of a benchmark that does few rounds.
fn rows(arguments: &[&str]) -> Vec<serde_json::Value> {
    let home = home();
    let rows = objects(&bench(home.path(), &[arguments, &["--json", "--repetitions", "1"]].concat()));
    for row in &rows {
        NAMES.iter().for_each(|name| assert!(row.get(name).is_some(), "{name} is missing: {row}"));
        assert_eq!(row["benchmark"], arguments[0]);
    }
    assert_eq!(processes(home.path()), []);
    rows
}

fn number(row: &serde_json::Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {row}"))
}

/// What is there must be a positive number, and what has no meaning null.
fn check(row: &serde_json::Value, meaningless: &[&str]) {
    for name in &NAMES[5..] {
        let there = !meaningless.contains(name);
        assert_eq!(row[name].as_f64().is_some_and(|number| number > 0.0), there, "{name}: {row}");
    }
    if !meaningless.contains(&"latency_us_p99") {
        let order = ["latency_us_p50", "latency_us_p99", "latency_us_p999"].map(|key| number(row, key));
        assert!(order.is_sorted(), "{row}");
    }
}

#[test]
fn push_pull_reports_itself_beside_its_ceiling() {
    for (workers, servers, more) in [("1", "1", ["--optimizer", "none"]), ("2", "2", ["--dtype", "bf16"])] {
        let sizes = ["push-pull", "--bytes", "64,3M", "--iterations", "10", "--workers", workers, "--servers", servers];
        let rows = rows(&[&sizes[..], &more].concat());
        assert_eq!(rows.iter().map(|row| row["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 3 << 20]);
        for row in &rows {
            check(row, &[]);
            assert_eq!((&row["transport"], &row["rounds"]), (&"tcp".into(), &10.0.into()));
            assert_eq!((row["workers"].to_string(), row["servers"].to_string()), (workers.into(), servers.into()));
            // Of all workers together at most what each one's time says, and of the slowest one's time at least that.
            let counted = number(row, "goodput_bytes_per_s") * number(row, "seconds");
            let payload = 10.0 * 2.0 * number(row, "bytes") * number(row, "workers");
            assert!(counted >= 0.999 * payload, "{counted} of {payload}: {row}");
            let ratio = number(row, "latency_us_p50") / number(row, "ceiling_latency_us");
            assert!((number(row, "latency_x_ceiling") / ratio - 1.0).abs() < 1e-9, "{row}");
            assert_eq!((&row["ceiling_over"], &row["ceiling_wait"]), (&"tcp".into(), &"adaptive".into()));
        }
        // Large payloads go into the kernel and out of it; what is read with a header is copied once more.
        let copied = number(&rows[1], "bytes_copied_per_byte_sent");
        assert!((2.0..3.1).contains(&copied), "{copied}");
    }
}

/// With one worker its own time is the time of all: the payload is what the rate says it is, to the byte.
#[test]
fn payload_is_counted_in_the_directions_that_carry_it() {
    for (benchmark, transport, payload) in
        [("push-pull", "shm", 2 * 10), ("push", "tcp", 10 + 2), ("push", "shm", 10 + 2), ("pull", "soft", 10)]
    {
        let arguments = [benchmark, "--transport", transport, "--bytes", "1M", "--iterations", "10"];
        let rows = rows(&[&arguments[..], &["--set", "chunk_bytes=256KiB"]].concat());
        let [row] = &rows[..] else { panic!("{rows:?}") };
        check(row, &[]);
        let counted = number(row, "goodput_bytes_per_s") * number(row, "seconds") / f64::from(1 << 20);
        assert!((counted - f64::from(payload)).abs() < 0.01, "{benchmark} over {transport}: {counted} MiB");
        let copied = number(row, "bytes_copied_per_byte_sent");
        let wanted = if transport == "shm" { 0.999..1.001 } else { 1.99..6.0 };
        assert!(wanted.contains(&copied), "{benchmark} over {transport}: {copied}");
        assert_eq!(row.get("ceiling_hot_bytes_per_s").is_some(), transport == "shm", "{row}");
        assert_eq!(row.get("consistency").is_some(), benchmark != "pull", "{row}");
    }
}

#[test]
fn every_consistency_and_every_format_runs() {
    for (consistency, dtype) in [("ssp:2", "f16"), ("asp", "bf16")] {
        for benchmark in ["push-pull", "push"] {
            let arguments = [benchmark, "--bytes", "128K", "--iterations", "8", "--workers", "2", "--dtype", dtype];
            let rows = rows(&[&arguments[..], &["--consistency", consistency, "--transport", "shm"]].concat());
            check(&rows[0], &[]);
            assert_eq!((&rows[0]["consistency"], &rows[0]["dtype"]), (&consistency.into(), &dtype.into()));
        }
    }
}

#[test]
fn latencies_have_no_rate_and_messages_no_latency() {
    let few = rows(&["latency", "--iterations", "50", "--transport", "shm"]);
    check(&few[0], &["goodput_bytes_per_s", "ceiling_bytes_per_s"]);
    assert_eq!(few[0]["bytes"], 64);
    assert!(number(&few[0], "ceiling_cache_line_us") > 0.0, "{few:?}");
    for transport in ["tcp", "soft"] {
        let arguments = ["message-rate", "--bytes", "256,1K", "--window", "8", "--iterations", "10"];
        let rows = rows(&[&arguments[..], &["--transport", transport]].concat());
        assert_eq!(rows.iter().map(|row| row["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [256, 1024]);
        for row in &rows {
            check(row, &["latency_us_p50", "latency_us_p99", "latency_us_p999", "ceiling_latency_us"]);
            let messages = number(row, "messages_per_s") * number(row, "seconds");
            assert!((messages - 2.0 * 8.0 * 10.0).abs() < 1.0, "{messages}: {row}");
        }
    }
}

/// A step is no faster than its backward pass, and its ceiling is the longer of the two.
#[test]
fn a_training_step_is_held_against_its_backward_pass() {
    let arguments = ["end-to-end", "--bytes", "256K", "--layers", "4", "--backward-ms", "5", "--iterations", "6"];
    let rows = rows(&[&arguments[..], &["--transport", "shm"]].concat());
    check(&rows[0], &[]);
    assert_eq!((&rows[0]["layers"], &rows[0]["backward_us"]), (&4.into(), &5000.0.into()));
    assert!(number(&rows[0], "latency_us_p50") >= 5000.0 && number(&rows[0], "exposed_us") >= 0.0, "{rows:?}");
    let ceiling = number(&rows[0], "ceiling_exchange_us").max(5000.0);
    assert_eq!(number(&rows[0], "ceiling_latency_us"), ceiling);
    let rate = 2.0 * f64::from(256 << 10) / ceiling * 1e6;
    assert!((number(&rows[0], "ceiling_bytes_per_s") - rate).abs() <= 1.0, "{rows:?}");
}

#[test]
fn the_optimizer_counts_what_a_step_moves() {
    for (optimizer, dtype, workers, per_parameter) in
        [("adamw", "f32", "1", 28), ("adamw", "bf16", "2", 30), ("adagrad", "f32", "1", 20), ("none", "f16", "1", 12)]
    {
        let arguments = ["optimizer", "--bytes", "64K", "--iterations", "6", "--threads", "2", "--workers", workers];
        let rows = rows(&[&arguments[..], &["--optimizer", optimizer, "--dtype", dtype]].concat());
        let row = &rows[0];
        check(row, &["bytes_copied_per_byte_sent"]);
        assert!(row["transport"].is_null() && row["servers"].is_null(), "{row}");
        assert_eq!(
            (row["bytes_per_parameter"].as_u64(), row["workers"].to_string()),
            (Some(per_parameter), workers.into())
        );
        let parameters = number(row, "goodput_bytes_per_s") / number(row, "parameters_per_s");
        assert!((parameters / per_parameter as f64 - 1.0).abs() < 1e-6, "{row}");
    }
}

#[test]
fn a_checkpoint_is_written_whole_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["checkpoint", "--bytes", "1200000", "--servers", "2", "--dir", folder.path().to_str().unwrap()];
    // The size is a multiple of 64 like every other.
    assert_eq!(bench(home().path(), &arguments).status.code(), Some(0));
    let rows = rows(&[&arguments[..2], &["1200128"], &arguments[3..]].concat());
    check(&rows[0], &["latency_us_p99", "latency_us_p999", "bytes_copied_per_byte_sent"]);
    assert!(rows[0]["transport"].is_null() && rows[0]["workers"].is_null(), "{rows:?}");
    let written = number(&rows[0], "goodput_bytes_per_s") * number(&rows[0], "seconds");
    assert!((written / number(&rows[0], "file_bytes") - 1.0).abs() < 1e-3, "{rows:?}");
    assert!((1_200_000.0..1_220_000.0).contains(&written), "{rows:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn people_get_a_table_a_drawing_and_the_echo_by_itself() {
    let home = home();
    let plot = home.path().join("rows.svg");
    let few = ["--bytes", "64", "--iterations", "10", "--repetitions", "2"];
    let drawn = ["--plot", plot.to_str().unwrap(), "--optimizer", "adamw"];
    let output = bench(home.path(), &[&["push-pull"], &drawn[..], &few[..]].concat());
    let out = text(&output.stdout);
    assert!(out.contains("optimizer adamw") && out.contains("x ceiling") && out.contains("\n     64 B"), "{out}");
    let drawing = std::fs::read_to_string(&plot).unwrap();
    let document = roxmltree::Document::parse(&drawing).unwrap();
    assert_eq!(document.root_element().tag_name().name(), "svg");
    let circles = document.descendants().filter(|node| node.tag_name().name() == "circle").count();
    assert_eq!(circles, 2, "a row and its ceiling: {drawing}");
    let output = bench(
        home.path(),
        &[&["echo", "--json", "--piece", "64K"], &few[..2], &["128K", "--seconds", "0.01", "--repetitions", "2"]]
            .concat(),
    );
    let out = text(&output.stdout);
    let echoes: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let forms: Vec<_> = echoes.iter().map(|row| (row["bytes"].to_string(), row["echo"].as_str().unwrap())).collect();
    let wanted = [("64", "whole"), ("131072", "whole"), ("131072", "pieces")];
    assert_eq!(forms, wanted.map(|(bytes, form)| (bytes.to_string(), form)), "{out}{}", text(&output.stderr));
}

/// A run that takes long says on standard error how far it is, and on standard output nothing but results.
#[test]
fn a_long_run_says_how_far_it_is() {
    let home = home();
    let arguments = ["optimizer", "--bytes", "64K", "--seconds", "0.6", "--repetitions", "3", "--json"];
    let output = bench(home.path(), &arguments);
    assert_eq!(objects(&output).len(), 1);
    assert!(text(&output.stderr).contains("64 KiB (size 1 of 1): repetition 2 of 3"), "{}", text(&output.stderr));
}

/// Every means with every policy. Figures are held against each other and not against a clock: a round's median speaks of the
/// same speed as the rate, and 4 MiB move faster than 64 bytes by less than the factor in bytes, all within what a busy machine
/// adds to either.
#[test]
fn every_echo_runs_with_every_policy() {
    let home = home();
    for over in ["tcp", "shm", "udp"] {
        for wait in ["sleep", "adaptive", "spin"] {
            let arguments =
                ["echo", "--json", "--over", over, "--wait", wait, "--bytes", "64,4M", "--iterations", "20"];
            let rows = objects(&bench(home.path(), &[&arguments[..], &["--repetitions", "1"]].concat()));
            let forms: Vec<&str> = rows.iter().map(|row| row["echo"].as_str().unwrap()).collect();
            assert_eq!(forms, if over == "udp" { vec!["whole", "pieces"] } else { vec!["whole", "whole", "pieces"] });
            for row in &rows {
                assert_eq!((&row["transport"], &row["wait"]), (&over.into(), &wait.into()), "{row}");
                let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {row}"));
                assert!(
                    number("latency_us_p50") > 0.0 && number("latency_us_p50") <= number("latency_us_p99"),
                    "{row}"
                );
                // At least half of the rounds take the median or longer, so their mean is at least half of it.
                let mean_us = 2.0 * number("bytes") / number("goodput_bytes_per_s") * 1e6;
                assert!(mean_us > 0.0 && number("latency_us_p50") <= 2.5 * mean_us, "{over} {wait}: {row}");
            }
        }
    }
    assert_eq!(processes(home.path()), []);
}

/// Several drivers and peers at once, over what needs more than a socket a pair.
#[test]
fn drivers_and_peers_meet_each_with_each() {
    let home = home();
    for over in ["shm", "udp"] {
        let arguments = ["echo", "--json", "--over", over, "--bytes", "640K", "--piece", "64K", "--workers", "2"];
        let more = ["--servers", "2", "--iterations", "10", "--repetitions", "1"];
        let rows = objects(&bench(home.path(), &[&arguments[..], &more[..]].concat()));
        assert_eq!(rows.len(), 1);
        assert_eq!((&rows[0]["echo"], &rows[0]["workers"]), (&"pieces".into(), &2.into()), "{rows:?}");
    }
}

/// Whoever starts an echo may be killed, and so may one of its processes: nobody is left, and nobody waits for the dead.
#[test]
fn no_process_of_an_echo_is_left_over() {
    for over in ["tcp", "shm", "udp"] {
        for victim in ["bench echo --over", "echo-peer", "echo-driver"] {
            let home = home();
            let running = start(home.path(), &["echo", "--over", over, "--bytes", "64K", "--seconds", "3600"]);
            let find = |name: &str| processes(home.path()).into_iter().find(|(_, command)| command.contains(name));
            wait_until("all three run", || processes(home.path()).len() == 3 && find("echo-driver").is_some());
            // Until the driver has been working for a while, so that its peer has been called.
            std::thread::sleep(Duration::from_millis(100));
            let (pid, _) = find(victim).unwrap();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
            wait_until(&format!("{over}: nobody is left after {victim} was killed"), || {
                processes(home.path()).is_empty()
            });
            let output = running.wait_with_output().unwrap(); // it has ended already
            assert!(!output.status.success(), "{over}, {victim}");
        }
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let home = home();
    for (arguments, hint) in [
        (&["push-pull", "--bytes", "65"][..], "multiple of 64"),
        (&["push-pull", "--bytes", "64MB"], "MiB"),
        (&["push-pull", "--set", "chunk_byte=1"], "did you mean `chunk_bytes`"),
        (&["push-pull", "--set", "landing_bytes=1"], "landing_bytes"),
        (&["push-pull", "--workers", "0"], "workers"),
        (&["push-pull", "--transport", "carrier-pigeon"], "tcp, shm, soft, verbs"),
        (&["push-pull", "--set", "transports=tcp"], "--transport"),
        (&["push-pull", "--consistency", "ssp"], "ssp:N"),
        (&["push-pull", "--window", "4"], "--window means nothing to push-pull: it goes with message-rate alone"),
        (&["pull", "--consistency", "asp"], "--consistency means nothing to pull"),
        (&["pull", "--optimizer", "sgd"], "--optimizer means nothing to pull"),
        (&["latency", "--layers", "4"], "end-to-end alone"),
        (&["message-rate", "--bytes", "64"], "multiple of 256"),
        (&["message-rate", "--bytes", "64", "--dtype", "f16"], "multiple of 128"),
        (&["message-rate", "--set", "chunk_bytes=256"], "--bytes says it"),
        (&["end-to-end", "--bytes", "64K", "--layers", "3"], "multiple of 192"),
        (&["end-to-end", "--backward-ms", "0"], "above 0"),
        (&["optimizer", "--transport", "tcp"], "--transport means nothing to optimizer"),
        (&["optimizer", "--consistency", "bsp"], "--consistency means nothing to optimizer"),
        (&["optimizer", "--servers", "2"], "--threads shares it"),
        (&["checkpoint", "--workers", "2"], "workers write no checkpoint"),
        (&["checkpoint", "--dtype", "bf16"], "state is f32"),
        (&["checkpoint", "--seconds", "1"], "--seconds means nothing to checkpoint"),
        (&["checkpoint", "--bytes", "64", "--servers", "2"], "no chunk for each of 2 servers"),
        (&["echo", "--piece", "64..128"], "one size"),
        (&["echo", "--over", "soft"], "tcp, shm, udp"),
        (&["echo", "--wait", "patiently"], "sleep, adaptive, spin"),
        (&["echo", "--datagram", "4096"], "--over udp"),
        (&["echo", "--flow", "line"], "--over shm"),
        (&["echo", "--flow", "sideways"], "both, there, back, line"),
    ] {
        let output = bench(home.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
}

/// Over verbs the same code runs where a device is; where none is, the benchmark says so before it starts anything.
#[test]
fn verbs_is_measured_where_a_device_is_and_refused_by_name_where_none_is() {
    let home = home();
    let arguments = ["push-pull", "--transport", "verbs", "--json", "--iterations", "5", "--repetitions", "1"];
    let output = bench(home.path(), &arguments);
    if output.status.success() {
        let rows = objects(&output);
        assert!(rows[0]["ceiling_bytes_per_s"].is_null() && number(&rows[0], "goodput_bytes_per_s") > 0.0, "{rows:?}");
    } else {
        assert_eq!(output.status.code(), Some(2));
        let said = text(&output.stderr);
        assert!(said.contains("--transport verbs: ") && said.contains("gradwire doctor"), "{said}");
    }
}
