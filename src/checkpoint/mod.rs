//! Checkpoints: what lets a job that ended go on with the same bits, and what carries a trained model to other tools.
//!
//! A checkpoint is a directory `clock-<12 digits>` with one safetensors file a shard and a `manifest.json`, which is written
//! last. The servers write the shards ([`ShardWriter`], [`write_shard`], [`write_changes`]) into `clock-<12 digits>.writing`, the launcher frames
//! them with [`begin`] and [`commit`]; [`latest`] and [`Checkpoint`] read. `docs/checkpoint.md` has the bytes as tables and
//! says what is guaranteed and which test shows it.
//!
//! Invariant: a directory whose name is `clock-` and digits alone was complete and durable before it got that name, and nothing
//! in it is written again.

mod changes;
mod disk;
mod export;
mod files;
mod import;
mod manifest;
mod paths;
mod reader;
mod stream;
mod writer;

pub use changes::{Stored, write_changes};
pub use export::export;
pub use files::decode_header;
pub use import::InitialParameters;
pub use manifest::{
    ChunkWritten, FORMAT_VERSION, JobState, LayoutTable, Manifest, ShardWritten, TensorEntry, decode_manifest,
    seal_manifest,
};
pub use reader::{Checkpoint, ChunkData, Latest, PassedOver, find, latest, latest_where, list};
pub use writer::{ChunkPlan, ChunkState, ShardWriter, abandon, begin, commit, prune, write_shard};

/// The newest clock that a directory's twelve digits can name.
pub const CLOCK_MAX: u64 = 999_999_999_999;

// The files hold little-endian numbers and are read in place.
const _: () = assert!(cfg!(target_endian = "little"));

#[cfg(test)]
mod tests;
