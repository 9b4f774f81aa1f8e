//! The two interfaces of the kernel under the tcp transport: what is said where one is refused, and what io_uring must not leave behind.
//!
//! What counts descriptors or memory, or is refused something by the kernel, runs in a process of its own: this test program,
//! started again for one of its tests.
//!
//! Invariant: where the kernel refuses io_uring to this process, what needs it says so loudly and is not run.

mod allocator;
mod cycles;
mod fence;
mod pair;
mod refused;
#[path = "../seccomp/filter.rs"]
mod seccomp;

use std::process::Command;

/// Set in a process that was started for one test.
const ALONE: &str = "TCP_IO_ALONE";

/// This program, to be started for one of its tests; `value` is for that test to read.
fn alone(test: &str, value: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, value);
    command
}

/// Runs it to its end, which must be a good one; what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}
