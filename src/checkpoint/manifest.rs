//! The manifest: what a checkpoint is of, where each chunk lies, and the sums by which damage is noticed.
//!
//! The text is one JSON object on one line, whose last member `sha256` is the sum of every byte before it.
//!
//! Invariant: a [`Manifest`] that [`decode_manifest`] returned names every chunk of its own layout exactly once, and its chunks
//! tile its flat space.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{CLOCK_MAX, paths};
use crate::{
    consistency::Consistency,
    layout::{ALIGNMENT, Init, Layout},
    types::{ChunkId, Clock, Epoch, ShardId, Version},
};

/// The format this code writes. It reads every version up to this one.
pub const FORMAT_VERSION: u64 = 3;

/// The version in which chunks may tell of each contributor's clock.
const FORMAT_WITH_CLOCKS: u64 = 2;

/// The version in which a shard may have files of older checkpoints.
const FORMAT_WITH_LINKS: u64 = 3;

const FORMAT: &str = "gradwire-checkpoint";

/// A chunk takes about 100 bytes and a tensor about 200: this is enough for 4 million chunks (1 MiB each: 10^12 parameters)
/// and a million tensors.
pub(super) const MANIFEST_BYTES_MAX: u64 = 1 << 30;

/// What a job says of itself when it writes a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobState {
    /// The job's name.
    pub job: String,
    /// Every push of an earlier clock is in; the next push of every worker carries this one.
    pub clock: Clock,
    /// The membership that wrote it.
    pub epoch: Epoch,
    /// What an update was and how far ahead one could run.
    pub consistency: Consistency,
    /// The seed of initial values, data order and random numbers.
    pub seed: u64,
    /// The optimizer's settings, as the optimizer writes them.
    pub optimizer: Value,
    /// Where the learning rate stands, as its schedule writes it.
    pub learning_rate: Value,
    /// What else the job had changed of its rules: a live clip norm, the loss scale; null if nothing.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub live: Value,
}

/// A tensor of the model and its place in the flat space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Unique within the model.
    pub name: String,
    /// Elements along each dimension; empty for a scalar.
    pub shape: Vec<u64>,
    /// How it was filled before the first step.
    pub init: Init,
    /// Parameter group.
    pub group: u16,
    /// First element in the flat space.
    pub start: u64,
    /// Workers that declared it, in rank order.
    pub contributors: Vec<u16>,
}

/// How the model lay in the servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutTable {
    /// Elements of a full chunk.
    pub chunk_elements: u32,
    /// Shards of the job that wrote it.
    pub shards: u16,
    /// Elements of the flat space, padding included.
    pub elements: u64,
    /// In model order.
    pub tensors: Vec<TensorEntry>,
    /// By chunk: first element in the flat space, and number of elements.
    pub chunks: Vec<(u64, u32)>,
}

/// A chunk as it lies in a shard's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkWritten {
    /// Which.
    pub chunk: ChunkId,
    /// How often it had been brought up to date.
    pub version: Version,
    /// How many steps its optimizer had taken.
    pub steps: u64,
    /// CRC-32C of its arrays, one after another.
    pub crc32c: u32,
    /// How many clocks of each contributor are in it, in rank order; empty where these are the checkpoint's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clocks: Vec<Clock>,
    /// Another file holds a later state of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_stale: bool,
}

/// A file of a shard, as its writer reports it to whoever commits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardWritten {
    /// Which shard.
    pub shard: ShardId,
    /// The file's name within the checkpoint.
    pub name: String,
    /// The older checkpoint for which it was written, of a file that is only linked to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Clock>,
    /// Its length.
    pub bytes: u64,
    /// CRC-32C of its length field and header.
    pub header_crc32c: u32,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
    /// Its chunks, in the order in which they lie.
    pub chunks: Vec<ChunkWritten>,
}

/// Everything that is known of a checkpoint without reading its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    format_version: u64,
    /// The version of gradwire that wrote it.
    pub gradwire: String,
    /// What the job said of itself.
    pub state: JobState,
    /// How the model lay.
    pub layout: LayoutTable,
    /// The files, by shard, of those that have chunks; of a shard that which was written for this checkpoint first, then the older ones.
    pub files: Vec<ShardWritten>,
}

