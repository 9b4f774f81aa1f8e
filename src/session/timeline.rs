//! A rank's part of a timeline: which clocks are wanted, how its marks travel to the launcher, and how far its clock is from the
//! launcher's.
//!
//! Invariant: marks that travel are those of the ring, in its order; a clock's offset is never trusted further than half of the round
//! trip by which it was measured.
#![forbid(unsafe_code)]

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    observe::{Mark, Ring, WORDS},
    types::Clock,
};

/// Marks of one report: a line of about a megabyte.
const PART_MARKS_MAX: usize = 16 << 10;

/// A range of clocks; its text is `A..B` (B not among them) or `A..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct StepRange {
    first: Clock,
    end: Clock,
}

impl StepRange {
    /// Every clock.
    pub const ALL: StepRange = StepRange { first: 0, end: Clock::MAX };

    /// Whether the clock is in it.
    pub fn contains(self, clock: Clock) -> bool {
        (self.first..self.end).contains(&clock)
    }
}

impl FromStr for StepRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<StepRange> {
        let wrong = || Error::Config(format!("`{text}` is no range of steps: write A..B, such as 100..110, or A.."));
        let (first, end) = text.trim().split_once("..").ok_or_else(wrong)?;
        let end = if end.is_empty() { Clock::MAX } else { end.parse().map_err(|_| wrong())? };
        let range = StepRange { first: first.parse().map_err(|_| wrong())?, end };
        if range.first < range.end { Ok(range) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for StepRange {
    type Error = Error;

    fn try_from(text: String) -> Result<StepRange> {
        text.parse()
    }
}

impl From<StepRange> for String {
    fn from(range: StepRange) -> String {
        range.to_string()
    }
}

impl fmt::Display for StepRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end {
            Clock::MAX => write!(f, "{}..", self.first),
            end => write!(f, "{}..{end}", self.first),
        }
    }
}

/// How far a rank's clock is from the launcher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockOffset {
    /// What is to be added to the rank's time, in nanoseconds.
    pub offset_ns: i64,
    /// How far that may be wrong, in nanoseconds; 0 where both read one clock.
    pub error_ns: u64,
}

impl ClockOffset {
    /// From a question sent at `sent`, answered by the launcher at `there`, the answer here at `received`; each by its own clock. If
    /// the way takes as long in both directions the offset is exact.
    pub fn of_round_trip(sent: u64, there: u64, received: u64) -> ClockOffset {
        let half = received.saturating_sub(sent) / 2;
        ClockOffset { offset_ns: there.wrapping_sub(sent + half) as i64, error_ns: half.max(1) }
    }
}

/// Marks of one thread of a rank, or some of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimelinePart {
    /// The thread: the lane of a server's shard, or of a worker.
    pub lane: u16,
    /// How far the rank's clock is from the launcher's.
    pub clock: ClockOffset,
    /// Marks that the ring had no room for, told with the first part.
    pub lost: u64,
    /// The marks: [`Mark::to_words`].
    marks: Vec<[u64; WORDS]>,
}

impl TimelinePart {
    /// All that a ring holds, in as many parts as it takes.
    pub fn of(lane: u16, clock: ClockOffset, ring: &Ring) -> Vec<TimelinePart> {
        let (marks, lost) = ring.read();
        let mut parts: Vec<TimelinePart> = marks
            .chunks(PART_MARKS_MAX)
            .map(|marks| TimelinePart {
                lane,
                clock,
                lost: 0,
                marks: marks.iter().map(|mark| mark.to_words()).collect(),
            })
            .collect();
        if let Some(first) = parts.first_mut() {
            first.lost = lost;
        }
        parts
    }

    /// The marks, in time of the launcher's clock; those without meaning left out.
    pub fn marks(&self) -> impl Iterator<Item = Mark> + '_ {
        let marks = self.marks.iter().filter_map(|words| Mark::from_words(*words));
        marks.map(|mark| Mark { at_ns: mark.at_ns.wrapping_add_signed(self.clock.offset_ns), ..mark })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        observe::What,
        types::{ChunkId, PeerId},
    };

    #[test]
    fn a_range_is_read_as_it_is_written() {
        let range: StepRange = "5..8".parse().unwrap();
        assert_eq!((4..9).filter(|clock| range.contains(*clock)).collect::<Vec<_>>(), [5, 6, 7]);
        for text in ["5..8", "0..", "7.."] {
            assert_eq!(text.parse::<StepRange>().unwrap().to_string(), text);
        }
        for wrong in ["", "5", "8..5", "5..5", "a..b", "-1..4"] {
            assert!(wrong.parse::<StepRange>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_offset_is_known_to_half_a_round_trip() {
        // The launcher's clock is 1000 behind; the way there takes 30, the way back 10.
        let clock = ClockOffset::of_round_trip(5000, 4030, 5040);
        assert_eq!(clock, ClockOffset { offset_ns: -990, error_ns: 20 });
        assert!((clock.offset_ns + 1000).unsigned_abs() <= clock.error_ns);
    }

    #[test]
    fn a_ring_travels_in_parts_and_arrives_in_the_launchers_time() {
        let ring = Ring::new(20_000);
        for clock in 0..20_005 {
            let (what, chunk, peer) = (What::Given, ChunkId(1), PeerId::worker(2));
            ring.write(Mark { at_ns: 1000 + clock, what, chunk, clock, peer });
        }
        let parts = TimelinePart::of(3, ClockOffset { offset_ns: -500, error_ns: 1 }, &ring);
        assert_eq!((parts.len(), parts[0].lost, parts[1].lost), (2, 5, 0));
        let text = serde_json::to_string(&parts).unwrap();
        let read: Vec<TimelinePart> = serde_json::from_str(&text).unwrap();
        let marks: Vec<Mark> = read.iter().flat_map(TimelinePart::marks).collect();
        assert_eq!(marks.len(), 20_000);
        assert!(marks.iter().zip(5..).all(|(mark, clock)| (mark.at_ns, mark.clock) == (500 + clock, clock)));
    }
}
