//! Peers that are lost, and workers that another process takes the place of.
//!
//! Invariant: nothing is taken from a worker after it was expelled, and its slots are opened to nobody but a later process of it.

use super::*;
use crate::{session::NEVER, types::ShardId};

impl<T: Transport> EventLoop<T> {
    /// See [`Shard::prepare_change`]. A worker that is lost is expelled; [`NEVER`] for a change that this shard cannot make.
    pub fn prepare_change(&mut self, number: u64, clock: Clock, change: Change) -> Clock {
        match change {
            Change::Lost(worker) | Change::Opens(worker) => self.expel(worker),
            Change::Joins(worker) if !self.shard.may_join(worker) => return NEVER,
            Change::Joins(_) | Change::Leaves(_) | Change::Settings(_) => {}
        }
        self.shard.prepare_change(number, clock)
    }

    /// A worker is lost: its path is fenced, and nothing more is taken from it. Another process may build the path anew.
    pub fn expel(&mut self, worker: u16) {
        self.paths.expel(PeerId::worker(worker));
        self.shard.expel(worker);
    }

    /// Another lane serves a shard: the path by which steps are decided upon leads there.
    pub fn set_lane(&mut self, shard: ShardId, lane: PeerId, now: Instant) {
        if let Some(before) = self.shard.set_lane(shard, lane) {
            self.paths.redirect(before, lane, now);
        }
    }

    /// Workers whose paths are lost where the job goes on without them, and why.
    pub fn take_losses(&mut self) -> std::vec::Drain<'_, (u16, String)> {
        self.losses.drain(..)
    }

    /// See [`Shard::take_lacked`].
    pub fn take_lacked(&mut self) -> Vec<(u16, ChunkId, Clock)> {
        self.shard.take_lacked()
    }

    /// A worker is not of the job from one clock on, and is of it from another; known before any of them has begun.
    pub fn set_absence(&mut self, worker: u16, from: Clock, until: Option<Clock>) {
        self.shard.leaves(worker, from);
        until.into_iter().for_each(|until| self.shard.joins(worker, until));
    }

    /// A worker's seat is empty from the start of the job on: somebody may take it later.
    pub fn leave_empty(&mut self, worker: u16) {
        self.expel(worker);
        self.shard.leaves(worker, self.shard.clock_done());
    }

    /// A path is gone: harmless if the peer owes and is owed nothing more, the end of the job otherwise.
    pub(super) fn lost(&mut self, peer: PeerId, error: Error) -> Result<()> {
        if self.shard.backup() == Some(peer) {
            tracing::warn!("{} goes on without its backup {peer}: {error}", self.me);
            self.lose_backup();
            return Ok(());
        }
        if self.shard.has_left(peer) {
            self.shard.handle_left(peer);
            return Ok(());
        }
        let awaited = match self.shard.awaited_from(peer) {
            Some(awaited) => format!(" ({} waits for {awaited})", self.me),
            None => String::new(),
        };
        let reason = match error {
            Error::Broken { reason, .. } => reason,
            other => other.to_string(),
        };
        let reason = format!("{reason}{awaited}");
        if self.shard.may_lose(peer) {
            self.expel(peer.rank.index);
            self.losses.push((peer.rank.index, reason));
            return Ok(());
        }
        Err(Error::Broken { peer, reason })
    }
}
