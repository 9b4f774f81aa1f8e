//! Shards with two copies in the simulated world: the store and its news, processes that die and are started again, and faults.
//!
//! Who serves is decided by the tenures of `session`, and what a lane makes of them by the server's own code; here are only delays,
//! deaths, and the launcher's habit of starting a dead server again and of ending one that has no part in anything any more.
//!
//! Invariant: one fault at a time, and only while every shard has both its copies: what two faults at once may do is promised
//! by nobody.

use std::collections::VecDeque;

use super::*;
use crate::{
    server::{Replica, Standing},
    session::{Change, Claim, Tenure},
    types::{Epoch, Rank, Role},
};

/// Silence after which the other lane of a pair counts as gone.
pub const SUSPICION: Duration = Duration::from_secs(2);

/// What ranks are told.
#[derive(Clone, Copy, Debug)]
pub(super) enum News {
    Tenure(usize, Tenure),
    Gone(Rank),
    /// A change is to be prepared for: its number, and from which clock on.
    Prepare(u64, Clock, Change),
    /// A change is settled.
    Settle(u64, Option<(Clock, Change)>),
}

/// What happened to the copies of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// Processes that were killed, or stopped until they had no part any more.
    pub deaths: u64,
    /// Paths between two lanes of a pair that were cut.
    pub cuts: u64,
    /// Lanes that took over.
    pub takeovers: u64,
    /// Backups that got all of the state from the primary.
    pub pairings: u64,
    /// Lanes that found themselves deposed and began anew.
    pub deposed: u64,
    /// Claims to which the store gave no answer, of which it had made some.
    pub unanswered: u64,
    /// Chunks of backups that were compared with their primaries', once a clock.
    pub compared: u64,
    /// Shards that were moved to another server.
    pub moves: u64,
    /// Moves that were given up.
    pub given_up: u64,
}

impl CopyCounts {
    /// Both together.
    pub fn and(self, other: CopyCounts) -> CopyCounts {
        CopyCounts {
            deaths: self.deaths + other.deaths,
            cuts: self.cuts + other.cuts,
            takeovers: self.takeovers + other.takeovers,
            pairings: self.pairings + other.pairings,
            deposed: self.deposed + other.deposed,
            unanswered: self.unanswered + other.unanswered,
            compared: self.compared + other.compared,
            moves: self.moves + other.moves,
            given_up: self.given_up + other.given_up,
        }
    }
}

/// The launcher's and the store's part.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub tenures: Vec<Tenure>,
    /// What the store holds: what the launcher knows, unless it has had no answer.
    pub stored: Vec<Tenure>,
    /// Claims on their way to the store.
    pub claims: Vec<(Instant, PeerId, Epoch, Claim)>,
    /// By node: what it will be told, in order.
    pub news: BTreeMap<PeerId, VecDeque<(Instant, News)>>,
    /// By server: how often it has been started.
    pub spawned: BTreeMap<u16, u64>,
    /// How often a lane has begun anew in its process.
    pub begun: BTreeMap<PeerId, u64>,
    /// Servers that are gone: when that is noticed, and whether it has been.
    pub gone: BTreeMap<u16, (Instant, bool)>,
    /// Until when the lanes of two shards hear nothing of each other.
    pub parted: Option<Instant>,
    /// A server that does not run, until then.
    pub stopped: Option<(u16, Instant)>,
    /// By lane: the tenure of its shard that it heard of last, in the present life of its process.
    pub heard: BTreeMap<PeerId, Tenure>,
    pub counts: CopyCounts,
}

impl Copies {
    pub fn new(options: &WorldOptions) -> Copies {
        let tenures: Vec<_> = (0..options.servers).map(|shard| options.first_tenure(shard)).collect();
        Copies { stored: tenures.clone(), tenures, ..Copies::default() }
    }

    pub(super) fn life(&self, lane: PeerId) -> u64 {
        let spawned = self.spawned.get(&lane.rank.index).copied().unwrap_or(0);
        spawned << 32 | self.begun.get(&lane).copied().unwrap_or(0)
    }
}

