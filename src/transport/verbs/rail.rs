//! One rail of one peer's path: its queue pair, its note ring, and what the device is at.
//!
//! A write is its payload's RDMA WRITEs, then the header of docs/wire.md, inline, into the peer's note ring. The 32 bits that
//! come with the ring's entry are the note's number on the path (low half) and how many of the peer's notes of this rail we have
//! read and posted receives for again (high half, modulo 2^16): so credits ride on notes, and go alone, as `CREDIT`, when half a
//! ring was read without one. Receives are posted a few at a time, for each posting is a call and a doorbell. Only the last request of a list, and one every quarter of the queue, completes; it stands for all before it.
//!
//! Invariant: never more notes are on their way than the peer's ring has entries, nor more requests than the send queue holds.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    address::Address,
    chain::{Chain, Target},
    memory::{NoteRing, entry_of},
    offer::Keys,
    order::NUMBERS,
    queue_pair::{Prepared, QueuePair},
};
use crate::{sys::verbs::IbvSge, wire::FrameHeader};

/// In the place of a note's number: no note, only the count of notes read.
const CREDIT: u16 = 0xffff;
/// In the place of a note's number: "I hear you"; the first word of each end.
const HELLO: u16 = 0xfffe;

/// Places in the send queue that are kept for words and probes.
const RESERVE: u32 = 4;

/// Receives beyond the ring's entries: for words (a hello, and two credits a ring), and for those that are not posted yet.
pub(super) const WORDS_MAX: u32 = 16;

/// Receives that are posted together.
const RECEIVES: u32 = 8;

/// A rail on which nothing was acknowledged for so long is asked whether it still is one.
const PROBE_AFTER: Duration = Duration::from_millis(500);

/// One rail of a path.
#[derive(Debug)]
pub(super) struct Rail {
    /// Its place among our rails, and among the peer's.
    pub(super) number: usize,
    /// Its port, for errors.
    name: String,
    /// Under what the pair's completions come: another with every pair and every restart.
    pub(super) wr_id: u64,
    // Dropped in this order: the pair before the ring that its peer writes.
    stage: Stage,
    ring: NoteRing,
    in_flight: VecDeque<InFlight>,
    /// Places taken in the send queue, and how many of them were taken after the last request that completes.
    used: u32,
    unsignaled: u32,
    /// Bytes handed to the device and not acknowledged.
    bytes: u64,
    /// Notes sent, and how many of them the peer has told us that it has read; modulo 2^16.
    sent: u16,
    read_there: u16,
    /// Notes of the peer read, how many of them it may send again, and how many of those it was told of; modulo 2^16.
    read: u16,
    free: u16,
    told: u16,
    /// Receives that have completed and are to be posted again.
    receives_owed: u32,
    owes_hello: bool,
    owes_probe: bool,
    /// Whether the end of the list that was begun is waited for: a source comes back by it, or a sign of life.
    is_awaited: bool,
    /// When the peer's device last acknowledged anything.
    heard: Instant,
}

#[derive(Debug)]
enum Stage {
    /// Offered: not connected.
    Prepared(Prepared),
    /// We say hello until the peer answers.
    Calling(QueuePair),
    /// The peer will say hello.
    Awaiting(QueuePair),
    /// Both have heard the other.
    Open(QueuePair),
    /// The device refused to connect it.
    Lost,
}

/// One or more requests at work in the device, up to one that may complete.
#[derive(Debug)]
struct InFlight {
    /// Of the request, among those of the path; `None` for what has no source.
    number: Option<u64>,
    places: u32,
    bytes: u64,
    is_signaled: bool,
}

/// What the 32 bits of a peer say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Hello,
    Credit,
    /// A note lies in the ring; its number.
    Note(u16),
}

/// A payload as the devices see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    /// The source's region, on our rails.
    pub(super) lkeys: Keys,
    /// The slot's region, on the peer's rails.
    pub(super) rkeys: Keys,
    /// Where it begins in the source's region, and in the slot's.
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) length: u32,
}

/// What a device takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Places of the send queue.
    pub(super) depth: u32,
    /// Bytes of one RDMA WRITE.
    pub(super) message_bytes: u32,
    /// Places up to one that completes.
    pub(super) signal_every: u32,
}

impl Rail {
    pub(super) fn new(
        number: usize,
        name: String,
        wr_id: u64,
        prepared: Prepared,
        ring: NoteRing,
        now: Instant,
    ) -> Rail {
        Rail {
            number,
            name,
            wr_id,
            stage: Stage::Prepared(prepared),
            ring,
            in_flight: VecDeque::new(),
            used: 0,
            unsignaled: 0,
            bytes: 0,
            sent: 0,
            read_there: 0,
            read: 0,
            free: 0,
            told: 0,
            receives_owed: 0,
            owes_hello: false,
            owes_probe: false,
            is_awaited: false,
            heard: now,
        }
    }

