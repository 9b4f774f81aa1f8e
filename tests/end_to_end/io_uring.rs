//! A whole job where io_uring is forbidden, as it is under Docker's default seccomp profile: it trains over epoll; who asks for io_uring is told why there is none.

use std::process::{Command, Stdio};

use nix::errno::Errno;

use crate::{jobs::home, seccomp::refuse_io_uring};

/// Two servers and two workers under a filter; whether it went well, and all that it printed.
fn job(errno: Errno, io: &str) -> (bool, String) {
    let home = home();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.args(["run", "-s", "2", "-n", "2", "--name", "refused", "--set", "chunk_bytes=1024", "--transport", "tcp"]);
    command.args(["--set", "optimizer.kind=sgd", "--set", r#"optimizer.groups=[{name="other"}]"#, "--"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "worker_process", "--nocapture", "--test-threads=1"]);
    command.env("WORKER_PART", "train").env("GRADWIRE_HOME", home.path()).env("GRADWIRE_LOG", "info");
    command.env("GRADWIRE_TCP_IO", io).stdin(Stdio::null());
    refuse_io_uring(&mut command, errno as i32);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[test]
fn a_job_where_io_uring_is_forbidden_trains_over_epoll() {
    let (is_well, text) = job(Errno::EPERM, "");
    assert!(is_well, "{text}");
    assert_eq!(crate::jobs::digests(&text).len(), 2, "both workers finished: {text}");
}

#[test]
fn a_job_that_insists_on_io_uring_where_it_is_forbidden_fails_by_name() {
    let (is_well, text) = job(Errno::EPERM, "uring");
    assert!(!is_well, "{text}");
    for part in [
        "io_uring was asked for",
        "io_uring_setup: EPERM (a seccomp profile such as Docker's",
        "leave GRADWIRE_TCP_IO away",
    ] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}
