//! Who serves each shard of a job where that may change, and servers that come and go.
//!
//! A server that is gone is told of to all; the lanes that had the other copies then claim. Another process may take its seat, and
//! is shown the job once no tenure counts on what its predecessor held.
//!
//! Invariant: a tenure changes only as the store has answered, and every rank is told; a job ends by name as soon as a shard has no
//! copy that has everything.

use super::*;
use crate::{
    session::{Claim, ShardStatus, Swap, rendezvous::notice::Departure},
    types::{Epoch, ShardId},
};

/// How every shard begins; nothing where each stays where it is.
pub(super) fn first(config: &JobConfig) -> Vec<Tenure> {
    let shards = if config.has_tenures() { config.shard_count() as u16 } else { 0 };
    (0..shards).map(|shard| config.first_tenure(ShardId(shard))).collect()
}

/// The lanes of a shard.
fn lanes(tenure: &Tenure) -> impl Iterator<Item = PeerId> + use<> {
    std::iter::once(tenure.primary).chain(tenure.other)
}

impl Roster {
    /// Every shard, and who serves it.
    pub(super) fn held(&self) -> impl Iterator<Item = (ShardId, Tenure)> + '_ {
        (0..).map(ShardId).zip(self.tenures.iter().copied())
    }

    /// Whether a rank's process is there and has been shown the job.
    pub(super) fn is_there(&self, rank: Rank) -> bool {
        let seat = &self.seats[&rank];
        let shown = matches!(seat.presence, Presence::First | Presence::Admitted);
        seat.connection.is_some() && shown && !seat.finished
    }

    /// Whether a lane serves its shard, as far as is known.
    pub(super) fn serves(&self, lane: PeerId) -> bool {
        let shard = usize::from(self.config.shard_of(lane).0);
        self.tenures.get(shard).is_none_or(|tenure| tenure.primary == lane)
    }

    /// Whether others may go on where this rank is gone.
    fn is_backed(&self, rank: Rank) -> bool {
        self.running && !self.tenures.is_empty() && rank.role == Role::Server
    }

    /// A rank says that it cannot go on, or has broken the protocol.
    pub(super) fn failed(&mut self, rank: Rank, text: String, elsewhere: bool) {
        match (self.is_backed(rank) || self.may_lose(rank)) && !self.over {
            true => self.gone(rank, Some(format!("failed: {text}"))),
            false => self.notice(Notice::Failed { rank, text, elsewhere }),
        }
    }

    /// A rank's connection ended before it had finished.
    pub(super) fn left(&mut self, rank: Rank) {
        match (self.is_backed(rank) || self.may_lose(rank)) && !self.over {
            true => self.gone(rank, None),
            false => self.notice(Notice::Lost(rank)),
        }
    }

    /// A server's process is gone, or is to count as gone: the lanes of its shards' other copies may claim, unless there is none.
    pub fn gone(&mut self, rank: Rank, why: Option<String>) {
        let Some(seat) = self.seats.get(&rank) else { return };
        if self.may_lose(rank) {
            return self.worker_gone(rank, why);
        }
        if seat.presence == Presence::Gone && self.config.moves_shards() && rank.role == Role::Server {
            return self.missed(rank, &why.unwrap_or("is gone".into())); // it has never joined
        }
        if self.over || seat.finished || seat.presence == Presence::Gone || !self.is_backed(rank) {
            return;
        }
        let of_it = self.held().filter(|(_, tenure)| lanes(tenure).any(|lane| lane.rank == rank));
        let ranks = of_it.flat_map(|(_, tenure)| lanes(&tenure)).map(|lane| lane.rank);
        let mut others: Vec<Rank> = ranks.filter(|other| *other != rank).collect();
        others.sort_unstable();
        others.dedup();
        let (pid, host) = self.vacate(rank);
        if !self.ends_for_lack_of_copies() {
            self.send(self.everybody(), FromLauncher::Command(Command::Gone { rank }));
        }
        let told = why.clone().unwrap_or("is gone".into());
        self.notice(Notice::Gone(Box::new(Departure { rank, pid, host, why, others })));
        if self.config.moves_shards() {
            self.missed(rank, &told);
        }
    }

    /// A seat's process is of the job no more: its number and its host.
    pub(super) fn vacate(&mut self, rank: Rank) -> (u32, String) {
        let seat = self.seat(rank);
        seat.presence = Presence::Gone;
        let (pid, host, connection) = (seat.pid, seat.host.clone(), seat.connection.take());
        if let Some(connection) = connection {
            self.by_connection.remove(&connection);
            self.effects.push_back(Effect::HangUp(connection));
        }
        (pid, host)
    }

    /// Ends the job if a shard has no copy left that has everything.
    fn ends_for_lack_of_copies(&mut self) -> bool {
        let lost = self.held().find(|(_, tenure)| {
            let serving = tenure.primary.rank;
            let serves = self.is_there(serving) || self.seats[&serving].finished;
            !(serves || tenure.is_paired && tenure.other.is_some_and(|other| self.is_there(other.rank)))
        });
        let Some((shard, tenure)) = lost else { return false };
        (self.over, self.ended) = (true, true);
        let held = lanes(&tenure).filter(|_| self.config.has_replicas()).map(|lane| lane.rank);
        let mut servers: Vec<Rank> = held.chain([tenure.primary.rank]).collect();
        servers.sort_unstable();
        servers.dedup();
        self.notice(Notice::CopiesLost { shard, servers });
        true
    }

    /// A lane wants a shard's tenure changed.
    pub(super) fn claim(&mut self, lane: PeerId, shard: ShardId, epoch: Epoch, claim: Claim) -> Result<(), String> {
        let Some(tenure) = self.tenures.get(usize::from(shard.0)).copied() else {
            return Err(format!("shard {} has no second copy", shard.0));
        };
        let other = tenure.other.map(|other| other.rank);
        let next = match claim {
            // A lane from which a shard has moved may not have heard of that yet.
            _ if !tenure.names(lane) && self.config.moves_shards() => Err("it has no part in it any more".into()),
            _ if !tenure.names(lane) => return Err(format!("{lane} holds no copy of shard {}", shard.0)),
            Claim::Pair if !other.is_some_and(|other| self.is_there(other)) => {
                Err("the other one is gone again".into())
            }
            // A process that has just taken a seat has nothing of what the one before it held.
            _ if !self.is_there(lane.rank) => Err("it has not been shown the job yet".into()),
            _ if self.over => Err("the job is ending".into()),
            _ => tenure.after(lane, epoch, claim),
        };
        match next {
            Ok(next) => {
                let swap = Swapping { claimant: Some(lane), shard, expected: tenure.epoch, next };
                self.effects.push_back(Effect::Swap(swap));
            }
            Err(why) => self.refuse(lane, shard, &why),
        }
        Ok(())
    }

    /// Tells a claimant alone how things stand.
    fn refuse(&mut self, lane: PeerId, shard: ShardId, why: &str) {
        tracing::info!("{lane} claims shard {} in vain: {why}", shard.0);
        let to = self.seats[&lane.rank].connection.into_iter().collect();
        let tenure = self.tenures[usize::from(shard.0)];
        self.send(to, FromLauncher::Command(Command::Tenure { shard, tenure }));
    }

    /// The store has answered.
    pub fn swapped(&mut self, swap: Swapping, outcome: Swap) {
        let Swapping { claimant, shard, next, .. } = swap;
        let refuse = |roster: &mut Roster, why: &str| {
            if let Some(claimant) = claimant {
                roster.refuse(claimant, shard, why);
            }
        };
        let failed = match &outcome {
            Swap::Unavailable(why) => Some(why.clone()),
            _ => None,
        };
        match outcome {
            Swap::Swapped => self.adopt(shard, next),
            // A swap whose answer never came may have been made all the same.
            Swap::Present(present) if present.epoch > self.tenures[usize::from(shard.0)].epoch => {
                self.adopt(shard, present);
            }
            Swap::Present(_) => refuse(self, "another claim was faster"),
            Swap::Unavailable(why) => {
                refuse(self, &why);
                if !std::mem::replace(&mut self.store_failed, true) {
                    self.notice(Notice::StoreUnavailable(why));
                }
            }
        }
        self.store_failed = failed.is_some();
        if claimant.is_none() {
            self.gave(shard, failed);
        }
    }

    /// A shard has a new tenure.
    fn adopt(&mut self, shard: ShardId, tenure: Tenure) {
        let before = std::mem::replace(&mut self.tenures[usize::from(shard.0)], tenure);
        let is_taken_over = before.primary != tenure.primary;
        if is_taken_over {
            self.tell_changes(tenure.primary.rank);
        }
        self.send(self.everybody(), FromLauncher::Command(Command::Tenure { shard, tenure }));
        if is_taken_over {
            self.prepare_again(shard);
        }
        if is_taken_over && let Some(command) = self.checkpoints.requested() {
            // Who serves now has not heard of it; those who have passed the clock say so, and a later one is asked for.
            self.send(self.everybody(), FromLauncher::Command(command));
        }
        let alone = self.held().filter(|(_, tenure)| !tenure.is_paired).map(|(shard, _)| shard).collect();
        self.notice(Notice::Tenure { shard, tenure, alone });
        if self.over || self.ends_for_lack_of_copies() {
            return;
        }
        if self.config.moves_shards() {
            self.moved(shard, before, tenure);
        }
        for rank in lanes(&before).map(|lane| lane.rank) {
            let dropped = before.needs(rank) && !tenure.needs(rank) && self.config.has_replicas();
            if dropped && self.is_there(rank) && !self.is_needed(rank) {
                self.gone(rank, Some("was not heard by the other servers of its shards".into()));
            }
        }
        self.admit();
    }

    /// Whether a rank has a part in any shard.
    fn is_needed(&self, rank: Rank) -> bool {
        self.held().any(|(_, tenure)| tenure.needs(rank))
    }

    /// Shows the job to those who have taken a seat again, as soon as no tenure means the process that held it before.
    pub(super) fn admit(&mut self) {
        let waiting = self.seats.iter().filter(|(_, seat)| seat.presence == Presence::Waiting && self.running);
        let waiting: Vec<Rank> =
            waiting.map(|(rank, _)| *rank).filter(|rank| !self.is_needed(*rank) && self.may_be_shown(*rank)).collect();
        for rank in waiting {
            let seat = self.seat(rank);
            seat.presence = Presence::Admitted;
            let to = seat.connection.into_iter().collect();
            let view = self.view.clone().expect("a job that runs has a view");
            self.send(to, FromLauncher::View(view));
        }
        self.tend_moves();
    }

    /// The job ends: whoever has not been shown it yet is not needed any more.
    pub(super) fn dismiss_waiting(&mut self) {
        self.dismiss_joining();
        let waiting = self.seats.iter().filter(|(_, seat)| seat.presence == Presence::Waiting);
        let waiting = waiting.map(|(rank, _)| *rank).filter(|rank| rank.role == Role::Server);
        for rank in waiting.collect::<Vec<_>>() {
            self.gone(rank, Some("came again as the job ended".into()));
        }
    }

    /// Answers the offers of a rank that has come again: everybody else has a path to make to it, one by one.
    pub(super) fn show_tenures(&mut self, rank: Rank) -> Result<(), String> {
        let seat = self.seat(rank);
        if seat.offered.as_ref().is_some_and(|offers| !offers.is_empty()) {
            return Err("a rank that comes again has nobody who waits for its offers".into());
        }
        let to: Vec<ConnectionId> = seat.connection.into_iter().collect();
        self.send(to.clone(), FromLauncher::Offers(Vec::new()));
        let changed = self.held().filter(|(_, tenure)| tenure.epoch > 0);
        let changed: Vec<Command> = changed.map(|(shard, tenure)| Command::Tenure { shard, tenure }).collect();
        for command in changed.into_iter().chain(self.checkpoints.requested()) {
            self.send(to.clone(), FromLauncher::Command(command));
        }
        Ok(())
    }

    pub(super) fn shards_standing(&self) -> Vec<ShardStatus> {
        let standing = self.held().map(|(shard, tenure)| {
            let backup = tenure.other.map(|other| other.rank);
            let is_held = |rank: Rank| tenure.is_paired && (self.is_there(rank) || self.seats[&rank].finished);
            let backup_state = match backup {
                None => "none",
                Some(rank) if is_held(rank) => "complete",
                Some(rank) if self.seats[&rank].connection.is_some() => "catching up",
                Some(_) => "gone",
            };
            let (epoch, primary, backup_state) = (tenure.epoch, tenure.primary.rank, backup_state.into());
            ShardStatus { shard, epoch, primary, backup, backup_state, moves: self.config.moves_shards() }
        });
        standing.collect()
    }
}
