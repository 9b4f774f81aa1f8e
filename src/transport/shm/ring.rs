//! The ring between one writer and one receiver: its indexes, its flags and the order in which both are touched, and nothing of
//! how the memory is shared. The layout stands in docs/wire.md.
//!
//! The words are reached through [`Shared`], so that the tests run this very code over words that explore every interleaving
//! and every value that the memory model lets a load return.
//!
//! *Entries.* The writer fills a slot, then moves `tail` (Release); the receiver sees `tail` (Acquire), copies the entry out
//! once, then moves `head` (Release), and only a writer that has seen that (Acquire) fills the slot again.
//!
//! *Wake-ups.* Who is about to sleep says so in a word, passes a full fence, and looks again; who has moved an index passes a full
//! fence and looks at the word. Of two full fences one comes first. If the sleeper's does, the other side sees the word and wakes
//! it; else the sleeper sees the index when it looks again, and does not sleep. There is no third case, so no wake-up is lost. The
//! receiver sleeps under `sleeping` (the writer moves `tail`), a writer without room under `waiting` (the receiver moves `head`).
//! The word counts: odd is asleep, and the other side remembers for which sleep it has woken, so that it does so once. It does not
//! clear the word itself: every word has one writer, and so one order of its values that needs no argument.
//!
//! *Fence.* The writer sets `copying` before the first byte of a payload, passes a full fence and looks at `fenced`; the receiver
//! sets `fenced`, passes a full fence and looks at `copying`. By the same argument either the writer sees `fenced` and does not
//! touch the slot, or the receiver sees `copying` and keeps the slots until it is clear (Release by the writer, Acquire here: the
//! bytes have landed). When the writer clears `copying` it looks at `fenced` in the same way: either it sees it and says so, or
//! the receiver saw `copying` clear.
//!
//! Invariant: what the other side has written into the shared words is never trusted: an index is refused unless it lies where
//! that side could honestly have moved it, and each side keeps its own index to itself and only shows it.
#![forbid(unsafe_code)]

use std::{fmt, sync::atomic::Ordering};

/// Words of an entry: one frame header.
pub(super) const ENTRY_WORDS: usize = 8;

/// An entry as it travels: eight little-endian words.
pub(super) type Entry = [u64; ENTRY_WORDS];

/// A word that both sides reach.
pub(super) trait Word {
    fn load(&self, ordering: Ordering) -> u64;
    fn store(&self, value: u64, ordering: Ordering);
}

/// The words that are not entries, each on a cache line of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Control {
    /// Entries written since the beginning. The writer's.
    Tail = 0,
    /// Entries read since the beginning. The receiver's.
    Head = 1,
    /// Odd while the receiver sleeps, or is about to; another number each time. The receiver's.
    Sleeping = 2,
    /// Odd while the writer waits for room, or is about to; another number each time. The writer's.
    Waiting = 3,
    /// The writer is putting bytes into a slot. The writer's.
    Copying = 4,
    /// The receiver takes nothing any more. The receiver's; never cleared.
    Fenced = 5,
}

/// Number of control words.
pub(super) const CONTROLS: usize = 6;

/// A ring's memory, as one side sees it.
pub(super) trait Shared {
    type Word: Word;
    /// Entries that fit; a power of two.
    const ENTRIES: u64;
    /// Words of an entry that are shared (a model has fewer).
    const WORDS: usize = ENTRY_WORDS;

    fn control(&self, which: Control) -> &Self::Word;

    /// A word of the entry in `slot`, which is less than [`Shared::ENTRIES`].
    fn entry(&self, slot: u64, word: usize) -> &Self::Word;

    /// A fence that orders everything before it with everything after it, on both sides.
    fn full_fence();
}

/// An index that the other side cannot honestly have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scribbled {
    pub(super) index: &'static str,
    pub(super) value: u64,
    pub(super) from: u64,
    pub(super) to: u64,
}

impl fmt::Display for Scribbled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scribbled { index, value, from, to } = self;
        write!(f, "it wrote {value} into the ring's {index}, which can be {from} to {to}")
    }
}

/// The writer's end.
#[derive(Debug)]
pub(super) struct Producer<S> {
    shared: S,
    tail: u64,
    /// The last `head` seen.
    head: u64,
    /// Our `waiting`.
    waiting: u64,
    /// The receiver's `sleeping` when it was woken last.
    woken: u64,
}

impl<S: Shared> Producer<S> {
    pub(super) fn new(shared: S) -> Producer<S> {
        Producer { shared, tail: 0, head: 0, waiting: 0, woken: 0 }
    }

    /// Whether an entry fits. The receiver's index is looked at only if the last look says that none does.
    pub(super) fn has_room(&mut self) -> Result<bool, Scribbled> {
        if self.tail - self.head == S::ENTRIES {
            let head = self.shared.control(Control::Head).load(Ordering::Acquire);
            if head < self.head || head > self.tail {
                return Err(Scribbled { index: "head", value: head, from: self.head, to: self.tail });
            }
            self.head = head;
        }
        Ok(self.tail - self.head < S::ENTRIES)
    }

