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

use std::{ops::Not, ptr::NonNull, sync::Arc};

use super::region::{Mapping, RegionId};

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
    /// The lease over all of a new mapping; at most one a mapping.
    pub(super) fn whole(mapping: Arc<Mapping>) -> Lease {
        let len = mapping.len();
        Lease { block: Arc::new(Block { mapping, start: 0, len }) }
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
        let Block { mapping, start, len } = &*self.block;
        let cut = |start, len| Lease { block: Arc::new(Block { mapping: mapping.clone(), start, len }) };
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
        Ok(Lease { block: Arc::new(Block { mapping, start, len }) })
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

    /// The exclusive lease again, if this was the last holder; itself otherwise.
    pub fn thaw(mut self) -> Result<Lease, SharedLease> {
        // `get_mut` and not `strong_count`: it succeeds only for the sole owner (there are no weak ones), and its Acquire meets
        // the Release of every holder dropped before, in whatever thread. So their reads happen before our writes.
        match Arc::get_mut(&mut self.block) {
            Some(_) => Ok(Lease { block: self.block }),
            None => Err(self),
        }
    }
}

impl Block {
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mem::{Region, RegionOptions};

    const BYTES: usize = 4096;

    fn fresh() -> (Region, Lease) {
        Region::allocate(BYTES, &RegionOptions::default()).unwrap()
    }

    /// What a random program does to the leases of a region; numbers are taken modulo what there is.
    #[derive(Clone, Debug)]
    enum Step {
        Split { which: usize, at: usize },
        Join { left: usize, right: usize },
        Write { which: usize, value: u8 },
        Freeze { which: usize },
        Share { which: usize },
        Drop { which: usize },
        Thaw { which: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let which = 0..64usize;
        let step = prop_oneof![
            3 => (which.clone(), 0..=BYTES).prop_map(|(which, at)| Step::Split { which, at }),
            3 => (which.clone(), which.clone()).prop_map(|(left, right)| Step::Join { left, right }),
            3 => (which.clone(), any::<u8>()).prop_map(|(which, value)| Step::Write { which, value }),
            2 => which.clone().prop_map(|which| Step::Freeze { which }),
            1 => which.clone().prop_map(|which| Step::Share { which }),
            1 => which.clone().prop_map(|which| Step::Drop { which }),
            3 => which.prop_map(|which| Step::Thaw { which }),
        ];
        prop::collection::vec(step, 1..200)
    }

    /// The leases of one region, and beside them what its bytes must be.
    struct World {
        held: Vec<Lease>,
        shared: Vec<SharedLease>,
        expected: Vec<u8>,
    }

    impl World {
        fn take(leases: &mut Vec<Lease>, which: usize) -> Option<Lease> {
            if leases.is_empty() { None } else { Some(leases.swap_remove(which % leases.len())) }
        }

        fn holders(&self, of: &SharedLease) -> usize {
            self.shared.iter().filter(|other| (other.offset(), other.len()) == (of.offset(), of.len())).count()
        }

        fn run(&mut self, step: Step) {
            match step {
                Step::Split { which, at } => {
                    let Some(lease) = World::take(&mut self.held, which) else { return };
                    let at = at % (lease.len() + 1);
                    let (left, right) = lease.split_at(at);
                    // Empty ranges are alike; two of one place would make `holders` count wrong.
                    self.held.extend([left, right].into_iter().filter(|part| !part.is_empty()));
                }
                Step::Join { left, right } => {
                    if self.held.len() < 2 {
                        return;
                    }
                    let left = World::take(&mut self.held, left).expect("there are two");
                    // Chance alone rarely finds a neighbour, so every other time it is looked for.
                    let end = left.offset() + left.len();
                    let neighbour = self.held.iter().position(|lease| lease.offset() == end && right % 2 == 0);
                    let right = World::take(&mut self.held, neighbour.unwrap_or(right)).expect("there are two");
                    let begin = right.offset();
                    match left.join(right) {
                        Ok(joined) => {
                            assert_eq!(end, begin);
                            self.held.push(joined);
                        }
                        Err((left, right)) => {
                            assert_ne!(end, begin);
                            self.held.extend([left, right]);
                        }
                    }
                }
                Step::Write { which, value } => {
                    let Some(mut lease) = World::take(&mut self.held, which) else { return };
                    lease.bytes_mut().fill(value);
                    self.expected[lease.offset()..][..lease.len()].fill(value);
                    self.held.push(lease);
                }
                Step::Freeze { which } => {
                    let Some(lease) = World::take(&mut self.held, which) else { return };
                    self.shared.push(lease.freeze());
                }
                Step::Share { which } if !self.shared.is_empty() => {
                    self.shared.push(self.shared[which % self.shared.len()].clone());
                }
                Step::Drop { which } if !self.shared.is_empty() => {
                    let which = which % self.shared.len();
                    if self.holders(&self.shared[which]) > 1 {
                        self.shared.swap_remove(which);
                    }
                }
                Step::Thaw { which } if !self.shared.is_empty() => {
                    let which = which % self.shared.len();
                    let holders = self.holders(&self.shared[which]);
                    match self.shared.swap_remove(which).thaw() {
                        Ok(lease) => {
                            assert_eq!(holders, 1);
                            self.held.push(lease);
                        }
                        Err(shared) => {
                            assert!(holders > 1);
                            self.shared.push(shared);
                        }
                    }
                }
                Step::Share { .. } | Step::Drop { .. } | Step::Thaw { .. } => {}
            }
        }

