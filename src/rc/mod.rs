//! The reliable-connected queue pair as a pure state machine: no socket, no clock, no thread.
//!
//! Two [`QueuePair`]s make a reliable, ordered, one-sided connection out of datagrams that may be lost, doubled, overtaken or
//! damaged. The rules are those of the InfiniBand Architecture Specification, volume 1 (IBA), chapter 9, "Transport layer":
//! packet sequence numbers (9.7.1), segmentation (9.7.2 and 9.4.4), acknowledgements and their coalescing (9.7.5), duplicates
//! (9.7.1, 9.7.5.1.4), NAK codes and timers (9.7.5.2), retries (9.7.5.1.2 and 9.9.2). Where something was left out or added, the
//! module that does so says it. Payload never passes through here: a packet to be sent names a range of its request's source, and
//! a payload that came is handed to the [`Receiver`] as it is.
//!
//! Whoever drives a queue pair gives it what came ([`QueuePair::handle_packet`]) and the time ([`QueuePair::handle_timeout`], at
//! [`QueuePair::next_deadline`]), and takes what is to be sent ([`QueuePair::poll_transmit`]) and told
//! ([`QueuePair::poll_event`]).
//!
//! Invariant: every message is completed once, in the order of posting; a message is applied at the receiver at most once, all of
//! it and in order; and a queue pair that cannot go on ends, in bounded time, with everything in flight failed.
#![forbid(unsafe_code)]

mod packet;
mod psn;
mod queue_pair;
mod requester;
mod responder;
mod syndrome;

#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

pub use packet::{Body, HEADER_BYTES_MAX, IMMEDIATE_BYTES, Immediate, Packet, PacketError, Secret, Target};
pub use psn::Psn;
pub use queue_pair::{Event, QueuePair, State};
pub use requester::{Message, Piece, Transmit};
pub use responder::Receiver;
pub use syndrome::{NakCode, RnrTimer, Syndrome};

/// What a queue pair is told at its birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of payload in one packet, at most.
    pub mtu: u32,
    /// Packets that may be sent and not acknowledged.
    pub window: u32,
    /// Time-outs in a row after which the peer counts as gone.
    pub retry_limit: u32,
    /// "Receiver not ready" answers in a row after which we give up.
    pub not_ready_limit: u32,
    /// How long a sender shall wait if we are not ready.
    pub not_ready_timer: RnrTimer,
    /// The least time to wait for an acknowledgement.
    pub timeout_min: Duration,
    /// The most, however often the wait was doubled.
    pub timeout_max: Duration,
    /// After so long a silence with nothing in flight the peer is asked whether it is there.
    pub probe_interval: Duration,
}

impl Default for Config {
    /// 4,096 bytes (the largest MTU of IBA), 64 packets; a silent peer is given up after 14 time-outs of 4 ms doubled up to 1 s:
    /// 7 s, or 20 s if no round trip was measured. Long, because here an acknowledgement needs the peer's thread, not only its NIC.
    fn default() -> Config {
        Config {
            mtu: 4096,
            window: 64,
            retry_limit: 14,
            not_ready_limit: 200,
            not_ready_timer: RnrTimer::at_least(Duration::from_micros(640)),
            timeout_min: Duration::from_millis(4),
            timeout_max: Duration::from_secs(1),
            probe_interval: Duration::from_secs(1),
        }
    }
}

/// Why a queue pair ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The peer did not answer our hellos.
    Deadline {
        /// How many we sent.
        hellos: u32,
    },
    /// The peer did not acknowledge.
    RetryExhausted {
        /// How often we sent it.
        tries: u32,
        /// From the last progress on.
        over: Duration,
    },
    /// The peer had no room.
    NotReady {
        /// How often it said so.
        tries: u32,
        /// From the last progress on.
        over: Duration,
    },
    /// The peer refused what we sent.
    Refused(NakCode),
    /// We refused what the peer sent.
    Refusing(String),
    /// The peer said goodbye.
    PeerEnded,
    /// A fault that was asked for.
    Died,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Deadline { hellos } => write!(f, "none of {hellos} hellos was answered before the deadline"),
            Cause::RetryExhausted { tries, over } => write!(
                f,
                "retries exhausted: {tries} tries over {:.1} s were not acknowledged; the peer is dead, stopped or cut off",
                over.as_secs_f64()
            ),
            Cause::NotReady { tries, over } => {
                write!(f, "the peer was not ready to receive {tries} times over {:.1} s", over.as_secs_f64())
            }
            Cause::Refused(code) => write!(f, "the peer refused what we sent: {code}"),
            Cause::Refusing(why) => f.write_str(why),
            Cause::PeerEnded => f.write_str("the peer ended it"),
            Cause::Died => f.write_str("the queue pair died by an injected fault"),
        }
    }
}

/// What a queue pair has done besides the plain thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets sent again.
    pub resent: u64,
    /// Acknowledgements that did not come in time.
    pub timeouts: u64,
    /// Requests that came again: acknowledged, not applied.
    pub duplicates: u64,
    /// Requests that came too early: not applied.
    pub out_of_order: u64,
    /// NAKs for a gap in the sequence that the peer sent us.
    pub naks: u64,
    /// Requests answered "not ready".
    pub rnr_sent: u64,
    /// "Not ready" answers that came.
    pub rnr_received: u64,
    /// Silent peers asked whether they are there.
    pub probes: u64,
}