    /// Shows an entry to the receiver.
    ///
    /// # Panics
    ///
    /// If there is no room for it.
    pub(super) fn push(&mut self, entry: &Entry) {
        assert!(self.tail - self.head < S::ENTRIES, "an entry was pushed into a full ring");
        for (at, word) in entry.iter().enumerate().take(S::WORDS) {
            self.shared.entry(self.tail % S::ENTRIES, at).store(*word, Ordering::Relaxed);
        }
        self.tail += 1;
        self.shared.control(Control::Tail).store(self.tail, Ordering::Release);
    }

    /// After entries were pushed: whether the receiver sleeps and is to be woken. True once a sleep.
    #[must_use]
    pub(super) fn must_wake(&mut self) -> bool {
        S::full_fence();
        is_new_sleep(self.shared.control(Control::Sleeping), &mut self.woken)
    }

    /// Says that we are about to sleep for want of room (or no longer). A full fence and another look must follow.
    pub(super) fn set_waiting(&mut self, waiting: bool) {
        tell(self.shared.control(Control::Waiting), &mut self.waiting, waiting);
    }

    /// Begins to write into a slot; false if the receiver has fenced us, and then nothing may be written.
    #[must_use]
    pub(super) fn begin_copy(&self) -> bool {
        self.shared.control(Control::Copying).store(1, Ordering::Relaxed);
        S::full_fence();
        let may = !self.is_fenced();
        if !may {
            self.shared.control(Control::Copying).store(0, Ordering::Release);
        }
        may
    }

    /// The bytes are in the slot; false if the receiver has fenced us meanwhile, and then it waits to hear of it.
    #[must_use]
    pub(super) fn end_copy(&self) -> bool {
        self.shared.control(Control::Copying).store(0, Ordering::Release);
        S::full_fence();
        !self.is_fenced()
    }

    /// Whether the receiver has ended the path.
    pub(super) fn is_fenced(&self) -> bool {
        self.shared.control(Control::Fenced).load(Ordering::Acquire) != 0
    }
}

/// The receiver's end.
#[derive(Debug)]
pub(super) struct Consumer<S> {
    shared: S,
    head: u64,
    /// The last `tail` seen.
    tail: u64,
    /// Our `sleeping`.
    sleeping: u64,
    /// The writer's `waiting` when it was woken last.
    woken: u64,
}

impl<S: Shared> Consumer<S> {
    pub(super) fn new(shared: S) -> Consumer<S> {
        Consumer { shared, head: 0, tail: 0, sleeping: 0, woken: 0 }
    }

    /// The next entry, if there is one: a copy, which nobody can change any more.
    pub(super) fn pop(&mut self) -> Result<Option<Entry>, Scribbled> {
        if self.head == self.tail {
            let tail = self.shared.control(Control::Tail).load(Ordering::Acquire);
            if tail < self.head || tail - self.head > S::ENTRIES {
                let to = self.head + S::ENTRIES;
                return Err(Scribbled { index: "tail", value: tail, from: self.head, to });
            }
            self.tail = tail;
        }
        if self.head == self.tail {
            return Ok(None);
        }
        let mut entry = [0; ENTRY_WORDS];
        for (at, word) in entry.iter_mut().enumerate().take(S::WORDS) {
            *word = self.shared.entry(self.head % S::ENTRIES, at).load(Ordering::Relaxed);
        }
        self.head += 1;
        Ok(Some(entry))
    }

    /// Gives the room of what was popped back to the writer; true if it waits for that and is to be woken.
    #[must_use]
    pub(super) fn release(&mut self) -> bool {
        self.shared.control(Control::Head).store(self.head, Ordering::Release);
        S::full_fence();
        is_new_sleep(self.shared.control(Control::Waiting), &mut self.woken)
    }

    /// Whether the next [`Consumer::pop`] has something to tell.
    pub(super) fn has_more(&self) -> bool {
        self.head != self.tail || self.shared.control(Control::Tail).load(Ordering::Acquire) != self.tail
    }

    /// Says that we are about to sleep (or no longer). A full fence and another look must follow.
    pub(super) fn set_sleeping(&mut self, sleeping: bool) {
        tell(self.shared.control(Control::Sleeping), &mut self.sleeping, sleeping);
    }

    /// Takes nothing any more. True if no byte lands in a slot after this; else they may until [`Consumer::is_copying`] is false.
    pub(super) fn fence(&self) -> bool {
        self.shared.control(Control::Fenced).store(1, Ordering::Release);
        S::full_fence();
        !self.is_copying()
    }

    /// Whether the writer is putting bytes into a slot. Once false after [`Consumer::fence`], it stays so.
    pub(super) fn is_copying(&self) -> bool {
        self.shared.control(Control::Copying).load(Ordering::Acquire) != 0
    }
}

/// Says in `word`, whose value is `count`, that its owner falls asleep or is awake; nothing if that is known.
fn tell(word: &impl Word, count: &mut u64, asleep: bool) {
    if asleep == count.is_multiple_of(2) {
        *count += 1;
        word.store(*count, Ordering::Relaxed);
    }
}

/// Whether the owner of `word` is asleep and was not woken from this sleep before.
fn is_new_sleep(word: &impl Word, woken: &mut u64) -> bool {
    let count = word.load(Ordering::Relaxed);
    let is_new = !count.is_multiple_of(2) && count != *woken;
    if is_new {
        *woken = count;
    }
    is_new
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
