//! What an acknowledgement says: all is well, not ready, or no (the AETH's syndrome, IBA 9.3.5 and 9.7.5.2).
//!
//! Invariant: one byte for each meaning; a byte that nothing is assigned to is refused.

use std::{fmt, time::Duration};

/// Why a request is refused (IBA 9.7.5.2, table of NAK codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NakCode {
    /// A packet is missing before the one that came: go back to it. The only one that is not fatal.
    Sequence = 0,
    /// The request makes no sense here.
    InvalidRequest = 1,
    /// The memory that it names is not the sender's to write.
    RemoteAccess = 2,
}

impl fmt::Display for NakCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NakCode::Sequence => "sequence error",
            NakCode::InvalidRequest => "invalid request",
            NakCode::RemoteAccess => "remote access error (no slot of ours is armed there, or it is too short)",
        })
    }
}

/// How long a sender waits before it tries again: one of 32 fixed times from 10 us to 655.36 ms (IBA 9.7.5.2.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RnrTimer(u8);

impl RnrTimer {
    /// The shortest of the 32 that is not shorter than `least`, or the longest.
    pub fn at_least(least: Duration) -> RnrTimer {
        (1..32).map(RnrTimer).find(|timer| timer.duration() >= least).unwrap_or(RnrTimer(0))
    }

    /// The time.
    pub fn duration(self) -> Duration {
        // In units of 10 us: 1, then 2, 3, 4, 6, 8, 12, 16, 24 …; 0 stands for the largest, 2^16.
        let units: u64 = match self.0 {
            0 => 1 << 16,
            1 => 1,
            even if even % 2 == 0 => 1 << (even / 2),
            odd => 3 << (odd / 2 - 1),
        };
        Duration::from_micros(10 * units)
    }
}

/// An acknowledgement's meaning. Each of them also acknowledges everything before its PSN (an `Ack` that one too).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// Everything up to here has been applied.
    Ack,
    /// No room for this one yet.
    NotReady(RnrTimer),
    /// Refused.
    Nak(NakCode),
}

const CLASS_NOT_READY: u8 = 0b001 << 5;
const CLASS_NAK: u8 = 0b011 << 5;

/// An acknowledgement whose lower five bits are all ones carries no credits: ours never do.
const ACK: u8 = 0b000_11111;

impl Syndrome {
    pub(super) fn encode(self) -> u8 {
        match self {
            Syndrome::Ack => ACK,
            Syndrome::NotReady(timer) => CLASS_NOT_READY | timer.0,
            Syndrome::Nak(code) => CLASS_NAK | code as u8,
        }
    }

    pub(super) fn decode(byte: u8) -> Option<Syndrome> {
        let codes = [NakCode::Sequence, NakCode::InvalidRequest, NakCode::RemoteAccess];
        match (byte & 0xe0, byte & 0x1f) {
            _ if byte == ACK => Some(Syndrome::Ack),
            (CLASS_NOT_READY, timer) => Some(Syndrome::NotReady(RnrTimer(timer))),
            (CLASS_NAK, code) => codes.into_iter().find(|known| *known as u8 == code).map(Syndrome::Nak),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timers_are_those_of_the_specification() {
        let us = |code| RnrTimer(code).duration().as_micros();
        let table = [(0, 655_360), (1, 10), (2, 20), (3, 30), (4, 40), (5, 60), (12, 640), (13, 960), (31, 491_520)];
        assert!(table.iter().all(|(code, expected)| us(*code) == *expected));
        assert_eq!(RnrTimer::at_least(Duration::from_micros(640)), RnrTimer(12));
        assert_eq!(RnrTimer::at_least(Duration::from_micros(641)), RnrTimer(13));
        assert_eq!(RnrTimer::at_least(Duration::from_secs(9)), RnrTimer(0));
    }

    #[test]
    fn one_byte_for_each_meaning() {
        let known = (0..=u8::MAX).filter(|byte| match Syndrome::decode(*byte) {
            Some(syndrome) => {
                assert_eq!(syndrome.encode(), *byte);
                true
            }
            None => false,
        });
        assert_eq!(known.count(), 1 + 32 + 3);
    }
}
