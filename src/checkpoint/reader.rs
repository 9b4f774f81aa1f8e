//! Reading: a checkpoint opened, checked, compared with a job's layout, and its chunks from whichever file holds them.
//!
//! Invariant: no float is handed out whose sum was not checked on the way.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::{
    disk::Map,
    files::{DATA_ALIGNMENT, decode_header},
    manifest::{ChunkWritten, MANIFEST_BYTES_MAX, Manifest, ShardWritten, TensorEntry, decode_manifest},
    paths::{self, MANIFEST, Stage, directory},
};
use crate::{
    Error, Result,
    layout::{Layout, Tensor},
    types::{ChunkId, Clock, Version},
};

const ADVICE: &str = "restore the file from a copy, or resume from an older checkpoint";

/// A complete checkpoint, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    files: Vec<ShardFile>,
    /// By chunk: which file, and which of its chunks.
    places: Vec<(u32, u32)>,
}

#[derive(Debug)]
struct ShardFile {
    path: PathBuf,
    map: Map,
    data_start: usize,
    /// By chunk of the file.
    arrays: Vec<Arrays>,
}

/// Where a chunk lies: so many arrays of its length, one after another.
#[derive(Clone, Copy, Debug)]
struct Arrays {
    start: usize,
    len: usize,
    first: bool,
    second: bool,
}

/// A chunk read from a checkpoint; its sum was right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkData<'a> {
    /// How often it had been brought up to date.
    pub version: Version,
    /// How many steps its optimizer had taken.
    pub steps: u64,
    /// How many clocks of each contributor were in it, in rank order; empty where these are the checkpoint's.
    pub clocks: &'a [Clock],
    /// The parameters.
    pub master: &'a [f32],
    /// The optimizer's first array; empty if it keeps none.
    pub first: &'a [f32],
    /// The optimizer's second array; empty if it keeps none.
    pub second: &'a [f32],
}

impl Checkpoint {
    /// Opens the checkpoint in a directory (`…/clock-000000000100`): checks its manifest, that every file is there with its
    /// length, and the files' headers. The parameters are checked when they are read, or all at once by
    /// [`Checkpoint::verify`].
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] saying what is wrong with which file and what to do; [`Error::File`] if one cannot be read.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let manifest_path = path.join(MANIFEST);
        if !manifest_path.exists() {
            return Err(no_manifest(path));
        }
        let map = Map::open(&manifest_path, MANIFEST_BYTES_MAX)?;
        let manifest = decode_manifest(&map).map_err(|defect| damaged(&manifest_path, &defect))?;
        let mut places = vec![(0, 0); manifest.layout.chunks.len()];
        let mut files = Vec::with_capacity(manifest.files.len());
        for (index, file) in manifest.files.iter().enumerate() {
            for (position, entry) in file.chunks.iter().enumerate().filter(|(_, entry)| !entry.is_stale) {
                places[entry.chunk.index()] = (index as u32, position as u32);
            }
            files.push(ShardFile::open(path, file, &manifest)?);
        }
        Ok(Checkpoint { path: path.into(), manifest, files, places })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known of it without reading its parameters.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The clock with which training goes on.
    pub fn clock(&self) -> Clock {
        self.manifest.state.clock
    }

    /// One chunk, from whichever file holds it.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if its bytes are not those that were written, or there is no such chunk.
    pub fn chunk(&self, id: ChunkId) -> Result<ChunkData<'_>> {
        let Some((file, position)) = self.places.get(id.index()).copied() else {
            let defect = format!("has {} chunks, and chunk {} is asked for", self.places.len(), id.0);
            return Err(Error::Checkpoint { path: self.path.clone(), defect });
        };
        let entry = &self.manifest.files[file as usize].chunks[position as usize];
        self.files[file as usize].chunk(position as usize, entry)
    }

    /// Reads everything, stale chunks of linked files too, and checks every sum. Returns how many bytes that were.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] for the first file whose bytes are not those that were written.
    pub fn verify(&self) -> Result<u64> {
        let mut bytes = 0;
        for (file, written) in self.files.iter().zip(&self.manifest.files) {
            for (position, entry) in written.chunks.iter().enumerate() {
                file.chunk(position, entry)?;
            }
            // The chunks and the header cover every byte; this sum is for tools that know nothing of chunks.
            if crc32c::crc32c(&file.map) != written.crc32c {
                return Err(damaged(&file.path, "is damaged: the CRC-32C of the file is not that of the manifest"));
            }
            bytes += written.bytes;
        }
        Ok(bytes)
    }

    /// Whether a job with this layout can go on from it: the same tensors, in the same order, cut alike. The number of shards
    /// and of workers may differ (see [`Checkpoint::same_contributors`]).
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] naming the first tensor that differs, with both shapes.
    pub fn matches(&self, layout: &Layout) -> Result<()> {
        let table = &self.manifest.layout;
        let differs = |defect: String| Err(Error::Checkpoint { path: self.path.clone(), defect });
        for (index, entry) in table.tensors.iter().enumerate() {
            let Some(tensor) = layout.tensor(&entry.name) else {
                return differs(format!(
                    "holds tensor `{}` {:?}, which the job does not declare",
                    entry.name, entry.shape
                ));
            };
            if let Some(difference) = difference(entry, tensor) {
                return differs(difference);
            }
            if layout.tensors[index].spec.name != entry.name {
                return differs(format!(
                    "has `{}` as tensor {index}, the job has `{}` there; declare them in the same order",
                    entry.name, layout.tensors[index].spec.name
                ));
            }
        }
        if let Some(tensor) = layout.tensors.get(table.tensors.len()) {
            let (name, shape) = (&tensor.spec.name, &tensor.spec.shape);
            return differs(format!("holds no tensor `{name}`, which the job declares as {shape:?}"));
        }
        if table.chunk_elements != layout.options.chunk_elements {
            return differs(format!(
                "was cut into chunks of {} elements, the job asks for {}; the size decides bits, so set it to {}",
                table.chunk_elements, layout.options.chunk_elements, table.chunk_elements
            ));
        }
        let cut = layout.chunks.iter().map(|chunk| (chunk.start, chunk.len));
        if !cut.eq(table.chunks.iter().copied()) {
            return differs(
                "is cut into other chunks than the job's, because other workers share its tensors; start the workers that \
                 declare them as before"
                    .into(),
            );
        }
        Ok(())
    }

    /// Whether the same workers contribute to every tensor: only then does training go on with the same bits.
    pub fn same_contributors(&self, layout: &Layout) -> bool {
        let now = layout.tensors.iter().map(|tensor| &tensor.contributors);
        self.manifest.layout.tensors.iter().map(|tensor| &tensor.contributors).eq(now)
    }
}

