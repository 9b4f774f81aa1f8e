//! Who has been silent for how long: heartbeats due and peers given up, as a pure function of what was heard when.
//!
//! Invariant: a peer is reported dead at most once, and only when nothing was heard from it for the whole deadline.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::types::PeerId;

/// Watches over the silence of peers.
#[derive(Debug)]
pub struct Liveness {
    interval: Duration,
    deadline: Duration,
    peers: BTreeMap<PeerId, Peer>,
}

#[derive(Debug)]
struct Peer {
    heard: Instant,
    beat_due: Instant,
}

/// What [`Liveness::poll`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Peers that are to be sent a heartbeat now.
    pub due: Vec<PeerId>,
    /// Peers given up, with how long they have been silent.
    pub dead: Vec<(PeerId, Duration)>,
}

impl Liveness {
    /// A heartbeat to every peer each `interval`; a peer that is silent for `deadline` is dead.
    pub fn new(interval: Duration, deadline: Duration) -> Liveness {
        Liveness { interval, deadline, peers: BTreeMap::new() }
    }

    /// Begins to watch a peer, as if it had been heard now.
    pub fn track(&mut self, peer: PeerId, now: Instant) {
        self.peers.insert(peer, Peer { heard: now, beat_due: now + self.interval });
    }

    /// Something came from the peer: any note will do. A peer that is not watched is passed over.
    pub fn heard(&mut self, peer: PeerId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.heard = peer.heard.max(now);
        }
    }

    /// Ends the watch over a peer.
    pub fn forget(&mut self, peer: PeerId) {
        self.peers.remove(&peer);
    }

    /// Whom to send a heartbeat now, and who is dead; the dead are watched no more. After a pause of our own (this process was
    /// stopped) silence says nothing about the others: see [`Liveness::resume`].
    pub fn poll(&mut self, now: Instant) -> Pulse {
        let mut pulse = Pulse::default();
        for (peer, state) in &mut self.peers {
            let silence = now.saturating_duration_since(state.heard);
            if silence >= self.deadline {
                pulse.dead.push((*peer, silence));
            } else if state.beat_due <= now {
                state.beat_due = now + self.interval;
                pulse.due.push(*peer);
            }
        }
        pulse.dead.iter().for_each(|(peer, _)| self.forget(*peer));
        pulse
    }

    /// This process has been unable to listen until now: everybody's silence is counted from here on.
    pub fn resume(&mut self, now: Instant) {
        self.peers.values_mut().for_each(|peer| peer.heard = peer.heard.max(now));
    }

    /// When `poll` has something to say at the earliest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.peers.values().map(|peer| peer.beat_due.min(peer.heard + self.deadline)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PeerId = PeerId::worker(0);
    const B: PeerId = PeerId::server(1, 0);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn heartbeats_are_due_each_interval_and_the_silent_die_once() {
        let start = Instant::now();
        let mut liveness = Liveness::new(ms(100), ms(350));
        assert_eq!(liveness.next_deadline(), None);
        liveness.track(A, start);
        liveness.track(B, start);
        assert_eq!(liveness.next_deadline(), Some(start + ms(100)));
        assert_eq!(liveness.poll(start + ms(99)), Pulse::default());
        assert_eq!(liveness.poll(start + ms(100)).due, [B, A]);
        assert_eq!(liveness.poll(start + ms(100)), Pulse::default(), "sent once an interval");
        liveness.heard(A, start + ms(300));
        let pulse = liveness.poll(start + ms(350));
        assert_eq!((pulse.due, pulse.dead), (vec![A], vec![(B, ms(350))]));
        assert_eq!(liveness.poll(start + ms(449)), Pulse::default(), "B is dead once");
        assert_eq!(liveness.poll(start + ms(650)).dead, [(A, ms(350))]);
        assert_eq!(liveness.next_deadline(), None);
    }

    #[test]
    fn the_next_deadline_is_never_late() {
        let start = Instant::now();
        let mut liveness = Liveness::new(ms(100), ms(250));
        liveness.track(A, start);
        let mut died_at = None;
        while let Some(deadline) = liveness.next_deadline() {
            if !liveness.poll(deadline).dead.is_empty() {
                died_at = Some(deadline);
            }
        }
        assert_eq!(died_at, Some(start + ms(250)));
    }

    #[test]
    fn word_that_comes_late_or_from_nobody_changes_nothing() {
        let start = Instant::now();
        let mut liveness = Liveness::new(ms(100), ms(300));
        liveness.track(A, start + ms(50));
        liveness.heard(A, start);
        liveness.heard(B, start);
        assert!(liveness.poll(start + ms(300)).dead.is_empty(), "an older word does not turn time back");
        liveness.forget(A);
        assert_eq!(liveness.next_deadline(), None);
    }

    #[test]
    fn our_own_pause_kills_nobody() {
        let start = Instant::now();
        let mut liveness = Liveness::new(ms(100), ms(300));
        liveness.track(A, start);
        liveness.resume(start + ms(5000));
        assert_eq!(liveness.poll(start + ms(5001)), Pulse { due: vec![A], dead: vec![] });
        assert_eq!(liveness.poll(start + ms(5300)).dead, [(A, ms(300))]);
    }
}
