//! The TCP driver: one-sided writes emulated over authenticated byte streams, moved by io_uring or by epoll.
//!
//! A write travels as a frame (header, then payload: docs/wire.md). The receiver checks the header's checksums, looks the slot up
//! in the region table, and receives the payload straight into it. The parts: `framing` knows bytes and no socket; `socket`,
//! `epoll` and `ring` know the kernel, and `choice` which of the last two is used; `connecting` and `strangers` are the two ends of
//! a handshake, by readiness always; `looking` asks what is ready; `path` is one peer's connection, and `flow` its memory while a ring works on it; this file
//! ties them to the transport's trait.
//!
//! Invariant: an error on one path ends that path and no other; `poll` and `flush` never block, and do bounded work per peer; a
//! lease that the kernel may still write to is given to nobody.

mod choice;
mod connecting;
mod flow;
mod framing;
mod looking;
mod options;
mod path;
mod ring;
mod sleeping;
mod socket;
mod strangers;

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpStream},
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

pub use choice::Io;
use connecting::{Call, Outcome};
pub use options::TcpOptions;
use path::{Open, Path, State};
use ring::{Finished, Operation, Ring};
use strangers::{Guest, Strangers};

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
    wire::{
        FrameHeader, FrameTarget, format_addresses, handshake::Refusal, parse_addresses, split_incarnation,
        with_incarnation,
    },
};

const FABRIC: &str = "tcp";

/// How long a fence waits for the kernel to let go of a path's memory. It does so at once; what it keeps is withheld.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// One-sided writes over TCP, seen from one thread.
#[derive(Debug)]
pub struct TcpTransport {
    options: TcpOptions,
    poller: Poller,
    /// Made by the thread that uses the transport first.
    ring: Option<Ring>,
    /// With a ring: the poller has something to say.
    poller_is_ready: bool,
    /// Looks since the poller was asked.
    looks: u32,
    strangers: Option<Strangers>,
    /// What peers are told to call; empty if we do not listen.
    advertised: Vec<SocketAddr>,
    table: RegionTable,
    paths: Vec<Option<Path>>,
    index_of: HashMap<PeerId, usize>,
    /// Paths to a peer that have been fenced: what it is offered is for the next one only.
    incarnations: HashMap<PeerId, u32>,
    /// Paths that are expected or being called: only they have deadlines.
    pending: usize,
    dirty: Vec<usize>,
    done: Done,
    /// Paths that were fenced while the kernel did not let go of their memory.
    withheld: Vec<Path>,
}

impl TcpTransport {
    /// A transport without paths; listens from now on if its options say so.
    pub fn new(options: TcpOptions) -> Result<TcpTransport> {
        options.io.attempt()?;
        let mut poller = Poller::new()?;
        let (mut strangers, mut advertised) = (None, Vec::new());
        if options.listen {
            let listener = socket::listen_on(options.listening_ip()?, options.ports.as_ref())?;
            let room = strangers.insert(Strangers::new(listener, &mut poller)?);
            let bound = room.address().map_err(|e| Error::os("getsockname", "the tcp listener", e))?;
            advertised = socket::reachable(bound, options.advertise)?;
        }
        Ok(TcpTransport {
            options,
            poller,
            ring: None,
            poller_is_ready: false,
            looks: 0,
            strangers,
            advertised,
            table: RegionTable::default(),
            paths: Vec::new(),
            index_of: HashMap::new(),
            incarnations: HashMap::new(),
            pending: 0,
            dirty: Vec::new(),
            done: Done::default(),
            withheld: Vec::new(),
        })
    }

    fn path(&mut self, peer: PeerId) -> Option<(usize, &mut Path)> {
        let index = *self.index_of.get(&peer)?;
        Some((index, self.paths[index].as_mut()?))
    }

