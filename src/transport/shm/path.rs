//! One peer's path: expected, being called, linked or dead; and the reading and writing while it is linked.
//!
//! Invariant: one call of [`Path::read`] or [`Path::write`] does a bounded amount of work, so that no peer keeps the others
//! waiting; nothing is read before the path is told as connected, and nothing is read or written once it is dead.
#![forbid(unsafe_code)]

use std::{collections::VecDeque, os::fd::OwnedFd, time::Instant};

use super::{
    connecting::Call,
    link::Link,
    mapping::{RING_ENTRIES, Ring},
    ring::{Consumer, ENTRY_WORDS, Entry},
    socket::{self, Owner},
};
use crate::{
    Error, Result,
    mem::SharedLease,
    observe::count_copied,
    transport::{Completion, done::Done, poller::Poller, region_table::RegionTable},
    types::PeerId,
    wire::FrameHeader,
};

/// Entries that are read from one ring in one poll.
const READ_ENTRIES_MAX: usize = 256;

/// Bytes that are copied to one peer in one flush or poll, give or take one payload.
const WRITE_BYTES_MAX: usize = 4 << 20;

const _: () = assert!(FrameHeader::SIZE == ENTRY_WORDS * 8);

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    pub(super) state: State,
    pub(super) outbound: VecDeque<Queued>,
    /// Whether the path is in the list of those to flush.
    pub(super) is_dirty: bool,
}

/// A write that waits for its turn, or for room in the ring.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) id: u64,
    pub(super) header: FrameHeader,
    pub(super) source: Option<SharedLease>,
}

#[derive(Debug)]
pub(super) enum State {
    /// The peer will call us.
    Expecting { deadline: Instant },
    /// We call the peer.
    Calling(Box<Call>),
    /// There is a connection; connected once the peer's ring is here.
    Linked(Box<Link>),
    /// Broken and reported; armed slots wait for the fence. What is left of a writer that may not have ended.
    Dead(Option<Remains>),
}

/// What tells whether a writer whose path has ended is still at it.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) inbound: Consumer<Ring>,
    pub(super) socket: OwnedFd,
    pub(super) owner: Owner,
}

impl Path {
    /// Reads what the peer has written, up to a bound; whether there was anything. An error is the reason why the path ends.
    pub(super) fn read(&mut self, table: &mut RegionTable, done: &mut Done) -> Result<bool, String> {
        self.read_up_to(READ_ENTRIES_MAX, table, done)
    }

    /// Reads what a peer wrote before its end: no more than its ring holds, whatever it still writes.
    pub(super) fn read_rest(&mut self, table: &mut RegionTable, done: &mut Done) -> Result<(), String> {
        self.read_up_to(RING_ENTRIES, table, done).map(|_| ())
    }

    fn read_up_to(&mut self, limit: usize, table: &mut RegionTable, done: &mut Done) -> Result<bool, String> {
        let State::Linked(link) = &mut self.state else { return Ok(false) };
        if !link.is_told {
            return Ok(false);
        }
        let peer = self.peer;
        let mut count = 0;
        while count < limit
            && let Some(entry) = link.inbound.pop().map_err(|scribbled| scribbled.to_string())?
        {
            let FrameHeader { target, note } = FrameHeader::decode(&bytes_of(&entry))
                .map_err(|error| format!("it sent an entry that cannot be read: {error}"))?;
            let lease = target.map(|target| table.take(peer, target.rkey, target.offset, note.length)).transpose();
            let lease = lease.map_err(|refusal| format!("it sent a write that may not land: {refusal}"))?;
            done.push((peer, Completion::Arrived { from: peer, note, lease }));
            count += 1;
        }
        if count > 0 && link.inbound.release() {
            link.wake()?;
        }
        Ok(count > 0)
    }

