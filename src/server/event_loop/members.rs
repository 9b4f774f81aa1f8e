//! Peers that are lost, and workers that another process takes the place of.
//!
//! Invariant: nothing is taken from a worker after it was expelled, and its slots are opened to nobody but a later process of it.

use super::*;
use crate::{server::Inheritance, session::NEVER, types::ShardId};

/// Whether workers are to build paths that this lane has never had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Arrivals {
    #[default]
    Nobody,
    /// Some are, from the next turn on.
    Begin,
    /// Whoever has not come by then is lost.
    Until(Instant),
}

impl Arrivals {
    pub fn until(self) -> Option<Instant> {
        if let Arrivals::Until(until) = self { Some(until) } else { None }
    }
}

impl<T: Transport> EventLoop<T> {
    /// See [`Shard::prepare_change`]. A worker that is lost is expelled, once a change: another process may have its seat when this is asked
    /// again. [`NEVER`] for a change that this shard cannot make.
    pub fn prepare_change(&mut self, number: u64, clock: Clock, change: Change) -> Clock {
        if let Some(from) = self.shard.promised(number) {
            return from;
        }
        match change {
            Change::Lost(worker) => self.expel(worker, false),
            Change::Opens(worker) => self.expel(worker, true),
            Change::Joins(worker) if !self.shard.may_join(worker) => return NEVER,
            Change::Joins(_) | Change::Leaves(_) | Change::Settings(_) => {}
        }
        self.shard.prepare_change(number, clock)
    }

    /// A worker is lost, or has finished (`gave_all`): its path is fenced, and nothing more is taken from it. Another process may build the
    /// path anew.
    fn expel(&mut self, worker: u16, gave_all: bool) {
        self.paths.expel(PeerId::worker(worker));
        self.shard.expel(worker, gave_all);
    }

    /// Who is of the job changes from a clock on that nobody has begun.
    pub(super) fn turn_member(&mut self, number: u64, clock: Clock, change: Change) {
        match change {
            Change::Settings(_) => {}
            Change::Lost(worker) | Change::Leaves(worker) | Change::Opens(worker) => self.shard.leaves(worker, clock),
            Change::Joins(worker) => {
                self.shard.joins(worker, clock, number);
                self.arrivals = Arrivals::Begin; // to a lane that took over meanwhile it has a path to build yet
            }
        }
    }

    /// A worker builds its path to a lane that takes over as it does one that broke, and has as long; of one that does not, nothing else
    /// would be heard.
    pub(super) fn miss_workers(&mut self, now: Instant) -> Result<()> {
        match self.arrivals {
            Arrivals::Begin => self.arrivals = Arrivals::Until(now + self.paths.rebuild_time()),
            Arrivals::Until(until) if until <= now => {
                self.arrivals = Arrivals::Nobody;
                for peer in self.shard.unattached().collect::<Vec<_>>() {
                    let reason = format!("it has not come within {:.1} s", self.paths.rebuild_time().as_secs_f64());
                    self.lost(peer, Error::Broken { peer, reason })?;
                }
            }
            Arrivals::Nobody | Arrivals::Until(_) => {}
        }
        Ok(())
    }

    /// Begins where another lane ended, with what a backup of it holds; workers and other shards' lanes come by themselves. The job began
    /// with so many `workers`, and `changes` are all that were made since, by number.
    pub(in super::super) fn inherit(
        &mut self,
        holds: &Inheritance,
        workers: u16,
        changes: &BTreeMap<u64, (Clock, Change)>,
    ) {
        self.shard.inherit(holds);
        self.shard.lanes().into_iter().for_each(|lane| self.paths.set_aside(lane));
        let seats = holds.finished.len() as u16;
        (0..seats).for_each(|worker| self.paths.set_aside(PeerId::worker(worker)));
        (workers..seats).for_each(|worker| self.leave_empty(worker));
        for (number, (clock, change)) in changes {
            match *change {
                Change::Lost(worker) => {
                    self.expel(worker, self.shard.gave_all(worker, holds.finished[usize::from(worker)]));
                }
                Change::Opens(worker) => self.expel(worker, true),
                Change::Settings(_) | Change::Leaves(_) | Change::Joins(_) => {}
            }
            self.turn_member(*number, *clock, *change);
        }
        let finished = self.shard.go_on(holds);
        finished.into_iter().for_each(|worker| self.paths.release(PeerId::worker(worker)));
        self.arrivals = Arrivals::Begin;
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
        until.into_iter().for_each(|until| self.shard.joins(worker, until, 0));
    }

    /// A worker's seat is empty from the start of the job on: somebody may take it later.
    pub fn leave_empty(&mut self, worker: u16) {
        self.expel(worker, false);
        self.shard.begins_without(worker);
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
            self.expel(peer.rank.index, false);
            self.losses.push((peer.rank.index, reason));
            return Ok(());
        }
        Err(Error::Broken { peer, reason })
    }
}
