//! Writing what has changed: chunks that are as they were in the checkpoint before are not written again. The files that hold them get
//! another name, in the new checkpoint's directory, so that each directory is whole by itself.
//!
//! A file that is linked to may hold chunks of which a later state is elsewhere: they are stale, and take room. Of a file of which less
//! than half counts, what counts is written again and the file is not linked to; so a checkpoint never takes more than twice what it
//! holds.
//!
//! Invariant: a chunk is taken from an older file only if its optimizer has taken no step since, and its sum is that of its bytes.
#![forbid(unsafe_code)]

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    io,
    path::Path,
};

use super::{
    disk::{Disk, SYSTEM},
    manifest::ShardWritten,
    paths::{self, Stage, directory},
    writer::{ChunkState, write_shard_on},
};
use crate::{
    Error, Result,
    types::{ChunkId, Clock, ShardId},
};

/// Files of older checkpoints that one shard links to at most.
const LINKS_MAX: usize = 31;

/// What was stored of a shard last, by the process that stores it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Of which clock.
    pub clock: Clock,
    /// In which files.
    pub files: Vec<ShardWritten>,
}

/// Writes what of a shard has changed since `before` was stored, and links to the files that hold the rest. Where these are gone, or the
/// file system makes no second names, the whole shard is written. Gives the files that hold the shard.
///
/// # Errors
///
/// [`Error::File`] naming the operation and the file.
pub fn write_changes(
    dir: &Path,
    clock: Clock,
    shard: ShardId,
    chunks: &[ChunkState<'_>],
    before: &Stored,
) -> Result<Vec<ShardWritten>> {
    write_changes_on(&SYSTEM, dir, clock, shard, chunks, before)
}

pub(super) fn write_changes_on(
    disk: &dyn Disk,
    dir: &Path,
    clock: Clock,
    shard: ShardId,
    chunks: &[ChunkState<'_>],
    before: &Stored,
) -> Result<Vec<ShardWritten>> {
    paths::check_clock(clock)?;
    let mut linked = if before.clock < clock { kept(chunks, before) } else { Vec::new() };
    if !linked.is_empty() && !link_all(disk, dir, clock, before, &linked)? {
        linked.clear();
    }
    let counts = linked.iter().flat_map(|file| &file.chunks).filter(|entry| !entry.is_stale);
    let held: HashSet<ChunkId> = counts.map(|entry| entry.chunk).collect();
    let changed: Vec<ChunkState<'_>> = chunks.iter().filter(|state| !held.contains(&state.chunk)).copied().collect();
    if changed.is_empty() && !linked.is_empty() {
        paths::sync_dir(disk, &directory(dir, clock, Stage::Writing))?;
        return Ok(linked);
    }
    // Making the name of this file durable makes those of the others so.
    linked.insert(0, write_shard_on(disk, dir, clock, shard, changed.into_iter())?);
    Ok(linked)
}

/// The files to be linked to, as the new manifest tells of them.
fn kept(chunks: &[ChunkState<'_>], before: &Stored) -> Vec<ShardWritten> {
    let now: HashMap<ChunkId, &ChunkState<'_>> = chunks.iter().map(|state| (state.chunk, state)).collect();
    let mut files = before.files.clone();
    for file in &mut files {
        file.since = file.since.or(Some(before.clock));
        file.name = paths::shard_file(file.shard, file.since);
        for entry in &mut file.chunks {
            let same = now
                .get(&entry.chunk)
                .filter(|state| !entry.is_stale && state.steps == entry.steps && state.sum() == entry.crc32c);
            entry.is_stale = same.is_none();
            // Clocks pass over a chunk to which nobody gives anything.
            (entry.version, entry.clocks) =
                same.map_or((entry.version, Vec::new()), |state| (state.version, state.clocks.to_vec()));
        }
    }
    let bytes = |file: &ShardWritten, counts: bool| -> usize {
        let of = file.chunks.iter().filter(|entry| entry.is_stale != counts);
        of.filter_map(|entry| now.get(&entry.chunk)).map(|state| state.bytes()).sum()
    };
    files.retain(|file| bytes(file, true) > 0 && bytes(file, true) >= bytes(file, false));
    files.sort_by_key(|file| Reverse(bytes(file, true)));
    files.truncate(LINKS_MAX);
    files
}

/// Gives files of the checkpoint before another name in the directory of the new one; `false` if that cannot be.
fn link_all(disk: &dyn Disk, dir: &Path, clock: Clock, before: &Stored, files: &[ShardWritten]) -> Result<bool> {
    let target = directory(dir, clock, Stage::Writing);
    paths::create_dirs(disk, &target)?;
    for file in files {
        let name = paths::shard_file(file.shard, file.since.filter(|since| *since < before.clock));
        if !link(disk, dir, (before.clock, &name), &target.join(&file.name))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The checkpoint before may just be getting its name; its files are whole and durable all the same.
fn link(disk: &dyn Disk, dir: &Path, (clock, name): (Clock, &str), target: &Path) -> Result<bool> {
    for stage in [Stage::Complete, Stage::Writing, Stage::Complete] {
        let source = directory(dir, clock, stage).join(name);
        let failed = |error| Error::file("link", &source, error);
        let mut outcome = disk.link(&source, target);
        if outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            disk.remove_file(target).map_err(failed)?; // of a try that came to nothing
            outcome = disk.link(&source, target);
        }
        match outcome {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if makes_no_links(&error) => {
                tracing::warn!("no second name for {}: {error}; the shard is written whole", source.display());
                return Ok(false);
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(false)
}

fn makes_no_links(error: &io::Error) -> bool {
    use io::ErrorKind::{CrossesDevices, PermissionDenied, TooManyLinks, Unsupported};
    matches!(error.kind(), CrossesDevices | PermissionDenied | TooManyLinks | Unsupported)
}