impl World<'_> {
    /// Everything about copies that happens between two rounds.
    pub(super) fn tend_copies(&mut self) -> Result<(), String> {
        if self.options.has_tenures() {
            self.collect_claims();
            self.decide_claims();
            self.tell_news()?;
        }
        if self.options.copies {
            self.start_again()?;
        }
        Ok(())
    }

    /// When something about copies is due next.
    pub(super) fn copies_due(&self) -> Option<Instant> {
        let copies = &self.copies;
        let heard = copies.news.iter().filter(|(node, _)| !self.rests(**node));
        let news = heard.filter_map(|(_, news)| news.front()).map(|(due, _)| *due);
        let claims = copies.claims.iter().map(|(due, ..)| *due);
        let gone = copies.gone.values().filter(|(_, noticed)| !noticed).map(|(due, _)| *due);
        news.chain(claims).chain(gone).chain(copies.stopped.map(|(_, until)| until)).min()
    }

    /// Whether every shard has both copies, and everybody runs.
    fn is_whole(&self) -> bool {
        let copies = &self.copies;
        let is_paired = |node: &Node| match node.replica.as_ref().and_then(Replica::followed) {
            Some(standby) => standby.is_paired(),
            None => node.replica.is_some(),
        };
        copies.gone.is_empty()
            && copies.stopped.is_none()
            && copies.parted.is_none_or(|until| until < self.now)
            && copies.tenures.iter().all(|tenure| tenure.is_paired)
            && self.servers.iter().all(is_paired)
    }

    fn collect_claims(&mut self) {
        for index in 0..self.servers.len() {
            let (node, now) = (&mut self.servers[index], self.now);
            let claim = node.replica.as_mut().and_then(|replica| replica.take_claim(now));
            let Some((epoch, claim)) = claim else { continue };
            let due = self.now + Duration::from_micros(self.random.below(20_000));
            self.copies.claims.push((due, node.me, epoch, claim));
        }
    }

    fn decide_claims(&mut self) {
        let now = self.now;
        let due: Vec<_> = self.copies.claims.extract_if(.., |(due, ..)| *due <= now).collect();
        for (_, claimant, epoch, claim) in due {
            let shard = self.servers.iter().find(|node| node.me == claimant).expect("a lane").shard;
            let tenure = self.copies.tenures[shard];
            match tenure.after(claimant, epoch, claim).ok().map(|next| (next, self.swap(shard, next))) {
                Some((next, Some(present))) if next == present => {
                    self.copies.counts.takeovers += u64::from(claim == Claim::TakeOver);
                    self.copies.counts.moves += u64::from(claim == Claim::Succeed);
                    self.copies.counts.pairings += u64::from(claim == Claim::Pair);
                }
                Some((_, Some(_))) => {} // a claim that nobody was told of
                None | Some((_, None)) => self.tell(claimant, News::Tenure(shard, tenure)),
            }
        }
    }

    /// A shard has a new tenure. Whoever takes over is told of all changes first, and asked to prepare for what is under way.
    fn adopt(&mut self, shard: usize, next: Tenure) {
        let before = std::mem::replace(&mut self.copies.tenures[shard], next);
        let is_taken_over = before.primary != next.primary;
        for (number, clock, change) in self.changing.book.made().to_vec() {
            if is_taken_over {
                self.tell(next.primary, News::Settle(number, Some((clock, change))));
            }
        }
        self.tell_everybody(News::Tenure(shard, next));
        if is_taken_over && let Some((number, clock, change)) = self.changing.book.displaced(ShardId(shard as u16)) {
            self.tell_everybody(News::Prepare(number, clock, change));
        }
    }

    /// Has the store put another tenure in the place of the one that the launcher knows: what holds now, of which everybody is told.
    /// Nothing if there is no answer; it may have been done all the same.
    pub(super) fn swap(&mut self, shard: usize, next: Tenure) -> Option<Tenure> {
        let stored = self.copies.stored[shard];
        let is_known = stored.epoch == self.copies.tenures[shard].epoch;
        if is_known && self.options.store_fails && self.random.once_in(3) {
            if self.random.once_in(2) {
                self.copies.stored[shard] = next;
            }
            self.copies.counts.unanswered += 1;
            return None;
        }
        let present = if is_known { next } else { stored };
        self.copies.stored[shard] = present;
        self.adopt(shard, present);
        Some(present)
    }

    pub(super) fn tell_everybody(&mut self, news: News) {
        let lanes = self.servers.iter().map(|node| node.me);
        let everybody: Vec<PeerId> =
            lanes.chain((0..self.trainers.len()).map(|worker| PeerId::worker(worker as u16))).collect();
        everybody.into_iter().for_each(|node| self.tell(node, news));
    }

    fn tell(&mut self, node: PeerId, news: News) {
        let due = self.now + Duration::from_micros(self.random.below(50_000));
        let queue = self.copies.news.entry(node).or_default();
        let due = queue.back().map_or(due, |(before, _)| due.max(*before));
        queue.push_back((due, news));
    }

    fn tell_news(&mut self) -> Result<(), String> {
        let now = self.now;
        let nodes: Vec<PeerId> = self.copies.news.keys().copied().collect();
        for node in nodes {
            if self.rests(node) {
                continue;
            }
            while let Some((due, news)) = self.copies.news.get_mut(&node).and_then(|queue| queue.front().copied()) {
                if due > now {
                    break;
                }
                self.copies.news.get_mut(&node).expect("just seen").pop_front();
                self.hear(node, news)?;
            }
        }
        Ok(())
    }

    fn hear(&mut self, node: PeerId, news: News) -> Result<(), String> {
        let now = self.now;
        if node.rank.role == Role::Worker {
            if let News::Tenure(shard, tenure) = news {
                let engine = &mut self.trainers[usize::from(node.rank.index)].engine;
                engine.set_tenure(ShardId(shard as u16), tenure.primary, now);
            }
            return Ok(());
        }
        let index = self.servers.iter().position(|server| server.me == node).expect("a lane of this world");
        let own = self.servers[index].shard;
        if let News::Tenure(shard, tenure) = news
            && shard == own
        {
            self.copies.heard.insert(node, tenure);
        }
        let Some(replica) = &mut self.servers[index].replica else { return self.begin_if_given(index) };
        match news {
            News::Gone(rank) => replica.handle_gone(rank),
            News::Tenure(shard, tenure) if shard == own => {
                if replica.set_tenure(tenure, now).map_err(|error| error.to_string())? == Standing::BeginsAnew {
                    if self.options.moves && self.servers[index].storing.is_some() {
                        return Err(format!(
                            "{node} is done with shard {shard}, and a snapshot of it is not on the disk"
                        ));
                    }
                    self.copies.counts.deposed += u64::from(self.options.copies);
                    self.begin_anew(index)?;
                }
            }
            News::Prepare(number, clock, change) => {
                let from = replica.prepare_change(number, clock, change);
                from.into_iter().for_each(|from| self.prepared(self.round, own, (number, node, from)));
            }
            News::Settle(number, settled) => {
                replica.settle_change(number, settled).map_err(|error| error.to_string())?;
            }
            News::Tenure(shard, tenure) => replica.set_lane(ShardId(shard as u16), tenure.primary, now),
        }
        Ok(())
    }

    /// A lane drops what it has and becomes a backup that has nothing.
    pub(super) fn begin_anew(&mut self, index: usize) -> Result<(), String> {
        let (me, shard) = (self.servers[index].me, self.servers[index].shard);
        self.servers[index].replica = None;
        *self.copies.begun.entry(me).or_default() += 1;
        if self.options.moves {
            return self.begin_if_given(index);
        }
        self.join(index, me, (shard, self.copies.tenures[shard]))
    }

    pub(super) fn join(&mut self, index: usize, me: PeerId, (shard, tenure): (usize, Tenure)) -> Result<(), String> {
        let life = self.copies.life(me);
        let copy = Copy { me, shard: ShardId(shard as u16), tenure, is_first: false, life };
        let standby = build::build_standby(self.options, &self.layout, &self.network, &copy);
        let mut standby = standby.map_err(|error| error.to_string())?;
        standby.join(self.now);
        for (other, tenure) in self.copies.tenures.iter().enumerate().filter(|(other, _)| *other != shard) {
            standby.set_lane(ShardId(other as u16), tenure.primary);
        }
        self.servers[index].replica = Some(Replica::following(me, tenure, standby));
        Ok(())
    }

    /// The launcher notices the dead, ends processes that have no part in anything, and starts both kinds again.
    fn start_again(&mut self) -> Result<(), String> {
        let now = self.now;
        if let Some((server, until)) = self.copies.stopped
            && until <= now
        {
            self.copies.stopped = None;
            self.halted.retain(|halted| halted.rank != Rank::server(server));
        }
        for server in 0..self.options.servers {
            let rank = Rank::server(server);
            let is_needed = self.copies.tenures.iter().any(|tenure| tenure.needs(rank));
            if !is_needed && !self.copies.gone.contains_key(&server) && self.knows_its_tenures(rank) {
                continue; // it has begun anew by itself, and catches up
            }
            if !is_needed && !self.copies.gone.contains_key(&server) {
                self.kill(server, now);
            }
        }
        for (server, (due, noticed)) in self.copies.gone.clone() {
            if due > now {
                continue;
            }
            if !noticed {
                self.copies.gone.insert(server, (due, true));
                self.tell_everybody(News::Gone(Rank::server(server)));
            }
            let serves = self.copies.tenures.iter().any(|tenure| tenure.primary.rank == Rank::server(server));
            if !serves && self.random.once_in(20) {
                self.copies.gone.remove(&server);
                *self.copies.spawned.entry(server).or_default() += 1;
                for index in 0..self.servers.len() {
                    let (me, shard) = (self.servers[index].me, self.servers[index].shard);
                    if me.rank.index == server {
                        self.copies.news.remove(&me);
                        self.join(index, me, (shard, self.copies.tenures[shard]))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether all lanes of a process follow somebody under the present tenures.
    fn knows_its_tenures(&self, rank: Rank) -> bool {
        let lanes = self.servers.iter().filter(|node| node.me.rank == rank);
        lanes.into_iter().all(|node| {
            let present = self.copies.tenures[node.shard].epoch;
            node.replica.as_ref().is_some_and(|replica| replica.served().is_none() && replica.tenure().epoch == present)
        })
    }

    /// A process ends; the launcher notices at `noticed`.
    pub(super) fn kill(&mut self, server: u16, noticed: Instant) {
        let rank = Rank::server(server);
        // What its steps lacked is to be judged, whoever hears of it.
        let (lacked, _) = self.hear_lanes_of(|node| node.me.rank == rank);
        self.elastic.lacked.extend(lacked);
        self.servers.iter_mut().filter(|node| node.me.rank == rank).for_each(|node| node.replica = None);
        self.copies.gone.insert(server, (noticed, false));
        self.copies.claims.retain(|(_, claimant, ..)| claimant.rank != rank);
        self.halted.retain(|halted| halted.rank != rank);
        self.copies.stopped = self.copies.stopped.filter(|(stopped, _)| *stopped != server);
    }

    /// Does something to a shard with two copies; `false` if this is no moment for it.
    pub(super) fn wreak_on_copies(&mut self) -> bool {
        let server = self.random.below(self.options.servers.into()) as u16;
        let shard = usize::from(server);
        let tenure = self.copies.tenures[shard];
        let (one, other) = (tenure.primary, tenure.other.expect("every shard has two copies"));
        let worker = PeerId::worker(self.random.below(self.trainers.len() as u64) as u16);
        let primary = self.copies.tenures[shard].primary;
        let flows = self.network.in_flight(one, other) > 0 || self.network.in_flight(primary, worker) > 0;
        if !flows || !self.is_whole() {
            return false;
        }
        let within = |world: &mut Self, most: u64| world.now + Duration::from_micros(world.random.below(most));
        // Where steps are decided upon, the lanes of two shards may lose each other too.
        let (decider, kinds) = (self.copies.tenures[0].primary, if self.options.decides() { 10 } else { 8 });
        match self.random.below(kinds) {
            0..3 => {
                // Mostly the launcher sees at once that a process has died; a host that is gone tells nobody.
                let most = if self.random.once_in(3) { 8_000_000 } else { 50_000 };
                let noticed = within(self, most);
                self.kill(server, noticed);
                self.copies.counts.deaths += 1;
            }
            3 => {
                let until = within(self, 12_000_000);
                let lanes = self.servers.iter().map(|node| node.me).filter(|lane| lane.rank.index == server);
                self.halted.extend(lanes);
                self.copies.stopped = Some((server, until));
                self.copies.counts.deaths += 1;
            }
            4 => {
                let until = within(self, 8_000_000);
                self.network.cut(one, other, until);
                self.copies.counts.cuts += 1;
            }
            5 => self.network.break_path(one, other),
            8 if decider != one => self.network.break_path(decider, one),
            9 if decider != one => {
                let until = within(self, 8_000_000);
                self.network.cut(decider, one, until);
                self.copies.parted = Some(until);
            }
            _ => self.network.break_path(primary, worker),
        }
        true
    }
}