    /// Writes what is queued, as far as there is room and up to a bound. An error is the reason why the path ends.
    pub(super) fn write(&mut self, done: &mut Done) -> Result<(), String> {
        let State::Linked(link) = &mut self.state else { return Ok(()) };
        let Some(mut ring) = link.outbound.take() else { return Ok(()) };
        let mut left = WRITE_BYTES_MAX;
        let mut count = 0;
        let result = loop {
            let Some(queued) = self.outbound.front().filter(|_| left > 0 && link.has_shared()) else { break Ok(()) };
            match ring.has_room() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(scribbled) => break Err(scribbled.to_string()),
            }
            if let (Some(target), Some(source)) = (queued.header.target, &queued.source) {
                let payload = &source.bytes()[..queued.header.payload_bytes()];
                let landed = link.find_region(target.rkey).and_then(|region| {
                    let region = region.ok_or_else(|| {
                        format!("a write names the key {:#x}, under which it has shared no region", target.rkey)
                    })?;
                    // Before the copy or after it: the peer may have ended the path, and then it waits for this end's own.
                    let may = ring.begin_copy();
                    let fits = !may || region.write(target.offset, payload);
                    let may = may && ring.end_copy();
                    if fits { Ok(may) } else { Err("a write does not lie within the region that it names".into()) }
                });
                match landed {
                    Ok(true) => count_copied(payload.len()),
                    Ok(false) => break Err(ENDED_BY_PEER.to_string()),
                    Err(reason) => break Err(reason),
                }
            }
            ring.push(&entry_of(&queued.header.encode()));
            left = left.saturating_sub(FrameHeader::SIZE + queued.header.payload_bytes());
            count += 1;
            let Queued { id, source, .. } = self.outbound.pop_front().expect("looked at just now");
            done.push((self.peer, Completion::Sent { id, source }));
        };
        let must_wake = count > 0 && ring.must_wake();
        link.outbound = Some(ring);
        if must_wake { result.and(link.wake()) } else { result }
    }

    /// Before a sleep: asks to be woken by an entry and, if something waits for it, by room. A full fence and
    /// [`Path::has_work`] must follow.
    pub(super) fn set_asleep(&mut self, asleep: bool) {
        let State::Linked(link) = &mut self.state else { return };
        link.inbound.set_sleeping(asleep);
        if let Some(ring) = &mut link.outbound {
            ring.set_waiting(asleep && !self.outbound.is_empty());
        }
    }

    /// Whether a poll would find something to read or be able to write.
    pub(super) fn has_work(&mut self) -> bool {
        let State::Linked(link) = &mut self.state else { return false };
        let may_write = !self.outbound.is_empty() && link.has_shared();
        let Some(ring) = &mut link.outbound else { return false };
        // What was scribbled into an index is told by the next poll.
        link.inbound.has_more() || (may_write && !matches!(ring.has_room(), Ok(false)))
    }

    /// Ends the path without a word to anybody but the peer, which finds its ring fenced and the connection ended.
    pub(super) fn end(&mut self, poller: &Poller) {
        match std::mem::replace(&mut self.state, State::Dead(None)) {
            State::Linked(link) => {
                let Link { socket, owner, inbound, at_end, process_token, .. } = *link;
                poller.remove(&socket);
                if let (Owner::Process { pidfd, .. }, Some(_)) = (&owner, process_token) {
                    poller.remove(pidfd);
                }
                if inbound.fence() || at_end || owner.has_ended() {
                    socket::end(&socket);
                } else {
                    // Its end of the connection will tell when it has ended.
                    socket::end_sending(&socket);
                    self.state = State::Dead(Some(Remains { inbound, socket, owner }));
                }
            }
            State::Calling(call) => call.hang_up(poller),
            State::Expecting { .. } => {}
            State::Dead(remains) => self.state = State::Dead(remains),
        }
    }

    /// Reports everything that was queued as failed.
    pub(super) fn fail_queued(&mut self, reason: &str, done: &mut Done) {
        let peer = self.peer;
        for Queued { id, source, .. } in self.outbound.drain(..) {
            let error = Error::Broken { peer, reason: reason.to_string() };
            done.push((peer, Completion::Failed { id, source, error }));
        }
    }
}

/// Why a path ends whose ring was found fenced.
const ENDED_BY_PEER: &str = "the peer ended it";

fn entry_of(bytes: &[u8; FrameHeader::SIZE]) -> Entry {
    let mut entry = [0; ENTRY_WORDS];
    for (word, bytes) in entry.iter_mut().zip(bytes.as_chunks().0) {
        // In memory an entry is the header's bytes, whatever the byte order of the machine.
        *word = u64::from_ne_bytes(*bytes);
    }
    entry
}

fn bytes_of(entry: &Entry) -> [u8; FrameHeader::SIZE] {
    let mut bytes = [0; FrameHeader::SIZE];
    for (word, bytes) in entry.iter().zip(bytes.as_chunks_mut().0) {
        *bytes = word.to_ne_bytes();
    }
    bytes
}
