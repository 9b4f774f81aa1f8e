//! One peer's path: its queue pair, its note ring, what waits for room and what the device is at.
//!
//! A write is its payload's RDMA WRITEs, then the header of docs/wire.md, inline, into the peer's note ring. The 32 bits that
//! come with the ring's entry are its index (low half) and how many of the peer's notes we have read (high half, modulo 2^16): so
//! credits ride on notes, and go alone, as `CREDIT`, when half a ring was read without one. Only the last request of a list, and
//! one every quarter of the queue, completes; it stands for all before it.
//!
//! Invariant: never more notes are on their way than the peer's ring has entries, nor more requests than the send queue holds; a
//! source comes back only when the device has said that it is done with it, or after the pair was destroyed.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    address::Address,
    chain::{Chain, Target},
    memory::NoteRing,
    queue_pair::{Prepared, QueuePair},
};
use crate::{
    Error, Result,
    mem::{Lease, SharedLease},
    sys::verbs::IbvSge,
    transport::{Completion, RemoteSlot, done::Done, region_table::RegionTable},
    types::PeerId,
    wire::FrameHeader,
};

/// In the place of a ring's index: no entry, only the count of notes read.
const CREDIT: u16 = 0xffff;
/// In the place of a ring's index: "I hear you"; the first word of each end.
const HELLO: u16 = 0xfffe;

/// Places in the send queue that are kept for words and probes.
const RESERVE: u32 = 4;

/// Receives beyond the ring's entries, for words: a hello, and two credits a ring.
pub(super) const WORDS_MAX: u32 = 8;

/// A path on which nothing was acknowledged for so long is asked whether it still is one.
const PROBE_AFTER: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    /// What the peer is told of our end.
    pub(super) offered: Address,
    /// Under what the pair's completions come: another with every pair and every restart.
    pub(super) wr_id: u64,
    pub(super) stage: Stage,
    /// Gone with the pair.
    ring: Option<NoteRing>,
    queue: VecDeque<Queued>,
    /// Requests that have not ended.
    outstanding: usize,
    in_flight: VecDeque<InFlight>,
    /// Places taken in the send queue.
    used: u32,
    /// Notes sent, and how many of them the peer has told us that it has read; modulo 2^16.
    sent: u16,
    read_there: u16,
    /// Notes of the peer read, and how many of them it was told of; modulo 2^16.
    read: u16,
    told: u16,
    /// Receives that have completed and are to be posted again.
    receives_owed: u32,
    owes_hello: bool,
    owes_probe: bool,
    /// When the peer's device last acknowledged anything.
    heard: Instant,
    /// Whether the path is in the list of those to send for.
    pub(super) is_dirty: bool,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Offered: not connected.
    Prepared(Prepared),
    /// We say hello until the peer answers.
    Calling { pair: QueuePair, deadline: Instant },
    /// The peer will say hello.
    Awaiting { pair: QueuePair, deadline: Instant },
    /// Both have heard the other.
    Open(QueuePair),
    /// Broken and reported; armed slots wait for the fence.
    Dead,
}

#[derive(Debug)]
struct Queued {
    id: u64,
    header: [u8; FrameHeader::SIZE],
    payload: Option<(SharedLease, Range)>,
}

/// A payload as the device sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) lkey: u32,
    pub(super) slot: RemoteSlot,
    pub(super) length: u32,
}

/// One or more requests at work in the device, up to one that may complete.
#[derive(Debug)]
struct InFlight {
    /// `None` for words and probes.
    request: Option<(u64, Option<SharedLease>)>,
    places: u32,
    is_signaled: bool,
}

/// What a path needs of its transport to send.
pub(super) struct Sending<'a> {
    pub(super) chain: &'a mut Chain,
    /// Places of the send queue.
    pub(super) depth: u32,
    /// Bytes of one RDMA WRITE.
    pub(super) message_bytes: u32,
}

impl Path {
    /// A path that was offered.
    pub(super) fn new(
        peer: PeerId,
        offered: Address,
        wr_id: u64,
        prepared: Prepared,
        ring: NoteRing,
        now: Instant,
    ) -> Path {
        Path {
            peer,
            offered,
            wr_id,
            stage: Stage::Prepared(prepared),
            ring: Some(ring),
            queue: VecDeque::new(),
            outstanding: 0,
            in_flight: VecDeque::new(),
            used: 0,
            sent: 0,
            read_there: 0,
            read: 0,
            told: 0,
            receives_owed: 0,
            owes_hello: false,
            owes_probe: false,
            heard: now,
            is_dirty: false,
        }
    }

    /// The handle of its queue pair, by which events name it.
    pub(super) fn handle(&self) -> Option<usize> {
        self.pair().map(QueuePair::handle)
    }