    /// What went wrong, and on which rail.
    pub(super) fn blame(&self, what: impl std::fmt::Display) -> String {
        format!("rail {}: {what}", self.name)
    }

    /// The handle of its queue pair, by which events name it.
    pub(super) fn handle(&self) -> Option<usize> {
        self.pair().map(QueuePair::handle)
    }

    pub(super) fn is_calling(&self) -> bool {
        matches!(self.stage, Stage::Calling(_))
    }

    #[inline]
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_))
    }

    /// When the peer's device last acknowledged anything, or the peer said something.
    pub(super) fn heard_at(&self) -> Instant {
        self.heard
    }

    /// Entries of our ring.
    pub(super) fn ring_entries(&self) -> u16 {
        self.ring.entries()
    }

    /// Bytes handed to the device and not acknowledged.
    #[inline]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Joins the pair to the peer's. The end that calls says hello first; the other waits for it.
    pub(super) fn connect(&mut self, remote: &Address, calls: bool) -> crate::Result<()> {
        let Stage::Prepared(prepared) = std::mem::replace(&mut self.stage, Stage::Lost) else {
            unreachable!("a path is connected once");
        };
        let pair = prepared.connect(remote)?;
        self.owes_hello = calls;
        self.stage = if calls { Stage::Calling(pair) } else { Stage::Awaiting(pair) };
        Ok(())
    }

    /// The hello was not heard: says it again, under another `wr_id`. The peer's pair is not connected yet, so nothing of ours
    /// has been received; or only its acknowledgement was lost, and then the same packet numbers make it a repetition.
    pub(super) fn call_again(&mut self, wr_id: u64, receives: u32) -> Result<(), String> {
        let Stage::Calling(pair) = &self.stage else { return Ok(()) };
        pair.restart().and_then(|()| pair.receive(receives, wr_id)).map_err(|error| error.to_string())?;
        self.wr_id = wr_id;
        self.in_flight.clear();
        (self.used, self.unsignaled, self.bytes) = (0, 0, 0);
        (self.receives_owed, self.owes_hello) = (0, true);
        Ok(())
    }

    /// Asks the peer's device for a sign of life if there was none for a while and none is due.
    pub(super) fn probe(&mut self, now: Instant) -> bool {
        let is_quiet = now.saturating_duration_since(self.heard) >= PROBE_AFTER;
        let is_asked = self.in_flight.iter().any(|work| work.is_signaled);
        self.owes_probe |= is_quiet && !is_asked && self.is_open();
        self.owes_probe
    }

    /// Whether there is something to do that waits for no note.
    #[inline]
    pub(super) fn owes(&self) -> bool {
        self.owes_hello || self.owes_probe || self.is_short_of_receives() || self.owes_credit()
    }

    #[inline]
    fn is_short_of_receives(&self) -> bool {
        self.receives_owed >= RECEIVES.min(u32::from(self.ring.entries()) / 4)
    }

    #[inline]
    fn owes_credit(&self) -> bool {
        self.free.wrapping_sub(self.told) >= self.ring.entries() / 2
    }

    /// Begins a list, which is finished before the chain is used again: posts the receives that are owed, says the hello that is.
    #[inline]
    pub(super) fn begin(&mut self, chain: &mut Chain) -> Result<(), String> {
        let (Stage::Open(pair) | Stage::Calling(pair)) = &self.stage else { return Ok(()) };
        if self.is_short_of_receives() {
            // Before the credit for them goes out.
            pair.receive(std::mem::take(&mut self.receives_owed), self.wr_id).map_err(|error| error.to_string())?;
            self.free = self.read;
        }
        let ring = Target { rkey: pair.remote().ring_rkey, offset: 0 };
        chain.begin(self.wr_id);
        self.is_awaited = std::mem::take(&mut self.owes_hello);
        if self.is_awaited {
            chain.word(immediate(HELLO, self.free), ring);
            self.launch(InFlight::word());
        }
        Ok(())
    }

    /// Whether the peer's ring and the send queue have room for a note, and for a payload if it has one that can go here.
    #[inline]
    pub(super) fn takes(&self, payload: Option<&Payload>, room: Room) -> bool {
        let Stage::Open(pair) = &self.stage else { return false };
        let has_key = payload.is_none_or(|payload| payload.has_key(self.number));
        let has_credit = self.sent.wrapping_sub(self.read_there) < pair.remote().ring_entries;
        has_key && has_credit && self.used + places(payload, room.message_bytes) + RESERVE <= room.depth
    }

    /// Adds a note to the list, under its number for the peer, and what it speaks of; `at` is its number here.
    #[inline]
    pub(super) fn add(
        &mut self,
        chain: &mut Chain,
        header: &FrameHeader,
        payload: Option<&Payload>,
        (number, at): (u16, u64),
        room: Room,
    ) {
        let Stage::Open(pair) = &self.stage else { unreachable!("it was asked whether it takes it") };
        let Address { ring_rkey, ring_entries, .. } = *pair.remote();
        if let Some(payload) = payload {
            payload.add_writes(chain, self.number, room.message_bytes);
        }
        let offset = u64::from(entry_of(self.sent, ring_entries)) * FrameHeader::SIZE as u64;
        chain.note(header, immediate(number, self.free), Target { rkey: ring_rkey, offset });
        self.sent = self.sent.wrapping_add(1);
        self.told = self.free;
        let places = places(payload, room.message_bytes);
        let bytes = FrameHeader::SIZE as u64 + payload.map_or(0, |payload| u64::from(payload.length));
        self.unsignaled += places;
        let is_signaled = self.unsignaled >= room.signal_every;
        if is_signaled {
            chain.signal();
            self.unsignaled = 0;
        }
        self.is_awaited = !is_signaled && (self.is_awaited || payload.is_some());
        self.launch(InFlight { number: payload.map(|_| at), places, bytes, is_signaled });
    }

    /// Ends the list with what else is owed, and hands it in.
    ///
    /// # Safety
    ///
    /// The sources of what was added are left alone until `retire` has told of them, or the rail is dropped.
    #[inline]
    pub(super) unsafe fn finish(&mut self, chain: &mut Chain, room: Room) -> Result<(), String> {
        let (Stage::Open(pair) | Stage::Calling(pair)) = &self.stage else { return Ok(()) };
        let ring = Target { rkey: pair.remote().ring_rkey, offset: 0 };
        if self.owes_credit() && self.is_open() {
            chain.word(immediate(CREDIT, self.free), ring);
            self.told = self.free;
            // One that only hears speaks in credits alone.
            self.unsignaled += 1;
            self.is_awaited |= self.unsignaled >= room.signal_every;
            self.launch(InFlight::word());
        }
        if std::mem::take(&mut self.owes_probe) {
            // Whatever completes is a sign of life.
            if chain.len() == 0 {
                chain.probe(ring);
                self.launch(InFlight::word());
            }
            self.is_awaited = true;
        }
        if chain.len() == 0 {
            return Ok(());
        }
        if self.is_awaited {
            // So that every source comes back without anything else having to happen.
            chain.signal();
            self.in_flight.back_mut().expect("the chain is not empty").is_signaled = true;
            self.unsignaled = 0;
        }
        let (Stage::Open(pair) | Stage::Calling(pair)) = &self.stage else { unreachable!("looked at above") };
        // SAFETY: what it reads is left alone (our caller).
        unsafe { pair.send(chain) }.map_err(|error| error.to_string())
    }

    /// Counts what was added to the list; what has no source, with what precedes it, if that does not complete by itself.
    #[inline]
    fn launch(&mut self, work: InFlight) {
        self.used += work.places;
        self.bytes += work.bytes;
        match self.in_flight.back_mut() {
            Some(last) if work.number.is_none() && !last.is_signaled => {
                last.places += work.places;
                last.bytes += work.bytes;
                last.is_signaled = work.is_signaled;
            }
            _ => self.in_flight.push_back(work),
        }
    }

    /// A request that was to complete did: it and all before it are done. Tells their numbers.
    pub(super) fn retire(&mut self, now: Instant, mut done: impl FnMut(u64)) {
        self.heard = now;
        while let Some(InFlight { number, places, bytes, is_signaled }) = self.in_flight.pop_front() {
            self.used -= places;
            self.bytes -= bytes;
            number.into_iter().for_each(&mut done);
            if is_signaled {
                break;
            }
        }
    }

    /// 32 bits of the peer have come. An error is the reason why the path ends.
    #[inline]
    pub(super) fn heard(&mut self, immediate: u32, now: Instant) -> Result<Word, String> {
        self.receives_owed += 1;
        self.heard = now;
        let (number, read_there) = (immediate as u16, (immediate >> 16) as u16);
        if read_there.wrapping_sub(self.read_there) > self.sent.wrapping_sub(self.read_there) {
            return Err(format!("it says that it has read {read_there} notes, more than we sent"));
        }
        self.read_there = read_there;
        match number {
            HELLO => self.greeted().map(|()| Word::Hello),
            _ if !self.is_open() => Err("it sent something before its hello".into()),
            CREDIT => Ok(Word::Credit),
            number => Ok(Word::Note(number)),
        }
    }

    fn greeted(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Calling(pair) => self.stage = Stage::Open(pair),
            Stage::Awaiting(pair) => {
                self.stage = Stage::Open(pair);
                self.owes_hello = true;
            }
            Stage::Prepared(_) | Stage::Open(_) | Stage::Lost => return Err("it said hello twice".into()),
        }
        Ok(())
    }

    /// The oldest note in the ring, whose entry the peer may then use again.
    #[inline]
    pub(super) fn read(&mut self) -> Result<FrameHeader, String> {
        let header = FrameHeader::decode_unsealed(&self.ring.read(self.read));
        self.read = self.read.wrapping_add(1);
        header.map_err(|error| format!("it sent a note that cannot be read: {error}"))
    }

    fn pair(&self) -> Option<&QueuePair> {
        match &self.stage {
            Stage::Calling(pair) | Stage::Awaiting(pair) | Stage::Open(pair) => Some(pair),
            Stage::Prepared(_) | Stage::Lost => None,
        }
    }
}

