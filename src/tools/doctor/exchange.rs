//! The measurement itself, over any fabric: one end writes, the other answers each write with a note.
//!
//! The answering end registers four slots, arms them, names them in an `Attach` note, and answers each `Push` with a `Credit`
//! note of the same clock once the slot is armed again. The writing end sends 64 bytes at a time and awaits each answer, then
//! 1 MiB at a time with all slots under way, and says `Finished`, which is answered by `Goodbye`.
//!
//! Invariant: at most as many writes are under way as there are slots, and every wait has a deadline.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    Error, Result,
    mem::{Lease, Region, RegionOptions, SharedLease},
    transport::{Completion, Driver, Endpoint, MemoryRegion, RemoteSlot, Waiter, Wakeup, WorkRequest},
    types::PeerId,
    wire::{Attachment, Note, NoteKind},
};

/// Bytes of a write whose time is taken.
pub const LATENCY_BYTES: u32 = 64;

/// Bytes of a write whose rate is taken.
pub const RATE_BYTES: u32 = 1 << 20;

/// What a 1 MiB write's answer is waited for as; the pair test tells by it where it stopped.
pub(super) const LARGE_ANSWER: &str = "the answer to a write of 1 MiB";

/// Writes of 1 MiB under way: enough to keep a link busy while one is being answered.
const SLOTS: u32 = 4;

/// How long each of the two measurements goes on.
const MEASURED_TIME: Duration = Duration::from_millis(300);

/// Memory for that many latencies: more than a second of the fastest fabric there is.
const ROUNDS_MAX: usize = 1 << 20;

/// An answer that takes longer will not come.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Median time from posting a write of 64 bytes to its answer.
    pub latency_us_p50: f64,
    /// The 99th percentile of it.
    pub latency_us_p99: f64,
    /// Payload of 1 MiB writes in one direction.
    pub bytes_per_s: f64,
}

/// One end of the path, from offer to goodbye.
pub(super) struct End<'a> {
    driver: &'a mut dyn Driver,
    peer: PeerId,
    waiter: Waiter,
    heard: VecDeque<Completion>,
    memory: MemoryRegion,
    lease: Option<Lease>,
}

