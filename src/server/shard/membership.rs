//! Workers that leave a running job and come again: at which clocks each is of the job, and whose contributions a step waits for.
//!
//! Of a worker that was lost nothing more is taken, from the moment on at which this shard is told. All shards then agree on a clock
//! of which nobody has begun anything. Before that clock each step counts what has landed in whole, and the lost worker is absent
//! where nothing has; from that clock on it does not count at all, not in a mean's divisor either. A worker that was told to leave is
//! waited for until such a clock; it is owed nothing of that clock and of later ones, and says that it has finished.
//!
//! Invariant: whether a worker counts in a mean at a clock is the same on every shard; a contribution to a clock at which a worker is
//! not of the job takes part in no step.

use super::*;

/// Whether a worker's process is there, as a shard sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Presence {
    #[default]
    Here,
    /// It was lost.
    Gone,
    /// Another process has its place and is connected; its first clock is not settled yet.
    Joining,
}

/// One worker's part in the job over time.
#[derive(Clone, Debug, Default)]
pub(super) struct Membership {
    presence: Presence,
    /// From each of these clocks on it is of the job, or is not any more; they ascend. Before the first one it is.
    turns: Vec<(Clock, bool)>,
    /// What has not come of an earlier clock never will.
    awaited_from: Clock,
    /// Its last process had finished: nothing of it is lacking.
    gave_all: bool,
    /// The number of the change by which its process joined; 0: it has been there from the start.
    joined_by: u64,
}

impl Membership {
    /// Whether it counts at a clock.
    pub fn is_member(&self, clock: Clock) -> bool {
        self.turns.iter().rev().find(|(from, _)| *from <= clock).is_none_or(|(_, is_in)| *is_in)
    }

    /// Whether what comes of a clock is taken. A process that joins knows its first clock, perhaps before this shard does.
    pub fn takes(&self, clock: Clock) -> bool {
        self.presence == Presence::Joining || self.is_member(clock)
    }

    /// Which of the processes that have had its seat is the last one that has joined.
    pub fn joined_by(&self) -> u64 {
        self.joined_by
    }

    /// Whether a process is there whose first clock is settled.
    pub fn is_here(&self) -> bool {
        self.presence == Presence::Here
    }

    /// A path to its process is there.
    pub fn connected(&mut self) {
        if self.presence == Presence::Gone {
            self.presence = Presence::Joining;
        }
    }

    /// The clock from which on it is of the job no more, as far as is known.
    fn out_from(&self) -> Option<Clock> {
        self.turns.last().filter(|(_, is_in)| !is_in).map(|(clock, _)| *clock)
    }
}

impl Contributor {
    /// Whether a step of `clock` waits for it.
    pub fn is_awaited(&self, clock: Clock) -> bool {
        let membership = &self.membership;
        !self.finished && clock >= membership.awaited_from && membership.is_member(clock)
    }

    /// Whether it has been of the job all the time, and is.
    pub fn stays(&self) -> bool {
        !self.finished && self.membership.turns.is_empty()
    }

    /// Whether something may be awaited of it.
    pub fn may_owe(&self) -> bool {
        !self.finished && self.membership.presence == Presence::Here
    }

    /// Whether the job goes on without its process, which takes no part yet.
    pub fn is_joining(&self) -> bool {
        self.membership.presence == Presence::Joining
    }

    /// Whether its path may end without harm.
    pub fn has_left(&self) -> bool {
        self.finished || self.membership.presence == Presence::Gone
    }
}

impl Shard {
    /// A worker's seat is empty from the start of the job on.
    pub fn begins_without(&mut self, worker: u16) {
        self.leaves(worker, self.config.start_clock);
    }

    /// Whether nothing more is to come of a worker, as far as is known.
    pub(super) fn is_over(&self, contributor: &Contributor) -> bool {
        let is_gone = contributor.membership.presence != Presence::Here;
        let is_through = |from: Clock| is_gone || self.clock_done() >= from;
        contributor.finished || contributor.membership.out_from().is_some_and(is_through)
    }

    /// Whether no process of a worker has a part in what is to come, and none is awaited.
    pub(super) fn has_ended(&self, contributor: &Contributor) -> bool {
        contributor.finished || contributor.membership.presence != Presence::Here
    }

    /// Whether the loss of this worker's path is no failure of the job.
    pub fn may_lose(&self, peer: PeerId) -> bool {
        let is_joining = || self.contributors[usize::from(peer.rank.index)].is_joining();
        peer.rank.role == Role::Worker && (self.config.may_lose_workers || is_joining())
    }

