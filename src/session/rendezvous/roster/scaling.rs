//! Servers that join and leave while the job runs: whoever asks for it is told how it goes, shards move one at a time, and servers
//! without a shard go.
//!
//! Which shard moves where says `session/scaling.rs`; that a move is safe, the tenures.
//!
//! Invariant: no shard is given to a server that is not there; a server is told to go only when no tenure names it.

use super::*;
use crate::{
    session::{Scaling, Step, moves_to, next_step},
    types::ShardId,
};

/// What somebody has asked for, and how far that is.
#[derive(Debug)]
struct Wish {
    servers: u16,
    moved: u32,
    moves: u32,
    asker: Option<ConnectionId>,
}

/// How many servers the job is to have.
#[derive(Debug, Default)]
pub(super) struct Scale {
    wish: Option<Wish>,
    /// The shard of which the store is asked.
    asked: Option<ShardId>,
    /// Servers that the launcher has been told to start.
    awaited: BTreeSet<Rank>,
    /// Servers that have been told to go.
    retiring: BTreeSet<Rank>,
}

impl Roster {
    /// Somebody wants the job to have so many servers; answered when every shard is where it is to be.
    pub(super) fn begin_scale(&mut self, connection: ConnectionId, servers: u16) -> Result<(), String> {
        self.may_scale(servers)?;
        let moves = moves_to(&self.tenures, servers) as u32;
        self.scale.wish = Some(Wish { servers, moved: 0, moves, asker: Some(connection) });
        self.notice(Notice::Scaling { servers, moves });
        (0..servers).for_each(|server| self.await_server(Rank::server(server)));
        self.tell_scaling(None);
        self.tend_moves();
        Ok(())
    }

    fn may_scale(&self, servers: u16) -> Result<(), String> {
        let room = self.config.max_servers;
        if !self.config.moves_shards() {
            return Err("the servers of this job stay: start it with --max-servers N, the most that it may have".into());
        }
        if servers == 0 || servers > room {
            return Err(format!("{servers} servers cannot be: this job has room for 1 to {room} (`max_servers`)"));
        }
        if let Some(wish) = &self.scale.wish {
            let Wish { servers, moved, moves, .. } = wish;
            return Err(format!(
                "the job is on its way to {servers} servers already ({moved} of {moves} shards have moved); try again when it is there"
            ));
        }
        match (self.running, self.ended) {
            (true, false) => Ok(()),
            (_, true) => Err("no server can join or leave any more: the job is ending".into()),
            _ => Err("no server can join or leave yet: the job has not begun to train".into()),
        }
    }

    /// Does what is to be done next, if it can be.
    pub(super) fn tend_moves(&mut self) {
        if !self.config.moves_shards() || !self.running || self.over || self.scale.asked.is_some() {
            return;
        }
        let wanted = self.scale.wish.as_ref().map(|wish| wish.servers).filter(|_| !self.ended);
        let may_follow = |rank| self.is_there(rank) && !self.scale.retiring.contains(&rank);
        match next_step(&self.tenures, wanted, may_follow) {
            Step::Give(shard, to) => {
                let tenure = self.tenures[usize::from(shard.0)];
                let Some(next) = tenure.given_to(to) else { return };
                self.scale.asked = Some(shard);
                let swap = Swapping { claimant: None, shard, expected: tenure.epoch, next };
                self.effects.push_back(Effect::Swap(swap));
            }
            Step::Moves(_) => {}
            Step::Awaits(rank) => self.await_server(rank),
            Step::Rests => self.rest(),
        }
    }

    /// Has a server started, if its seat is free.
    fn await_server(&mut self, rank: Rank) {
        if self.seats[&rank].presence == Presence::Gone && self.scale.awaited.insert(rank) {
            self.notice(Notice::Wanted(rank));
        }
    }

    /// No shard moves any more: servers that have none go, and whoever asked is told.
    fn rest(&mut self) {
        let is_idle = |rank: &Rank| !self.held().any(|(_, tenure)| tenure.names_rank(*rank));
        let idle = self.seats.keys().filter(|rank| rank.role == Role::Server && self.is_there(**rank) && is_idle(rank));
        let idle: Vec<Rank> = idle.filter(|rank| !self.scale.retiring.contains(rank)).copied().collect();
        for rank in idle {
            self.scale.retiring.insert(rank);
            let to = self.seats[&rank].connection.into_iter().collect();
            self.send(to, FromLauncher::Command(Command::Retire));
        }
        if !self.scale.retiring.is_empty() {
            return;
        }
        self.scale.awaited.clear();
        if let Some(Wish { servers, moved, asker, .. }) = self.scale.wish.take() {
            self.send(asker.into_iter().collect(), FromLauncher::Scaled { servers, moved });
            self.notice(Notice::Scaled { servers, moved });
        }
    }

