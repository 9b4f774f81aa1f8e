//! One peer's path: its rails, what waits for room on them, and the order of what comes and goes.
//!
//! Every request goes whole on one rail: of those that have room, the one with the fewest bytes under way. Their order is kept by
//! `order`. A rail that fails ends the path.
//!
//! Invariant: a source comes back only when the device has said that it is done with it, or after the pairs were destroyed;
//! nothing arrives before `Connected`, which comes when every rail has heard its hello.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    Port,
    address::Address,
    offer::{Keys, Meeting, Offer},
    order::{self, Arrivals, Departures},
    rail::{Payload, Rail, Room, Word},
};
use crate::{
    Error, Result,
    mem::{Lease, SharedLease},
    transport::{Completion, done::Done, region_table::RegionTable},
    types::PeerId,
    wire::{FrameHeader, FrameTarget, Note},
};

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    /// What the peer is told of our end.
    pub(super) offered: Vec<Option<Address>>,
    pub(super) stage: Stage,
    /// Before the path is connected, all of ours that are up; then those that are used; none when it is dead.
    rails: Vec<Rail>,
    /// The peer's regions, where a path has more than the first rail.
    keys: Vec<Keys>,
    queue: VecDeque<Queued>,
    /// Requests that have not ended.
    outstanding: usize,
    departures: Departures<(u64, Option<SharedLease>)>,
    arrivals: Arrivals,
    /// The number of the next note.
    number: u16,
    /// Whether the path is in the list of those to send for.
    pub(super) is_dirty: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Offered: not connected.
    Prepared,
    /// Not all rails have heard the peer.
    Joining { deadline: Instant },
    /// All have.
    Open,
    /// Broken and reported; armed slots wait for the fence.
    Dead,
}

#[derive(Debug)]
struct Queued {
    id: u64,
    note: Note,
    payload: Option<(SharedLease, Payload)>,
}

impl Path {
    /// A path that was offered, on `rails`.
    pub(super) fn new(peer: PeerId, offered: Vec<Option<Address>>, rails: Vec<Rail>) -> Path {
        Path {
            peer,
            offered,
            stage: Stage::Prepared,
            rails,
            keys: Vec::new(),
            queue: VecDeque::new(),
            outstanding: 0,
            departures: Departures::new(),
            arrivals: Arrivals::new([]),
            number: 0,
            is_dirty: false,
        }
    }

    /// Whether there are pairs that are connected, which can fail.
    pub(super) fn is_joined(&self) -> bool {
        matches!(self.stage, Stage::Joining { .. } | Stage::Open)
    }

