//! Writes to bytes and back, without a socket: what a connection receives next and where to, what it sends next and from where.
//!
//! A driver asks [`Inbound::targets`] where the next bytes go, receives, tells [`Inbound::received`] how many came, and takes the
//! writes that are complete from [`Inbound::next`]. It asks [`Outbound::gather`] for the ranges to send and tells
//! [`Outbound::advance`] how many bytes went. All ranges stay where they are until then, so that a driver whose kernel fills them
//! later (io_uring) can use the same code as one that calls `recv`.
//!
//! Invariant: a payload's bytes go nowhere but into the lease that `open` returned for its header, and never beyond its
//! `note.length`; what is buffered is at most [`BUFFER_BYTES`], whatever a header says.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    fmt,
    io::{IoSlice, IoSliceMut},
};

use crate::{
    mem::{Lease, SharedLease},
    observe::count_copied,
    transport::region_table::SlotRefusal,
    wire::{FrameHeader, Note, WireError},
};

/// A connection's read buffer: 256 notes in one receive, and at most so much of a payload copied instead of received in place.
pub const BUFFER_BYTES: usize = 16 << 10;

/// Ranges in one vectored send: 64 writes with payload, or 128 notes.
pub const RANGES_MAX: usize = 128;

/// Why a connection's bytes cannot be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// They are no frame.
    Wire(WireError),
    /// The frame may not land.
    Slot(SlotRefusal),
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Defect::Wire(error) => write!(f, "it sent a frame that cannot be read: {error}"),
            Defect::Slot(refusal) => write!(f, "it sent a write that may not land: {refusal}"),
        }
    }
}

/// The receiving half of a connection.
#[derive(Debug)]
pub struct Inbound {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    payload: Option<Payload>,
    /// How long the first of the ranges given out last is.
    offered: usize,
}

#[derive(Debug)]
struct Payload {
    note: Note,
    lease: Lease,
    filled: usize,
}

impl Payload {
    fn rest(&mut self) -> &mut [u8] {
        &mut self.lease.bytes_mut()[self.filled..self.note.length as usize]
    }
}

impl Default for Inbound {
    fn default() -> Inbound {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Inbound { buffer, start: 0, end: 0, payload: None, offered: 0 }
    }
}

impl Inbound {
    /// Where the next bytes go: the rest of the payload at hand (at most `limit` bytes of it), then the buffer.
    pub fn targets(&mut self, limit: usize) -> [IoSliceMut<'_>; 2] {
        // What `next` leaves behind is less than a header, so this moves next to nothing.
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let into_slot = match &mut self.payload {
            Some(payload) => payload.rest(),
            None => &mut [],
        };
        let whole = into_slot.len() <= limit;
        let offered = into_slot.len().min(limit);
        let into_slot = &mut into_slot[..offered];
        self.offered = offered;
        // Payload bytes beyond the limit stay in the socket rather than take the way through the buffer.
        let into_buffer = if whole { &mut self.buffer[self.end..] } else { &mut [] };
        [IoSliceMut::new(into_slot), IoSliceMut::new(into_buffer)]
    }

    /// `count` bytes have been received into [`Inbound::targets`].
    pub fn received(&mut self, count: usize) {
        count_copied(count);
        let in_slot = count.min(self.offered);
        if let Some(payload) = &mut self.payload {
            payload.filled += in_slot;
        }
        self.end += count - in_slot;
        self.offered = 0;
        assert!(self.end <= self.buffer.len(), "more was received than there was room for");
    }