    /// The store has answered what the launcher asked of it.
    pub(super) fn gave(&mut self, shard: ShardId, why: Option<String>) {
        self.scale.asked = self.scale.asked.filter(|asked| *asked != shard);
        match why {
            Some(why) => self.give_up_scale(&format!("it cannot be written down who serves shard {}: {why}", shard.0)),
            None => self.tend_moves(),
        }
    }

    /// A shard has another tenure than before.
    pub(super) fn moved(&mut self, shard: ShardId, before: Tenure, now: Tenure) {
        if before.primary != now.primary {
            if let Some(wish) = &mut self.scale.wish {
                wish.moved += 1;
            }
            self.tell_scaling(Some(shard));
            self.notice(Notice::Moved { shard, from: before.primary.rank, to: now.primary.rank });
        }
        self.tend_moves();
    }

    fn tell_scaling(&mut self, shard: Option<ShardId>) {
        let Some(Wish { moved, moves, asker, .. }) = &self.scale.wish else { return };
        let (moved, moves, asker) = (*moved, *moves, *asker);
        let shard = shard.map(|shard| (shard, self.tenures[usize::from(shard.0)].primary.rank));
        self.send(asker.into_iter().collect(), FromLauncher::Scaling(Scaling { moved, moves, shard }));
    }

    /// A server is gone, or cannot be had: what was wanted of it is given up, and shards stay where they are.
    pub fn missed(&mut self, rank: Rank, why: &str) {
        self.scale.retiring.remove(&rank);
        let takes_part = self.scale.awaited.contains(&rank) || self.held().any(|(_, tenure)| tenure.names_rank(rank));
        if takes_part && self.scale.wish.is_some() {
            return self.give_up_scale(&format!("{rank} {why}"));
        }
        self.tend_moves();
    }

    /// A server cannot hold the shard that it was given.
    pub(super) fn declined(&mut self, rank: Rank, shard: ShardId, why: &str) {
        let tenure = self.tenures.get(usize::from(shard.0)).copied();
        let Some(tenure) = tenure.filter(|tenure| tenure.other.is_some_and(|other| other.rank == rank)) else { return };
        self.give_up_scale(&format!("{rank} cannot hold shard {}: {why}", shard.0));
        // Whoever serves would wait for it.
        if let Some(next) = tenure.given_to(None).filter(|_| self.scale.asked.is_none()) {
            self.scale.asked = Some(shard);
            let swap = Swapping { claimant: None, shard, expected: tenure.epoch, next };
            self.effects.push_back(Effect::Swap(swap));
        }
    }

    /// The job does not get as many servers as somebody wanted.
    pub(super) fn give_up_scale(&mut self, why: &str) {
        if let Some(Wish { servers, moved, moves, asker }) = self.scale.wish.take() {
            let text = format!(
                "{why}; {moved} of {moves} shards had moved on the way to {servers} servers, and all stay where they are"
            );
            self.send(asker.into_iter().collect(), FromLauncher::Refused(text.clone()));
            self.notice(Notice::ScaleFailed(text));
        }
        self.scale.awaited.clear();
        self.tend_moves();
    }

    /// A server that was told to go has gone; its seat is free. `false` if it was not told.
    pub(super) fn retired(&mut self, rank: Rank) -> bool {
        if !self.scale.retiring.remove(&rank) || self.ended {
            return false;
        }
        self.vacate(rank);
        *self.seat(rank) = Seat::new(true);
        self.notice(Notice::Retired(rank));
        self.tend_moves();
        true
    }

    /// A control caller hung up; what it asked for goes on.
    pub(super) fn forget_asker(&mut self, connection: ConnectionId) {
        if let Some(wish) = &mut self.scale.wish {
            wish.asker = wish.asker.filter(|asker| *asker != connection);
        }
    }

    /// The lanes that a server's process has, as far as is known.
    pub(super) fn lanes_of(&self, rank: Rank) -> Vec<PeerId> {
        match (rank.role, self.config.moves_shards()) {
            (Role::Worker, _) => vec![PeerId { rank, lane: 0 }],
            (Role::Server, false) => (0..self.config.lanes_per_server()).map(|lane| PeerId { rank, lane }).collect(),
            (Role::Server, true) => {
                let serving = self.held().map(|(_, tenure)| tenure.primary);
                serving.filter(|lane| lane.rank == rank).collect()
            }
        }
    }
}
