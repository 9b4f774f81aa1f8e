//! The shared-memory driver: one-sided writes between processes of one host and one user, each copied once, by the writer.
//!
//! Regions are memfds with a sealed size. Two ends that find each other ([`reachable`]) meet over a Unix socket with an abstract
//! name, look at each other's user, shake hands as on tcp, and hand each other a ring and their registered regions. A write is a
//! copy into the peer's slot, which this process has mapped, and an entry (the 64-byte frame header) in the peer's ring. The parts:
//! `ring` knows the order in which shared words are touched and nothing else, `mapping` the memory, `socket` the kernel,
//! `connecting` and `strangers` are the two ends of a handshake, `link` is a connection and what came over it, `path` one peer's
//! state, `withheld` keeps what a fence could not give back yet, and this file ties them to the transport's trait.
//!
//! *Sleep.* A sleeper says so in the rings that it reads and, where it waits for room, in those that it writes; then one full fence,
//! then another look at all of them (`ring` has the argument why no wake-up is lost). It is woken by a message on the socket of the
//! path, which is in its epoll set already. A descriptor of the peer's (an eventfd) would be a little cheaper to write to, but
//! whether it is one and whether writing to it blocks is in the hands of whoever sent it; a message never blocks, and if there is
//! no room for it, what is unread keeps the peer awake as well.
//!
//! *Order.* While a region has not been sent, no entry is, so that a peer that learns a key from an entry finds its region in the
//! socket: it looks there when a write names a key that it does not know.
//!
//! *Fence.* The writer copies by itself, so that `fence` alone cannot stop it: it may be in the middle of a copy, stopped. `copying`
//! in its ring says so, and then its slots are withheld until it is clear, or the writer's process has ended (pidfd), or its end of
//! the connection is closed, which its driver does between two copies and the kernel after the last thread's end. A new path to
//! the same peer has a new ring and does not wait for that.
//!
//! *Trust.* A peer has our registered regions mapped as a whole; it knows the job's token and runs under our user, who may write to
//! our memory by other means too. What it sends or scribbles is checked all the same: its path ends, and no other. But a write to
//! where nothing is armed has landed before its entry is refused.
//!
//! Invariant: an error on one path ends that path and no other; `poll` and `flush` never block, and do bounded work per peer; a
//! slot is given back only when its writer can no longer be writing to it.

mod address;
mod connecting;
mod link;
mod mapping;
mod options;
mod path;
mod ring;
mod sleeping;
mod socket;
mod strangers;
mod withheld;

use std::{
    collections::{HashMap, VecDeque},
    os::fd::{BorrowedFd, OwnedFd},
    time::Instant,
};

use address::Address;
pub use address::reachable;
use connecting::{Call, Outcome};
use link::Link;
#[doc(hidden)]
pub use mapping::RING_LAYOUT;
use mapping::Ring;
pub use options::ShmOptions;
use path::{Path, Queued, State};
use ring::Shared;
use socket::Owner;
use strangers::{Guest, Strangers};
use withheld::Withheld;

use super::{
    Armed, Completion, Driver, Endpoint, MemoryRegion, QueueFull, RemoteSlot, Transport, Wakeup, WorkRequest,
    done::Done,
    poller::{Kind, Poller, Readiness, Token},
    region_table::RegionTable,
};
use crate::{
    Error, Result,
    mem::{Lease, Region},
    types::PeerId,
    wire::{FrameHeader, FrameTarget, handshake::Refusal, split_incarnation, with_incarnation},
};

const FABRIC: &str = "shm";

/// While rings have entries, only one poll of so many asks the kernel what else there is.
const BUSY_POLLS_MAX: u32 = 16;

/// One-sided writes through shared memory, seen from one thread.
#[derive(Debug)]
pub struct ShmTransport {
    options: ShmOptions,
    poller: Poller,
    strangers: Strangers,
    address: Address,
    table: RegionTable,
    /// What peers are to map.
    regions: Vec<(u32, Region)>,
    paths: Vec<Option<Path>>,
    index_of: HashMap<PeerId, usize>,
    /// Paths to a peer that have been fenced: what it is offered is for the next one only.
    incarnations: HashMap<PeerId, u32>,
    /// Paths that are not connected yet: only they have deadlines.
    pending: usize,
    dirty: Vec<usize>,
    withheld: Withheld,
    done: Done,
    /// Whether the rings say that we sleep.
    asleep: bool,
    /// Polls since the kernel was asked last.
    busy_polls: u32,
}

