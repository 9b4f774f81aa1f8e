//! What a round of the echo is made of: messages to the peer, each answered by one message back.
//!
//! A flow says which direction carries the bytes; the other carries messages of [`NOTE`] bytes, as a push is answered by a note
//! with a credit and a pull is asked for by a note.
//!
//! Invariant: both ends compute the same messages from the same greeting.

use clap::ValueEnum;

/// Bytes of a message that carries none of the round's bytes: a note with its header.
pub(super) const NOTE: u64 = 64;

/// Which directions carry a round's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Flow {
    /// Both, as push-pull does.
    Both,
    /// To the peer, as push does. A round is over when the bytes have left; whoever stops waits for the last answer.
    There,
    /// From the peer, as pull does.
    Back,
    /// None: over shared memory a count goes there and back and nothing else, which is one cache line each way.
    Line,
}

impl Flow {
    /// All of them, in the order of their codes in a greeting.
    pub(super) const ALL: [Flow; 4] = [Flow::Both, Flow::There, Flow::Back, Flow::Line];

    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Flow::Both => "both",
            Flow::There => "there",
            Flow::Back => "back",
            Flow::Line => "line",
        }
    }

    /// The directions that carry a round's bytes.
    pub const fn directions(self) -> u64 {
        match self {
            Flow::Both => 2,
            Flow::There | Flow::Back => 1,
            Flow::Line => 0,
        }
    }
}

/// The messages of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Messages {
    /// Bytes of a round, in each direction that carries them.
    pub bytes: u64,
    /// Bytes of a message, but for the last one.
    pub piece: u64,
    /// Which directions carry them.
    pub flow: Flow,
}

/// One direction of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Messages of a round.
    pub count: u64,
    /// Bytes of a message, but for the last one.
    pub unit: u64,
    /// Bytes of a round.
    pub total: u64,
}

impl Messages {
    /// How many.
    pub fn count(&self) -> u64 {
        self.bytes.div_ceil(self.piece)
    }

    /// What goes to the peer.
    pub fn there(&self) -> Way {
        self.way(matches!(self.flow, Flow::Both | Flow::There))
    }

    /// What comes back.
    pub fn back(&self) -> Way {
        self.way(matches!(self.flow, Flow::Both | Flow::Back))
    }

    fn way(&self, carries: bool) -> Way {
        let count = self.count();
        match (carries, self.flow) {
            (true, _) => Way { count, unit: self.piece, total: self.bytes },
            (false, Flow::Line) => Way { count, unit: 0, total: 0 },
            (false, _) => Way { count, unit: NOTE, total: count * NOTE },
        }
    }
}

impl Way {
    /// Where message `message` begins, counted over all rounds.
    pub fn at(&self, message: u64) -> u64 {
        message / self.count * self.total + (message % self.count * self.unit).min(self.total)
    }

    /// How many messages are complete when `bytes` of all rounds have come.
    pub fn complete(&self, bytes: u64) -> u64 {
        // The last message of a round may be shorter, so it is complete only with the round.
        bytes / self.total * self.count + bytes % self.total / self.unit
    }

    /// The part of a round from byte `start` to byte `end` of all rounds, as far as the round goes.
    pub fn range(&self, start: u64, end: u64) -> std::ops::Range<usize> {
        let first = start % self.total;
        let last = self.total.min(first + end.saturating_sub(start));
        first as usize..last as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_begin_and_end_where_both_ends_expect_them() {
        let messages = Messages { bytes: 10, piece: 4, flow: Flow::There };
        let (there, back) = (messages.there(), messages.back());
        assert_eq!((there.count, back.count, back.total), (3, 3, 192));
        assert_eq!([0, 1, 2, 3, 4, 6].map(|message| there.at(message)), [0, 4, 8, 10, 14, 20]);
        assert_eq!([0, 3, 4, 8, 9, 10, 13, 14, 20].map(|bytes| there.complete(bytes)), [0, 0, 1, 2, 2, 3, 3, 4, 6]);
        assert_eq!((there.range(8, 13), there.range(13, 13), there.range(14, 30)), (8..10, 3..3, 4..10));
        assert_eq!(Messages { flow: Flow::Line, ..messages }.there().at(5), 0);
        assert_eq!(Messages { flow: Flow::Back, ..messages }.back().total, 10);
    }
}