impl LayoutTable {
    /// The table of a layout.
    pub fn new(layout: &Layout) -> LayoutTable {
        let entry = |tensor: &crate::layout::Tensor| TensorEntry {
            name: tensor.spec.name.clone(),
            shape: tensor.spec.shape.clone(),
            init: tensor.spec.init,
            group: tensor.spec.group,
            start: tensor.start,
            contributors: tensor.contributors.clone(),
        };
        LayoutTable {
            chunk_elements: layout.options.chunk_elements,
            shards: layout.options.shards,
            elements: layout.elements,
            tensors: layout.tensors.iter().map(entry).collect(),
            chunks: layout.chunks.iter().map(|chunk| (chunk.start, chunk.len)).collect(),
        }
    }
}

impl Manifest {
    /// Of what a job and its shards' writers say.
    pub fn new(state: JobState, layout: &Layout, mut files: Vec<ShardWritten>) -> Manifest {
        files.sort_by_key(|file| (file.shard, file.since));
        // The lowest version that can say it: programs that do not know a later one read what they can.
        let format_version = match (has_links(&files), has_clocks(&files)) {
            (true, _) => FORMAT_WITH_LINKS,
            (false, true) => FORMAT_WITH_CLOCKS,
            (false, false) => 1,
        };
        Manifest {
            format: FORMAT.into(),
            format_version,
            gradwire: env!("CARGO_PKG_VERSION").into(),
            state,
            layout: LayoutTable::new(layout),
            files,
        }
    }

    /// The version of the format it is written in.
    pub fn format_version(&self) -> u64 {
        self.format_version
    }

    /// Its text.
    pub(super) fn encode(&self) -> Vec<u8> {
        seal_manifest(&serde_json::to_vec(self).expect("maps with text keys only"))
    }

    /// Says what does not fit together.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.state.clock > CLOCK_MAX {
            return Err(format!("its clock {} is beyond {CLOCK_MAX}", self.state.clock));
        }
        self.layout.check()?;
        if self.format_version < FORMAT_WITH_CLOCKS && has_clocks(&self.files) {
            return Err(format!(
                "it tells of contributors' clocks, which format version {} does not",
                self.format_version
            ));
        }
        if self.format_version < FORMAT_WITH_LINKS && has_links(&self.files) {
            return Err(format!(
                "it names files of older checkpoints, which format version {} does not",
                self.format_version
            ));
        }
        // A shard without chunks has no file; which shard has which chunk is seen in the files alone.
        let mut before = None;
        let mut held = vec![false; self.layout.chunks.len()];
        for (index, file) in self.files.iter().enumerate() {
            let follows = before.replace((file.shard, file.since)) < Some((file.shard, file.since));
            let is_older = file.since.is_none_or(|since| since < self.state.clock);
            let is_named = file.shard.0 < self.layout.shards && file.name == paths::shard_file(file.shard, file.since);
            if !follows || !is_older || !is_named {
                return Err(format!("its file {index} is `{}` of shard {}", file.name, file.shard.0));
            }
            for entry in &file.chunks {
                let chunk = entry.chunk.0;
                match held.get_mut(entry.chunk.index()) {
                    Some(_) if entry.is_stale && file.since.is_some() => {}
                    Some(_) if entry.is_stale => {
                        return Err(format!("`{}` was written with the stale chunk {chunk}", file.name));
                    }
                    None => return Err(format!("`{}` lists chunk {chunk}, and there are {}", file.name, held.len())),
                    Some(true) => return Err(format!("`{}` lists chunk {chunk}, which is listed before", file.name)),
                    Some(seen) => *seen = true,
                }
            }
        }
        match held.iter().position(|seen| !seen) {
            Some(chunk) => Err(format!("no file holds chunk {chunk}")),
            None => Ok(()),
        }
    }
}

