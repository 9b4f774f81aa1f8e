//! What happened to which chunk and when, for a timeline: marks in a ring that one thread writes and another may read.
//!
//! Invariant: a ring never grows; when it is full the oldest marks go, and how many have gone is known.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use nix::{
    sys::time::TimeValLike,
    time::{ClockId, clock_gettime},
};

use super::TaskKind;
use crate::types::{ChunkId, Clock, PeerId};

/// Marks that a thread keeps: 2 MiB.
pub const MARKS_MAX: usize = 1 << 16;

/// Numbers of a mark as it is stored and as it travels.
pub const WORDS: usize = 4;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A worker's program has begun a clock.
    Began,
    /// A worker's program has given a chunk's gradient.
    Given,
    /// A worker's gradient has been handed to the fabric.
    Pushed,
    /// A worker's gradient has landed at its shard.
    Landed,
    /// A computation has begun.
    Started(TaskKind),
    /// A computation has ended.
    Ended(TaskKind),
    /// A shard's parameters have been handed to the fabric.
    Replied,
    /// A shard's parameters have landed at a worker.
    Received,
    /// A worker's program has waited for everything that it wanted of a clock.
    Waited,
}

impl What {
    const TASKS: u64 = TaskKind::ALL.len() as u64;

    fn to_bits(self) -> u64 {
        match self {
            What::Began => 0,
            What::Given => 1,
            What::Pushed => 2,
            What::Landed => 3,
            What::Replied => 4,
            What::Received => 5,
            What::Waited => 6,
            What::Started(task) => 8 + task as u64,
            What::Ended(task) => 8 + What::TASKS + task as u64,
        }
    }

    fn from_bits(bits: u64) -> Option<What> {
        let task = |from: u64| TaskKind::ALL.get(usize::try_from(bits.checked_sub(from)?).ok()?).copied();
        Some(match bits {
            0 => What::Began,
            1 => What::Given,
            2 => What::Pushed,
            3 => What::Landed,
            4 => What::Replied,
            5 => What::Received,
            6 => What::Waited,
            _ => match task(8) {
                Some(task) => What::Started(task),
                None => What::Ended(task(8 + What::TASKS)?),
            },
        })
    }
}

/// One thing that has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When, in nanoseconds of this host's CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// What.
    pub what: What,
    /// To which chunk; chunk 0 where it concerns a whole clock.
    pub chunk: ChunkId,
    /// Of which clock.
    pub clock: Clock,
    /// With whom; oneself where nobody else has a part in it.
    pub peer: PeerId,
}

impl Mark {
    /// The numbers by which it is stored and travels.
    pub fn to_words(self) -> [u64; WORDS] {
        [self.at_ns, self.clock, (self.what.to_bits() << 32) | u64::from(self.chunk.0), self.peer.to_bits()]
    }

    /// The inverse of [`Mark::to_words`]; `None` for numbers that no mark has.
    pub fn from_words(words: [u64; WORDS]) -> Option<Mark> {
        let [at_ns, clock, what_and_chunk, peer] = words;
        let (what, chunk) = (What::from_bits(what_and_chunk >> 32)?, ChunkId(what_and_chunk as u32));
        Some(Mark { at_ns, what, chunk, clock, peer: PeerId::from_bits(peer)? })
    }
}

/// The time of this host's CLOCK_MONOTONIC in nanoseconds: one clock for all processes of a host.
pub fn monotonic_ns() -> u64 {
    // It fails only for a clock that does not exist.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| time.num_nanoseconds().max(0) as u64)
}

/// The marks of one thread.
#[derive(Debug)]
pub struct Ring {
    words: Box<[[AtomicU64; WORDS]]>,
    /// Marks ever written.
    written: AtomicU64,
}

impl Ring {
    /// A ring for so many marks, at least one.
    pub fn new(marks: usize) -> Ring {
        let empty = || std::array::from_fn(|_| AtomicU64::new(0));
        // One place more: the writer may be in the middle of a mark while another thread reads.
        Ring { words: (0..=marks.max(1)).map(|_| empty()).collect(), written: AtomicU64::new(0) }
    }

    /// Writes a mark. Only one thread may.
    pub fn write(&self, mark: Mark) {
        let written = self.written.load(Ordering::Relaxed);
        let place = (written % self.words.len() as u64) as usize;
        for (word, value) in self.words[place].iter().zip(mark.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        self.written.store(written + 1, Ordering::Release);
    }

    /// The marks that are there, oldest first, and how many have gone. What is overwritten during the call is left out.
    pub fn read(&self) -> (Vec<Mark>, u64) {
        let places = self.words.len() as u64;
        let oldest = |written: u64| (written + 1).saturating_sub(places);
        let written = self.written.load(Ordering::Acquire);
        let first = oldest(written);
        let words: Vec<[u64; WORDS]> = (first..written)
            .map(|mark| self.words[(mark % places) as usize].each_ref().map(|word| word.load(Ordering::Relaxed)))
            .collect();
        fence(Ordering::Acquire);
        let lost = oldest(self.written.load(Ordering::Relaxed)).min(written);
        (words.into_iter().skip((lost - first) as usize).filter_map(Mark::from_words).collect(), lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(clock: Clock) -> Mark {
        let (what, chunk) = (What::Ended(TaskKind::Apply), ChunkId(u32::MAX));
        Mark { at_ns: clock * 7, what, chunk, clock, peer: PeerId::server(3, 2) }
    }

    #[test]
    fn a_full_ring_forgets_the_oldest_and_says_so() {
        let ring = Ring::new(4);
        assert_eq!(ring.read(), (vec![], 0));
        (0..3).for_each(|clock| ring.write(mark(clock)));
        assert_eq!(ring.read(), ((0..3).map(mark).collect(), 0));
        (3..10).for_each(|clock| ring.write(mark(clock)));
        assert_eq!(ring.read(), ((6..10).map(mark).collect(), 6));
    }

    #[test]
    fn every_kind_of_mark_travels() {
        let simple =
            [What::Began, What::Given, What::Pushed, What::Landed, What::Replied, What::Received, What::Waited];
        let tasks = TaskKind::ALL.into_iter().flat_map(|task| [What::Started(task), What::Ended(task)]);
        for what in simple.into_iter().chain(tasks) {
            let sent = Mark { what, ..mark(5) };
            assert_eq!(Mark::from_words(sent.to_words()), Some(sent));
        }
        assert_eq!(Mark::from_words([0, 0, 7 << 32, 0]), None);
        assert_eq!(Mark::from_words([0, 0, 16 << 32, 0]), None);
        assert_eq!(Mark::from_words([0, 0, 0, u64::MAX]), None);
    }
}
