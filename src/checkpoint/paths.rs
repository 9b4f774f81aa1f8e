//! The names of checkpoints and of their parts, and the directory of a job's checkpoints as a list.
//!
//! Invariant: a name that this module did not make is never touched.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    CLOCK_MAX,
    disk::{Disk, DiskFile},
};
use crate::{
    Error, Result,
    types::{Clock, ShardId},
};

/// The file that makes a directory a checkpoint.
pub(super) const MANIFEST: &str = "manifest.json";

/// What the name of a directory says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Complete, but a second write of the same clock was about to take its place.
    Replaced,
    /// Complete.
    Complete,
    /// Being written, or never finished.
    Writing,
    /// Being removed.
    Removing,
}

impl Stage {
    const ALL: [Stage; 4] = [Stage::Replaced, Stage::Complete, Stage::Writing, Stage::Removing];

    fn suffix(self) -> &'static str {
        match self {
            Stage::Complete => "",
            Stage::Replaced => ".replaced",
            Stage::Writing => ".writing",
            Stage::Removing => ".removing",
        }
    }
}

/// The directory of one clock at one stage.
pub(super) fn directory(dir: &Path, clock: Clock, stage: Stage) -> PathBuf {
    dir.join(format!("clock-{clock:012}{}", stage.suffix()))
}

/// The name of a shard's file; of one that was written for an older checkpoint, that one's clock is in it.
pub(super) fn shard_file(shard: ShardId, since: Option<Clock>) -> String {
    match since {
        None => format!("shard-{:05}.safetensors", shard.0),
        Some(since) => format!("shard-{:05}.clock-{since:012}.safetensors", shard.0),
    }
}

/// The name under which a file is written before it gets its own.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().expect("a file's path").to_os_string();
    name.push(".temp");
    path.with_file_name(name)
}

/// What the checkpoints' directory holds, newest clock first, and of one clock the complete one first.
pub(super) fn list(dir: &Path) -> Result<Vec<(Clock, Stage)>> {
    let failed = |error| Error::file("list", dir, error);
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        if let Some(named) = entry.map_err(failed)?.file_name().to_str().and_then(parse) {
            found.push(named);
        }
    }
    found.sort_by_key(|(clock, stage)| (std::cmp::Reverse(*clock), *stage != Stage::Complete, *stage));
    Ok(found)
}

/// The names of the files in a directory of ours.
pub(super) fn files(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::file("list", dir, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        names.push(name.into_string().map_err(|name| Error::Checkpoint {
            path: dir.join(name),
            defect: "is not a file that gradwire made; move it elsewhere".into(),
        })?);
    }
    names.sort();
    Ok(names)
}

fn parse(name: &str) -> Option<(Clock, Stage)> {
    let (digits, suffix) = name.strip_prefix("clock-")?.split_at_checked(12)?;
    let stage = Stage::ALL.into_iter().find(|stage| stage.suffix() == suffix)?;
    let all_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
    all_digits.then(|| digits.parse().ok()).flatten().map(|clock| (clock, stage))
}

/// Refuses a clock that has no directory name.
pub(super) fn check_clock(clock: Clock) -> Result<()> {
    match clock {
        0..=CLOCK_MAX => Ok(()),
        _ => Err(Error::Config(format!(
            "clock {clock} is beyond {CLOCK_MAX}, the last that a checkpoint can be named after"
        ))),
    }
}

/// Makes a directory and the missing ones above it, durably.
pub(super) fn create_dirs(disk: &dyn Disk, path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_dirs(disk, parent)?;
    match disk.create_dir(path) {
        // Servers of one job make the same directory at the same time.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made.map_err(|error| Error::file("create the directory", path, error))?,
    }
    sync_dir(disk, parent)
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk.sync_dir(path).map_err(|error| Error::file("sync the directory", path, error))
}

/// Renames within a directory. Not durable before that directory is synced.
pub(super) fn rename(disk: &dyn Disk, source: &Path, target: &Path) -> Result<()> {
    disk.rename(source, target).map_err(|error| Error::file("rename", source, error))
}

/// Removes a directory of ours and the files in it.
pub(super) fn remove_tree(disk: &dyn Disk, path: &Path) -> Result<()> {
    for name in files(path)? {
        let file = path.join(name);
        disk.remove_file(&file).map_err(|error| Error::file("remove", &file, error))?;
    }
    disk.remove_dir(path).map_err(|error| Error::file("remove the directory", path, error))
}

/// Starts the file that [`finish_file`] will give its name.
pub(super) fn start_file(disk: &dyn Disk, path: &Path) -> Result<Box<dyn DiskFile>> {
    let temp = temporary(path);
    disk.create(&temp).map_err(|error| Error::file("create", temp, error))
}

/// Makes a file's bytes durable, gives it its name, and makes the name durable.
pub(super) fn finish_file(disk: &dyn Disk, mut file: Box<dyn DiskFile>, path: &Path) -> Result<()> {
    let temp = temporary(path);
    file.sync().map_err(|error| Error::file("sync", &temp, error))?;
    drop(file);
    rename(disk, &temp, path)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_dir(disk, parent.unwrap_or(Path::new(".")))
}