impl InFlight {
    fn word() -> InFlight {
        InFlight { number: None, places: 1, bytes: 0, is_signaled: false }
    }
}

fn places(payload: Option<&Payload>, message_bytes: u32) -> u32 {
    1 + payload.map_or(0, |payload| payload.messages(message_bytes))
}

impl Payload {
    fn messages(&self, message_bytes: u32) -> u32 {
        self.length.div_ceil(message_bytes)
    }

    /// Whether a send queue can take it at all.
    pub(super) fn fits(&self, room: Room) -> bool {
        self.messages(room.message_bytes) + 1 + RESERVE <= room.depth
    }

    /// Whether it can go on a rail: the peer has told us its region's key there.
    pub(super) fn has_key(&self, rail: usize) -> bool {
        self.rkeys[rail] != 0
    }

    /// RDMA WRITEs of `message_bytes` at most: some devices take longer ones and get them wrong.
    fn add_writes(&self, chain: &mut Chain, rail: usize, message_bytes: u32) {
        let mut done = 0;
        while done < self.length {
            let length = (self.length - done).min(message_bytes);
            let range = IbvSge { addr: self.source + u64::from(done), length, lkey: self.lkeys[rail] };
            chain.write(range, Target { rkey: self.rkeys[rail], offset: self.target + u64::from(done) });
            done += length;
        }
    }
}