impl<'a> End<'a> {
    /// Registers the memory of this end.
    pub(super) fn new(driver: &'a mut dyn Driver, peer: PeerId) -> Result<End<'a>> {
        let options = RegionOptions { name: "doctor".into(), ..RegionOptions::default() };
        let (region, lease) = Region::allocate((SLOTS * RATE_BYTES) as usize, &options)?;
        let memory = driver.register(&region)?;
        Ok(End { driver, peer, waiter: Waiter::new()?, heard: VecDeque::new(), memory, lease: Some(lease) })
    }

    /// Comes back when the path is there.
    pub(super) fn connect(&mut self, remote: &Endpoint, deadline: Instant) -> Result<()> {
        self.driver.connect(self.peer, remote, deadline)?;
        while !matches!(self.next("a connection", deadline)?, Completion::Connected { .. }) {}
        Ok(())
    }

    /// The next completion that is not a failure.
    fn next(&mut self, awaited: &'static str, deadline: Instant) -> Result<Completion> {
        let begun = Instant::now();
        loop {
            match self.heard.pop_front() {
                Some(Completion::Failed { error, .. } | Completion::Broken { error, .. }) => return Err(error),
                Some(completion) => return Ok(completion),
                None => {}
            }
            let mut completions = Vec::new();
            self.driver.flush()?;
            self.driver.poll(Instant::now(), &mut completions)?;
            self.heard.extend(completions);
            if !self.heard.is_empty() {
                continue;
            }
            if Instant::now() >= deadline {
                let (from, waited) = (self.peer.to_string(), begun.elapsed());
                return Err(Error::Deadline { from, awaited, chunk: None, clock: None, waited });
            }
            let driver: &mut dyn Wakeup = &mut *self.driver;
            self.waiter.wait(&mut [driver], Some(deadline))?;
        }
    }

    /// The next write of the peer.
    fn arrival(&mut self, awaited: &'static str) -> Result<(Note, Option<Lease>)> {
        let deadline = Instant::now() + ANSWER_TIME;
        loop {
            if let Completion::Arrived { note, lease, .. } = self.next(awaited, deadline)? {
                return Ok((note, lease));
            }
        }
    }

    fn post(&mut self, note: Note, payload: Option<(SharedLease, RemoteSlot)>) -> Result<()> {
        let request = WorkRequest { id: note.clock, peer: self.peer, note, payload };
        // A handful is under way; a queue that is too short for that is a defect of the fabric's.
        self.driver.post(request).map_err(|_| self.unexpected("its queue is full"))
    }

    fn unexpected(&self, what: &str) -> Error {
        Error::Protocol { peer: self.peer, what: format!("in the doctor's test: {what}") }
    }

    /// Answers the other end's writes until it has finished.
    pub(super) fn answer(&mut self) -> Result<()> {
        let rkey = self.memory.rkey(self.driver.fabric(self.peer));
        let lease = self.lease.take().ok_or_else(|| self.unexpected("an end answers once"))?;
        for slot in lease.chunks(RATE_BYTES as usize) {
            self.driver.arm(self.peer, slot)?;
        }
        let attachment = Attachment { rkey, offset: 0, slot_bytes: RATE_BYTES, slots: SLOTS, credit: u64::from(SLOTS) };
        self.post(attachment.to_note(), None)?;
        loop {
            let (note, lease) = self.arrival("a write or the end of the test")?;
            match (note.kind, lease) {
                (NoteKind::Push, Some(lease)) => {
                    self.driver.arm(self.peer, lease)?;
                    self.post(Note { clock: note.clock, ..Note::new(NoteKind::Credit) }, None)?;
                }
                (NoteKind::Finished, None) => break,
                (kind, _) => return Err(self.unexpected(&format!("it sent a note of kind {kind:?}"))),
            }
        }
        self.post(Note::new(NoteKind::Goodbye), None)?;
        // The other end hangs up when it has read this; whatever comes now, the test is over.
        while self.next("the other end to hang up", Instant::now() + ANSWER_TIME).is_ok() {}
        Ok(())
    }

    /// Writes, and takes the time.
    pub(super) fn measure(&mut self) -> Result<Figures> {
        let (note, _) = self.arrival("the place where to write")?;
        let place = Attachment::from_note(&note).map_err(|error| self.unexpected(&error.to_string()))?;
        if note.kind != NoteKind::Attach || place.slot_bytes < RATE_BYTES || place.slots == 0 {
            return Err(self.unexpected("it offered no slots of 1 MiB"));
        }
        let lease = self.lease.take().ok_or_else(|| self.unexpected("an end measures once"))?;
        let source = lease.freeze();
        let mut times = Vec::new();
        let begun = Instant::now();
        while times.len() < ROUNDS_MAX && (times.is_empty() || begun.elapsed() < MEASURED_TIME) {
            let posted = Instant::now();
            self.write(times.len() as u64, LATENCY_BYTES, &source, &place)?;
            self.credit(times.len() as u64, "the answer to a write of 64 bytes")?;
            times.push(posted.elapsed());
        }
        let bytes_per_s = self.rate(times.len() as u64, &source, &place)?;
        self.post(Note::new(NoteKind::Finished), None)?;
        while self.arrival("goodbye")?.0.kind != NoteKind::Goodbye {}
        times.sort_unstable();
        let quantile = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e6;
        Ok(Figures { latency_us_p50: quantile(0.5), latency_us_p99: quantile(0.99), bytes_per_s })
    }

    /// Large writes, as many under way as there are slots; `first` is the clock of the first.
    fn rate(&mut self, first: u64, source: &SharedLease, place: &Attachment) -> Result<f64> {
        let begun = Instant::now();
        let (mut posted, mut answered) = (first, first);
        loop {
            let goes_on = posted == first || begun.elapsed() < MEASURED_TIME;
            while goes_on && posted - answered < u64::from(place.slots.min(SLOTS)) {
                self.write(posted, RATE_BYTES, source, place)?;
                posted += 1;
            }
            if posted == answered {
                break;
            }
            self.credit(answered, LARGE_ANSWER)?;
            answered += 1;
        }
        Ok((answered - first) as f64 * f64::from(RATE_BYTES) / begun.elapsed().as_secs_f64())
    }

    fn write(&mut self, clock: u64, length: u32, source: &SharedLease, place: &Attachment) -> Result<()> {
        let index = clock % u64::from(place.slots.min(SLOTS));
        let offset = place.offset + index * u64::from(place.slot_bytes);
        let slot = RemoteSlot { rkey: place.rkey, offset, len: place.slot_bytes };
        let note = Note { clock, length, weight: 1, ..Note::new(NoteKind::Push) };
        self.post(note, Some((source.clone(), slot)))
    }

    fn credit(&mut self, clock: u64, awaited: &'static str) -> Result<()> {
        let (note, _) = self.arrival(awaited)?;
        match note.kind == NoteKind::Credit && note.clock == clock {
            true => Ok(()),
            false => Err(self.unexpected(&format!("write {clock} was answered by {:?} of {}", note.kind, note.clock))),
        }
    }
}
