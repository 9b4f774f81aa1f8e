//! `gradwire bench` with real processes: what it prints for machines and for people, and what it refuses.

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

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

/// The processes that were started with this home, each with its command line.
fn processes(home: &Path) -> Vec<(u32, String)> {
    let environment = format!("GRADWIRE_HOME={}\0", home.display());
    let numbers =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ours = numbers.filter_map(|pid: u32| {
        let read = |name| std::fs::read(format!("/proc/{pid}/{name}")).ok().map(|bytes| text(&bytes));
        // A process that has ended and is not collected yet has neither.
        read("environ")?.contains(&environment).then_some((pid, read("cmdline")?.replace('\0', " ")))
    });
    ours.filter(|(_, command)| !command.is_empty()).collect()
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

#[test]
fn push_pull_reports_itself_beside_its_ceiling() {
    let home = home();
    for (workers, servers, more) in [("1", "1", ["--optimizer", "none"]), ("2", "2", ["--dtype", "bf16"])] {
        let mut arguments = vec!["push-pull", "--json", "--bytes", "64,3M", "--iterations", "10", "--repetitions", "1"];
        arguments.extend(["--workers", workers, "--servers", servers]);
        arguments.extend(more);
        let rows = objects(&bench(home.path(), &arguments));
        assert_eq!(rows.iter().map(|row| row["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 3 << 20]);
        for row in &rows {
            assert_eq!((&row["benchmark"], &row["transport"]), (&"push-pull".into(), &"tcp".into()));
            assert_eq!((row["workers"].to_string(), row["servers"].to_string()), (workers.into(), servers.into()));
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {row}"));
            assert!(number("latency_us_p50") > 0.0 && number("latency_us_p50") <= number("latency_us_p99"), "{row}");
            assert!(number("goodput_bytes_per_s") > 0.0 && number("ceiling_latency_us") > 0.0, "{row}");
            // At least half of the slowest worker's rounds take its median or longer, which bounds the rate.
            let by_latency = number("workers") * 2.0 * number("bytes") / number("latency_us_p50") * 1e6;
            assert!(number("goodput_bytes_per_s") <= 2.5 * by_latency, "{row}");
            assert!(number("ceiling_bytes_per_s") > 0.0, "{row}");
            let ratio = number("latency_us_p50") / number("ceiling_latency_us");
            assert!((number("latency_x_ceiling") / ratio - 1.0).abs() < 1e-9, "{row}");
            assert_eq!((&row["ceiling_over"], &row["ceiling_wait"]), (&"tcp".into(), &"adaptive".into()));
        }
    }
}

#[test]
fn people_get_a_table_and_the_echo_stands_alone() {
    let home = home();
    let few = ["--bytes", "64", "--iterations", "10", "--repetitions", "2"];
    let output = bench(home.path(), &[&["push-pull", "--optimizer", "adamw"], &few[..]].concat());
    let out = text(&output.stdout);
    assert!(out.contains("optimizer adamw") && out.contains("x ceiling") && out.contains("\n     64 B"), "{out}");
    let output = bench(
        home.path(),
        &[&["echo", "--json", "--piece", "64K"], &few[..2], &["128K", "--seconds", "0.01"]].concat(),
    );
    let out = text(&output.stdout);
    let echoes: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let forms: Vec<_> = echoes.iter().map(|row| (row["bytes"].to_string(), row["echo"].as_str().unwrap())).collect();
    let wanted = [("64", "whole"), ("131072", "whole"), ("131072", "pieces")];
    assert_eq!(forms, wanted.map(|(bytes, form)| (bytes.to_string(), form)), "{out}{}", text(&output.stderr));
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
        (["push-pull", "--bytes", "65"], "multiple of 64"),
        (["push-pull", "--bytes", "64MB"], "MiB"),
        (["push-pull", "--set", "chunk_byte=1"], "did you mean `chunk_bytes`"),
        (["push-pull", "--workers", "0"], "workers"),
        (["push-pull", "--transport", "carrier-pigeon"], "tcp, shm, soft"),
        (["push-pull", "--set", "transports=tcp"], "--transport"),
        (["echo", "--piece", "64..128"], "one size"),
        (["echo", "--over", "soft"], "tcp, shm, udp"),
        (["echo", "--wait", "patiently"], "sleep, adaptive, spin"),
        (["echo", "--datagram", "4096"], "--over udp"),
    ] {
        let output = bench(home.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
}
