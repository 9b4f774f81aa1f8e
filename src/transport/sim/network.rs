//! The simulated network's state: nodes, paths, and messages on their way.
//!
//! Invariant: messages of a path are delivered in the order in which they were posted; after a path has ended at a node, nothing
//! of it lands there.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{SimOptions, SimRandom};
use crate::{
    Error, Result,
    mem::{Lease, Region, SharedLease},
    transport::{Completion, MemoryRegion, QueueFull, RemoteSlot, WorkRequest, region_table::RegionTable},
    types::PeerId,
    wire::Note,
};

/// One end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// `connect` was called; waits for the other end's until then.
    Connecting(Instant),
    Connected,
    /// Broken or fenced here.
    Ended,
}

#[derive(Debug)]
enum Source {
    /// The payload is read when it lands.
    Lent(SharedLease),
    /// The payload was copied when it was sent.
    Copied(Vec<u8>),
}

#[derive(Debug)]
struct Message {
    id: u64,
    note: Note,
    payload: Option<(Source, RemoteSlot)>,
    due: Instant,
}

#[derive(Debug, Default)]
struct Link {
    unflushed: VecDeque<WorkRequest>,
    messages: VecDeque<Message>,
    cut_until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Node {
    table: RegionTable,
    ends: BTreeMap<PeerId, End>,
    inbox: VecDeque<Completion>,
    /// Ends that will be told of a broken path.
    breaking: Vec<(PeerId, Instant, String)>,
}

#[derive(Debug)]
pub(super) struct Network {
    random: SimRandom,
    options: SimOptions,
    now: Instant,
    nodes: BTreeMap<PeerId, Node>,
    /// By (from, to).
    links: BTreeMap<(PeerId, PeerId), Link>,
}

impl Network {
    pub fn new(seed: u64, options: SimOptions, now: Instant) -> Network {
        Network { random: SimRandom::new(seed), options, now, nodes: BTreeMap::new(), links: BTreeMap::new() }
    }

    pub fn add(&mut self, me: PeerId) {
        self.nodes.insert(me, Node::default());
    }

    pub fn register(&mut self, me: PeerId, region: &Region) -> Result<MemoryRegion> {
        self.node(me).table.register(region)
    }

    pub fn arm(&mut self, me: PeerId, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.node(me).table.arm(peer, slot)
    }

    pub fn connect(&mut self, me: PeerId, peer: PeerId, deadline: Instant) {
        self.node(me).ends.insert(peer, End::Connecting(deadline));
        let other = self.nodes.get(&peer).and_then(|node| node.ends.get(&me));
        if matches!(other, Some(End::Connecting(_))) {
            self.links.insert((me, peer), Link::default());
            self.links.insert((peer, me), Link::default());
            for (one, other) in [(me, peer), (peer, me)] {
                let node = self.node(one);
                node.ends.insert(other, End::Connected);
                node.inbox.push_back(Completion::Connected { peer: other });
            }
        }
    }

    pub fn post(&mut self, me: PeerId, request: WorkRequest) -> Result<(), QueueFull> {
        let connected = self.node(me).ends.get(&request.peer) == Some(&End::Connected);
        let queue_max = self.options.queue_max;
        let link = self.links.get_mut(&(me, request.peer)).filter(|_| connected);
        let Some(link) = link else {
            let error = broken(request.peer, "there is no path");
            let source = request.payload.map(|(source, _)| source);
            self.node(me).inbox.push_back(Completion::Failed { id: request.id, source, error });
            return Ok(());
        };
        if link.unflushed.len() + link.messages.len() >= queue_max {
            return Err(QueueFull(request));
        }
        link.unflushed.push_back(request);
        Ok(())
    }

    pub fn flush(&mut self, me: PeerId) {
        let delay_us = self.options.delay_max.as_micros() as u64;
        for ((from, _), link) in self.links.range_mut((me, PeerId::server(0, 0))..) {
            if *from != me {
                break;
            }
            let node = self.nodes.get_mut(&me).expect("a node of this network");
            for WorkRequest { id, note, payload, .. } in link.unflushed.drain(..) {
                let delay = Duration::from_micros(self.random.below(delay_us + 1));
                let after = link.messages.back().map_or(self.now, |before| before.due);
                let due = after.max(self.now + delay);
                let payload = payload.map(|(source, slot)| {
                    if self.random.once_in(2) {
                        let copy = Source::Copied(source.bytes().to_vec());
                        node.inbox.push_back(Completion::Sent { id, source: Some(source) });
                        (copy, slot)
                    } else {
                        (Source::Lent(source), slot)
                    }
                });
                link.messages.push_back(Message { id, note, payload, due });
            }
        }
    }

    pub fn advance(&mut self, now: Instant) {
        self.now = now;
        let keys: Vec<_> = self.links.keys().copied().collect();
        for key in keys {
            while let Some(message) = self.next_of(key) {
                self.deliver(key.0, key.1, message);
            }
        }
        self.tell_ends();
    }

    pub fn next_due(&self) -> Option<Instant> {
        let messages = self.links.values().filter_map(|link| {
            let due = link.messages.front()?.due;
            Some(link.cut_until.map_or(due, |until| due.max(until)))
        });
        let ends = self.nodes.values().flat_map(|node| {
            let breaking = node.breaking.iter().map(|(_, when, _)| *when);
            let connecting = node.ends.values().filter_map(|end| match end {
                End::Connecting(deadline) => Some(*deadline),
                _ => None,
            });
            breaking.chain(connecting)
        });
        messages.chain(ends).min()
    }

    pub fn break_path(&mut self, one: PeerId, other: PeerId) {
        let delay_us = self.options.delay_max.as_micros() as u64;
        for (at, peer) in [(one, other), (other, one)] {
            let when = self.now + Duration::from_micros(self.random.below(delay_us + 1));
            self.node(at).breaking.push((peer, when, "the simulator broke it".into()));
        }
    }

