//! The processes of a job of these tests.
//!
//! Invariant: a process is known by the home in its environment, never by its name.

use std::path::Path;

/// The processes that were started with this home, each with its command line.
pub fn processes(home: &Path) -> Vec<(u32, String)> {
    let environment = format!("GRADWIRE_HOME={}\0", home.display());
    let numbers =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ours = numbers.filter_map(|pid: u32| {
        let read = |name| {
            std::fs::read(format!("/proc/{pid}/{name}")).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        // A process that has ended and is not collected yet has neither.
        read("environ")?.contains(&environment).then_some((pid, read("cmdline")?.replace('\0', " ")))
    });
    ours.filter(|(_, command)| !command.is_empty()).collect()
}