fn immediate(number: u16, read: u16) -> u32 {
    u32::from(read) << 16 | u32::from(number)
}

const _: () = assert!(RESERVE >= 3, "a hello, a credit and a probe");
const _: () = assert!(NUMBERS <= HELLO, "words and numbers are told apart");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::verbs::{IbvSendWr, WR_RDMA_WRITE};

    #[test]
    fn no_message_is_longer_than_the_port_sends() {
        const LONGEST: u32 = 1000;
        let mut keys = [Keys::default(); 2];
        (keys[0][1], keys[1][1]) = (3, 5);
        for length in [1, 999, 1000, 1001, 2000, 12_345] {
            let payload = Payload { lkeys: keys[0], rkeys: keys[1], source: 64, target: 4096, length };
            assert_eq!((payload.has_key(0), payload.has_key(1)), (false, true));
            let mut chain = Chain::new(16, LONGEST);
            chain.begin(1);
            payload.add_writes(&mut chain, 1, LONGEST);
            assert_eq!(chain.len() as u32, payload.messages(LONGEST));
            let mut done = 0;
            let mut at = chain.link();
            while !at.is_null() {
                // SAFETY: the list is the chain's own, just linked.
                let (IbvSendWr { opcode, wr, next, .. }, range) = unsafe { (*at, *(*at).sg_list) };
                // SAFETY: the chain's requests are all writes.
                let target = unsafe { wr.rdma };
                assert_eq!((opcode, target.rkey, range.lkey), (WR_RDMA_WRITE, 5, 3));
                assert_eq!((range.addr, target.remote_addr), (64 + done, 4096 + done));
                assert!(range.length > 0 && range.length <= LONGEST);
                done += u64::from(range.length);
                at = next;
            }
            assert_eq!(done, u64::from(length), "every byte once");
            let room = |depth| Room { depth, message_bytes: LONGEST, signal_every: 1 };
            let needed = payload.messages(LONGEST) + 1 + RESERVE;
            assert!(payload.fits(room(needed)) && !payload.fits(room(needed - 1)));
        }
    }
}