impl ShmTransport {
    /// A transport without paths; listens from now on. An error where the system lacks what it needs (/proc, abstract sockets).
    pub fn new(options: ShmOptions) -> Result<ShmTransport> {
        let mut poller = Poller::new()?;
        let address = Address::fresh()?;
        let strangers = Strangers::new(socket::listen_as(&address.socket_name())?, &mut poller)?;
        Ok(ShmTransport {
            options,
            poller,
            strangers,
            address,
            table: RegionTable::default(),
            regions: Vec::new(),
            paths: Vec::new(),
            index_of: HashMap::new(),
            incarnations: HashMap::new(),
            pending: 0,
            dirty: Vec::new(),
            withheld: Withheld::default(),
            done: Done::default(),
            asleep: false,
            busy_polls: 0,
        })
    }

    fn path(&mut self, peer: PeerId) -> Option<(usize, &mut Path)> {
        let index = *self.index_of.get(&peer)?;
        Some((index, self.paths[index].as_mut()?))
    }

    fn on_ready(&mut self, ready: Readiness, now: Instant) -> Result<()> {
        match ready.token.kind() {
            Some(Kind::Listener) => self.strangers.welcome(now, &mut self.poller)?,
            Some(Kind::Stranger) => self.on_stranger(ready.token, now)?,
            Some(Kind::Path) => self.on_socket(ready, now)?,
            Some(Kind::Process) => self.on_process(ready.token),
            Some(Kind::Withheld) => self.withheld.on_ready(ready.token, &self.poller, &mut self.done),
            None => {}
        }
        Ok(())
    }

    fn on_stranger(&mut self, token: Token, now: Instant) -> Result<()> {
        let (paths, index_of) = (&self.paths, &self.index_of);
        let incarnations = &self.incarnations;
        let state_of = |peer: &PeerId| index_of.get(peer).and_then(|index| paths[*index].as_ref()).map(|p| &p.state);
        let admit = |peer: PeerId, meant: u32| match state_of(&peer) {
            // Who calls by an offer that a fence has ended may not have fenced its own end.
            _ if meant != incarnations.get(&peer).copied().unwrap_or(0) => Err(Refusal::Stale),
            Some(State::Expecting { .. }) => Ok(()),
            Some(State::Linked(_)) => Err(Refusal::Duplicate),
            // Not fenced and connected again yet, or never expected: the caller may try again.
            Some(State::Dead(_) | State::Calling(_)) | None => Err(Refusal::UnknownPeer),
        };
        let guest = self.strangers.readable(token, &self.options.identity, &mut self.poller, admit);
        let Some(Guest { peer, socket, owner }) = guest else { return Ok(()) };
        let index = self.index_of[&peer];
        let deadline = match self.paths[index].as_ref().map(|path| &path.state) {
            Some(State::Expecting { deadline }) => *deadline,
            _ => now,
        };
        let token = self.poller.add(&socket, Kind::Path, index)?;
        self.begin(index, socket, owner, token, deadline)
    }

