//! `gradwire bench` with real processes: what it prints for machines and for people, and what it refuses.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

fn home() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

fn bench(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.arg("bench").args(arguments).env("GRADWIRE_HOME", home).stdin(Stdio::null());
    command.output().unwrap()
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
        let output = bench(home.path(), &arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let out = text(&output.stdout);
        let rows: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.iter().map(|row| row["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 3 << 20]);
        for row in &rows {
            assert_eq!((&row["benchmark"], &row["transport"]), (&"push-pull".into(), &"tcp".into()));
            assert_eq!((row["workers"].to_string(), row["servers"].to_string()), (workers.into(), servers.into()));
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {row}"));
            assert!(number("latency_us_p50") > 0.0 && number("latency_us_p50") <= number("latency_us_p99"), "{row}");
            assert!(number("goodput_bytes_per_s") > 0.0 && number("ceiling_latency_us") > 0.0, "{row}");
            // Whole rounds of a single worker and its median must tell of the same speed, within what medians and means differ.
            let by_latency = number("workers") * 2.0 * number("bytes") / number("latency_us_p50") * 1e6;
            assert!((0.02..50.0).contains(&(number("goodput_bytes_per_s") / by_latency)), "{row}");
            assert!(number("ceiling_bytes_per_s") > 0.0, "{row}");
        }
    }
}

#[test]
fn people_get_a_table_and_the_echo_stands_alone() {
    let home = home();
    let few = ["--bytes", "64", "--iterations", "10", "--repetitions", "2"];
    let output = bench(home.path(), &[&["push-pull", "--optimizer", "adamw"], &few[..]].concat());
    let out = text(&output.stdout);
    assert!(out.contains("optimizer adamw") && out.contains("ceiling p50") && out.contains("\n     64 B"), "{out}");
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

#[test]
fn what_cannot_be_measured_is_refused() {
    let home = home();
    for (arguments, hint) in [
        (["push-pull", "--bytes", "65"], "multiple of 64"),
        (["push-pull", "--bytes", "64MB"], "MiB"),
        (["push-pull", "--set", "chunk_byte=1"], "did you mean `chunk_bytes`"),
        (["push-pull", "--workers", "0"], "workers"),
        (["push-pull", "--transport", "carrier-pigeon"], "tcp"),
        (["echo", "--piece", "64..128"], "one size"),
    ] {
        let output = bench(home.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
}
