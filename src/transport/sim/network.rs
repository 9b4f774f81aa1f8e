//! The simulated network's state: nodes, paths, and messages on their way.
//!
//! Invariant: messages of a path are delivered, and the ends of its requests told, in the order in which they were posted; after
//! a path has ended at a node, nothing of it lands there.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{SimOptions, SimRandom};
use crate::{
    Error, Result,
    mem::{Lease, Region, SharedLease},
    transport::{Completion, QueueFull, RemoteSlot, WorkRequest, region_table::RegionTable},
    types::PeerId,
    wire::Note,
};

/// One end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// `connect` was called with this offer of the other end's; waits for its call until then.
    Connecting {
        wanted: u32,
        deadline: Instant,
    },
    Connected,
    /// Broken here, not fenced yet.
    Ended,
    /// Fenced here.
    Fenced,
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
    /// Its number among all messages of the link.
    sequence: u64,
    note: Note,
    payload: Option<(Source, RemoteSlot)>,
    due: Instant,
}

/// What became of a message, as far as its sender may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Pending,
    Sent,
    Lost,
}

/// A flushed request whose end has not been told.
#[derive(Debug)]
struct Untold {
    id: u64,
    source: Option<SharedLease>,
    fate: Fate,
}

#[derive(Debug, Default)]
struct Link {
    unflushed: VecDeque<WorkRequest>,
    messages: VecDeque<Message>,
    untold: VecDeque<Untold>,
    /// Messages whose end has been told: the sequence number of the first one in `untold`.
    told: u64,
    cut_until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Node {
    table: RegionTable,
    ends: BTreeMap<PeerId, End>,
    /// Paths to a peer that have been fenced: what it is offered is for the next one only.
    incarnations: BTreeMap<PeerId, u32>,
    /// Completions with the peer that each is about.
    inbox: VecDeque<(PeerId, Completion)>,
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
    pub corrupted: u64,
}

impl Network {
    pub fn new(seed: u64, options: SimOptions, now: Instant) -> Network {
        Network {
            random: SimRandom::new(seed),
            options,
            now,
            nodes: BTreeMap::new(),
            links: BTreeMap::new(),
            corrupted: 0,
        }
    }

    pub fn add(&mut self, me: PeerId) {
        self.nodes.insert(me, Node::default());
    }

    pub fn register(&mut self, me: PeerId, region: &Region) -> Result<u32> {
        self.node(me).table.register(region)
    }

    pub fn arm(&mut self, me: PeerId, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.node(me).table.arm(peer, slot)
    }

    /// For which path to `peer` an offer is, if one can be made just now.
    pub fn offer(&mut self, me: PeerId, peer: PeerId) -> Result<u32> {
        if self.options.refuse_one_in > 0 && self.random.once_in(self.options.refuse_one_in) {
            return Err(Error::Config("the simulator makes no offer just now".into()));
        }
        Ok(self.incarnation(me, peer))
    }

    /// How many paths to `peer` have been fenced at `me`.
    fn incarnation(&mut self, me: PeerId, peer: PeerId) -> u32 {
        self.node(me).incarnations.get(&peer).copied().unwrap_or(0)
    }

    pub fn connect(&mut self, me: PeerId, peer: PeerId, wanted: u32, deadline: Instant) -> Result<()> {
        if self.node(me).ends.get(&peer).is_some_and(|end| *end != End::Fenced) {
            return Err(Error::Config(format!("there is a path to {peer} already; fence it first")));
        }
        let (own, theirs) = (self.incarnation(me, peer), self.nodes.get(&peer).map(|node| node.incarnations.get(&me)));
        let theirs = theirs.flatten().copied().unwrap_or(0);
        let node = self.node(me);
        node.ends.insert(peer, End::Connecting { wanted, deadline });
        // What was about to be told of an earlier path is none of this one's business.
        node.breaking.retain(|(of, ..)| *of != peer);
        let other = self.nodes.get(&peer).and_then(|node| node.ends.get(&me));
        if matches!(other, Some(End::Connecting { wanted: ours, .. }) if *ours == own) && wanted == theirs {
            self.links.insert((me, peer), Link::default());
            self.links.insert((peer, me), Link::default());
            for (one, other) in [(me, peer), (peer, me)] {
                let node = self.node(one);
                node.ends.insert(other, End::Connected);
                node.inbox.push_back((other, Completion::Connected { peer: other }));
            }
        }
        Ok(())
    }

