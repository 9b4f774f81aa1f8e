//! The part of a layout that one worker has: which chunks it pushes to, and where they lie in its own flat buffers.
//!
//! Invariant: server and worker compute the same view, so that an offset need not travel with every write.

use super::Layout;
use crate::types::{ChunkId, ShardId};

/// One worker's chunks, packed in layout order.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// The worker's own chunks, in layout order.
    pub chunks: Vec<ChunkId>,
    /// By chunk of the whole layout: first element in the worker's buffers, `None` if it is not the worker's.
    starts: Vec<Option<u64>>,
    /// Elements of the worker's buffers.
    pub elements: u64,
}

impl WorkerView {
    /// The view of worker `worker`.
    pub fn new(layout: &Layout, worker: u16) -> WorkerView {
        let mut view = WorkerView { chunks: Vec::new(), starts: vec![None; layout.chunks.len()], elements: 0 };
        for (index, chunk) in layout.chunks.iter().enumerate() {
            if chunk.contributors.binary_search(&worker).is_ok() {
                view.chunks.push(ChunkId(index as u32));
                view.starts[index] = Some(view.elements);
                view.elements += u64::from(chunk.len);
            }
        }
        view
    }

    /// First element of a chunk in the worker's buffers.
    pub fn start(&self, chunk: ChunkId) -> Option<u64> {
        self.starts.get(chunk.index()).copied().flatten()
    }

    /// The worker's own chunks of one shard, in the agreed order of pushing.
    pub fn order(&self, layout: &Layout, shard: ShardId) -> Vec<ChunkId> {
        layout.shards[usize::from(shard.0)].iter().copied().filter(|chunk| self.start(*chunk).is_some()).collect()
    }
}
