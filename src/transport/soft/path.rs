//! One peer's path: a queue pair, whom it talks to, and the leases of what is under way.
//!
//! Invariant: `posted` holds exactly the messages that the queue pair has not completed, in its order; a slot that was taken for
//! a write is in `landing` until the write is complete, and goes back to the table if that never happens.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::address::SoftAddress;
use crate::{
    Error,
    mem::{Lease, SharedLease},
    observe::count_copied,
    rc::{Event, Immediate, Piece, QueuePair, Receiver, State, Target},
    transport::{Completion, done::Done, region_table::RegionTable},
    types::PeerId,
    wire::Note,
};

/// A queue pair and its two addresses: all that is needed to speak.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) qp: QueuePair,
    pub(super) local: SoftAddress,
    pub(super) remote: Option<SoftAddress>,
}

/// A request whose end was not told.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) id: u64,
    pub(super) source: Option<SharedLease>,
}

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    pub(super) line: Line,
    pub(super) posted: VecDeque<Posted>,
    /// The queue pair's number of the first in `posted`.
    pub(super) first_ticket: u64,
    landing: Option<Lease>,
    /// Arrivals for which there is room until the next poll.
    pub(super) receives: usize,
}

impl Path {
    pub(super) fn new(peer: PeerId, line: Line) -> Path {
        Path { peer, line, posted: VecDeque::new(), first_ticket: 0, landing: None, receives: 0 }
    }

    /// The bytes that a packet carries.
    pub(super) fn payload(&self, piece: Option<Piece>) -> &[u8] {
        let Some(Piece { ticket, start, len }) = piece else { return &[] };
        let posted = &self.posted[(ticket - self.first_ticket) as usize];
        let source = posted.source.as_ref().expect("a message with a target has a source");
        &source.bytes()[start..start + len]
    }

    /// Where what comes over this path takes effect.
    pub(super) fn receiver<'a>(
        &'a mut self,
        table: &'a mut RegionTable,
        done: &'a mut Done,
    ) -> (&'a mut QueuePair, Landing<'a>) {
        let Path { peer, line, landing, receives, .. } = self;
        (&mut line.qp, Landing { peer: *peer, table, slot: landing, receives, done })
    }

    /// Tells what the queue pair has to tell.
    pub(super) fn settle(&mut self, table: &mut RegionTable, done: &mut Done) {
        let peer = self.peer;
        while let Some(event) = self.line.qp.poll_event() {
            match event {
                Event::Connected => done.push((peer, Completion::Connected { peer })),
                Event::Sent { ticket } => {
                    assert_eq!(ticket, self.first_ticket, "messages complete in order");
                    self.first_ticket += 1;
                    let Posted { id, source } = self.posted.pop_front().expect("the queue pair has it from here");
                    done.push((peer, Completion::Sent { id, source }));
                }
                // What follows says why; then all that is left in `posted` fails.
                Event::Failed { .. } => {}
                Event::Broken(cause) => {
                    let reason = cause.to_string();
                    self.abandon(&reason, table, done);
                    done.push((peer, Completion::Broken { peer, error: Error::Broken { peer, reason } }));
                }
            }
        }
    }

    /// Nothing more lands and nothing more is sent: the slot goes back to the table, requests fail.
    pub(super) fn abandon(&mut self, reason: &str, table: &mut RegionTable, done: &mut Done) {
        assert_eq!(self.line.qp.state(), State::Error, "only what is over is abandoned");
        let peer = self.peer;
        if let Some(slot) = self.landing.take() {
            table.put_back(peer, slot);
        }
        for Posted { id, source } in self.posted.drain(..) {
            let error = Error::Broken { peer, reason: reason.into() };
            done.push((peer, Completion::Failed { id, source, error }));
        }
    }
}

/// A path's memory while a packet is handled.
#[derive(Debug)]
pub(super) struct Landing<'a> {
    peer: PeerId,
    table: &'a mut RegionTable,
    slot: &'a mut Option<Lease>,
    receives: &'a mut usize,
    done: &'a mut Done,
}

impl Receiver for Landing<'_> {
    fn is_ready(&self) -> bool {
        *self.receives > 0
    }

    fn begin(&mut self, target: &Target) -> Result<(), String> {
        let taken = self.table.take(self.peer, target.rkey, target.offset, target.length);
        *self.slot = Some(taken.map_err(|refusal| refusal.to_string())?);
        Ok(())
    }

    fn place(&mut self, at: usize, payload: &[u8]) {
        let slot = self.slot.as_mut().expect("a write has begun");
        slot.bytes_mut()[at..at + payload.len()].copy_from_slice(payload);
        count_copied(payload.len());
    }

    fn complete(&mut self, target: Option<&Target>, immediate: &Immediate) -> Result<(), String> {
        let note = Note::decode(immediate).map_err(|defect| format!("it sent a note that cannot be read: {defect}"))?;
        let fits = match target {
            Some(target) => note.kind.has_payload() && note.length == target.length,
            None => !note.kind.has_payload(),
        };
        if !fits {
            return Err(format!("it sent a {:?} note that does not go with its payload", note.kind));
        }
        *self.receives -= 1;
        let lease = self.slot.take();
        self.done.push((self.peer, Completion::Arrived { from: self.peer, note, lease }));
        Ok(())
    }
}
