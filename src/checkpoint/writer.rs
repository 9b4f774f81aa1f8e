//! Writing: a shard's file on each server, then the manifest and the name in the launcher.
//!
//! Invariant: every step leaves each checkpoint that was complete before it readable, under its name or under `.replaced`.
#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    disk::{Disk, DiskFile, SYSTEM},
    files::encode_header,
    manifest::{ChunkWritten, Manifest, ShardWritten, decode_manifest},
    paths::{self, MANIFEST, Stage, directory},
    reader::Checkpoint,
};
use crate::{
    Error, Result,
    layout::ALIGNMENT,
    types::{ChunkId, Clock, ShardId, Version},
};

/// What will be written of a chunk: known before its contents are, so that a shard can be written chunk by chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlan {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Its elements: a positive multiple of [`ALIGNMENT`].
    pub len: u32,
    /// Whether the optimizer keeps a first moment (or any one array).
    pub first: bool,
    /// Whether the optimizer keeps a second one.
    pub second: bool,
}

/// A chunk as it is to be written.
#[derive(Clone, Copy, Debug)]
pub struct ChunkState<'a> {
    /// Which chunk.
    pub chunk: ChunkId,
    /// How often it was brought up to date.
    pub version: Version,
    /// How many steps its optimizer has taken.
    pub steps: u64,
    /// How many clocks of each contributor are in it, in rank order; empty where these are the checkpoint's.
    pub clocks: &'a [Clock],
    /// The parameters.
    pub master: &'a [f32],
    /// The optimizer's first array; empty if it keeps none.
    pub first: &'a [f32],
    /// The optimizer's second array; empty if it keeps none.
    pub second: &'a [f32],
}

impl ChunkState<'_> {
    /// CRC-32C of its arrays, one after another.
    pub(super) fn sum(&self) -> u32 {
        let arrays = [self.master, self.first, self.second].map(bytemuck::cast_slice::<f32, u8>);
        arrays.iter().fold(0, |sum, array| crc32c::crc32c_append(sum, array))
    }

    /// Bytes of its arrays.
    pub(super) fn bytes(&self) -> usize {
        4 * (self.master.len() + self.first.len() + self.second.len())
    }

    fn plan(&self) -> ChunkPlan {
        ChunkPlan {
            chunk: self.chunk,
            len: self.master.len() as u32,
            first: !self.first.is_empty(),
            second: !self.second.is_empty(),
        }
    }
}

/// Writes one shard's file, a chunk at a time, so that a server can look after its network in between.
pub struct ShardWriter<'d> {
    disk: &'d dyn Disk,
    file: Box<dyn DiskFile>,
    path: PathBuf,
    plan: Vec<ChunkPlan>,
    written: ShardWritten,
}

impl ShardWriter<'static> {
    /// Starts shard `shard` of the checkpoint of `clock` in the directory `dir`; `plan` is what will be written, in order.
    ///
    /// # Errors
    ///
    /// [`Error::File`] naming the operation and the file.
    pub fn create(dir: &Path, clock: Clock, shard: ShardId, plan: Vec<ChunkPlan>) -> Result<ShardWriter<'static>> {
        ShardWriter::create_on(&SYSTEM, dir, clock, shard, plan)
    }
}

impl<'d> ShardWriter<'d> {
    pub(super) fn create_on(
        disk: &'d dyn Disk,
        dir: &Path,
        clock: Clock,
        shard: ShardId,
        plan: Vec<ChunkPlan>,
    ) -> Result<ShardWriter<'d>> {
        paths::check_clock(clock)?;
        let directory = directory(dir, clock, Stage::Writing);
        paths::create_dirs(disk, &directory)?;
        let path = directory.join(paths::shard_file(shard, None));
        let refused = |defect| Error::Checkpoint { path: path.clone(), defect };
        let header = shard_header(clock, shard, &plan).map_err(refused)?;
        let sum = crc32c::crc32c(&header);
        let mut writer = ShardWriter {
            disk,
            file: paths::start_file(disk, &path)?,
            plan,
            written: ShardWritten {
                shard,
                name: paths::shard_file(shard, None),
                since: None,
                bytes: 0,
                header_crc32c: sum,
                crc32c: sum,
                chunks: Vec::new(),
            },
            path,
        };
        writer.append(&header)?;
        Ok(writer)
    }

    /// Writes the next chunk of the plan.
    ///
    /// # Errors
    ///
    /// [`Error::File`]; the shard cannot be finished then.
    pub fn write(&mut self, state: ChunkState<'_>) -> Result<()> {
        let planned = self.plan.get(self.written.chunks.len()).copied();
        assert_eq!(planned, Some(state.plan()), "chunks are written as planned");
        let (mut sum, mut bytes) = (0, 0);
        for array in [state.master, state.first, state.second] {
            assert!(array.is_empty() || array.len() == state.master.len(), "arrays of one chunk have one length");
            let array: &[u8] = bytemuck::cast_slice(array);
            sum = crc32c::crc32c_append(sum, array);
            bytes += array.len();
            self.append(array)?;
        }
        self.written.crc32c = crc32c::crc32c_combine(self.written.crc32c, sum, bytes);
        let ChunkState { chunk, version, steps, clocks, .. } = state;
        let clocks = clocks.to_vec();
        self.written.chunks.push(ChunkWritten { chunk, version, steps, crc32c: sum, clocks, is_stale: false });
        Ok(())
    }

    /// Makes the file durable and gives it its name; what is returned goes to whoever commits.
    ///
    /// # Errors
    ///
    /// [`Error::File`].
    pub fn finish(self) -> Result<ShardWritten> {
        assert_eq!(self.written.chunks.len(), self.plan.len(), "all that was planned is written");
        paths::finish_file(self.disk, self.file, &self.path)?;
        Ok(self.written)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.written.bytes += bytes.len() as u64;
        self.file.write(bytes).map_err(|error| Error::file("write", paths::temporary(&self.path), error))
    }
}