        /// Every byte of the region is in exactly one range, and is what was last written to it.
        fn check(&self) {
            let mut ranges: Vec<(usize, &[u8])> =
                self.held.iter().map(|lease| (lease.offset(), lease.bytes())).collect();
            ranges.extend(self.shared.iter().map(|lease| (lease.offset(), lease.bytes())));
            ranges.sort_by_key(|&(offset, bytes)| (offset, bytes.len()));
            ranges.dedup_by_key(|&mut (offset, bytes)| (offset, bytes.len()));
            let mut end = 0;
            for (offset, bytes) in ranges {
                assert_eq!(offset, end);
                end = offset + bytes.len();
                assert_eq!(bytes, &self.expected[offset..end]);
            }
            assert_eq!(end, BYTES);
        }
    }

    proptest! {
        #[test]
        fn ranges_stay_disjoint_and_complete_and_keep_their_contents(steps in steps()) {
            let (_region, lease) = fresh();
            let len = lease.len();
            let (lease, _rest) = lease.split_at(BYTES.min(len));
            let mut world = World { held: vec![lease], shared: Vec::new(), expected: vec![0; BYTES] };
            for step in steps {
                world.run(step);
                world.check();
            }
        }

        #[test]
        fn chunks_cover_the_range_in_order(len in 0..=BYTES, size in 1..=BYTES) {
            let (_region, lease) = fresh();
            let pieces = lease.split_at(len).0.chunks(size);
            prop_assert_eq!(pieces.len(), len.div_ceil(size).max(1));
            let mut end = 0;
            for (index, piece) in pieces.iter().enumerate() {
                prop_assert_eq!(piece.offset(), end);
                prop_assert!(piece.len() == size || index == pieces.len() - 1);
                end += piece.len();
            }
            prop_assert_eq!(end, len);
        }
    }

    #[test]
    fn neighbours_of_two_regions_do_not_join() {
        let ((_one, first), (_two, second)) = (fresh(), fresh());
        let (left, _) = first.split_at(64);
        let (_, right) = second.split_at(64);
        let (left, right) = left.join(right).unwrap_err();
        assert_ne!(left.region_id(), right.region_id());
        assert_eq!(left.region_id(), left.freeze().region_id());
    }

    #[test]
    #[should_panic(expected = "infinitely many")]
    fn chunks_of_nothing_are_a_bug_of_the_caller() {
        fresh().1.chunks(0);
    }

    #[test]
    #[should_panic(expected = "split at 4097")]
    fn a_split_beyond_the_end_is_a_bug_of_the_caller() {
        let (_region, lease) = fresh();
        lease.split_at(BYTES).0.split_at(BYTES + 1);
    }

    /// The last reader may drop in another thread than the one that then writes: no order but that of `thaw` keeps them apart.
    #[test]
    fn a_range_thaws_once_the_readers_of_other_threads_are_gone() {
        let (_region, mut lease) = fresh();
        for round in 0..200u8 {
            lease.bytes_mut().fill(round);
            let shared = lease.freeze();
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let reader = shared.clone();
                    std::thread::spawn(move || assert!(reader.bytes().iter().all(|&byte| byte == round)))
                })
                .collect();
            let mut waiting = shared;
            lease = loop {
                match waiting.thaw() {
                    Ok(lease) => break lease,
                    Err(shared) => waiting = shared,
                }
                std::thread::yield_now();
            };
            for reader in readers {
                reader.join().unwrap();
            }
        }
    }
}
