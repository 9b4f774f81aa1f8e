//! A frame's header to bytes and back, checksums included: once a message on every path over sockets and shared memory.
//!
//! Invariant: what is read back is what was written.

use std::hint::black_box;

use criterion::Criterion;
use gradwire::{
    types::ChunkId,
    wire::{FrameHeader, FrameTarget, Note, NoteKind},
};

/// A push's header.
pub fn header(length: u32) -> FrameHeader {
    let note = Note { chunk: ChunkId(7), clock: 12, length, weight: 1, ..Note::new(NoteKind::Push) };
    FrameHeader { target: Some(FrameTarget { rkey: 3, offset: 1 << 20 }), note }
}

pub fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("framing");
    let header = header(1 << 20);
    let bytes = header.encode();
    assert_eq!(FrameHeader::decode(&bytes), Ok(header));
    group.bench_function("encode a push's header", |bencher| bencher.iter(|| black_box(&header).encode()));
    group.bench_function("decode a push's header", |bencher| bencher.iter(|| FrameHeader::decode(black_box(&bytes))));
    group.finish();
}