    /// The ring, which is made here if it is wanted: no path is open before.
    fn ring(&mut self) -> Result<Option<&mut Ring>> {
        if self.ring.is_none() && self.options.io == Io::Uring {
            self.ring = Some(Ring::open(self.poller.fd()).map_err(|trouble| choice::refused(&trouble))?);
        }
        Ok(self.ring.as_mut())
    }

    fn on_finished(&mut self, finished: Finished) {
        if finished.operation() == Operation::Watch {
            self.poller_is_ready = true;
            return;
        }
        let (token, ring) = (finished.token(), self.ring.as_mut().expect("it finished something"));
        let index = token.index();
        let path = self.paths.get_mut(index).and_then(Option::as_mut).filter(|path| path.is_connected_as(token));
        let Some(path) = path else { return self.release(finished) };
        let result = path.finished(finished, ring, &mut self.table, &mut self.done);
        if let Err(reason) = result {
            self.break_path(index, &reason);
        } else if let State::Ending { reason, .. } = &path.state
            && !path.is_busy()
        {
            let reason = reason.clone();
            self.bury(index, &reason);
        }
    }

    /// The kernel is done with something of a path that was fenced.
    fn release(&mut self, finished: Finished) {
        let token = finished.token();
        let Some(at) = self.withheld.iter().position(|path| path.is_connected_as(token)) else { return };
        self.withheld[at].take_back(finished, &mut self.done);
        if !self.withheld[at].is_busy() {
            let mut path = self.withheld.swap_remove(at);
            let slots = path.end(&self.poller).into_iter().collect();
            self.done.push((path.peer, Completion::Released { peer: path.peer, slots }));
            path.fail_queued("we ended it", &mut self.done);
        }
    }

    fn on_ready(&mut self, ready: Readiness, now: Instant) -> Result<()> {
        match ready.token.kind() {
            Some(Kind::Listener) => match &mut self.strangers {
                Some(strangers) => strangers.welcome(now, &mut self.poller),
                None => Ok(()),
            },
            Some(Kind::Stranger) => self.on_stranger(ready.token),
            Some(Kind::Path) => self.on_path(ready, now),
            Some(Kind::Process | Kind::Withheld) | None => Ok(()), // tcp watches sockets only
        }
    }

    fn on_stranger(&mut self, token: Token) -> Result<()> {
        let Some(strangers) = &mut self.strangers else { return Ok(()) };
        let (paths, index_of) = (&self.paths, &self.index_of);
        let incarnations = &self.incarnations;
        let state_of = |peer: &PeerId| index_of.get(peer).and_then(|index| paths[*index].as_ref()).map(|p| &p.state);
        let admit = |peer: PeerId, meant: u32| match state_of(&peer) {
            // Who calls by an offer that a fence has ended may not have fenced its own end.
            _ if meant != incarnations.get(&peer).copied().unwrap_or(0) => Err(Refusal::Stale),
            Some(State::Expecting { .. }) => Ok(()),
            Some(State::Open(_)) => Err(Refusal::Duplicate),
            // Not fenced and connected again yet, or never expected: the caller may try again.
            Some(State::Ending { .. } | State::Dead | State::Calling(_)) | None => Err(Refusal::UnknownPeer),
        };
        let guest = strangers.readable(token, &self.options.identity, &mut self.poller, admit);
        let Some(Guest { peer, stream }) = guest else { return Ok(()) };
        let index = self.index_of[&peer];
        let token = self.poller.rename(&stream, Kind::Path, index)?;
        self.open(index, stream, token);
        Ok(())
    }

    fn on_path(&mut self, ready: Readiness, now: Instant) -> Result<()> {
        let index = ready.token.index();
        let Some(path) = self.paths.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        if let State::Calling(call) = &mut path.state {
            let outcome = call.readable(ready.token, now, &mut self.poller, &self.options.identity)?;
            self.conclude(index, outcome);
            return Ok(());
        }
        if !path.is_connected_as(ready.token) {
            return Ok(());
        }
        let mut result = Ok(());
        if ready.readable {
            result = path.read(&mut self.table, &mut self.done);
        }
        if ready.writable && result.is_ok() {
            result = path.write(&self.poller, self.ring.as_mut(), &mut self.done);
        }
        if let Err(reason) = result {
            self.break_path(index, &reason);
        }
        Ok(())
    }

