//! Rails on which the network between two ends carried nothing, though the ports are up: for a while paths are offered without them.
//!
//! Both ends see both offers, so it is enough that one of them doubts a rail. An end that dies makes its rails look like that too,
//! one after the other; a path that cannot be offered on any other rail is offered on all of them.
//!
//! Invariant: a doubt never keeps a path from being offered.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::RAILS_MAX;
use crate::types::PeerId;

/// How long paths to a peer go without a rail that carried nothing to it. A trial costs the device's retries, about a second.
const PASSED_OVER: Duration = Duration::from_secs(60);

/// By peer, until when each rail is passed over.
#[derive(Debug, Default)]
pub(super) struct Doubts(HashMap<PeerId, [Option<Instant>; RAILS_MAX]>);

impl Doubts {
    /// Nothing came through to `peer` on the rail.
    pub(super) fn add(&mut self, peer: PeerId, rail: usize, now: Instant) {
        self.0.entry(peer).or_default()[rail] = Some(now + PASSED_OVER);
    }

    /// The two ends doubt different rails, so that none is left.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.0.remove(&peer);
    }

    /// Which of the rails that could be used are not to be offered to the peer.
    pub(super) fn of(&mut self, peer: PeerId, usable: &[bool], now: Instant) -> [bool; RAILS_MAX] {
        let Some(until) = self.0.get(&peer) else { return [false; RAILS_MAX] };
        let doubted = until.map(|until| until.is_some_and(|until| now < until));
        if usable.iter().zip(doubted).any(|(usable, doubted)| *usable && !doubted) {
            return doubted;
        }
        self.forget(peer);
        [false; RAILS_MAX]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubt_holds_for_its_peer_and_a_while_and_never_leaves_nothing() {
        let (peer, other, now) = (PeerId::worker(0), PeerId::worker(1), Instant::now());
        let mut doubts = Doubts::default();
        doubts.add(peer, 1, now);
        assert_eq!(doubts.of(peer, &[true, true], now), [false, true, false, false]);
        assert_eq!(doubts.of(other, &[true, true], now), [false; 4]);
        assert_eq!(doubts.of(peer, &[true, true], now + PASSED_OVER), [false; 4], "it is tried again");
        doubts.add(peer, 0, now);
        assert_eq!(doubts.of(peer, &[true, true], now), [false; 4], "there is no other");
        assert_eq!(doubts.of(peer, &[true, true], now), [false; 4], "from then on none is doubted");
        doubts.add(peer, 1, now);
        assert_eq!(doubts.of(peer, &[false, true], now), [false; 4], "the other one is down");
        doubts.add(peer, 1, now);
        doubts.forget(peer);
        assert_eq!(doubts.of(peer, &[true, true], now), [false; 4]);
    }
}