    /// When it ends if it is not open by then.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Joining { deadline } => Some(deadline),
            _ => None,
        }
    }

    /// Requests that have not ended.
    #[inline]
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The rail whose completions come under `wr_id`.
    #[inline]
    pub(super) fn rail_of(&self, wr_id: u64) -> Option<usize> {
        self.rails.iter().position(|rail| rail.wr_id == wr_id)
    }

    /// The rail of that queue pair.
    pub(super) fn rail_of_pair(&self, handle: usize) -> Option<usize> {
        self.rails.iter().position(|rail| rail.handle() == Some(handle))
    }

    /// The rail on that one of our ports.
    pub(super) fn rail_on(&self, port: usize) -> Option<usize> {
        self.rails.iter().position(|rail| rail.number == port)
    }

    /// The number of a rail among our ports.
    pub(super) fn number_of(&self, rail: usize) -> usize {
        self.rails[rail].number
    }

    /// Whether another rail has had a sign of life of the peer within `time`: then the peer is there, and it is the rail that fails.
    pub(super) fn hears_elsewhere(&self, rail: usize, now: Instant, time: Duration) -> bool {
        let others = self.rails.iter().enumerate().filter(|(at, _)| *at != rail);
        others.into_iter().any(|(_, other)| other.is_open() && now.saturating_duration_since(other.heard_at()) < time)
    }

    /// The numbers of the rails that have not heard the peer, if others have.
    pub(super) fn silent(&self) -> impl Iterator<Item = usize> {
        let any_is_open = self.rails.iter().any(Rail::is_open);
        self.rails.iter().filter(move |rail| any_is_open && !rail.is_open()).map(|rail| rail.number)
    }

    /// What went wrong, and on which rail.
    pub(super) fn blame(&self, rail: usize, what: impl std::fmt::Display) -> String {
        self.rails[rail].blame(what)
    }

    /// Why it ends if its deadline has passed.
    pub(super) fn silence(&self) -> String {
        let what = "it did not answer our hello, or say its own, before the deadline";
        self.rails.iter().find(|rail| !rail.is_open()).map_or(what.into(), |rail| rail.blame(what))
    }

    /// Joins each of the rails to the peer's; the others are given up.
    pub(super) fn connect(&mut self, remote: &Offer, meeting: &Meeting, calls: bool, deadline: Instant) -> Result<()> {
        if self.stage != Stage::Prepared {
            return Err(Error::Config(format!("there is a path to {} already; fence it first", self.peer)));
        }
        self.stage = Stage::Dead;
        self.rails.retain(|rail| meeting.rails.contains(&rail.number));
        for rail in &mut self.rails {
            let remote = remote.rails[rail.number].as_ref().expect("the two met on it");
            rail.connect(remote, calls)?;
        }
        if meeting.rails != [0] {
            self.keys = remote.keys.clone();
        }
        self.arrivals = Arrivals::new(self.rails.iter().map(Rail::ring_entries));
        self.stage = Stage::Joining { deadline };
        Ok(())
    }

    /// The keys of a region of the peer, by the key that names it. One that was registered after the peer's offer has that key
    /// alone, on the first rail.
    pub(super) fn keys(&self, rkey: u32) -> Keys {
        self.keys.iter().find(|keys| keys[0] == rkey).copied().unwrap_or([rkey, 0, 0, 0])
    }

    /// Whether a payload can go on any of the rails.
    pub(super) fn can_carry(&self, payload: &Payload) -> bool {
        self.rails.iter().any(|rail| payload.has_key(rail.number))
    }

    /// Whether the peer has not answered a rail's hello yet.
    pub(super) fn is_calling(&self, rail: usize) -> bool {
        self.rails[rail].is_calling()
    }

    pub(super) fn call_again(&mut self, rail: usize, wr_id: u64, receives: u32) -> Result<(), String> {
        let rail = &mut self.rails[rail];
        rail.call_again(wr_id, receives).map_err(|why| rail.blame(why))
    }

    #[inline]
    pub(super) fn push(&mut self, id: u64, note: Note, payload: Option<(SharedLease, Payload)>) {
        self.outstanding += 1;
        self.queue.push_back(Queued { id, note, payload });
    }

    /// Asks the peer's devices for a sign of life where there was none for a while; whether any is to be asked.
    pub(super) fn probe(&mut self, now: Instant) -> bool {
        self.rails.iter_mut().fold(false, |any, rail| rail.probe(now) | any)
    }

    /// Whether `send` has something to do, or may have.
    #[inline]
    pub(super) fn owes(&self) -> bool {
        !self.queue.is_empty() || self.rails.iter().any(Rail::owes)
    }

    /// Sends what is owed and what is queued, as far as there is room on the rails.
    #[inline]
    pub(super) fn send(&mut self, ports: &mut [Port], room: Room, done: &mut Done) -> Result<(), String> {
        for rail in &mut self.rails {
            rail.begin(&mut ports[rail.number].chain).map_err(|why| rail.blame(why))?;
        }
        let mut added = 0;
        while self.stage == Stage::Open
            && let Some(Queued { note, payload, .. }) = self.queue.get(added)
        {
            let payload = payload.as_ref().map(|(_, payload)| payload);
            let able = self.rails.iter_mut().filter(|rail| rail.takes(payload, room));
            let Some(rail) = able.min_by_key(|rail| rail.bytes()) else { break };
            let port = &mut ports[rail.number];
            let target = payload.map(|payload| FrameTarget { rkey: payload.rkeys[0], offset: payload.target });
            let numbers = (self.number, self.departures.upcoming() + added as u64);
            rail.add(&mut port.chain, &FrameHeader { target, note: *note }, payload, numbers, room);
            self.number = order::next(self.number);
            port.carried.notes += 1;
            port.carried.bytes += payload.map_or(0, |payload| payload.length.into());
            added += 1;
        }
        for rail in &mut self.rails {
            // SAFETY: the sources are in `queue`, and below in `departures`, which keep them until the rail has told that they have
            // completed (`retire`) or the pairs are destroyed (`end`); a source is read-only as long as anybody holds it.
            unsafe { rail.finish(&mut ports[rail.number].chain, room) }.map_err(|why| rail.blame(why))?;
        }
        // What is on its way waits for none of this.
        for _ in 0..added {
            let Queued { id, payload, .. } = self.queue.pop_front().expect("looked at above");
            match payload {
                None if self.departures.passes() => self.report((id, None), done),
                None => self.departures.push((id, None), true),
                Some((source, _)) => self.departures.push((id, Some(source)), false),
            }
        }
        Ok(())
    }

    /// A request of a rail that was to complete did.
    #[inline]
    pub(super) fn retire(&mut self, rail: usize, now: Instant, done: &mut Done) {
        let departures = &mut self.departures;
        self.rails[rail].retire(now, |number| departures.done(number));
        self.report_departures(done);
    }

    fn report_departures(&mut self, done: &mut Done) {
        while let Some(departed) = self.departures.pop() {
            self.report(departed, done);
        }
    }

    #[inline]
    fn report(&mut self, (id, source): (u64, Option<SharedLease>), done: &mut Done) {
        self.outstanding -= 1;
        done.push((self.peer, Completion::Sent { id, source }));
    }

    /// 32 bits of the peer have come on a rail, perhaps with a note. An error is the reason why the path ends.
    #[inline]
    pub(super) fn heard(
        &mut self,
        at: usize,
        immediate: u32,
        now: Instant,
        table: &mut RegionTable,
        done: &mut Done,
    ) -> Result<(), String> {
        let mut next = match self.rails[at].heard(immediate, now).map_err(|why| self.blame(at, why))? {
            Word::Note(number) if self.stage == Stage::Open && self.arrivals.passes(at, number) => Some(at),
            // One rail may hear of notes while another waits for its hello.
            Word::Note(number) => {
                self.arrivals.arrived(at, number).map_err(|why| self.blame(at, why))?;
                self.next_arrival()?
            }
            Word::Hello if self.rails.iter().all(Rail::is_open) => {
                self.stage = Stage::Open;
                done.push((self.peer, Completion::Connected { peer: self.peer }));
                self.next_arrival()?
            }
            Word::Credit | Word::Hello => None,
        };
        while let Some(at) = next {
            self.deliver(at, table, done).map_err(|why| self.blame(at, why))?;
            next = self.next_arrival()?;
        }
        Ok(())
    }

    /// The rail whose oldest note is to be delivered now.
    #[inline]
    fn next_arrival(&mut self) -> Result<Option<usize>, String> {
        match self.stage == Stage::Open && !self.arrivals.is_empty() {
            true => self.arrivals.take(),
            false => Ok(None),
        }
    }

    #[inline]
    fn deliver(&mut self, at: usize, table: &mut RegionTable, done: &mut Done) -> Result<(), String> {
        let header = self.rails[at].read()?;
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

    /// Ends the path without a word to anybody: each pair is destroyed, then its ring.
    pub(super) fn end(&mut self) {
        self.stage = Stage::Dead;
        self.rails.clear();
    }

    /// Reports everything that has not ended as failed. Only after `end`.
    pub(super) fn fail(&mut self, reason: &str, done: &mut Done) {
        assert!(self.stage == Stage::Dead && self.rails.is_empty(), "a device may still read the sources");
        self.outstanding = 0;
        let peer = self.peer;
        let waiting = self.queue.drain(..).map(|queued| (queued.id, queued.payload.map(|(source, _)| source)));
        for (id, source) in self.departures.drain().chain(waiting) {
            let error = Error::Broken { peer, reason: reason.to_string() };
            done.push((peer, Completion::Failed { id, source, error }));
        }
    }
}
