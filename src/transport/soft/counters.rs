//! What a soft transport has done and suffered, for tests to see that a fault hit something and that a stranger was refused.
//!
//! Invariant: counts only grow, also when the path that they are about has ended.
#![forbid(unsafe_code)]

use crate::rc;

/// Counts since the transport's birth, over all peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoftCounters {
    /// Packets that queue pairs gave to be sent.
    pub sent: u64,
    /// Datagrams that came.
    pub received: u64,
    /// Packets lost by injection.
    pub lost: u64,
    /// Packets doubled by injection.
    pub duplicated: u64,
    /// Packets held back by injection so that others overtake them.
    pub reordered: u64,
    /// Packets delayed by injection.
    pub delayed: u64,
    /// Packets damaged by injection.
    pub corrupted: u64,
    /// Datagrams that the kernel would not send at all.
    pub send_errors: u64,
    /// Datagrams refused: too short, or for no queue pair of ours.
    pub unknown_queue_pair: u64,
    /// Datagrams refused: damaged, or sealed with another secret.
    pub bad_check: u64,
    /// Datagrams refused: the check is right, and what it covers is no packet.
    pub malformed: u64,
    /// Packets for a connection that we have ended.
    pub after_end: u64,
    /// What the queue pairs counted.
    pub queue_pairs: rc::Counters,
}

impl SoftCounters {
    /// Adds a queue pair's counts.
    pub(super) fn add(&mut self, more: &rc::Counters) {
        let rc::Counters { resent, timeouts, duplicates, out_of_order, naks, rnr_sent, rnr_received, probes } = more;
        let sum = &mut self.queue_pairs;
        sum.resent += resent;
        sum.timeouts += timeouts;
        sum.duplicates += duplicates;
        sum.out_of_order += out_of_order;
        sum.naks += naks;
        sum.rnr_sent += rnr_sent;
        sum.rnr_received += rnr_received;
        sum.probes += probes;
    }
}