fn shard_header(clock: Clock, shard: ShardId, plan: &[ChunkPlan]) -> Result<Vec<u8>, String> {
    let mut tensors = Vec::with_capacity(plan.len() * 3);
    for chunk in plan {
        assert!(chunk.len > 0 && u64::from(chunk.len).is_multiple_of(ALIGNMENT), "chunks keep the layout's alignment");
        let arrays = [("master", true), ("first", chunk.first), ("second", chunk.second)];
        for (array, _) in arrays.into_iter().filter(|(_, there)| *there) {
            tensors.push((format!("chunk.{}.{array}", chunk.chunk.0), vec![u64::from(chunk.len)]));
        }
    }
    let metadata =
        [("format", "gradwire-shard".to_string()), ("clock", clock.to_string()), ("shard", shard.0.to_string())];
    encode_header(&metadata, &tensors)
}

/// Writes a whole shard at once: [`ShardWriter`] for a server that has nothing else to do.
///
/// # Errors
///
/// [`Error::File`] naming the operation and the file.
pub fn write_shard<'a>(
    dir: &Path,
    clock: Clock,
    shard: ShardId,
    chunks: impl Iterator<Item = ChunkState<'a>>,
) -> Result<ShardWritten> {
    write_shard_on(&SYSTEM, dir, clock, shard, chunks)
}

pub(super) fn write_shard_on<'a>(
    disk: &dyn Disk,
    dir: &Path,
    clock: Clock,
    shard: ShardId,
    chunks: impl Iterator<Item = ChunkState<'a>>,
) -> Result<ShardWritten> {
    let chunks: Vec<_> = chunks.collect();
    let plan = chunks.iter().map(ChunkState::plan).collect();
    let mut writer = ShardWriter::create_on(disk, dir, clock, shard, plan)?;
    for chunk in chunks {
        writer.write(chunk)?;
    }
    writer.finish()
}

/// Opens a directory of checkpoints for writing: makes it, and removes what crashed writes left in it. Called once, in the launcher,
/// before any shard is written; a directory of checkpoints has one writing job at a time.
///
/// # Errors
///
/// [`Error::File`] naming the operation and the file.
pub fn begin(dir: &Path) -> Result<()> {
    begin_on(&SYSTEM, dir)
}

pub(super) fn begin_on(disk: &dyn Disk, dir: &Path) -> Result<()> {
    paths::create_dirs(disk, dir)?;
    let found = paths::list(dir)?;
    for (left, stage) in &found {
        let path = directory(dir, *left, *stage);
        match stage {
            Stage::Complete => {}
            Stage::Replaced if !found.contains(&(*left, Stage::Complete)) => {
                // A crash came between the two renames of `commit`: the old one is still the checkpoint of its clock.
                paths::rename(disk, &path, &directory(dir, *left, Stage::Complete))?;
                paths::sync_dir(disk, dir)?;
            }
            Stage::Replaced | Stage::Writing | Stage::Removing => paths::remove_tree(disk, &path)?,
        }
    }
    Ok(())
}

/// Completes a checkpoint whose shards are all written: the manifest, then the name. Returns its directory.
///
/// A complete checkpoint of the same clock is replaced. The directory must be one that all writers share.
///
/// # Errors
///
/// [`Error::Checkpoint`] if a shard is missing or does not fit; [`Error::File`] if the disk refuses. After an error it is not
/// known to be durable, and all older ones are as they were.
pub fn commit(dir: &Path, manifest: &Manifest) -> Result<PathBuf> {
    commit_on(&SYSTEM, dir, manifest)
}

