//! A shard with two copies, as its worker sees it: what is proven there, and how another lane takes over.
//!
//! What has come to the primary alone may be lost with it. Both copies have what lies below the window's base: the base is the credit
//! less the number of slots. Whoever takes over says from which position on it lacks anything; what was sent from there on is sent to
//! it again, in order, and counted from 0.
//!
//! Invariant: a gradient goes back to its user only when both copies have what was made of it.

use super::{Client, Effect, Request, Sent};
use crate::{
    consistency::position,
    types::{ChunkId, Clock, PeerId, ShardId},
    wire::NoteKind,
};

/// The number of a push that is in both copies: parameters that it asked for are asked for by themselves.
pub(super) const HELD: u64 = u64::MAX;

impl Client {
    /// Who serves a shard.
    pub fn lane_of(&self, shard: ShardId) -> PeerId {
        self.lanes[usize::from(shard.0)].peer
    }

    /// The shard that `from` served is served by `to` from now on. Nothing more is sent before `to` has said what it has.
    pub fn redirect(&mut self, from: PeerId, to: PeerId) {
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.peer == from) else { return };
        (lane.peer, lane.landing, lane.resumes_at) = (to, None, None);
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Arm { peer, slot } if peer == from => self.effects.push_back(Effect::Arm { peer: to, slot }),
                other => self.effects.push_back(other), // what was to be posted to `from` fails: its path is no more
            }
        }
    }

    /// What lies below the window's base is in both copies, and so is all that was sent before it.
    pub(super) fn prove_by_window(&mut self, lane: usize) {
        let Some(landing) = self.lanes[lane].landing else { return };
        let base = self.lanes[lane].credit.saturating_sub(landing.slots.into());
        let unproven = &self.lanes[lane].unproven;
        let mut proven = 0;
        for (index, sent) in (1..).zip(unproven.iter()) {
            match self.position_of(lane, sent) {
                Some(position) if position < base => proven = index,
                Some(_) => break,
                None => {} // it is proven by what was sent after it
            }
        }
        let count = unproven.first() + proven;
        self.prove(lane, count);
    }

    /// Another lane has taken the shard over and has all that lies below `base`: the rest is to be sent to it, counted from 0.
    pub(super) fn inherit(&mut self, lane: usize, base: u64) {
        for sent in std::mem::take(&mut self.lanes[lane].unproven).into_entries() {
            let (chunk, clock) = (sent.note.chunk, sent.note.clock);
            let position = self.position_of(lane, &sent);
            if base == u64::MAX || position.is_some_and(|position| position < base) {
                if let Some((_, gradient)) = sent.payload {
                    self.part(chunk, Some(gradient));
                }
                continue;
            }
            let number = self.lanes[lane].unproven.push(sent);
            if position.is_some() {
                self.renumber(chunk, |awaited| (awaited == clock).then_some(number));
            }
        }
        let (chunks, own) = (self.lanes[lane].chunks, self.layout.chunks.len());
        for index in 0..own {
            let Some(state) = self.chunks[index].as_ref().filter(|state| state.lane == lane) else { continue };
            let place = state.place;
            let is_held = |clock| position(clock, chunks, place) < base;
            self.renumber(ChunkId(index as u32), |awaited| is_held(awaited).then_some(HELD));
        }
    }

    /// The lane has received so many notes. What it lacks before the first that is not proven is in its state since before it took over, and
    /// is not sent again: what follows is counted from there.
    pub(super) fn pass_over(&mut self, lane: usize, received: u64) {
        let first = self.lanes[lane].unproven.first();
        if received >= first {
            return;
        }
        self.lanes[lane].unproven.renumber(received);
        for state in self.chunks.iter_mut().flatten().filter(|state| state.lane == lane) {
            if let Some(Request::Push { number: Some(number), .. }) = &mut state.awaits
                && *number != HELD
            {
                *number = if *number < first { HELD } else { *number - (first - received) };
            }
        }
    }

    /// What the push has as its number whose parameters are awaited, by its clock.
    fn renumber(&mut self, chunk: ChunkId, number_of: impl Fn(Clock) -> Option<u64>) {
        let state = self.chunks[chunk.index()].as_mut().expect("a contribution to an own chunk");
        if let Some(Request::Push { clock, number: Some(number) }) = &mut state.awaits
            && let Some(new) = number_of(*clock)
        {
            *number = new;
        }
    }

    fn position_of(&self, lane: usize, sent: &Sent) -> Option<u64> {
        if !matches!(sent.note.kind, NoteKind::Push | NoteKind::Absent) {
            return None;
        }
        let (_, place) = self.own(sent.note.chunk);
        Some(position(sent.note.clock, self.lanes[lane].chunks, place))
    }
}