    /// The next complete write, if one is here. `open` decides where a payload may land.
    pub fn next(
        &mut self,
        mut open: impl FnMut(&FrameHeader) -> Result<Lease, SlotRefusal>,
    ) -> Result<Option<(Note, Option<Lease>)>, Defect> {
        loop {
            let buffered = self.end - self.start;
            if let Some(payload) = &mut self.payload {
                let rest = payload.rest();
                let count = rest.len().min(buffered);
                rest[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
                count_copied(count);
                let complete = rest.len() == count;
                payload.filled += count;
                self.start += count;
                return match self.payload.take_if(|_| complete) {
                    Some(Payload { note, lease, .. }) => Ok(Some((note, Some(lease)))),
                    None => Ok(None),
                };
            }
            let Some(bytes) = self.buffer[self.start..self.end].first_chunk() else { return Ok(None) };
            let header = FrameHeader::decode(bytes).map_err(Defect::Wire)?;
            self.start += FrameHeader::SIZE;
            if header.target.is_none() {
                return Ok(Some((header.note, None)));
            }
            let lease = open(&header).map_err(Defect::Slot)?;
            assert!(header.note.length as usize <= lease.len(), "a slot was opened that is too short");
            self.payload = Some(Payload { note: header.note, lease, filled: 0 });
        }
    }

    /// Whether the last byte received ended a frame.
    pub fn is_between_frames(&self) -> bool {
        self.payload.is_none() && self.start == self.end
    }

    /// The slot of a payload that is not complete.
    pub fn into_slot(self) -> Option<Lease> {
        self.payload.map(|payload| payload.lease)
    }
}

/// The sending half of a connection: writes in the order in which they were posted.
#[derive(Debug, Default)]
pub struct Outbound {
    queue: VecDeque<Queued>,
    /// Bytes of the first write that are sent.
    sent: usize,
}

/// A write that is not all sent.
#[derive(Debug)]
pub struct Queued {
    /// The request's id.
    pub id: u64,
    /// The payload's bytes.
    pub source: Option<SharedLease>,
    header: [u8; FrameHeader::SIZE],
    payload_bytes: usize,
}

impl Queued {
    fn len(&self) -> usize {
        FrameHeader::SIZE + self.payload().len()
    }

    fn payload(&self) -> &[u8] {
        self.source.as_ref().map_or(&[], |source| &source.bytes()[..self.payload_bytes])
    }
}

impl Outbound {
    /// Appends a write. The source has at least `header.payload_bytes()` bytes; so many are sent.
    pub fn push(&mut self, id: u64, header: &FrameHeader, source: Option<SharedLease>) {
        let payload_bytes = header.payload_bytes();
        let room = source.as_ref().map_or(0, SharedLease::len);
        assert!(room >= payload_bytes, "a note of {payload_bytes} payload bytes over a source of {room}");
        let queued = Queued { id, source, header: header.encode(), payload_bytes };
        self.queue.push_back(queued);
    }

    /// Writes that are not all sent.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Fills `ranges` with what is to be sent next, from the first byte not sent on; returns how many ranges and bytes that is.
    /// Ends with the range that reaches `limit` bytes.
    pub fn gather<'a>(&'a self, ranges: &mut [IoSlice<'a>; RANGES_MAX], limit: usize) -> (usize, usize) {
        let (mut count, mut bytes, mut skip) = (0, 0, self.sent);
        for queued in &self.queue {
            for part in [&queued.header[..], queued.payload()] {
                let skipped = skip.min(part.len());
                skip -= skipped;
                let part = &part[skipped..];
                if part.is_empty() {
                    continue;
                }
                if count == RANGES_MAX || bytes >= limit {
                    return (count, bytes);
                }
                ranges[count] = IoSlice::new(part);
                count += 1;
                bytes += part.len();
            }
        }
        (count, bytes)
    }

    /// `count` more bytes are sent; `done` gets each write that this completes.
    pub fn advance(&mut self, count: usize, mut done: impl FnMut(Queued)) {
        count_copied(count);
        self.sent += count;
        while let Some(first) = self.queue.front() {
            if self.sent < first.len() {
                return;
            }
            self.sent -= first.len();
            done(self.queue.pop_front().expect("looked at just now"));
        }
        assert_eq!(self.sent, 0, "more was sent than there was");
    }

    /// Takes all that is not completely sent.
    pub fn drain(&mut self) -> impl Iterator<Item = Queued> + '_ {
        self.sent = 0;
        self.queue.drain(..)
    }
}

#[cfg(test)]
#[path = "framing_tests.rs"]
mod tests;
