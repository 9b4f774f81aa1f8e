//! Leases: the only way to touch registered bytes.
//!
//! A [`Lease`] is exclusive and moves: into a work request, and back out of its completion. A [`SharedLease`] is what a lease
//! becomes while several readers (sends) use it; it becomes a lease again when the last one is done.
//!
//! ```
//! use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! fn post(payload: SharedLease) -> Lease {
//!     payload.thaw().expect("the only holder") // a transport gives it back in the completion
//! }
//! let (mut left, right) = lease.split_at(64);
//! left.bytes_mut().fill(1);
//! let mut left = post(left.freeze());
//! left.bytes_mut()[0] = 2;
//! # drop(right);
//! ```
//!
//! What was split is gone; its bytes are reached through the parts:
//!
//! ```compile_fail,E0382
//! # use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! let (left, right) = lease.split_at(64);
//! lease.bytes();
//! ```
//!
//! What was posted is gone until its completion; a NIC may be reading it:
//!
//! ```compile_fail,E0382
//! # use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, mut lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! fn post(_payload: SharedLease) {}
//! post(lease.freeze());
//! lease.bytes_mut()[0] = 2;
//! ```
//!
//! What was armed is gone until something arrives in it; a NIC may be writing it:
//!
//! ```compile_fail,E0382
//! # use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! fn arm(_slot: Lease) {}
//! arm(lease);
//! lease.bytes();
//! ```
//!
//! A reference into a lease keeps it from being posted:
//!
//! ```compile_fail,E0505
//! # use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, mut lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! fn post(_payload: SharedLease) {}
//! let bytes = lease.bytes_mut();
//! post(lease.freeze());
//! bytes[0] = 2;
//! ```
//!
//! And what is shared is read-only:
//!
//! ```compile_fail,E0599
//! # use gradwire::mem::{Lease, Region, RegionOptions, SharedLease};
//! # let (_region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
//! let mut shared: SharedLease = lease.freeze();
//! shared.bytes_mut();
//! ```
//!
//! Invariant: the blocks of one mapping never overlap, and a block behind a `Lease` has exactly one owner. It holds by
//! induction: `whole` makes the first block, once a mapping (its one caller is `Region::allocate`); `split_at` and `join` consume
//! what they cut or glue; nothing else makes a block, and a block is shared only after `freeze` has consumed its lease.

