//! What a client does over a path that has been rebuilt, and what it holds until then.
//!
//! Invariant: a gradient goes back to its user when its arrival is proven and the transport has given up its share of it, not
//! before and once.

use super::{Client, Event, Request, Sent, inheriting::HELD};
use crate::{
    mem::SharedLease,
    types::{ChunkId, PeerId},
    wire::{Note, NoteFlags, NoteKind},
};

impl Client {
    /// To which lane how many writes were sent again, because its path has been rebuilt; each time is told once.
    pub fn take_resent(&mut self) -> Option<(PeerId, u64)> {
        self.resent.take()
    }

    /// The lane is ready, for the first time or over a path that has been rebuilt: what it lacks is sent again, and what it had been
    /// asked for is asked for again.
    pub(super) fn resume(&mut self, lane: usize) -> Result<(), String> {
        let is_rebuilt = self.lanes[lane].resumes_at.is_some();
        let received = match (self.lanes[lane].resumes_at.take(), self.lanes[lane].unproven.allows(0)) {
            (Some(received), _) => received,
            (None, true) => 0, // nothing has come over an older path
            (None, false) => return Err("it does not say what it has received".into()),
        };
        if self.config.has_copies {
            self.pass_over(lane, received);
        } else {
            self.prove(lane, received);
        }
        let unproven = &self.lanes[lane].unproven;
        let lacking = unproven.iter().skip((received - unproven.first()) as usize);
        let again: Vec<_> = lacking.map(|sent| (self.to_be_sent_again(sent.note), sent.payload.clone())).collect();
        if is_rebuilt {
            self.resent = Some((self.lanes[lane].peer, again.len() as u64));
        }
        again.into_iter().for_each(|(note, payload)| self.post_sent(lane, note, payload));
        if self.lanes[lane].finished {
            return Ok(()); // whoever has said so asks for nothing any more
        }
        for index in 0..self.chunks.len() {
            let Some(state) = self.chunks[index].as_ref().filter(|state| state.lane == lane) else { continue };
            let is_lost = match state.awaits {
                Some(Request::Pull { .. }) => true,
                // Otherwise the push itself asks, now or when its turn comes.
                Some(Request::Push { number, .. }) => number.is_some_and(|number| number < received || number == HELD),
                None => false,
            };
            if is_lost {
                self.request(ChunkId(index as u32));
            }
        }
        Ok(())
    }

    /// A contribution to a shard with two copies may have to be sent again although its reply is here: another one would be taken for that
    /// to a later push.
    fn to_be_sent_again(&self, note: Note) -> Note {
        let state = self.chunks.get(note.chunk.index()).and_then(Option::as_ref);
        match state.and_then(|state| state.awaits) {
            Some(Request::Push { clock, .. }) if clock == note.clock => note,
            _ => Note { flags: note.flags.without(NoteFlags::WANTS_REPLY), ..note },
        }
    }

    /// Asks for the parameters of a chunk that are awaited.
    pub(super) fn request(&mut self, chunk: ChunkId) {
        let state = self.chunks[chunk.index()].as_ref().expect("own has looked");
        let peer = self.lanes[state.lane].peer;
        let pull = Note { chunk, ..Note::new(NoteKind::Pull) };
        let note = match state.awaits.expect("they are awaited") {
            Request::Pull { min_version, patience_ms } => Note { version: min_version, credit: patience_ms, ..pull },
            Request::Push { clock, .. } => Note { clock, flags: NoteFlags::REPLY_AGAIN, ..pull },
        };
        self.post(peer, u64::MAX - 1, note, None);
    }

    /// The first `count` of what the lane was sent have arrived: their gradients go back to the user.
    pub(super) fn prove(&mut self, lane: usize, count: u64) {
        while let Some(Sent { note, payload }) = self.lanes[lane].unproven.prove(count) {
            if let Some((_, gradient)) = payload {
                self.part(note.chunk, Some(gradient));
            }
        }
    }

    /// A chunk's gradient has arrived, or the transport has given up its share of it: it goes back to the user once both is so.
    pub(super) fn part(&mut self, chunk: ChunkId, arrived: Option<SharedLease>) {
        let state = self.chunks[chunk.index()].as_mut().expect("a gradient of an own chunk");
        match arrived.or_else(|| state.parting.take()).map(SharedLease::thaw) {
            Some(Ok(lease)) => self.events.push_back(Event::GradientSent { chunk, lease }),
            Some(Err(shared)) => state.parting = Some(shared),
            None => {}
        }
    }
}
