//! Servers that join and leave a simulated job: the launcher's part in it, and what goes wrong while shards move.
//!
//! What is to move where is said by `session`'s own plan, and a move is the lanes' own affair; here are the moments, the delays, and
//! servers that die before they have a shard.
//!
//! Invariant: a server that serves a shard does not die: without a second copy that ends the job, and nothing is to be learnt from it.

use super::{copies::News, *};
use crate::{
    session::{Step, next_step},
    types::{Epoch, Rank},
};

/// How many servers there are to be.
#[derive(Debug, Default)]
pub(super) struct Moves {
    servers: Option<u16>,
    /// How often somebody has said so.
    wishes: u64,
    /// When that changes next.
    changes_at: Option<Instant>,
    /// What the store is asked, and when it answers: a shard, and who is to follow there.
    asked: Option<(Instant, ShardId, Option<PeerId>)>,
    /// Under which tenure a lane would not hold what it was given, and when the launcher hears of it.
    declined: BTreeMap<PeerId, (Epoch, Instant)>,
}

impl WorldOptions {
    /// Who serves a shard as the job begins. Where shards move the seed says on how many servers they are then.
    pub(super) fn first_tenure(&self, shard: u16) -> Tenure {
        if self.moves {
            let servers = 1 + (self.seed / 3 % u64::from(self.servers)) as u16;
            return Tenure::alone(JobConfig::seat(ShardId(shard), shard % servers));
        }
        let pair = pair(ShardId(shard), self.servers, 1);
        if self.copies { Tenure::first(pair) } else { Tenure::alone(pair[0]) }
    }

    /// Whether who serves a shard may change.
    pub(super) fn has_tenures(&self) -> bool {
        self.copies || self.moves
    }
}

