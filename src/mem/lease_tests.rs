//! Leases under random programs: what is split, joined, frozen and shared stays where it belongs.
//!
//! Invariant: every byte is at any time in exactly one lease, and whole again when all of them are back.

use proptest::prelude::*;

use super::*;
use crate::mem::{Region, RegionOptions};

const BYTES: usize = 4096;

fn fresh() -> (Region, Lease) {
    Region::allocate(BYTES, &RegionOptions::default()).unwrap()
}

#[test]
fn a_checksum_is_of_the_bytes_as_they_are() {
    let (_region, mut lease) = fresh();
    for round in 0..3u8 {
        lease.bytes_mut()[..9].copy_from_slice(b"123456789");
        lease.bytes_mut()[9] = round;
        let shared = lease.freeze();
        for _ in 0..2 {
            // The check value of CRC-32C (Castagnoli).
            assert_eq!(shared.checksum(9), Some(0xe306_9283));
            assert_eq!(shared.clone().checksum(10), Some(crc32c::crc32c(&shared.bytes()[..10])));
        }
        lease = shared.thaw().unwrap();
    }
    assert_eq!(lease.freeze().checksum(0), Some(0));
}

#[test]
fn what_is_shared_is_written_by_its_only_holder_and_its_checksum_asked_for_again() {
    let (_region, lease) = fresh();
    let mut shared = lease.freeze();
    let before = shared.checksum(9);
    let other = shared.clone();
    assert!(shared.sole_bytes_mut().is_none());
    drop(other);
    shared.sole_bytes_mut().unwrap()[..9].copy_from_slice(b"123456789");
    assert_eq!((before, shared.checksum(9)), (Some(crc32c::crc32c(&[0; 9])), Some(0xe306_9283)));
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
        let mut ranges: Vec<(usize, &[u8])> = self.held.iter().map(|lease| (lease.offset(), lease.bytes())).collect();
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
