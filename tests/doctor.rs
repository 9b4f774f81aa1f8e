//! `gradwire doctor` as a user runs it: this machine, and two processes that test the way between them.
//!
//! Invariant: every process ends with its test; all addresses are on the loopback interface.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStderr, Command, Output, Stdio},
};

/// A process that ends with its test. What it goes on to say needs a reader: a log line into a closed pipe would end it.
struct Ended(Child, Option<BufReader<ChildStderr>>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.arg("doctor").args(arguments).stdin(Stdio::null());
    command.env_remove("GRADWIRE_TOKEN").env_remove("GRADWIRE_TOKEN_FILE");
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A listener, the token that it printed, and where it waits.
fn listener() -> (Ended, String, String) {
    let mut command = doctor(&["--listen", "127.0.0.1:0", "--wait", "60"]);
    let mut child = Ended(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), None);
    let mut reader = BufReader::new(child.0.stderr.take().unwrap());
    let said: Vec<String> = reader.by_ref().lines().take(2).map(|line| line.unwrap()).collect();
    child.1 = Some(reader);
    let words: Vec<&str> = said[1].split_whitespace().collect();
    let [token, "gradwire", "doctor", address] = words[..] else { panic!("{said:?}") };
    let token = token.strip_prefix("GRADWIRE_TOKEN=").unwrap().to_string();
    (child, token, address.to_string())
}

#[test]
fn this_machine_is_examined_and_the_exit_status_says_the_verdict() {
    let output = doctor(&["--json"]).output().unwrap();
    let found: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    let items = found["items"].as_array().unwrap();
    let wrong: Vec<_> = items.iter().filter(|item| item["verdict"] == "wrong").collect();
    for item in &wrong {
        assert!(item["mend"].is_string(), "{item}");
    }
    assert!(wrong.len() as u64 <= found["wrong"].as_u64().unwrap());
    assert_eq!(output.status.code(), Some(i32::from(found["wrong"] != 0)), "{found}");
    for topic in [
        "rdma devices",
        "gpu",
        "cuda",
        "memlock",
        "capabilities",
        "huge pages",
        "namespaces",
        "io_uring",
        "shared memory",
    ] {
        assert!(items.iter().any(|item| item["topic"] == topic), "no {topic} in {found}");
    }
    assert!(found["fabrics"].as_array().unwrap().iter().any(|tried| tried["fabric"] == "tcp"), "{found}");
    assert!(found["fabrics"][0]["latency_us_p50"].as_f64().unwrap() > 0.0, "{found}");
}

#[test]
fn a_pair_is_tested_with_the_token_that_the_listener_printed() {
    let (mut waiting, token, address) = listener();
    let output = doctor(&[&address, "--json"]).env("GRADWIRE_TOKEN", token).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let reached: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reached["address"], address);
    assert_eq!(reached["mtu"], 65535, "the loopback interface has 65536, and an IP packet at most one less");
    assert!(reached["bytes_per_s"].as_f64().unwrap() > 0.0 && reached["latency_us_p50"].as_f64().unwrap() > 0.0);
    assert!(waiting.0.wait().unwrap().success());
}

#[test]
fn without_the_token_nothing_is_tested() {
    let (mut waiting, token, address) = listener();
    let output = doctor(&[&address]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(
        text(&output).contains("gradwire doctor --listen") && text(&output).contains("GRADWIRE_TOKEN"),
        "{}",
        text(&output)
    );
    let other = if token.starts_with('0') { "1" } else { "0" }.to_string() + &token[1..];
    let output = doctor(&[&address]).env("GRADWIRE_TOKEN", &other).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("same GRADWIRE_TOKEN") && !said.contains(&other[..8]), "{said}");
    assert!(waiting.0.try_wait().unwrap().is_none(), "a stranger does not end the wait");
    // And who holds it is still served.
    let output = doctor(&[&address]).env("GRADWIRE_TOKEN", &token).output().unwrap();
    assert!(output.status.success() && text(&output).contains("GB/s"), "{}", text(&output));
}

#[test]
fn a_host_where_nobody_listens_is_told_apart() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let token = "0".repeat(64);
    let output = doctor(&[&format!("127.0.0.1:{port}")]).env("GRADWIRE_TOKEN", &token).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("nothing listens: start `gradwire doctor --listen`"), "{}", text(&output));
    let output = doctor(&["no.such.host.invalid"]).env("GRADWIRE_TOKEN", &token).output().unwrap();
    assert!(text(&output).contains("no host that this one knows"), "{}", text(&output));
}