impl ShardFile {
    fn open(dir: &Path, written: &ShardWritten, manifest: &Manifest) -> Result<ShardFile> {
        let path = dir.join(&written.name);
        if !path.exists() {
            return Err(damaged(&path, "is missing"));
        }
        let map = Map::open(&path, u64::MAX)?;
        if map.len() as u64 != written.bytes {
            let defect =
                format!("has {} bytes, and {} were written: it is truncated or foreign", map.len(), written.bytes);
            return Err(damaged(&path, &defect));
        }
        let (data_start, metadata) = decode_header(&map).map_err(|defect| damaged(&path, &defect))?;
        if crc32c::crc32c(&map[..data_start]) != written.header_crc32c {
            return Err(damaged(
                &path,
                "is damaged or of another checkpoint: the CRC-32C of its header is not the manifest's",
            ));
        }
        let mut arrays = Vec::with_capacity(written.chunks.len());
        let mut end = 0;
        for entry in &written.chunks {
            let len = manifest.layout.chunks[entry.chunk.index()].1 as usize;
            let there = |array: &str| metadata.info(&format!("chunk.{}.{array}", entry.chunk.0)).is_some();
            let place = Arrays { start: end, len, first: there("first"), second: there("second") };
            // The header's own offsets need not be read: its sum says that our writer made it, and that writer puts the arrays
            // of the manifest's chunks one after another.
            end += len * 4 * (1 + usize::from(place.first) + usize::from(place.second));
            arrays.push(place);
        }
        if data_start + end != map.len() || !data_start.is_multiple_of(DATA_ALIGNMENT) {
            return Err(damaged(&path, "does not hold the chunks that its manifest lists"));
        }
        Ok(ShardFile { path, map, data_start, arrays })
    }

    fn chunk<'a>(&'a self, position: usize, entry: &'a ChunkWritten) -> Result<ChunkData<'a>> {
        let Arrays { start, len, first, second } = self.arrays[position];
        let count = 1 + usize::from(first) + usize::from(second);
        let bytes = &self.map[self.data_start + start..][..count * len * 4];
        let sum = crc32c::crc32c(bytes);
        if sum != entry.crc32c {
            let (chunk, at) = (entry.chunk.0, self.data_start + start);
            return Err(damaged(
                &self.path,
                &format!(
                    "is damaged: chunk {chunk}, {} bytes at {at}, has the CRC-32C {sum:08x}, not {:08x}",
                    bytes.len(),
                    entry.crc32c
                ),
            ));
        }
        let (master, rest) = bytemuck::cast_slice(bytes).split_at(len);
        let (first, second) = rest.split_at(if first { len } else { 0 });
        Ok(ChunkData { version: entry.version, steps: entry.steps, clocks: &entry.clocks, master, first, second })
    }
}