    fn conclude(&mut self, index: usize, outcome: Outcome) {
        match outcome {
            Outcome::Pending => {}
            Outcome::Open(stream, token) => self.open(index, stream, token),
            Outcome::Ended(reason) => self.break_path(index, &reason),
        }
    }

    fn open(&mut self, index: usize, stream: TcpStream, token: Token) {
        let Some(path) = &mut self.paths[index] else { return };
        let open = Open::new(stream, token, &self.poller, self.ring.as_mut());
        let result = open.map_err(|e| e.to_string()).and_then(|open| {
            path.state = State::Open(open);
            self.pending -= 1;
            self.done.push((path.peer, Completion::Connected { peer: path.peer }));
            // What was posted and flushed before there was a connection.
            path.write(&self.poller, self.ring.as_mut(), &mut self.done)
        });
        if let Err(reason) = result {
            self.break_path(index, &reason);
        }
    }

    fn break_path(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        if let (true, Some(ring)) = (path.is_busy(), &mut self.ring) {
            // The rest follows when the kernel has let go.
            path.begin_end(reason, ring);
            return;
        }
        if is_pending(&path.state) {
            self.pending -= 1;
        }
        self.bury(index, reason);
    }

    fn bury(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        if let Some(slot) = path.end(&self.poller) {
            self.table.put_back(path.peer, slot);
        }
        path.fail_queued(reason, &mut self.done);
        let error = Error::Broken { peer: path.peer, reason: reason.to_string() };
        self.done.push((path.peer, Completion::Broken { peer: path.peer, error }));
    }

    /// Has the kernel let go of a path's memory; `false` if it does not until then.
    fn settle(&mut self, path: &mut Path, until: Instant) -> bool {
        let Some(ring) = &mut self.ring else { return true };
        path.begin_end("we ended it", ring);
        while let (true, Some(token)) = (path.is_busy(), path.token()) {
            match ring.wait_for(token, until) {
                Ok(Some(finished)) => path.take_back(finished, &mut self.done),
                Ok(None) => return false,
                Err(error) => {
                    tracing::warn!(%error, peer = %path.peer, "cannot wait for the end of a path's operations");
                    return false;
                }
            }
        }
        true
    }