    fn on_socket(&mut self, ready: Readiness, now: Instant) -> Result<()> {
        let index = ready.token.index();
        let Some(path) = self.paths.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        match &mut path.state {
            State::Calling(call) => {
                let deadline = call.deadline;
                let outcome = call.readable(ready.token, now, &mut self.poller, &self.options.identity);
                self.conclude(index, outcome, deadline)
            }
            State::Linked(link) if link.token == ready.token => {
                let mut result = Ok(());
                if ready.readable {
                    result = link.receive();
                }
                if ready.writable && result.is_ok() {
                    result = link.send_waiting(&self.poller);
                }
                self.after_talk(index, result);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Something was received: the peer's ring, its end, or nothing that changes the path.
    fn after_talk(&mut self, index: usize, result: Result<(), String>) {
        let Some(path) = &mut self.paths[index] else { return };
        let State::Linked(link) = &mut path.state else { return };
        if result.is_ok() && link.outbound.is_some() && !link.is_told {
            link.is_told = true;
            self.pending -= 1;
            self.done.push((path.peer, Completion::Connected { peer: path.peer }));
        }
        let ended = link.at_end.then(|| link.last_reason());
        match (result, ended) {
            (Err(reason), _) => self.break_path(index, &reason),
            (Ok(()), Some(reason)) => self.finish(index, &reason),
            (Ok(()), None) => {}
        }
    }

    fn on_process(&mut self, token: Token) {
        let path = self.paths.get_mut(token.index()).and_then(Option::as_mut);
        if let Some(Path { state: State::Linked(link), .. }) = path
            && link.process_token == Some(token)
        {
            let reason = link.last_reason();
            self.finish(token.index(), &reason);
        }
    }

    fn conclude(&mut self, index: usize, outcome: Outcome, deadline: Instant) -> Result<()> {
        match outcome {
            Outcome::Pending => Ok(()),
            Outcome::Open(socket, owner, token) => self.begin(index, socket, owner, token, deadline),
            Outcome::Ended(reason) => {
                self.break_path(index, &reason);
                Ok(())
            }
        }
    }

    fn begin(&mut self, index: usize, socket: OwnedFd, owner: Owner, token: Token, deadline: Instant) -> Result<()> {
        let Some(path) = &mut self.paths[index] else { return Ok(()) };
        let names = (self.options.identity.me, path.peer);
        let mut link = Link::begin(names, socket, owner, token, deadline, &self.regions, &mut self.poller)?;
        let result = link.send_waiting(&self.poller);
        path.state = State::Linked(Box::new(link));
        self.after_talk(index, result);
        Ok(())
    }

    /// Reads and writes one path's rings; whether there was anything to read.
    fn exchange(&mut self, index: usize) -> bool {
        let Some(path) = &mut self.paths[index] else { return false };
        let mut result = path.read(&mut self.table, &mut self.done);
        if let Ok(busy) = result
            && !path.outbound.is_empty()
        {
            result = path.write(&mut self.done).map(|()| busy);
        }
        match result {
            Ok(busy) => busy,
            Err(reason) => {
                self.finish(index, &reason);
                true
            }
        }
    }

    /// Ends a path whose peer may have written something before, which is read first.
    fn finish(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        let rest = path.read_rest(&mut self.table, &mut self.done);
        self.break_path(index, rest.as_ref().err().map_or(reason, String::as_str));
    }

    fn break_path(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        if is_pending(&path.state) {
            self.pending -= 1;
        }
        path.end(&self.poller);
        path.fail_queued(reason, &mut self.done);
        let error = Error::Broken { peer: path.peer, reason: reason.to_string() };
        self.done.push((path.peer, Completion::Broken { peer: path.peer, error }));
    }

    fn tick(&mut self, now: Instant) -> Result<()> {
        self.strangers.tick(now, &mut self.poller)?;
        if self.pending == 0 {
            return Ok(());
        }
        for index in 0..self.paths.len() {
            match self.paths[index].as_mut().map(|path| &mut path.state) {
                Some(State::Expecting { deadline }) if now >= *deadline => {
                    self.break_path(index, "it did not call us before the deadline");
                }
                Some(State::Linked(link)) if !link.is_told && now >= link.deadline => {
                    self.break_path(index, "it did not share its ring before the deadline");
                }
                Some(State::Calling(call)) => {
                    let deadline = call.deadline;
                    let outcome = call.tick(now, &mut self.poller, index)?;
                    self.conclude(index, outcome, deadline)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn set_asleep(&mut self, asleep: bool) {
        self.asleep = asleep;
        self.paths.iter_mut().flatten().for_each(|path| path.set_asleep(asleep));
    }
}

impl Transport for ShmTransport {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        region.host_only(FABRIC)?;
        let rkey = self.table.register(region)?;
        if self.regions.iter().all(|(known, _)| *known != rkey) {
            self.regions.push((rkey, region.clone()));
            for index in 0..self.paths.len() {
                if let Some(Path { state: State::Linked(link), .. }) = &mut self.paths[index] {
                    link.share(rkey, region);
                    let result = link.send_waiting(&self.poller);
                    self.after_talk(index, result);
                }
            }
        }
        Ok(MemoryRegion::new(FABRIC, rkey, region.len() as u64))
    }

    fn fabric(&self, _peer: PeerId) -> &'static str {
        FABRIC
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let incarnation = self.incarnations.get(&peer).copied().unwrap_or(0);
        Ok(Endpoint::new(FABRIC, with_incarnation(self.address.to_string(), incarnation)))
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        let Some(address) = remote.on(FABRIC) else {
            return Err(Error::Config(format!("{peer} offers `{}`, this is {FABRIC}", remote.fabrics())));
        };
        if self.index_of.contains_key(&peer) {
            return Err(Error::Config(format!("there is a path to {peer} already; fence it first")));
        }
        let refuse = |why: String| Error::Config(format!("{peer} cannot be reached by {FABRIC}: {why}"));
        let (address, incarnation) = split_incarnation(address)?;
        reachable(&self.address.to_string(), address).map_err(refuse)?;
        // The larger name calls, so that there is one connection and not two.
        let state = if self.options.identity.me > peer {
            let name = Address::parse(address).map_err(refuse)?.socket_name();
            State::Calling(Box::new(Call::new((peer, incarnation), name, Instant::now(), deadline)))
        } else {
            State::Expecting { deadline }
        };
        let index = self.paths.iter().position(Option::is_none).unwrap_or(self.paths.len());
        if index == self.paths.len() {
            self.paths.push(None);
        }
        self.paths[index] = Some(Path { peer, state, outbound: VecDeque::new(), is_dirty: false });
        self.index_of.insert(peer, index);
        self.pending += 1;
        Ok(())
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.table.arm(peer, slot)
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        let mut slots = self.table.fence(peer);
        if let Some(index) = self.index_of.remove(&peer)
            && let Some(mut path) = self.paths[index].take()
        {
            *self.incarnations.entry(peer).or_default() += 1;
            if is_pending(&path.state) {
                self.pending -= 1;
            }
            path.end(&self.poller);
            path.fail_queued("we ended it", &mut self.done);
            if let State::Dead(Some(remains)) = path.state {
                slots = self.withheld.keep(peer, remains, slots, &mut self.poller);
            }
            self.dirty.retain(|dirty| *dirty != index);
        }
        // What has arrived is whole, whatever the peer is doing.
        self.done.forget(peer, &mut slots);
        slots
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        let queue_limit = self.options.queue_limit;
        let peer = request.peer;
        let defect = match self.path(peer) {
            None => Some(Error::Broken { peer, reason: "there is none: connect comes first".into() }),
            Some((_, Path { state: State::Dead(_), .. })) => {
                Some(Error::Broken { peer, reason: "it ended before".into() })
            }
            Some((_, path)) if path.outbound.len() >= queue_limit => return Err(QueueFull(request)),
            Some(_) => request.defect(),
        };
        let WorkRequest { id, note, payload, .. } = request;
        let (source, slot) = payload.unzip();
        if let Some(error) = defect {
            self.done.push((peer, Completion::Failed { id, source, error }));
            return Ok(());
        }
        let target = slot.map(|slot| FrameTarget { rkey: slot.rkey, offset: slot.offset });
        let (index, path) = self.path(peer).expect("looked up above");
        path.outbound.push_back(Queued { id, header: FrameHeader { target, note }, source });
        if !std::mem::replace(&mut path.is_dirty, true) {
            self.dirty.push(index);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let Some(path) = &mut self.paths[index] else { continue };
            path.is_dirty = false;
            if let Err(reason) = path.write(&mut self.done) {
                self.finish(index, &reason);
            }
        }
        // The list keeps its memory.
        self.dirty = dirty;
        Ok(())
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        let was_asleep = self.asleep;
        if was_asleep {
            self.set_asleep(false);
        }
        let mut busy = false;
        for index in 0..self.paths.len() {
            busy |= self.exchange(index);
        }
        self.busy_polls += 1;
        // What woke us is to be read away, or it would do so again.
        if !busy || was_asleep || self.busy_polls >= BUSY_POLLS_MAX {
            self.busy_polls = 0;
            for at in 0..self.poller.collect()? {
                self.on_ready(self.poller.ready(at), now)?;
            }
        }
        self.withheld.look(&self.poller, &mut self.done);
        self.tick(now)?;
        self.done.tell(completions);
        Ok(())
    }
}

impl Driver for ShmTransport {
    fn judge(&self, own: &str, remote: &str) -> Result<String, String> {
        let bare = |text| split_incarnation(text).map(|(address, _)| address).map_err(|error| error.to_string());
        reachable(bare(own)?, bare(remote)?).map(|()| "both are on one host, of one user".into())
    }
}

impl Drop for ShmTransport {
    fn drop(&mut self) {
        for path in self.paths.iter_mut().flatten() {
            path.end(&self.poller);
        }
    }
}

fn is_pending(state: &State) -> bool {
    match state {
        State::Expecting { .. } | State::Calling(_) => true,
        State::Linked(link) => !link.is_told,
        State::Dead(_) => false,
    }
}
