//! How a model lies in the servers: tensors in one flat space, cut into chunks, dealt to shards. Pure; server, worker and
//! checkpoint share it.
//!
//! Tensors follow one another in model order, each starting at a multiple of [`ALIGNMENT`] elements; a chunk never crosses into
//! tensors with another set of contributors.
//!
//! Invariant: the layout is a function of the declarations and the job's settings alone; every rank computes the same one.
#![forbid(unsafe_code)]

mod init;
mod philox;
mod span;
mod tensor;
mod view;

pub use init::Init;
pub use span::Span;
pub use tensor::TensorSpec;
pub use view::WorkerView;

use crate::{
    Error, Result,
    types::{ChunkId, ShardId},
};

/// Every tensor starts at a multiple of this many elements: 64 bytes of f32, so that no vector load of one straddles a line.
pub const ALIGNMENT: u64 = 16;

/// The settings that, with the declarations, determine a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutOptions {
    /// Elements of a full chunk; a multiple of [`ALIGNMENT`].
    pub chunk_elements: u32,
    /// Shards of the job.
    pub shards: u16,
}

/// A tensor and its place in the flat space.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// As declared.
    pub spec: TensorSpec,
    /// First element in the flat space.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
    /// Workers that declared it, in rank order.
    pub contributors: Vec<u16>,
}

/// The unit of transfer: a range of the flat space.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// First element in the flat space.
    pub start: u64,
    /// Number of elements.
    pub len: u32,
    /// Its ranges by parameter group.
    pub spans: Vec<Span>,
    /// Workers that push to it, in rank order.
    pub contributors: Vec<u16>,
    /// The shard that owns it.
    pub shard: ShardId,
    /// Its place in the order in which the shard's chunks are pushed.
    pub position: u32,
}

/// A part of a tensor that lies in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which chunk.
    pub chunk: ChunkId,
    /// First element within the chunk.
    pub chunk_start: u32,
    /// First element within the tensor.
    pub tensor_start: u64,
    /// Number of elements.
    pub len: u32,
}

/// The whole model: tensors, chunks, and which shard has what.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// In model order.
    pub tensors: Vec<Tensor>,
    /// In the order of the flat space.
    pub chunks: Vec<Chunk>,
    /// By shard, in the agreed order of pushing: last layers first, as backward produces them.
    pub shards: Vec<Vec<ChunkId>>,
    /// Elements of the flat space, padding included.
    pub elements: u64,
    /// The settings it was built with.
    pub options: LayoutOptions,
}

impl Layout {
    /// Lays out the union of what the workers declare (`declarations[w]` by worker w).
    ///
    /// # Errors
    ///
    /// [`Error::LayoutConflict`] where two workers disagree on a tensor; [`Error::Config`] for an empty or impossible model.
    pub fn build(declarations: &[Vec<TensorSpec>], options: LayoutOptions) -> Result<Layout> {
        if options.chunk_elements == 0 || !u64::from(options.chunk_elements).is_multiple_of(ALIGNMENT) {
            return Err(Error::Config(format!(
                "a chunk must hold a positive multiple of {ALIGNMENT} elements, not {}",
                options.chunk_elements
            )));
        }
        if options.shards == 0 {
            return Err(Error::Config("a job needs at least one shard".into()));
        }
        let mut tensors = Vec::new();
        let mut elements = 0u64;
        for declared in tensor::union(declarations)? {
            let len = declared.spec.elements().expect("checked by union");
            tensors.push(Tensor { spec: declared.spec, start: elements, len, contributors: declared.contributors });
            elements += len.next_multiple_of(ALIGNMENT);
        }
        let mut layout = Layout { chunks: cut(&tensors, options), tensors, shards: Vec::new(), elements, options };
        layout.deal();
        Ok(layout)
    }

    /// The chunk with this id.
    pub fn chunk(&self, id: ChunkId) -> &Chunk {
        &self.chunks[id.index()]
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.spec.name == name)
    }

    /// Elements of the largest chunk.
    pub fn chunk_len_max(&self) -> u32 {
        self.chunks.iter().map(|chunk| chunk.len).max().unwrap_or(0)
    }

    /// The chunks over which a tensor lies, in order.
    pub fn pieces(&self, tensor: &Tensor) -> impl Iterator<Item = Piece> + '_ {
        let (start, end) = (tensor.start, tensor.start + tensor.len);
        let first = self.chunks.partition_point(|chunk| chunk.start + u64::from(chunk.len) <= start);
        self.chunks[first..].iter().enumerate().take_while(move |(_, chunk)| chunk.start < end).map(
            move |(index, chunk)| {
                let from = start.max(chunk.start);
                let to = end.min(chunk.start + u64::from(chunk.len));
                Piece {
                    chunk: ChunkId((first + index) as u32),
                    chunk_start: (from - chunk.start) as u32,
                    tensor_start: from - start,
                    len: (to - from) as u32,
                }
            },
        )
    }

    /// The tensors that lie, wholly or in part, in a chunk.
    pub fn tensors_of(&self, id: ChunkId) -> impl Iterator<Item = &Tensor> + '_ {
        let chunk = self.chunk(id);
        let (start, end) = (chunk.start, chunk.start + u64::from(chunk.len));
        let first = self.tensors.partition_point(|tensor| tensor.start + tensor.len <= start);
        self.tensors[first..].iter().take_while(move |tensor| tensor.start < end)
    }

    /// Deals chunks to shards: each, in layout order, to the shard that has the fewest elements so far.
    fn deal(&mut self) {
        let mut load = vec![0u64; usize::from(self.options.shards)];
        self.shards = vec![Vec::new(); load.len()];
        for (index, chunk) in self.chunks.iter_mut().enumerate() {
            let shard = (0..load.len()).min_by_key(|shard| load[*shard]).expect("at least one shard");
            load[shard] += u64::from(chunk.len);
            chunk.shard = ShardId(shard as u16);
            self.shards[shard].push(ChunkId(index as u32));
        }
        for order in &mut self.shards {
            order.reverse();
            for (position, id) in order.iter().enumerate() {
                self.chunks[id.index()].position = position as u32;
            }
        }
    }
}

/// Cuts the flat space into chunks.
fn cut(tensors: &[Tensor], options: LayoutOptions) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for tensor in tensors {
        let mut start = tensor.start;
        let end = tensor.start + tensor.len.next_multiple_of(ALIGNMENT);
        while start < end {
            let fits = |chunk: &Chunk| chunk.len < options.chunk_elements && chunk.contributors == tensor.contributors;
            if !chunks.last().is_some_and(fits) {
                chunks.push(Chunk {
                    start,
                    len: 0,
                    spans: Vec::new(),
                    contributors: tensor.contributors.clone(),
                    shard: ShardId(0),
                    position: 0,
                });
            }
            let chunk = chunks.last_mut().expect("just pushed");
            let len = u64::from(options.chunk_elements - chunk.len).min(end - start) as u32;
            match chunk.spans.last_mut() {
                Some(span) if span.group == tensor.spec.group => span.len += len,
                _ => chunk.spans.push(Span { start: chunk.len, len, group: tensor.spec.group }),
            }
            chunk.len += len;
            start += u64::from(len);
        }
    }
    chunks
}

#[cfg(test)]
mod tests;