impl LayoutTable {
    fn check(&self) -> Result<(), String> {
        let mut names = HashSet::new();
        let mut end = 0u64;
        for tensor in &self.tensors {
            let name = &tensor.name;
            if !names.insert(name.as_str()) {
                return Err(format!("it lists tensor `{name}` twice"));
            }
            if tensor.start != end {
                return Err(format!("tensor `{name}` begins at {} where {end} is expected", tensor.start));
            }
            let len = tensor.shape.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension));
            end = len
                .filter(|len| *len > 0)
                .and_then(|len| len.checked_next_multiple_of(ALIGNMENT))
                .and_then(|len| end.checked_add(len))
                .ok_or_else(|| format!("tensor `{name}` has the impossible shape {:?}", tensor.shape))?;
            if tensor.contributors.is_empty() || !tensor.contributors.is_sorted_by(|a, b| a < b) {
                return Err(format!("tensor `{name}` has the contributors {:?}", tensor.contributors));
            }
        }
        if end != self.elements || end == 0 || self.shards == 0 {
            return Err(format!(
                "its tensors have {end} elements, it speaks of {} on {} shards",
                self.elements, self.shards
            ));
        }
        let mut end = 0u64;
        for (index, (start, len)) in self.chunks.iter().enumerate() {
            let fits = *len > 0 && *len <= self.chunk_elements && u64::from(*len).is_multiple_of(ALIGNMENT);
            if *start != end || !fits {
                return Err(format!("chunk {index} has {len} elements from {start} on, where {end} is expected"));
            }
            end = end.checked_add(u64::from(*len)).ok_or_else(|| format!("chunk {index} ends beyond 2^64"))?;
        }
        if end != self.elements {
            return Err(format!("its chunks have {end} elements, its tensors {}", self.elements));
        }
        Ok(())
    }
}

fn has_clocks(files: &[ShardWritten]) -> bool {
    files.iter().flat_map(|file| &file.chunks).any(|entry| !entry.clocks.is_empty())
}

fn has_links(files: &[ShardWritten]) -> bool {
    files.iter().any(|file| file.since.is_some() || file.chunks.iter().any(|entry| entry.is_stale))
}

const SEAL: &[u8] = b",\"sha256\":\"";
const SEAL_END: &[u8] = b"\"}\n";

/// Puts the sum of all before it as the last member of a JSON object. (For tests and fuzzers, which need texts whose sum is
/// right to reach what lies behind that check.)
pub fn seal_manifest(object: &[u8]) -> Vec<u8> {
    let mut text = object.strip_suffix(b"}").unwrap_or(object).to_vec();
    let sum = sum_of(&text);
    text.extend_from_slice(SEAL);
    text.extend_from_slice(sum.as_bytes());
    text.extend_from_slice(SEAL_END);
    text
}

/// Reads a manifest, refusing whatever is not exactly one.
///
/// # Errors
///
/// In words, what is wrong and what to do.
pub fn decode_manifest(bytes: &[u8]) -> Result<Manifest, String> {
    #[derive(Deserialize)]
    struct Identity {
        format: Option<String>,
        format_version: Option<u64>,
    }
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(format!("it has {} bytes, more than the {MANIFEST_BYTES_MAX} a manifest may have", bytes.len()));
    }
    let object = unseal(bytes);
    // A stranger's file and that of a newer version have no sum that we could know, so identity is asked first where there is
    // one to read, and the sum decides only whether what is said can be believed.
    let identity: Option<Identity> = match &object {
        Ok(object) => serde_json::from_slice(object).ok(),
        Err(_) => serde_json::from_slice(bytes).ok(),
    };
    match identity {
        Some(Identity { format, .. }) if format.as_deref() != Some(FORMAT) => {
            return Err("it is not the manifest of a gradwire checkpoint: name a directory that gradwire wrote".into());
        }
        Some(Identity { format_version: Some(version), .. }) if version == 0 || version > FORMAT_VERSION => {
            return Err(format!(
                "it is in format version {version}, and this gradwire ({}) reads up to version {FORMAT_VERSION}: use the \
                 gradwire that wrote it, or a newer one",
                env!("CARGO_PKG_VERSION")
            ));
        }
        _ => {}
    }
    let manifest: Manifest =
        serde_json::from_slice(&object?).map_err(|error| format!("its sum is right, but its text is not: {error}"))?;
    manifest.check().map_err(|defect| format!("its sum is right, but {defect}"))?;
    Ok(manifest)
}

/// The object without its seal.
fn unseal(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let sealed = bytes.len().checked_sub(SEAL.len() + 64 + SEAL_END.len()).map(|at| bytes.split_at(at));
    let (text, sum) = sealed
        .and_then(|(text, seal)| Some((text, seal.strip_prefix(SEAL)?.strip_suffix(SEAL_END)?)))
        .ok_or("it does not end with its own SHA-256: it is truncated or damaged")?;
    let found = sum_of(text);
    if found.as_bytes() != sum {
        return Err(format!("it is damaged: the SHA-256 of its text is {found}, not {}", String::from_utf8_lossy(sum)));
    }
    let mut object = text.to_vec();
    object.push(b'}');
    Ok(object)
}

fn sum_of(text: &[u8]) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
