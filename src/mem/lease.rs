//! Leases: the only way to touch registered bytes.
//!
//! A [`Lease`] is exclusive and moves: into a work request, and back out of its completion. A [`SharedLease`] is what a lease
//! becomes while several readers (sends) use it; it becomes a lease again when the last one is done.
//!
//! ```compile_fail
//! use gradwire::mem::{Region, RegionOptions};
//! let (_region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! let (left, right) = lease.split_at(64);
//! lease.bytes(); // the range was given away: it cannot be used twice
//! ```
//!
//! Invariant: the blocks of one mapping never overlap, and a block behind a `Lease` has exactly one owner.

use std::{ptr::NonNull, sync::Arc};

use super::region::Mapping;

#[derive(Debug)]
struct Block {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
}

/// An exclusive byte range of a region.
#[derive(Debug)]
pub struct Lease {
    block: Arc<Block>,
}

/// A read-only byte range of a region, counted.
#[derive(Clone, Debug)]
pub struct SharedLease {
    block: Arc<Block>,
}

impl Lease {
    /// The lease over all of a new mapping.
    pub(super) fn whole(mapping: Arc<Mapping>) -> Lease {
        let len = mapping.len();
        Lease { block: Arc::new(Block { mapping, start: 0, len }) }
    }

    /// Offset of the first byte within the region.
    pub fn offset(&self) -> usize {
        self.block.start
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.block.len
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.block.len == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the block lies within its mapping (checked when it was cut), which the block keeps alive; nobody else holds a
        // lease on it.
        unsafe { std::slice::from_raw_parts(self.block.pointer().as_ptr(), self.block.len) }
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` on the block's only owner makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.block.pointer().as_ptr(), self.block.len) }
    }

    /// Cuts the range in two: `[0, at)` and `[at, len)`. Allocates; for use at start, not on the data path.
    ///
    /// # Panics
    ///
    /// If `at` lies beyond the end.
    pub fn split_at(self, at: usize) -> (Lease, Lease) {
        assert!(at <= self.block.len, "split at {at} of {}", self.block.len);
        let Block { mapping, start, len } = &*self.block;
        let cut = |start, len| Lease { block: Arc::new(Block { mapping: mapping.clone(), start, len }) };
        (cut(*start, at), cut(start + at, len - at))
    }

    /// Cuts the range into pieces of `size` bytes each (the last may be shorter).
    pub fn chunks(self, size: usize) -> Vec<Lease> {
        let mut pieces = Vec::new();
        let mut rest = self;
        while rest.len() > size {
            let (piece, tail) = rest.split_at(size);
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }

    /// Makes the range readable by many; [`SharedLease::thaw`] is the way back.
    pub fn freeze(self) -> SharedLease {
        SharedLease { block: self.block }
    }

    pub(super) fn mapping(&self) -> *const Mapping {
        Arc::as_ptr(&self.block.mapping)
    }
}

impl SharedLease {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.block.len
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.block.len == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as in `Lease::bytes`; while a block is shared nobody can obtain `bytes_mut` of it.
        unsafe { std::slice::from_raw_parts(self.block.pointer().as_ptr(), self.block.len) }
    }

    /// The exclusive lease again, if this was the last holder; itself otherwise.
    pub fn thaw(mut self) -> Result<Lease, SharedLease> {
        match Arc::get_mut(&mut self.block) {
            Some(_) => Ok(Lease { block: self.block }),
            None => Err(self),
        }
    }
}

impl Block {
    fn pointer(&self) -> NonNull<u8> {
        debug_assert!(self.start + self.len <= self.mapping.len());
        // SAFETY: start lies within the mapping (see the invariant of this file).
        unsafe { self.mapping.start().add(self.start) }
    }
}