use std::{
    ops::Not,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::region::{Mapping, RegionId};

#[derive(Debug)]
struct Block {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
    /// While it is shared: a length + 1 and the checksum of so many bytes; 0 if none has been asked for.
    checked: AtomicU64,
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
    /// The lease over all of a new mapping; at most one a mapping.
    pub(super) fn whole(mapping: Arc<Mapping>) -> Lease {
        let len = mapping.len();
        Lease { block: Arc::new(Block::new(mapping, 0, len)) }
    }

    /// The region that the range is of.
    pub fn region_id(&self) -> RegionId {
        self.block.mapping.id()
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
    ///
    /// # Panics
    ///
    /// If they lie on a device ([`Lease::device_address`]): the processor cannot reach them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies within its mapping, which the block keeps mapped and whose bytes the kernel zeroed at birth. No
        // other lease overlaps it (invariant of this file), a `Lease` is the only owner of its block, and `&self` rules out
        // `bytes_mut` meanwhile; devices and peers write only to leases that a transport holds, which then nobody borrows.
        unsafe { std::slice::from_raw_parts(self.block.host_pointer().as_ptr(), self.block.len) }
    }

    /// The bytes, to be written.
    ///
    /// # Panics
    ///
    /// As [`Lease::bytes`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; and `&mut self` on the block's only owner (`freeze` and `thaw` see to that) rules out every
        // other reference into the range.
        unsafe { std::slice::from_raw_parts_mut(self.block.host_pointer().as_ptr(), self.block.len) }
    }

    /// Where a device has the first byte, if the range lies on one.
    pub fn device_address(&self) -> Option<u64> {
        let Block { mapping, start, .. } = &*self.block;
        mapping.is_host().not().then(|| (mapping.start().addr().get() + start) as u64)
    }

    /// Where the processor has the first byte, for a device that copies while this lease is in its hands. No reference comes of it.
    ///
    /// # Panics
    ///
    /// As [`Lease::bytes`].
    pub(crate) fn host_start(&self) -> NonNull<u8> {
        self.block.host_pointer()
    }

    /// Cuts the range in two: `[0, at)` and `[at, len)`. Allocates; for use at start, not on the data path.
    ///
    /// # Panics
    ///
    /// If `at` lies beyond the end.
    pub fn split_at(self, at: usize) -> (Lease, Lease) {
        assert!(at <= self.block.len, "split at {at} of {}", self.block.len);
        let Block { mapping, start, len, .. } = &*self.block;
        let cut = |start, len| Lease { block: Arc::new(Block::new(mapping.clone(), start, len)) };
        (cut(*start, at), cut(start + at, len - at))
    }

    /// Glues two neighbours of one region together, the inverse of [`Lease::split_at`]; both back if `next` does not begin where
    /// `self` ends. Allocates.
    pub fn join(self, next: Lease) -> Result<Lease, (Lease, Lease)> {
        let neighbours = self.region_id() == next.region_id() && self.offset() + self.len() == next.offset();
        if !neighbours {
            return Err((self, next));
        }
        let (mapping, start, len) = (self.block.mapping.clone(), self.offset(), self.len() + next.len());
        Ok(Lease { block: Arc::new(Block::new(mapping, start, len)) })
    }

    /// Cuts the range into pieces of `size` bytes each (the last may be shorter); an empty range is one empty piece.
    ///
    /// # Panics
    ///
    /// If `size` is 0.
    pub fn chunks(self, size: usize) -> Vec<Lease> {
        assert!(size > 0, "chunks of 0 bytes would be infinitely many");
        let mut pieces = Vec::with_capacity(self.len().div_ceil(size).max(1));
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
}

impl SharedLease {
    /// The region that the range is of.
    pub fn region_id(&self) -> RegionId {
        self.block.mapping.id()
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
    ///
    /// # Panics
    ///
    /// As [`Lease::bytes`].
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range is valid as in `Lease::bytes`. While this `SharedLease` is borrowed the block has no `Lease`: the one
        // it had was consumed by `freeze`, and `thaw` makes one only from the last `SharedLease`, by value.
        unsafe { std::slice::from_raw_parts(self.block.host_pointer().as_ptr(), self.block.len) }
    }

    /// CRC-32C of the first `length` bytes, computed once however many ask: nobody can change what is shared. `None` if the bytes
    /// lie on a device.
    ///
    /// # Panics
    ///
    /// If the range is shorter.
    pub fn checksum(&self, length: u32) -> Option<u32> {
        if !self.block.mapping.is_host() {
            return None;
        }
        let known = self.block.checked.load(Ordering::Relaxed);
        if known >> 32 == u64::from(length) + 1 {
            return Some(known as u32);
        }
        let checksum = crc32c::crc32c(&self.bytes()[..length as usize]);
        if length < u32::MAX {
            let both = (u64::from(length) + 1) << 32 | u64::from(checksum);
            self.block.checked.store(both, Ordering::Relaxed);
        }
        Some(checksum)
    }

    /// The bytes, to be written, if this is the only holder.
    ///
    /// # Panics
    ///
    /// As [`Lease::bytes`].
    pub fn sole_bytes_mut(&mut self) -> Option<&mut [u8]> {
        // As in `thaw`, for as long as `self` is borrowed: meanwhile nobody can clone it.
        let block = Arc::get_mut(&mut self.block)?;
        *block.checked.get_mut() = 0;
        // SAFETY: the range is valid as in `Lease::bytes`, and nobody else holds its block.
        Some(unsafe { std::slice::from_raw_parts_mut(block.host_pointer().as_ptr(), block.len) })
    }

    /// The exclusive lease again, if this was the last holder; itself otherwise.
    pub fn thaw(mut self) -> Result<Lease, SharedLease> {
        // `get_mut` and not `strong_count`: it succeeds only for the sole owner (there are no weak ones), and its Acquire meets
        // the Release of every holder dropped before, in whatever thread. So their reads happen before our writes.
        match Arc::get_mut(&mut self.block) {
            Some(block) => {
                *block.checked.get_mut() = 0; // the bytes may change from here on
                Ok(Lease { block: self.block })
            }
            None => Err(self),
        }
    }
}

impl Block {
    fn new(mapping: Arc<Mapping>, start: usize, len: usize) -> Block {
        Block { mapping, start, len, checked: AtomicU64::new(0) }
    }

    /// The first byte, which the processor can reach.
    fn host_pointer(&self) -> NonNull<u8> {
        assert!(
            self.mapping.is_host(),
            "{} lies on a device: its bytes are reached by copies alone",
            self.mapping.id()
        );
        debug_assert!(self.start + self.len <= self.mapping.len());
        // SAFETY: `whole` starts with the mapping's own bounds and `split_at` and `join` keep within those of what they consume,
        // so `start` lies within the mapping or at its end; a mapping is at most isize::MAX bytes (`Region::allocate`).
        unsafe { self.mapping.start().add(self.start) }
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