pub(super) fn commit_on(disk: &dyn Disk, dir: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let clock = manifest.state.clock;
    let [writing, complete, replaced] =
        [Stage::Writing, Stage::Complete, Stage::Replaced].map(|stage| directory(dir, clock, stage));
    let refused = |defect| Error::Checkpoint { path: writing.clone(), defect };
    manifest.check().map_err(refused)?;
    let text = manifest.encode();
    // What cannot be read again (a setting that is no number has no JSON) is better refused now than at the resume.
    if decode_manifest(&text).as_ref() != Ok(manifest) {
        return Err(refused("has settings that cannot be written, such as an initial value that is not finite".into()));
    }
    check_shards(&writing, manifest)?;
    for name in paths::files(&writing)? {
        // A crashed attempt with more shards, or with temporary files, may have left what is not ours.
        if !manifest.files.iter().any(|file| file.name == name) {
            let path = writing.join(name);
            disk.remove_file(&path).map_err(|error| Error::file("remove", path, error))?;
        }
    }
    let path = writing.join(MANIFEST);
    let mut file = paths::start_file(disk, &path)?;
    file.write(&text).map_err(|error| Error::file("write", &path, error))?;
    paths::finish_file(disk, file, &path)?;
    let replaces = complete.exists();
    if replaces {
        if replaced.exists() {
            paths::remove_tree(disk, &replaced)?;
        }
        paths::rename(disk, &complete, &replaced)?;
    }
    paths::rename(disk, &writing, &complete)?;
    paths::sync_dir(disk, dir)?;
    if replaces && let Err(error) = paths::remove_tree(disk, &replaced) {
        // The new one is complete and durable; the next `begin` tries again.
        tracing::warn!(%error, "the checkpoint that was replaced is still there");
    }
    Ok(complete)
}

/// Every file is there and as long as its writer said.
fn check_shards(writing: &Path, manifest: &Manifest) -> Result<()> {
    for file in &manifest.files {
        let path = writing.join(&file.name);
        let bytes = fs::metadata(&path).map(|metadata| metadata.len()).map_err(|error| Error::Checkpoint {
            path: path.clone(),
            defect: format!(
                "shard {} says that it wrote this file, but it cannot be seen from here ({error}): the checkpoint directory \
                 must be on a file system that all servers and the launcher share",
                file.shard.0
            ),
        })?;
        if bytes != file.bytes {
            let defect = format!("has {bytes} bytes, and shard {} wrote {}", file.shard.0, file.bytes);
            return Err(Error::Checkpoint { path, defect });
        }
    }
    Ok(())
}

/// Gives up a checkpoint that cannot be completed: on a disk that is full, what there is of it takes the room of the next.
///
/// # Errors
///
/// [`Error::File`]; the next [`begin`] tries again.
pub fn abandon(dir: &Path, clock: Clock) -> Result<()> {
    abandon_on(&SYSTEM, dir, clock)
}

pub(super) fn abandon_on(disk: &dyn Disk, dir: &Path, clock: Clock) -> Result<()> {
    let writing = directory(dir, clock, Stage::Writing);
    if writing.is_dir() { paths::remove_tree(disk, &writing) } else { Ok(()) }
}

/// Removes all checkpoints that are older than the newest `keep` readable ones, and what an earlier try has left of such. Returns
/// what it removed.
///
/// Damaged ones do not count as kept, so that those before them stay.
///
/// # Errors
///
/// [`Error::Config`] if told to keep none; [`Error::File`].
pub fn prune(dir: &Path, keep: usize) -> Result<Vec<PathBuf>> {
    prune_on(&SYSTEM, dir, keep)
}

pub(super) fn prune_on(disk: &dyn Disk, dir: &Path, keep: usize) -> Result<Vec<PathBuf>> {
    if keep == 0 {
        return Err(Error::Config("at least one checkpoint must be kept".into()));
    }
    let mut kept = 0;
    let mut removed = Vec::new();
    for (clock, stage) in paths::list(dir)? {
        let path = directory(dir, clock, stage);
        match stage {
            Stage::Complete if kept < keep => kept += usize::from(Checkpoint::open(&path).is_ok()),
            Stage::Complete => {
                // Under another name first, so that a checkpoint is never there in part.
                let removing = directory(dir, clock, Stage::Removing);
                paths::rename(disk, &path, &removing)?;
                paths::sync_dir(disk, dir)?;
                paths::remove_tree(disk, &removing)?;
                removed.push(path);
            }
            Stage::Removing => paths::remove_tree(disk, &path)?,
            Stage::Replaced | Stage::Writing => {}
        }
    }
    Ok(removed)
}
