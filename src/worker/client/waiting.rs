//! What a client waits for, to be named when a deadline passes or somebody asks.
//!
//! Invariant: nothing in here changes anything; what has come is never said to be awaited.

use super::{Awaited, Client, Request};
use crate::{
    session::Owed,
    types::{ChunkId, Clock, PeerId},
};

impl Client {
    /// The first thing that is awaited, of `peer` or of anybody.
    pub fn awaited(&self, peer: Option<PeerId>) -> Option<Awaited> {
        self.chunks.iter().enumerate().find_map(|(index, state)| {
            let state = state.as_ref()?;
            let owner = self.lanes[state.lane].peer;
            let clock = match state.awaits.filter(|request| !request.is_void(self.leaves_from))? {
                Request::Push { clock, .. } => Some(clock),
                Request::Pull { .. } => None,
            };
            let wanted = peer.is_none_or(|peer| peer == owner);
            wanted.then_some(Awaited { peer: owner, chunk: ChunkId(index as u32), clock })
        })
    }

    /// Of each lane: gradients that wait for their turn, and positions that are open before the first of them.
    pub fn turns(&self) -> impl Iterator<Item = (PeerId, u64, u64)> {
        self.lanes.iter().map(|lane| {
            let next = lane.waiting.peek().map_or(lane.pushed, |next| next.position);
            (lane.peer, lane.waiting.len() as u64, lane.credit.saturating_sub(next))
        })
    }

    /// What is awaited of each lane: its path, the first chunk whose parameters it owes, room for a gradient, its goodbye.
    pub fn waits(&self) -> Vec<(PeerId, Owed, Option<ChunkId>, Option<Clock>)> {
        let waits = self.lanes.iter().filter_map(|lane| {
            if lane.landing.is_none() {
                return Some((lane.peer, Owed::Path, None, None));
            }
            if let Some(Awaited { chunk, clock, .. }) = self.awaited(Some(lane.peer)) {
                return Some((lane.peer, Owed::Parameters, Some(chunk), clock));
            }
            if let Some(next) = lane.waiting.peek() {
                return Some((lane.peer, Owed::Room, Some(next.chunk), Some(next.clock)));
            }
            (lane.finished && !lane.goodbye).then_some((lane.peer, Owed::Goodbye, None, None))
        });
        waits.collect()
    }
}