    pub fn post(&mut self, me: PeerId, request: WorkRequest) -> Result<(), QueueFull> {
        let peer = request.peer;
        let connected = self.node(me).ends.get(&peer) == Some(&End::Connected);
        let queue_max = self.options.queue_max;
        let link = self.links.get_mut(&(me, peer)).filter(|_| connected);
        if link.as_ref().is_some_and(|link| link.unflushed.len() + link.untold.len() >= queue_max) {
            return Err(QueueFull(request));
        }
        let error = match (link, request.defect()) {
            (Some(link), None) => {
                link.unflushed.push_back(request);
                return Ok(());
            }
            (Some(_), Some(defect)) => defect,
            (None, _) => broken(peer, "there is none"),
        };
        let source = request.payload.map(|(source, _)| source);
        self.node(me).inbox.push_back((peer, Completion::Failed { id: request.id, source, error }));
        Ok(())
    }

    pub fn flush(&mut self, me: PeerId) {
        let delay_us = self.options.delay_max.as_micros() as u64;
        let mut flushed = Vec::new();
        for ((from, to), link) in self.links.range_mut((me, PeerId::server(0, 0))..) {
            if *from != me {
                break;
            }
            for WorkRequest { id, note, payload, .. } in link.unflushed.drain(..) {
                let delay = Duration::from_micros(self.random.below(delay_us + 1));
                let after = link.messages.back().map_or(self.now, |before| before.due);
                let due = after.max(self.now + delay);
                let (source, slot) = payload.unzip();
                let is_copied = source.is_some() && self.random.once_in(2);
                let fate = if is_copied { Fate::Sent } else { Fate::Pending };
                let carried = source.clone().map(|source| match is_copied {
                    true => Source::Copied(source.bytes().to_vec()),
                    false => Source::Lent(source),
                });
                let sequence = link.told + link.untold.len() as u64;
                link.untold.push_back(Untold { id, source, fate });
                link.messages.push_back(Message { sequence, note, payload: carried.zip(slot), due });
            }
            flushed.push(*to);
        }
        flushed.into_iter().for_each(|to| self.tell_sender(me, to));
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
                End::Connecting { deadline, .. } => Some(*deadline),
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

    pub fn break_end(&mut self, one: PeerId, other: PeerId) {
        let reason = "the simulator broke this end of it".into();
        let when = self.now;
        self.node(one).breaking.push((other, when, reason));
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
        let node = self.node(me);
        if node.ends.contains_key(&peer) {
            *node.incarnations.entry(peer).or_default() += 1;
        }
        let mut leases = Vec::new();
        let mut kept = VecDeque::with_capacity(node.inbox.len());
        for (of, completion) in node.inbox.drain(..) {
            match completion {
                completion if of != peer => kept.push_back((of, completion)),
                Completion::Arrived { lease, .. } => leases.extend(lease),
                Completion::Connected { .. } | Completion::Broken { .. } => {}
                Completion::Sent { id, source } => {
                    let error = broken(peer, "we ended it");
                    kept.push_back((of, Completion::Failed { id, source, error }));
                }
                other @ (Completion::Failed { .. } | Completion::Released { .. }) => kept.push_back((of, other)),
            }
        }
        node.inbox = kept;
        leases.append(&mut node.table.fence(peer));
        self.end(me, peer);
        self.node(me).ends.insert(peer, End::Fenced);
        self.tell_later(peer, me);
        leases
    }

    /// A node disappears, as a killed process does.
    pub fn vanish(&mut self, me: PeerId) {
        let peers: Vec<PeerId> = self.node(me).ends.keys().copied().collect();
        peers.into_iter().for_each(|peer| drop(self.fence(me, peer)));
        let node = self.node(me);
        (node.table, node.inbox) = (RegionTable::default(), VecDeque::new());
    }

    pub fn is_quiet(&self, without: &[PeerId]) -> bool {
        self.nodes.iter().all(|(id, node)| node.inbox.is_empty() || without.contains(id))
    }

    pub fn poll(&mut self, me: PeerId, now: Instant, completions: &mut Vec<Completion>) {
        debug_assert!(now <= self.now, "a node runs ahead of the network's time");
        completions.extend(self.node(me).inbox.drain(..).map(|(_, completion)| completion));
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
        let Message { sequence, note, payload, .. } = message;
        let target = self.node(to);
        if target.ends.get(&from) != Some(&End::Connected) {
            // The receiver has ended its side: the bytes go nowhere.
            drop(payload);
            return self.decide(from, to, sequence, Fate::Lost);
        }
        let mut lease = None;
        if let Some((source, slot)) = payload {
            match target.table.take(from, slot.rkey, slot.offset, note.length) {
                Ok(mut taken) => {
                    let bytes = match &source {
                        Source::Lent(shared) => shared.bytes(),
                        Source::Copied(copy) => copy,
                    };
                    let length = note.length as usize;
                    taken.bytes_mut()[..length].copy_from_slice(&bytes[..length]);
                    let corrupt = self.options.corrupt_one_in;
                    if corrupt > 0 && length > 0 && self.random.once_in(corrupt) {
                        let bit = self.random.below(8 * length as u64) as usize;
                        taken.bytes_mut()[bit / 8] ^= 1 << (bit % 8);
                        self.corrupted += 1;
                    }
                    lease = Some(taken);
                }
                Err(refusal) => {
                    drop(source);
                    return self.tell_end(to, from, &format!("it wrote where it may not: {refusal}"));
                }
            }
        }
        self.node(to).inbox.push_back((from, Completion::Arrived { from, note, lease }));
        self.decide(from, to, sequence, Fate::Sent);
    }

    /// It is certain what the sender of a message will be told, if it has not been told already that it was copied.
    fn decide(&mut self, from: PeerId, to: PeerId, sequence: u64, fate: Fate) {
        let link = self.links.get_mut(&(from, to)).expect("a message was on it");
        let place = sequence.checked_sub(link.told).and_then(|place| link.untold.get_mut(place as usize));
        if let Some(untold) = place.filter(|untold| untold.fate == Fate::Pending) {
            untold.fate = fate;
            self.tell_sender(from, to);
        }
    }

    /// Tells a sender what is certain, in order.
    fn tell_sender(&mut self, from: PeerId, to: PeerId) {
        let link = self.links.get_mut(&(from, to)).expect("there is something to tell of it");
        let node = self.nodes.get_mut(&from).expect("a node of this network");
        while link.untold.front().is_some_and(|first| first.fate != Fate::Pending) {
            let Untold { id, source, fate } = link.untold.pop_front().expect("just seen");
            link.told += 1;
            let completion = match fate {
                Fate::Lost => Completion::Failed { id, source, error: broken(to, "the peer ended it") },
                _ => Completion::Sent { id, source },
            };
            node.inbox.push_back((to, completion));
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
                if matches!(end, End::Connecting { deadline, .. } if *deadline <= now) {
                    told.push((*me, *peer, "nobody answered before the deadline".into()));
                }
            }
        }
        for (me, peer, reason) in told {
            self.tell_end(me, peer, &reason);
        }
    }