    fn tick(&mut self, now: Instant) -> Result<()> {
        if let Some(strangers) = &mut self.strangers {
            strangers.tick(now, &mut self.poller)?;
        }
        if self.pending == 0 {
            return Ok(());
        }
        for index in 0..self.paths.len() {
            match self.paths[index].as_mut().map(|path| &mut path.state) {
                Some(State::Expecting { deadline }) if now >= *deadline => {
                    let ours = format_addresses(&self.advertised);
                    self.break_path(
                        index,
                        &format!("it did not call us before the deadline, at {ours}; is that port open to it?"),
                    );
                }
                Some(State::Calling(call)) => {
                    let outcome = call.tick(now, &mut self.poller, index)?;
                    self.conclude(index, outcome);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Transport for TcpTransport {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        region.host_only(FABRIC)?;
        Ok(MemoryRegion::new(FABRIC, self.table.register(region)?, region.len() as u64))
    }

    fn fabric(&self, _peer: PeerId) -> &'static str {
        FABRIC
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let incarnation = self.incarnations.get(&peer).copied().unwrap_or(0);
        Ok(Endpoint::new(FABRIC, with_incarnation(format_addresses(&self.advertised), incarnation)))
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        let Some(address) = remote.on(FABRIC) else {
            return Err(Error::Config(format!("{peer} offers `{}`, this is {FABRIC}", remote.fabrics())));
        };
        if self.index_of.contains_key(&peer) {
            return Err(Error::Config(format!("there is a path to {peer} already; fence it first")));
        }
        // Where both listen the larger name calls, so that there is one connection and not two.
        let they_listen = !address.is_empty();
        let state = if they_listen && (!self.options.listen || self.options.identity.me > peer) {
            let (address, incarnation) = split_incarnation(address)?;
            let addresses = parse_addresses(address)?;
            State::Calling(Box::new(Call::new((peer, incarnation), addresses, Instant::now(), deadline)))
        } else if self.options.listen {
            State::Expecting { deadline }
        } else {
            return Err(Error::Config(format!("neither {peer} nor {} listens", self.options.identity.me)));
        };
        let index = self.paths.iter().position(Option::is_none).unwrap_or(self.paths.len());
        if index == self.paths.len() {
            self.paths.push(None);
        }
        self.paths[index] = Some(Path::new(peer, state));
        self.index_of.insert(peer, index);
        self.pending += 1;
        Ok(())
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.table.arm(peer, slot)
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        let mut slots = Vec::new();
        if let Some(index) = self.index_of.remove(&peer)
            && let Some(mut path) = self.paths[index].take()
        {
            *self.incarnations.entry(peer).or_default() += 1;
            if is_pending(&path.state) {
                self.pending -= 1;
            }
            let settled = self.settle(&mut path, Instant::now() + SETTLE_TIME);
            self.done.forget(peer, &mut slots);
            self.dirty.retain(|dirty| *dirty != index);
            if settled {
                if let Some(slot) = path.end(&self.poller) {
                    self.table.put_back(peer, slot);
                }
                path.fail_queued("we ended it", &mut self.done);
            } else {
                self.withheld.push(path);
            }
        }
        slots.append(&mut self.table.fence(peer));
        slots
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        let queue_limit = self.options.queue_limit;
        let peer = request.peer;
        let defect = match self.path(peer) {
            None => Some(Error::Broken { peer, reason: "there is none: connect comes first".into() }),
            Some((_, Path { state: State::Dead, .. })) => {
                Some(Error::Broken { peer, reason: "it ended before".into() })
            }
            Some((_, path)) if path.unsent() >= queue_limit => return Err(QueueFull(request)),
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
        if path.push(id, &FrameHeader { target, note }, source) {
            self.dirty.push(index);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let Some(path) = &mut self.paths[index] else { continue };
            path.is_dirty = false;
            if path.can_write()
                && let Err(reason) = path.write(&self.poller, self.ring.as_mut(), &mut self.done)
            {
                self.break_path(index, &reason);
            }
        }
        // The list keeps its memory.
        self.dirty = dirty;
        match self.ring()? {
            Some(ring) => ring.flush(),
            None => Ok(()),
        }
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        match self.ring()? {
            None => self.look(now)?,
            Some(ring) => {
                ring.collect()?;
                // What they bring about has its turn in the next poll.
                for _ in 0..ring.finished() {
                    let finished = self.ring.as_mut().and_then(Ring::next);
                    finished.into_iter().for_each(|finished| self.on_finished(finished));
                }
                if std::mem::take(&mut self.poller_is_ready) {
                    self.look(now)?;
                    let (ring, poller) = (self.ring.as_mut().expect("it is there"), &self.poller);
                    ring.watch(poller.fd())?;
                }
            }
        }
        self.tick(now)?;
        self.done.tell(completions);
        Ok(())
    }
}

impl Driver for TcpTransport {
    fn judge(&self, own: &str, remote: &str) -> Result<String, String> {
        let neither = own.is_empty() && remote.is_empty();
        if neither { Err("neither end listens".into()) } else { Ok("sockets reach any host".into()) }
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        let until = Instant::now() + SETTLE_TIME;
        for mut path in std::mem::take(&mut self.paths).into_iter().flatten() {
            if self.settle(&mut path, until) {
                path.end(&self.poller);
            }
        }
    }
}

fn is_pending(state: &State) -> bool {
    matches!(state, State::Expecting { .. } | State::Calling(_))
}

#[cfg(test)]
mod tests;
