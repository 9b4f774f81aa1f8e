//! Tests of the checkpoint code, and what they share: small jobs whose contents are functions of their names.
//!
//! Invariant: nothing here is compiled into the library.
#![forbid(unsafe_code)]

mod changes;
mod crash;
mod damage;
mod model_disk;
mod round_trip;
mod stored;
mod transfer;

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{
    changes::write_changes_on,
    disk::Disk,
    writer::{begin_on, commit_on, write_shard_on},
    *,
};
use crate::{
    Result,
    consistency::Consistency,
    layout::{Init, Layout, LayoutOptions, TensorSpec},
    types::{ChunkId, Clock, ShardId},
};

/// Three tensors in three chunks: a tensor that spans chunks, one that shares a chunk, a scalar; each needs padding.
fn small_layout(shards: u16) -> Layout {
    let tensors = vec![
        TensorSpec::new("embedding.weight", [5, 7]).init(Init::Normal(0.02)),
        TensorSpec::new("bias", [3]).group(1),
        TensorSpec::new("scale", []).init(Init::Constant(1.0)),
    ];
    Layout::build(&[tensors.clone(), tensors], LayoutOptions { chunk_elements: 32, shards }).unwrap()
}

fn state(clock: Clock) -> JobState {
    JobState {
        job: "test".into(),
        clock,
        epoch: 0,
        consistency: Consistency::Bsp,
        seed: u64::MAX - 1,
        optimizer: json!({ "name": "adamw", "beta1": 0.9 }),
        learning_rate: json!({ "now": 0.1 }),
        live: serde_json::Value::Null,
    }
}

/// Element `index` of an array of a chunk at a clock: another number for each.
fn value(clock: Clock, chunk: ChunkId, array: u32, index: u32) -> f32 {
    clock as f32 + chunk.0 as f32 * 0.125 + array as f32 * 1024.0 - index as f32 * 65536.0
}

/// The contents of a chunk, with the arrays that an optimizer keeping `moments` of them has.
#[derive(Clone, Debug, PartialEq)]
struct Contents {
    chunk: ChunkId,
    version: u64,
    steps: u64,
    clocks: Vec<Clock>,
    arrays: [Vec<f32>; 3],
}

impl Contents {
    fn at(layout: &Layout, clock: Clock, chunk: ChunkId, moments: u32) -> Contents {
        let array = |array: u32| match array <= moments {
            true => (0..layout.chunk(chunk).len).map(|index| value(clock, chunk, array, index)).collect(),
            false => Vec::new(),
        };
        let arrays = [array(0), array(1), array(2)];
        Contents { chunk, version: clock, steps: clock * 2, clocks: Vec::new(), arrays }
    }

    /// Chunk 0 takes a step at every clock, the others rarely; clocks pass over all of them.
    fn rare(layout: &Layout, clock: Clock, chunk: ChunkId) -> Contents {
        let last = clock - clock % [1, 4, 13][chunk.index()];
        Contents { version: clock, ..Contents::at(layout, last, chunk, 2) }
    }

    fn state(&self) -> ChunkState<'_> {
        let [master, first, second] = &self.arrays;
        ChunkState {
            chunk: self.chunk,
            version: self.version,
            steps: self.steps,
            clocks: &self.clocks,
            master,
            first,
            second,
        }
    }

    fn is(&self, data: &ChunkData<'_>) -> bool {
        let [master, first, second] = &self.arrays;
        let same = |a: &[f32], b: &[f32]| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
        (self.version, self.steps, &self.clocks[..]) == (data.version, data.steps, data.clocks)
            && same(master, data.master)
            && same(first, data.first)
            && same(second, data.second)
    }
}

/// Writes a whole checkpoint as a job would: the launcher begins, each server writes its shard, the launcher commits.
fn write_all(disk: &dyn Disk, dir: &Path, layout: &Layout, clock: Clock, moments: u32) -> Result<PathBuf> {
    write_contents(disk, dir, layout, state(clock), |chunk| Contents::at(layout, clock, chunk, moments))
}

/// The same with other contents.
fn write_contents(
    disk: &dyn Disk,
    dir: &Path,
    layout: &Layout,
    state: JobState,
    contents: impl Fn(ChunkId) -> Contents,
) -> Result<PathBuf> {
    let clock = state.clock;
    begin_on(disk, dir)?;
    let mut written = Vec::new();
    // The second server reports first: the order in which reports come must not matter.
    for (shard, chunks) in layout.shards.iter().enumerate().rev() {
        let contents: Vec<_> = chunks.iter().map(|chunk| contents(*chunk)).collect();
        let states = contents.iter().map(Contents::state);
        written.push(write_shard_on(disk, dir, clock, ShardId(shard as u16), states)?);
    }
    commit_on(disk, dir, &Manifest::new(state, layout, written))
}

/// What the newest checkpoint in a directory has of a shard, as its writer would have kept it.
fn stored_before(dir: &Path, shard: ShardId) -> Option<Stored> {
    let before = latest(dir).unwrap().checkpoint?;
    let files = before.manifest().files.iter().filter(|file| file.shard == shard).cloned().collect();
    Some(Stored { clock: before.clock(), files })
}

/// Writes a whole checkpoint in which few chunks have changed since the newest one that there is.
fn write_rare(disk: &dyn Disk, dir: &Path, layout: &Layout, clock: Clock) -> Result<PathBuf> {
    begin_on(disk, dir)?;
    let mut written = Vec::new();
    for (shard, chunks) in (0..).map(ShardId).zip(&layout.shards) {
        let contents: Vec<_> = chunks.iter().map(|chunk| Contents::rare(layout, clock, *chunk)).collect();
        let states: Vec<_> = contents.iter().map(Contents::state).collect();
        match stored_before(dir, shard) {
            Some(before) => written.extend(write_changes_on(disk, dir, clock, shard, &states, &before)?),
            None => written.push(write_shard_on(disk, dir, clock, shard, states.into_iter())?),
        }
    }
    commit_on(disk, dir, &Manifest::new(state(clock), layout, written))
}

/// Asserts that a checkpoint is that of `clock` in every bit.
fn assert_is(checkpoint: &Checkpoint, layout: &Layout, clock: Clock, moments: u32) {
    assert_holds(checkpoint, layout, clock, |chunk| Contents::at(layout, clock, chunk, moments));
}

/// The same with other contents.
fn assert_holds(checkpoint: &Checkpoint, layout: &Layout, clock: Clock, contents: impl Fn(ChunkId) -> Contents) {
    assert_eq!(checkpoint.manifest().state, state(clock));
    checkpoint.matches(layout).unwrap();
    for index in 0..layout.chunks.len() as u32 {
        let expected = contents(ChunkId(index));
        assert!(expected.is(&checkpoint.chunk(ChunkId(index)).unwrap()), "chunk {index} at clock {clock}");
    }
    checkpoint.verify().unwrap();
}