impl World<'_> {
    /// When something about moves is due next.
    pub(super) fn moves_due(&self) -> Option<Instant> {
        let moves = &self.moves;
        let declined = moves.declined.iter().filter(|(lane, (epoch, _))| self.is_given(**lane, *epoch));
        let declined = declined.map(|(_, (_, due))| *due).filter(|_| moves.asked.is_none());
        moves.changes_at.into_iter().chain(moves.asked.map(|(due, ..)| due)).chain(declined).min()
    }

    /// The launcher's part between two rounds.
    pub(super) fn tend_moves(&mut self) -> Result<(), String> {
        if !self.options.moves {
            return Ok(());
        }
        self.notice_the_dead()?;
        let now = self.now;
        if let Some((_, shard, to)) = self.moves.asked.take_if(|(due, ..)| *due <= now) {
            let place = usize::from(shard.0);
            if let Some(next) = self.copies.tenures[place].given_to(to) {
                let is_given = self.swap(place, next) == Some(next);
                self.copies.counts.given_up += u64::from(is_given && to.is_none());
            }
        }
        let is_due = |(lane, (epoch, due)): (&PeerId, &(Epoch, Instant))| *due <= now && self.is_given(*lane, *epoch);
        let declined = self.moves.declined.iter().find_map(|each| is_due(each).then_some(ShardId(each.0.lane)));
        if self.moves.asked.is_none()
            && let Some(shard) = declined
        {
            self.moves.asked = Some((now, shard, None)); // whoever serves would wait for it
        }
        let next =
            next_step(&self.copies.tenures, self.moves.servers, |rank| !self.copies.gone.contains_key(&rank.index));
        // After the last wish every shard has to get on where it is then.
        let may_wish = self.moves.changes_at.is_none() && self.moves.wishes < 1 + self.options.seed % 9;
        match next {
            Step::Give(shard, to) if self.moves.asked.is_none() => {
                let due = self.now + Duration::from_micros(self.random.below(20_000));
                self.moves.asked = Some((due, shard, to));
            }
            // Somebody changes his mind while a shard is on its way.
            Step::Moves(_) if may_wish && self.random.once_in(2_000) => {
                self.moves.changes_at = Some(self.now);
            }
            Step::Rests if may_wish => {
                let longest = if self.random.once_in(2) { 2_000 } else { 200_000 };
                self.moves.changes_at = Some(self.now + Duration::from_micros(self.random.below(longest)));
            }
            _ => {}
        }
        if self.moves.changes_at.is_some_and(|at| at <= self.now) {
            self.moves.changes_at = None;
            self.moves.wishes += 1;
            self.moves.servers = Some(1 + self.random.below(self.options.servers.into()) as u16);
        }
        Ok(())
    }

    /// Servers that have died are noticed, and started again some time later.
    fn notice_the_dead(&mut self) -> Result<(), String> {
        let now = self.now;
        if let Some((server, _)) = self.copies.stopped.filter(|(_, until)| *until <= now) {
            self.copies.stopped = None;
            self.halted.retain(|halted| halted.rank != Rank::server(server));
        }
        for (server, (due, noticed)) in self.copies.gone.clone() {
            if due <= now && !noticed {
                self.copies.gone.insert(server, (due, true));
                self.tell_everybody(News::Gone(Rank::server(server)));
            }
            // A seat is free for another process once no tenure means the one before.
            let is_needed = self.copies.tenures.iter().any(|tenure| tenure.needs(Rank::server(server)));
            if due <= now && !is_needed && self.random.once_in(20) {
                self.copies.gone.remove(&server);
                *self.copies.spawned.entry(server).or_default() += 1;
                for index in 0..self.servers.len() {
                    let (me, shard) = (self.servers[index].me, self.servers[index].shard);
                    if me.rank.index == server {
                        self.copies.news.remove(&me);
                        self.copies.heard.insert(me, self.copies.tenures[shard]);
                        self.begin_if_given(index)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A lane begins to follow if, as far as its process has heard, the shard is given to it.
    pub(super) fn begin_if_given(&mut self, index: usize) -> Result<(), String> {
        let (me, shard) = (self.servers[index].me, self.servers[index].shard);
        let is_there = !self.copies.gone.contains_key(&me.rank.index);
        match self.copies.heard.get(&me).copied() {
            Some(tenure) if self.options.moves && is_there && tenure.other == Some(me) => {
                if self.moves.declined.get(&me).is_some_and(|(epoch, _)| *epoch == tenure.epoch) {
                    return Ok(());
                }
                if self.options.chaos == Chaos::Moves && self.random.once_in(20) {
                    let heard = self.now + Duration::from_micros(self.random.below(50_000));
                    self.moves.declined.insert(me, (tenure.epoch, heard)); // it has not the memory
                    return Ok(());
                }
                self.join(index, me, (shard, tenure))
            }
            _ => Ok(()),
        }
    }

    /// Whether a lane is to follow, under the tenure of this epoch.
    fn is_given(&self, lane: PeerId, epoch: Epoch) -> bool {
        let tenure = self.copies.tenures[usize::from(lane.lane)];
        tenure.epoch == epoch && tenure.other == Some(lane) && !tenure.is_paired
    }

    /// Does something to a shard on the move; `false` if this is no moment for it.
    pub(super) fn wreak_on_moves(&mut self) -> bool {
        let is_begun = |lane: PeerId| self.servers.iter().any(|node| node.me == lane && node.replica.is_some());
        let moving = self.copies.tenures.iter().find_map(|tenure| Some((tenure.primary, tenure.other?)));
        let moving = moving.filter(|(from, to)| is_begun(*from) && is_begun(*to));
        let Some((from, to)) = moving else { return false };
        let worker = PeerId::worker(self.random.below(self.trainers.len() as u64) as u16);
        let flows = self.network.in_flight(from, to) > 0 || self.network.in_flight(from, worker) > 0;
        if !flows || !self.copies.gone.is_empty() || self.copies.stopped.is_some() {
            return false;
        }
        let within = |world: &mut Self, most: u64| world.now + Duration::from_micros(world.random.below(most));
        let claims = || self.copies.claims.iter().any(|(_, claimant, ..)| claimant.rank == to.rank);
        // What the store has written down counts, also where its answer never came.
        let mut written = self.copies.tenures.iter().chain(&self.copies.stored);
        let serves = claims() || written.any(|tenure| tenure.primary.rank == to.rank);
        // Where steps are decided upon, the lanes of two shards may lose each other too.
        let (decider, kinds) = (self.copies.tenures[0].primary, if self.options.decides() { 12 } else { 10 });
        match self.random.below(kinds) {
            0..3 if !serves => {
                let most = if self.random.once_in(3) { 3_000_000 } else { 50_000 };
                let noticed = within(self, most);
                self.kill(to.rank.index, noticed);
                self.copies.counts.deaths += 1;
            }
            3 if !serves => self.stop(to.rank),
            // It stops, and may be deposed before it goes on.
            4 => self.stop(from.rank),
            5 => {
                let until = within(self, 4_000_000);
                self.network.cut(from, to, until);
                self.copies.counts.cuts += 1;
            }
            6 => self.network.break_path(from, worker),
            7 => self.network.break_path(to, worker),
            8 => [from, to].into_iter().for_each(|lane| self.network.break_path(lane, worker)),
            10 => self.network.break_path(decider, from),
            // Of two that follow one another neither end would know in time that there was a moment between them.
            11 if self.copies.parted.is_none_or(|until| until + DEADLINE < self.now) => {
                let until = within(self, 4_000_000);
                self.network.cut(decider, from, until);
                self.copies.parted = Some(until);
            }
            _ => self.network.break_path(from, to),
        }
        true
    }

    /// A server does not run for a while, for less long than its workers wait for it.
    fn stop(&mut self, server: Rank) {
        let until = self.now + Duration::from_micros(self.random.below(4_000_000));
        self.halted.extend(self.servers.iter().map(|node| node.me).filter(|lane| lane.rank == server));
        self.copies.stopped = Some((server.index, until));
        self.copies.counts.deaths += 1;
    }
}
