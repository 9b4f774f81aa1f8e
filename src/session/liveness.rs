//! Is a peer alive? Our own heartbeat on every path, so that a process that is stopped is told from one that computes, on every
//! fabric (some acknowledge writes for a process that no longer runs).
//!
//! Invariant: pure; a peer is reported dead once, after a silence of at least the deadline.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::types::PeerId;

/// What [`Liveness::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LivenessEvent {
    /// It is time to give `PeerId` a sign of life.
    HeartbeatDue(PeerId),
    /// Nothing was heard from the peer for this long.
    Dead(PeerId, Duration),
}

#[derive(Clone, Copy, Debug)]
struct Peer {
    heard: Instant,
    heartbeat_next: Instant,
    polled: Instant,
    interval: Duration,
    deadline: Duration,
}

/// Keeps track of when each peer was heard.
#[derive(Clone, Debug)]
pub struct Liveness {
    interval: Duration,
    deadline: Duration,
    peers: BTreeMap<PeerId, Peer>,
    /// Peers that count as dead after another silence.
    suspects: BTreeMap<PeerId, Duration>,
}

impl Liveness {
    /// Heartbeats every `interval`; a silence of `deadline` means death.
    pub fn new(interval: Duration, deadline: Duration) -> Liveness {
        Liveness { interval, deadline, peers: BTreeMap::new(), suspects: BTreeMap::new() }
    }

    /// Begins to watch a peer.
    pub fn track(&mut self, peer: PeerId, now: Instant) {
        let own = self.suspects.get(&peer).map(|silence| (*silence / 5, *silence));
        let (interval, deadline) = own.unwrap_or((self.interval, self.deadline));
        let heartbeat_next = now + interval;
        self.peers.insert(peer, Peer { heard: now, heartbeat_next, polled: now, interval, deadline });
    }

    /// A silence of so long means that this peer is dead, from when it is tracked next; heartbeats are sent five times as often.
    pub fn suspect_after(&mut self, peer: PeerId, silence: Duration) {
        self.suspects.insert(peer, silence);
    }

    /// Something came from a peer.
    pub fn heard(&mut self, peer: PeerId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.heard = now;
        }
    }

    /// How long nothing has been heard from a peer; `None` if it is not watched.
    pub fn silence(&self, peer: PeerId, now: Instant) -> Option<Duration> {
        self.peers.get(&peer).map(|peer| now.saturating_duration_since(peer.heard))
    }

    /// Stops watching a peer.
    pub fn forget(&mut self, peer: PeerId) {
        self.peers.remove(&peer);
    }

    /// Time has passed. Heartbeats that are due count as sent; dead peers are forgotten.
    ///
    /// If this thread itself was not running (stopped, or starved by others), a peer's silence says nothing: the gap since the
    /// last poll is not counted against the peer.
    pub fn poll(&mut self, now: Instant, events: &mut Vec<LivenessEvent>) {
        for (id, peer) in &mut self.peers {
            let gap = now.saturating_duration_since(peer.polled);
            peer.polled = now;
            if gap > peer.deadline / 2 {
                peer.heard = (peer.heard + gap).min(now);
            }
            let silence = now.saturating_duration_since(peer.heard);
            if silence >= peer.deadline {
                events.push(LivenessEvent::Dead(*id, silence));
            } else if now >= peer.heartbeat_next {
                peer.heartbeat_next = now + peer.interval;
                events.push(LivenessEvent::HeartbeatDue(*id));
            }
        }
        self.peers.retain(|_, peer| now.saturating_duration_since(peer.heard) < peer.deadline);
    }

    /// When [`Liveness::poll`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.peers.values().map(|peer| peer.heartbeat_next.min(peer.heard + peer.deadline)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn poll(liveness: &mut Liveness, now: Instant) -> Vec<LivenessEvent> {
        let mut events = Vec::new();
        liveness.poll(now, &mut events);
        events
    }

    #[test]
    fn a_silent_peer_dies_once_and_a_heard_one_does_not() {
        let start = Instant::now();
        let (silent, alive) = (PeerId::worker(0), PeerId::worker(1));
        let mut liveness = Liveness::new(SECOND, 3 * SECOND);
        liveness.track(silent, start);
        liveness.track(alive, start);
        let mut dead = Vec::new();
        for tick in 1..10 {
            let now = start + tick * SECOND;
            liveness.heard(alive, now);
            let events = poll(&mut liveness, now);
            assert!(events.contains(&LivenessEvent::HeartbeatDue(alive)));
            dead.extend(events.into_iter().filter(|event| matches!(event, LivenessEvent::Dead(..))));
        }
        assert_eq!(dead, [LivenessEvent::Dead(silent, 3 * SECOND)]);
    }

    #[test]
    fn our_own_absence_is_not_held_against_a_peer() {
        let start = Instant::now();
        let mut liveness = Liveness::new(SECOND, 3 * SECOND);
        liveness.track(PeerId::worker(0), start);
        let late = start + 100 * SECOND;
        assert_eq!(poll(&mut liveness, late), [LivenessEvent::HeartbeatDue(PeerId::worker(0))]);
        assert_eq!(liveness.silence(PeerId::worker(0), late), Some(Duration::ZERO));
        assert_eq!(liveness.silence(PeerId::worker(1), late), None);
        assert_eq!(poll(&mut liveness, late + SECOND).len(), 1);
        poll(&mut liveness, late + 2 * SECOND);
        let events = poll(&mut liveness, late + 3 * SECOND);
        assert_eq!(events, [LivenessEvent::Dead(PeerId::worker(0), 3 * SECOND)]);
    }

    #[test]
    fn the_next_deadline_is_the_earliest() {
        let start = Instant::now();
        let mut liveness = Liveness::new(SECOND, 3 * SECOND);
        assert_eq!(liveness.next_deadline(), None);
        liveness.track(PeerId::worker(0), start);
        assert_eq!(liveness.next_deadline(), Some(start + SECOND));
    }
}