    /// Workers of which something may be awaited and which have not been told where they may write.
    pub fn unattached(&self) -> impl Iterator<Item = PeerId> + '_ {
        let unattached =
            self.contributors.iter().filter(|contributor| contributor.may_owe() && contributor.landing.is_none());
        unattached.map(|contributor| contributor.peer)
    }

    /// Nothing more is taken from a worker, and it is owed nothing; its path has been fenced. `gave_all`: it is known to have finished.
    pub fn expel(&mut self, worker: u16, gave_all: bool) {
        for chunk in &mut self.chunks {
            chunk.replies.retain(|reply| reply.worker != worker);
            chunk.pulls.retain(|pull| pull.worker != worker);
        }
        let contributor = &mut self.contributors[usize::from(worker)];
        let membership = &mut contributor.membership;
        // It may have been expelled already: whoever takes another shard over is asked once more, and so is everybody.
        let gave_before = membership.presence == Presence::Gone && membership.gave_all;
        membership.presence = Presence::Gone;
        membership.gave_all = gave_all || contributor.finished || gave_before;
        contributor.parameters = None;
        (contributor.landing, contributor.received, contributor.contributed) = (None, 0, 0);
        (contributor.is_unanswered, contributor.finished, contributor.inherits) = (false, false, false);
        (contributor.said_goodbye, contributor.is_leaving) = (false, false);
        let peer = contributor.peer;
        self.recall(peer);
    }

    /// A worker is of the job no more from a clock on that nobody has begun.
    pub fn leaves(&mut self, worker: u16, clock: Clock) {
        self.turn(worker, clock, false);
        let membership = &mut self.contributors[usize::from(worker)].membership;
        if membership.presence != Presence::Here {
            membership.awaited_from = Clock::MAX;
            // Where nobody else has a part, what it lacks of these clocks is written down all the same.
            self.clocks_pushed = self.clocks_pushed.max(clock);
        }
        let begins = clock.saturating_mul(self.chunks.len() as u64);
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.pushed = contributor.pushed.min(begins);
        for position in begins.max(self.window.base())..self.window.end() {
            self.window.forget(position, worker.into());
            let cell = self.window.slot(position) * usize::from(self.config.workers) + usize::from(worker);
            let peer = self.contributors[usize::from(worker)].peer;
            self.effects.extend(self.landed[cell].take().map(|landed| Effect::Arm { peer, slot: landed.lease }));
        }
        self.cancel_checkpoints_if_over();
        self.regard_membership();
    }

    /// Whether a worker may be of the job again: not where this shard has a part for it, and takes no part in decisions any more.
    pub fn may_join(&self, worker: u16) -> bool {
        self.contributors[usize::from(worker)].own == 0 || !self.has_left_decisions()
    }

    /// Whether a process that has a part in this shard waits for its first clock.
    pub(super) fn somebody_joins(&self) -> bool {
        self.contributors
            .iter()
            .any(|contributor| contributor.own > 0 && contributor.membership.presence == Presence::Joining)
    }

    /// A worker is of the job again from a clock on that nobody has begun, by the change of this number.
    pub fn joins(&mut self, worker: u16, clock: Clock, number: u64) {
        self.turn(worker, clock, true);
        let membership = &mut self.contributors[usize::from(worker)].membership;
        membership.joined_by = number;
        if membership.presence != Presence::Here {
            (membership.presence, membership.awaited_from) = (Presence::Here, clock);
            // Where nobody else has a part, the clocks until then pass without anybody.
            self.clocks_pushed = self.clocks_pushed.max(clock);
        }
        self.wait_again(clock);
        self.regard_membership();
        self.dismiss_finished(); // it may have nothing to give, and have said so before this was known here
    }

    /// Positions of a clock and later ones that were complete without a worker that is awaited now are so no more.
    fn wait_again(&mut self, clock: Clock) {
        let chunks = self.chunks.len() as u64;
        let first = clock.saturating_mul(chunks).max(self.window.base());
        for position in (first..self.window.end()).filter(|_| chunks > 0) {
            let (slot, index) = (self.window.slot(position), (position % chunks) as usize);
            if std::mem::take(&mut self.queued[slot]) {
                self.chunks[index].complete.retain(|complete| *complete != position);
            }
        }
    }

    /// Contributions of lost workers without which steps were taken, since this was asked last: worker, chunk, clock.
    pub fn take_lacked(&mut self) -> Vec<(u16, ChunkId, Clock)> {
        std::mem::take(&mut self.lacked)
    }

    fn turn(&mut self, worker: u16, clock: Clock, is_in: bool) {
        let done = self.clock_done();
        let turns = &mut self.contributors[usize::from(worker)].membership.turns;
        let seen = turns.partition_point(|(from, _)| *from <= done);
        turns.drain(..seen.saturating_sub(1));
        turns.retain(|(from, _)| *from < clock); // what was to come later is void
        turns.push((clock, is_in));
    }

    fn regard_membership(&mut self) {
        (0..self.chunks.len()).for_each(|index| self.touch(index));
        self.complete_open_positions();
    }

    /// Contributors of a chunk that are of the job at a clock.
    pub(super) fn members(&self, index: usize, clock: Clock) -> impl Iterator<Item = u16> {
        let contributors = self.chunks[index].contributors.iter().copied();
        contributors.filter(move |worker| self.contributors[usize::from(*worker)].membership.is_member(clock))
    }

    /// A step is taken: writes down which lost workers' contributions it lacks.
    pub(super) fn note_lacking(&mut self, index: usize, clock: Clock, position: u64) {
        let lacks = |worker: &u16| {
            let contributor = &self.contributors[usize::from(*worker)];
            clock < contributor.membership.awaited_from
                && !contributor.finished
                && !contributor.membership.gave_all
                && !self.window.has(position, (*worker).into())
        };
        let chunk = self.chunks[index].id;
        let lacking = self.members(index, clock).filter(lacks).map(|worker| (worker, chunk, clock));
        let lacking: Vec<_> = lacking.collect();
        self.lacked.extend(lacking);
    }

    pub(super) fn cancel_checkpoints_if_over(&mut self) {
        if self.contributors.iter().all(|contributor| self.is_over(contributor)) {
            self.checkpointing.cancel();
        }
    }
}
