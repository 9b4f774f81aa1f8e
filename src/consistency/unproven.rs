//! What was sent and is not known to have arrived: what must be sent again once a broken path has been rebuilt.
//!
//! Both ends count what comes over all paths between them, and a path keeps its order; so what an end has received is always the
//! first N of what the other has sent. N is all that needs to be said after a rebuild.
//!
//! Invariant: entries are numbered from 0 in the order of sending; an entry is given out once, when it is proven.

use std::collections::VecDeque;

/// Entries in the order of sending, from the first that is not known to have arrived.
#[derive(Clone, Debug)]
pub struct Unproven<T> {
    /// The number of the first entry.
    first: u64,
    entries: VecDeque<T>,
}

impl<T> Default for Unproven<T> {
    fn default() -> Unproven<T> {
        Unproven { first: 0, entries: VecDeque::new() }
    }
}

impl<T> Unproven<T> {
    /// Something is sent: its number.
    pub fn push(&mut self, entry: T) -> u64 {
        self.entries.push_back(entry);
        self.end() - 1
    }

    /// The number of the oldest entry of which it is not known.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Whether all that was sent is known to have arrived.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is not known to have arrived, in order, to be numbered anew.
    pub fn into_entries(self) -> impl Iterator<Item = T> {
        self.entries.into_iter()
    }

    /// How many have been sent.
    pub fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// The oldest entry of which it is not known has this number from here on, since none before it will be sent again: those after it
    /// follow.
    pub fn renumber(&mut self, first: u64) {
        self.first = first;
    }

    /// The oldest entry of which it is not known.
    pub fn front(&self) -> Option<&T> {
        self.entries.front()
    }

    /// The other end has received `count` of all that was sent: gives out the oldest entry that is among them.
    pub fn prove(&mut self, count: u64) -> Option<T> {
        if self.first >= count {
            return None;
        }
        let entry = self.entries.pop_front()?;
        self.first += 1;
        Some(entry)
    }

    /// Whether an end that has received `count` may say so: not fewer than it was known to have, nor more than were sent.
    pub fn allows(&self, count: u64) -> bool {
        (self.first..=self.end()).contains(&count)
    }

    /// What is not known to have arrived, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_proven_is_given_out_once_and_in_order() {
        let mut sent = Unproven::default();
        for (number, entry) in ["a", "b", "c"].into_iter().enumerate() {
            assert_eq!(sent.push(entry), number as u64);
        }
        let proven: Vec<_> = std::iter::from_fn(|| sent.prove(2)).collect();
        assert_eq!(proven, ["a", "b"]);
        assert_eq!((sent.prove(1), sent.end(), sent.front()), (None, 3, Some(&"c")));
        assert!(sent.allows(2) && sent.allows(3) && !sent.allows(1) && !sent.allows(4));
        assert_eq!(sent.push("d"), 3);
        assert!(sent.iter().eq(&["c", "d"]));
    }
}