    /// Tells an end that the path is gone, unless it has ended there already.
    fn tell_end(&mut self, me: PeerId, peer: PeerId, reason: &str) {
        if matches!(self.node(me).ends.get(&peer), Some(End::Connected | End::Connecting { .. })) {
            self.end(me, peer);
            let error = broken(peer, reason);
            self.node(me).inbox.push_back((peer, Completion::Broken { peer, error }));
            self.tell_later(peer, me);
        }
    }

    /// The path has ended at `peer`: `me` notices sooner or later, if it still holds its end.
    fn tell_later(&mut self, me: PeerId, peer: PeerId) {
        let later = self.now + self.options.delay_max;
        if let Some(node) = self.nodes.get_mut(&me).filter(|node| node.ends.get(&peer) == Some(&End::Connected)) {
            node.breaking.push((peer, later, "the peer ended it".into()));
        }
    }

    /// Ends the path at `me`; what it had queued fails.
    fn end(&mut self, me: PeerId, peer: PeerId) {
        self.node(me).ends.insert(peer, End::Ended);
        self.linger(me, peer);
        let Some(link) = self.links.get_mut(&(me, peer)) else { return };
        link.told += link.untold.len() as u64;
        let untold = link.untold.drain(..).map(|untold| (untold.id, untold.source));
        let unflushed = link.unflushed.drain(..);
        let unflushed = unflushed.map(|request| (request.id, request.payload.map(|(source, _)| source)));
        let node = self.nodes.get_mut(&me).expect("a node of this network");
        for (id, source) in untold.chain(unflushed) {
            let error = broken(peer, "it ended");
            node.inbox.push_back((peer, Completion::Failed { id, source, error }));
        }
    }

    /// The path has ended at `me`: of what is under way some still arrives, until the other end has ended it too.
    fn linger(&mut self, me: PeerId, peer: PeerId) {
        let Some(link) = self.links.get_mut(&(me, peer)) else { return };
        let count = if self.options.lingers { self.random.below(link.messages.len() as u64 + 1) as usize } else { 0 };
        link.messages.truncate(count);
        for message in &mut link.messages {
            if let Some((source, _)) = &mut message.payload
                && let Source::Lent(shared) = source
            {
                *source = Source::Copied(shared.bytes().to_vec());
            }
        }
    }

    fn node(&mut self, id: PeerId) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node of this network")
    }
}

fn broken(peer: PeerId, reason: &str) -> Error {
    Error::Broken { peer, reason: reason.into() }
}