    pub fn cut(&mut self, one: PeerId, other: PeerId, until: Instant) {
        for key in [(one, other), (other, one)] {
            if let Some(link) = self.links.get_mut(&key) {
                link.cut_until = Some(until);
            }
        }
    }

    pub fn in_flight(&self, one: PeerId, other: PeerId) -> usize {
        let count = |key| self.links.get(&key).map_or(0, |link: &Link| link.unflushed.len() + link.messages.len());
        count((one, other)) + count((other, one))
    }

    pub fn fence(&mut self, me: PeerId, peer: PeerId) -> Vec<Lease> {
        self.end(me, peer);
        let node = self.node(me);
        let mut leases = node.table.fence(peer);
        let mut kept = VecDeque::with_capacity(node.inbox.len());
        for completion in node.inbox.drain(..) {
            match completion {
                Completion::Arrived { from, lease, .. } if from == peer => leases.extend(lease),
                Completion::Connected { peer: other } | Completion::Broken { peer: other, .. } if other == peer => {}
                other => kept.push_back(other),
            }
        }
        node.inbox = kept;
        leases
    }

    pub fn is_quiet(&self) -> bool {
        self.nodes.values().all(|node| node.inbox.is_empty())
    }

    pub fn poll(&mut self, me: PeerId, now: Instant, completions: &mut Vec<Completion>) {
        debug_assert!(now <= self.now, "a node runs ahead of the network's time");
        completions.extend(self.node(me).inbox.drain(..));
    }

    /// The next message of a link that is due.
    fn next_of(&mut self, key: (PeerId, PeerId)) -> Option<Message> {
        let link = self.links.get_mut(&key)?;
        if link.cut_until.is_some_and(|until| until > self.now) || link.messages.front()?.due > self.now {
            return None;
        }
        link.cut_until = None;
        link.messages.pop_front()
    }

    fn deliver(&mut self, from: PeerId, to: PeerId, message: Message) {
        let Message { id, note, payload, .. } = message;
        let now = self.now;
        let target = self.node(to);
        if target.ends.get(&from) != Some(&End::Connected) {
            // The receiver has ended its side: the bytes go nowhere, and the sender learns it as a broken path.
            if let Some((Source::Lent(source), _)) = payload {
                let error = broken(to, "the peer ended the path");
                self.node(from).inbox.push_back(Completion::Failed { id, source: Some(source), error });
            }
            return;
        }
        let mut lease = None;
        let mut sent = None;
        if let Some((source, slot)) = payload {
            match target.table.take(from, slot.rkey, slot.offset, note.length) {
                Ok(mut taken) => {
                    let bytes = match &source {
                        Source::Lent(shared) => shared.bytes(),
                        Source::Copied(copy) => copy,
                    };
                    let length = note.length as usize;
                    taken.bytes_mut()[..length].copy_from_slice(&bytes[..length]);
                    lease = Some(taken);
                }
                Err(refusal) => {
                    target.breaking.push((from, now, format!("it wrote where it may not: {refusal}")));
                    self.node(from).breaking.push((to, now, "the peer refused a write".into()));
                    return;
                }
            }
            if let Source::Lent(shared) = source {
                sent = Some(shared);
            }
        } else {
            self.node(from).inbox.push_back(Completion::Sent { id, source: None });
        }
        self.node(to).inbox.push_back(Completion::Arrived { from, note, lease });
        if let Some(source) = sent {
            self.node(from).inbox.push_back(Completion::Sent { id, source: Some(source) });
        }
    }

    /// Tells ends of broken paths and of connects that came to nothing.
    fn tell_ends(&mut self) {
        let now = self.now;
        let mut told = Vec::new();
        for (me, node) in &mut self.nodes {
            node.breaking.retain(|(peer, when, reason)| {
                if *when <= now {
                    told.push((*me, *peer, reason.clone()));
                }
                *when > now
            });
            for (peer, end) in &node.ends {
                if matches!(end, End::Connecting(deadline) if *deadline <= now) {
                    told.push((*me, *peer, "it did not connect in time".into()));
                }
            }
        }
        for (me, peer, reason) in told {
            if self.node(me).ends.get(&peer) != Some(&End::Ended) {
                self.end(me, peer);
                self.node(me).inbox.push_back(Completion::Broken { peer, error: broken(peer, &reason) });
                // The other end notices sooner or later, if it has not been told.
                let later = now + self.options.delay_max;
                self.node(peer).breaking.push((me, later, "the peer ended the path".into()));
            }
        }
    }

    /// Ends the path at `me`; what it had queued fails.
    fn end(&mut self, me: PeerId, peer: PeerId) {
        self.node(me).ends.insert(peer, End::Ended);
        let Some(link) = self.links.get_mut(&(me, peer)) else { return };
        let mut failed: Vec<(u64, Option<SharedLease>)> = Vec::new();
        for message in link.messages.drain(..) {
            match message.payload {
                Some((Source::Lent(source), _)) => failed.push((message.id, Some(source))),
                Some((Source::Copied(_), _)) => {} // reported as sent already
                None => failed.push((message.id, None)),
            }
        }
        let unflushed = link.unflushed.drain(..);
        failed.extend(unflushed.map(|request| (request.id, request.payload.map(|(source, _)| source))));
        for (id, source) in failed {
            let error = broken(peer, "the path ended");
            self.node(me).inbox.push_back(Completion::Failed { id, source, error });
        }
    }

    fn node(&mut self, id: PeerId) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node of this network")
    }
}

fn broken(peer: PeerId, reason: &str) -> Error {
    Error::Broken { peer, reason: reason.into() }
}
