//! The keeper: a small process beside the launcher that clears up after it if it is killed.
//!
//! The launcher holds the other end of the keeper's standard input. A line there means that the launcher has cleared up itself;
//! an end without a line means that it was killed.
//!
//! Invariant: the keeper does nothing as long as the launcher lives.
#![forbid(unsafe_code)]

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{spawn, sweep};
use crate::Result;

/// How long the processes of a dead launcher's job are looked for.
const SWEEP_TIME: Duration = Duration::from_secs(10);

/// The launcher's handle on its keeper.
#[derive(Debug)]
pub(super) struct Keeper(Child);

impl Keeper {
    /// Starts the keeper of the job with this mark and directory.
    pub fn start(executable: &Path, mark: &str, directory: &Path) -> Result<Keeper> {
        let mut command = Command::new(executable);
        command.arg("keep").arg("--job").arg(mark).arg("--directory").arg(directory);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // A launcher that itself runs inside a job must not have its keeper taken for one of that job's processes.
        command.env_remove(sweep::MARK_VARIABLE);
        spawn::detached(&mut command).map(Keeper)
    }

    /// Tells the keeper that nothing is left to do.
    pub fn dismiss(mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(b"done\n");
        }
        let _ = self.0.wait();
    }
}

/// What the keeper's process does (`gradwire keep`, started by the launcher only): waits for the launcher's end and clears up if
/// the launcher has not.
pub fn keep(mark: &str, directory: &PathBuf) {
    let mut said = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut said);
    if said.is_empty() {
        sweep::sweep(mark, SWEEP_TIME);
        let _ = std::fs::remove_dir_all(directory);
    }
}