    /// When it ends if it is not open by then.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Calling { deadline, .. } | Stage::Awaiting { deadline, .. } => Some(*deadline),
            _ => None,
        }
    }

    /// Requests that have not ended.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Joins the pair to the peer's. The end that calls says hello first; the other waits for it.
    pub(super) fn connect(&mut self, remote: &Address, calls: bool, deadline: Instant) -> Result<()> {
        let Stage::Prepared(prepared) = std::mem::replace(&mut self.stage, Stage::Dead) else {
            return Err(Error::Config(format!("there is a path to {} already; fence it first", self.peer)));
        };
        let pair = prepared.connect(remote)?;
        self.owes_hello = calls;
        self.stage = if calls { Stage::Calling { pair, deadline } } else { Stage::Awaiting { pair, deadline } };
        Ok(())
    }

    /// The hello was not heard: says it again, under another `wr_id`. The peer's pair is not connected yet, so nothing of ours
    /// has been received; or only its acknowledgement was lost, and then the same packet numbers make it a repetition.
    pub(super) fn call_again(&mut self, wr_id: u64, receives: u32) -> Result<(), String> {
        let Stage::Calling { pair, .. } = &self.stage else { return Ok(()) };
        pair.restart().and_then(|()| pair.receive(receives, wr_id)).map_err(|error| error.to_string())?;
        self.wr_id = wr_id;
        self.in_flight.clear();
        (self.used, self.receives_owed, self.owes_hello) = (0, 0, true);
        Ok(())
    }

    pub(super) fn push(&mut self, id: u64, header: &FrameHeader, payload: Option<(SharedLease, Range)>) {
        self.outstanding += 1;
        self.queue.push_back(Queued { id, header: header.encode(), payload });
    }

    /// Asks the peer's device for a sign of life if there was none for a while and none is due.
    pub(super) fn probe(&mut self, now: Instant) -> bool {
        let is_quiet = now.saturating_duration_since(self.heard) >= PROBE_AFTER;
        self.owes_probe |= is_quiet && self.in_flight.is_empty() && matches!(self.stage, Stage::Open(_));
        self.owes_probe
    }

    /// Posts the receives that are owed, then sends what is owed and what is queued, as far as there is room.
    pub(super) fn send(&mut self, sending: &mut Sending<'_>) -> Result<(), String> {
        let (pair, is_open) = match &self.stage {
            Stage::Open(pair) => (pair, true),
            Stage::Calling { pair, .. } => (pair, false),
            Stage::Prepared(_) | Stage::Awaiting { .. } | Stage::Dead => return Ok(()),
        };
        let remote = *pair.remote();
        // Before the credit for them goes out.
        pair.receive(std::mem::take(&mut self.receives_owed), self.wr_id).map_err(|error| error.to_string())?;
        let ring = Target { rkey: remote.ring_rkey, offset: 0 };
        let chain = &mut *sending.chain;
        chain.begin(self.wr_id);
        let first = self.in_flight.len();
        if std::mem::take(&mut self.owes_hello) {
            chain.word(immediate(HELLO, self.read), ring);
            self.in_flight.push_back(InFlight { request: None, places: 1, is_signaled: false });
        }
        let mut unsignaled = 0;
        while is_open && let Some(next) = self.queue.front() {
            let places = next.places(sending.message_bytes);
            let has_credit = self.sent.wrapping_sub(self.read_there) < remote.ring_entries;
            if !has_credit || self.used + chain.len() as u32 + places + RESERVE > sending.depth {
                break;
            }
            let Queued { id, header, payload } = self.queue.pop_front().expect("looked at above");
            if let Some((source, range)) = &payload {
                range.add_writes(chain, source.offset() as u64, sending.message_bytes);
            }
            let index = self.sent % remote.ring_entries;
            let offset = u64::from(index) * FrameHeader::SIZE as u64;
            chain.note(header, immediate(index, self.read), Target { offset, ..ring });
            self.sent = self.sent.wrapping_add(1);
            self.told = self.read;
            unsignaled += places;
            let is_signaled = unsignaled >= sending.depth / 4;
            if is_signaled {
                chain.signal();
                unsignaled = 0;
            }
            let source = payload.map(|(source, _)| source);
            self.in_flight.push_back(InFlight { request: Some((id, source)), places, is_signaled });
        }
        let own_entries = self.ring.as_ref().map_or(0, NoteRing::entries);
        if is_open && self.read.wrapping_sub(self.told) >= own_entries / 2 {
            chain.word(immediate(CREDIT, self.read), ring);
            self.told = self.read;
            self.in_flight.push_back(InFlight { request: None, places: 1, is_signaled: false });
        }
        if std::mem::take(&mut self.owes_probe) && chain.len() == 0 {
            chain.probe(ring);
            self.in_flight.push_back(InFlight { request: None, places: 1, is_signaled: false });
        }
        if chain.len() == 0 {
            return Ok(());
        }
        // So that every source comes back without anything else having to happen.
        chain.signal();
        self.in_flight.back_mut().expect("the chain is not empty").is_signaled = true;
        self.used += self.in_flight.range(first..).map(|work| work.places).sum::<u32>();
        // SAFETY: the sources are in `in_flight`, which keeps them until they have completed (`retire`) or the pair is destroyed
        // (`end`); a source is read-only as long as anybody holds it.
        unsafe { pair.send(chain) }.map_err(|error| error.to_string())
    }

    /// A request that was to complete did: it and all before it are done.
    pub(super) fn retire(&mut self, now: Instant, done: &mut Done) {
        self.heard = now;
        while let Some(InFlight { request, places, is_signaled }) = self.in_flight.pop_front() {
            self.used -= places;
            if let Some((id, source)) = request {
                self.outstanding -= 1;
                done.push((self.peer, Completion::Sent { id, source }));
            }
            if is_signaled {
                break;
            }
        }
    }

    /// 32 bits of the peer have come, perhaps with a note. An error is the reason why the path ends.
    pub(super) fn heard(
        &mut self,
        word: u32,
        now: Instant,
        table: &mut RegionTable,
        done: &mut Done,
    ) -> Result<(), String> {
        self.receives_owed += 1;
        self.heard = now;
        let (index, read_there) = (word as u16, (word >> 16) as u16);
        if read_there.wrapping_sub(self.read_there) > self.sent.wrapping_sub(self.read_there) {
            return Err(format!("it says that it has read {read_there} notes, more than we sent"));
        }
        self.read_there = read_there;
        if index == HELLO {
            return self.greeted(done);
        }
        if !matches!(self.stage, Stage::Open(_)) {
            return Err("it sent something before its hello".into());
        }
        if index == CREDIT {
            return Ok(());
        }
        let ring = self.ring.as_ref().ok_or("its ring is gone")?;
        if index != self.read % ring.entries() {
            return Err(format!("it wrote to entry {index} of its note ring out of turn"));
        }
        let header = FrameHeader::decode(&ring.read(self.read))
            .map_err(|error| format!("it sent a note that cannot be read: {error}"))?;
        self.read = self.read.wrapping_add(1);
        let lease: Option<Lease> = match header.target {
            None => None,
            Some(target) => Some(
                table
                    .take(self.peer, target.rkey, target.offset, header.note.length)
                    .map_err(|refusal| format!("it sent a write that may not land: {refusal}"))?,
            ),
        };
        done.push((self.peer, Completion::Arrived { from: self.peer, note: header.note, lease }));
        Ok(())
    }

    fn greeted(&mut self, done: &mut Done) -> Result<(), String> {
        match std::mem::replace(&mut self.stage, Stage::Dead) {
            Stage::Calling { pair, .. } => self.stage = Stage::Open(pair),
            Stage::Awaiting { pair, .. } => {
                self.stage = Stage::Open(pair);
                self.owes_hello = true;
            }
            Stage::Prepared(_) | Stage::Open(_) | Stage::Dead => return Err("it said hello twice".into()),
        }
        done.push((self.peer, Completion::Connected { peer: self.peer }));
        Ok(())
    }

    /// Ends the path without a word to anybody: the pair is destroyed, then the ring.
    pub(super) fn end(&mut self) {
        self.stage = Stage::Dead;
        self.ring = None;
    }

    /// Reports everything that has not ended as failed. Only after `end`.
    pub(super) fn fail(&mut self, reason: &str, done: &mut Done) {
        assert!(matches!(self.stage, Stage::Dead), "sources are given back while a device may read them");
        self.outstanding = 0;
        let peer = self.peer;
        let at_work = self.in_flight.drain(..).filter_map(|work| work.request);
        let waiting = self.queue.drain(..).map(|queued| (queued.id, queued.payload.map(|(source, _)| source)));
        for (id, source) in at_work.chain(waiting) {
            let error = Error::Broken { peer, reason: reason.to_string() };
            done.push((peer, Completion::Failed { id, source, error }));
        }
    }

    fn pair(&self) -> Option<&QueuePair> {
        match &self.stage {
            Stage::Calling { pair, .. } | Stage::Awaiting { pair, .. } | Stage::Open(pair) => Some(pair),
            Stage::Prepared(_) | Stage::Dead => None,
        }
    }
}

impl Queued {
    fn places(&self, message_bytes: u32) -> u32 {
        1 + self.payload.as_ref().map_or(0, |(_, range)| range.messages(message_bytes))
    }
}

impl Range {
    fn messages(self, message_bytes: u32) -> u32 {
        self.length.div_ceil(message_bytes)
    }

    /// Whether a send queue of that depth can take it at all.
    pub(super) fn fits(self, message_bytes: u32, depth: u32) -> bool {
        self.messages(message_bytes) + 1 + RESERVE <= depth
    }

    fn add_writes(self, chain: &mut Chain, source_offset: u64, message_bytes: u32) {
        let mut done = 0;
        while done < self.length {
            let length = (self.length - done).min(message_bytes);
            let range = IbvSge { addr: source_offset + u64::from(done), length, lkey: self.lkey };
            chain.write(range, Target { rkey: self.slot.rkey, offset: self.slot.offset + u64::from(done) });
            done += length;
        }
    }
}

fn immediate(index: u16, read: u16) -> u32 {
    u32::from(read) << 16 | u32::from(index)
}

const _: () = assert!(RESERVE >= 3, "a hello, a credit and a probe");