fn difference(entry: &TensorEntry, tensor: &Tensor) -> Option<String> {
    let name = &entry.name;
    if entry.shape != tensor.spec.shape {
        return Some(format!(
            "holds tensor `{name}` as {:?}, the job declares it as {:?}",
            entry.shape, tensor.spec.shape
        ));
    }
    (entry.group != tensor.spec.group).then(|| {
        format!(
            "holds tensor `{name}` in parameter group {}, the job declares it in group {}",
            entry.group, tensor.spec.group
        )
    })
}

fn damaged(path: &Path, defect: &str) -> Error {
    Error::Checkpoint { path: path.into(), defect: format!("{defect}; {ADVICE}") }
}

fn no_manifest(path: &Path) -> Error {
    let inside = paths::list(path).unwrap_or_default();
    let defect = match inside.iter().find(|(_, stage)| *stage == Stage::Complete) {
        Some((clock, stage)) => {
            format!(
                "is a directory of checkpoints, not one; the newest in it is {}",
                directory(path, *clock, *stage).display()
            )
        }
        None if path.is_dir() => {
            format!("has no {MANIFEST}: it is no checkpoint, or its write never finished; use an older one")
        }
        None => "is not a directory".into(),
    };
    Error::Checkpoint { path: path.into(), defect }
}

/// What a directory of checkpoints offers.
#[derive(Debug)]
pub struct Latest {
    /// The newest that can be used, if any.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that cannot, newest first.
    pub passed_over: Vec<PassedOver>,
}

/// A checkpoint that cannot be used.
#[derive(Debug)]
pub struct PassedOver {
    /// Its directory.
    pub path: PathBuf,
    /// Why not.
    pub why: Error,
}

/// The newest complete checkpoint in a directory; none if there is none, or no such directory.
///
/// # Errors
///
/// [`Error::File`] if the directory cannot be listed.
pub fn latest(dir: &Path) -> Result<Latest> {
    latest_where(dir, |_| Ok(()))
}

/// The newest complete checkpoint in a directory that passes one more check, such as [`Checkpoint::verify`].
///
/// # Errors
///
/// [`Error::File`] if the directory cannot be listed.
pub fn latest_where(dir: &Path, check: impl Fn(&Checkpoint) -> Result<()>) -> Result<Latest> {
    let mut passed_over = Vec::new();
    for (path, opened) in list(dir)? {
        match opened.and_then(|checkpoint| check(&checkpoint).map(|()| checkpoint)) {
            Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), passed_over }),
            Err(why) => passed_over.push(PassedOver { path, why }),
        }
    }
    Ok(Latest { checkpoint: None, passed_over })
}

/// Everything in a directory that is named as a checkpoint, newest first: open, or why it cannot be used. Each is opened when
/// its turn comes.
///
/// # Errors
///
/// [`Error::File`] if the directory cannot be listed.
pub fn list(dir: &Path) -> Result<impl Iterator<Item = (PathBuf, Result<Checkpoint>)>> {
    let found = paths::list(dir)?.into_iter().map(|(clock, stage)| (directory(dir, clock, stage), stage));
    Ok(found.map(|(path, stage)| {
        let defect = match stage {
            Stage::Complete | Stage::Replaced => {
                let opened = Checkpoint::open(&path);
                return (path, opened);
            }
            Stage::Writing => "is being written, or its write never finished",
            Stage::Removing => "is being removed",
        };
        let why = Error::Checkpoint { path: path.clone(), defect: defect.into() };
        (path, Err(why))
    }))
}

/// The checkpoint at `path`, or the newest complete one in the directory `path`.
///
/// # Errors
///
/// [`Error::Checkpoint`] if it cannot be used, or if there is none.
pub fn find(path: &Path) -> Result<Latest> {
    if path.join(MANIFEST).exists() {
        return Ok(Latest { checkpoint: Some(Checkpoint::open(path)?), passed_over: Vec::new() });
    }
    let latest = latest(path)?;
    if latest.checkpoint.is_none() {
        let why = latest.passed_over.first().map_or(String::new(), |passed| format!("; the newest: {}", passed.why));
        let defect = format!("there is no complete checkpoint here{why}");
        return Err(Error::Checkpoint { path: path.into(), defect });
    }
    Ok(latest)
}
