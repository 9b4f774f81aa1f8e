//! Ranks that are gone while the job goes on: servers whose shards go on elsewhere, and workers of a job that may lose some; and workers
//! that are wanted in empty seats.
//!
//! A loss is told once it is known from both sides: the rendezvous has said that the job goes on, and the process has ended (it is
//! killed, if it has not). Then it is started again, after a pause that doubles as long as no shard gets its second copy back, or the
//! worker does not take part again.
//!
//! Invariant: a rank is started again only after its last process has ended, and so many times in a row at most.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{Context, End, Ending, SETTLE_TIME, Sight, Supervisor};
use crate::{
    launch::cause::Exit,
    session::{Change, Departure, OnWorkerLoss, Order, Tenure},
    types::{Clock, Rank, Role, ShardId},
};

/// The pause before a rank is started again for the first time; it doubles with each try that has brought nothing.
const PAUSE: Duration = Duration::from_millis(100);

/// So often a rank is started in a row without a shard's getting its second copy back, or without its taking part again.
const TRIES_MAX: u32 = 6;

/// A rank whose process has ended, or is to.
#[derive(Debug, Default)]
struct Loss {
    departure: Option<Departure>,
    exit: Option<Exit>,
}

/// What is known of ranks that were lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    open: BTreeMap<Rank, Loss>,
    /// How each ended last, and whether it was killed.
    ends: BTreeMap<Rank, (String, bool)>,
    /// When to start one again.
    restarts: BTreeMap<Rank, Instant>,
    tries: BTreeMap<Rank, u32>,
    lost: Option<(ShardId, Vec<Rank>)>,
    /// Some shard has had no backup.
    was_alone: bool,
    /// Workers that were lost, and do not take part again yet.
    departed: BTreeSet<Rank>,
    /// Those of them whose clock is settled from which on they are out.
    pub missing: BTreeMap<Rank, Clock>,
    /// Workers that came while the job ran, to seats that were empty at first.
    pub added: BTreeSet<Rank>,
    /// Workers that were told to leave: they are not missed, and not started again.
    leaving: BTreeSet<Rank>,
    /// Servers that have gone since they had no shard any more.
    retired: BTreeSet<Rank>,
}

impl Losses {
    /// Whether a server was let go.
    pub fn is_retired(&self, rank: Rank) -> bool {
        self.retired.contains(&rank)
    }

    /// How a rank's process ended, the last one that did, and whether it was killed.
    fn end_of(&self, rank: Rank) -> (String, bool) {
        let loss = self.open.get(&rank);
        let why = loss.and_then(|loss| loss.departure.as_ref()?.why.clone()).map(|why| (why, false));
        let exit = || loss?.exit.map(|exit| (exit.to_string(), matches!(exit, Exit::Signal(_))));
        let before = || self.ends.get(&rank).cloned();
        why.or_else(exit).or_else(before).unwrap_or(("left the job".into(), false))
    }
}

impl Supervisor {
    /// Whether others may go on where this rank is gone.
    pub(super) fn is_backed(&self, rank: Rank) -> bool {
        ((self.losable())(rank) || self.has_departed(rank)) && !self.summaries.contains_key(&rank)
    }

    /// Which ranks the job goes on without, as things stand.
    pub(super) fn losable(&self) -> fn(Rank) -> bool {
        let config = &self.options.config;
        match (config.has_tenures(), config.may_lose_workers()) {
            _ if !self.running => |_| false,
            (true, true) => |_| true,
            (true, false) => |rank| rank.role == Role::Server,
            (false, true) => |rank| rank.role == Role::Worker,
            (false, false) => |_| false,
        }
    }

    /// Whether a worker was lost, and takes no part.
    pub(super) fn has_departed(&self, rank: Rank) -> bool {
        self.losses.departed.contains(&rank)
    }

    /// Whether a rank is gone, and only the end of its process is not known yet.
    pub(super) fn awaits_end_of(&self, rank: Rank) -> bool {
        self.losses.open.get(&rank).is_some_and(|loss| loss.departure.is_some())
    }

    /// Who is of the job has changed from a clock on.
    pub(super) fn member_turned(&mut self, clock: Clock, change: Change) {
        match change {
            Change::Settings(_) | Change::Opens(_) => {}
            Change::Leaves(worker) => drop(self.losses.leaving.insert(Rank::worker(worker))),
            Change::Lost(worker) if self.is_missed(Rank::worker(worker)) => {
                self.losses.missing.entry(Rank::worker(worker)).or_insert(clock);
            }
            Change::Lost(_) => {}
            Change::Joins(worker) => {
                let rank = Rank::worker(worker);
                self.losses.missing.remove(&rank);
                self.losses.departed.remove(&rank);
                self.losses.tries.remove(&rank);
            }
        }
        self.check_finished();
    }

    /// Whether a worker was lost without which the job is not whole.
    fn is_missed(&self, rank: Rank) -> bool {
        self.has_departed(rank) && !self.losses.leaving.contains(&rank)
    }

    /// Somebody wants a worker to take part, whose seat is empty: its process is started, after the last one there has ended.
    pub(super) fn wanted(&mut self, rank: Rank) {
        if rank.role == Role::Server {
            return self.start_server(rank);
        }
        let losses = &mut self.losses;
        losses.leaving.remove(&rank);
        losses.tries.remove(&rank);
        losses.departed.insert(rank);
        if rank.index >= self.options.config.workers {
            losses.added.insert(rank);
        }
        for ranks in [&mut self.joined, &mut self.lost] {
            ranks.remove(&rank);
        }
        self.summaries.remove(&rank);
        if self.options.by_hand.is_empty() {
            self.losses.restarts.insert(rank, Instant::now());
        } else {
            self.tell(&format!("{rank} is awaited: start its process as the others were"));
        }
    }

    /// The job ends: processes that were to take part and do not yet are not needed.
    pub(super) fn end_departed(&self) {
        self.losses.departed.iter().for_each(|rank| self.processes.signal(*rank, Signal::SIGKILL));
    }

    /// A worker that has finished may have ended badly before that was known.
    pub(super) fn look_at_end_of(&mut self, rank: Rank) {
        if let Some(Loss { exit: Some(exit), .. }) = self.losses.open.remove(&rank) {
            self.see(Sight::Exited(rank, exit));
        }
    }

    pub(super) fn tell(&self, text: &str) {
        self.processes.say(&format!("gradwire: job {}: {text}", self.options.config.name));
    }

    /// The process of such a server has ended.
    pub(super) fn backed_exited(&mut self, rank: Rank, exit: Exit) {
        self.losses.open.entry(rank).or_default().exit = Some(exit);
        // A server that ends well has said that it leaves, or its connection has ended: the rendezvous will tell which, and must not take this
        // end for that of a process that joins in its place.
        let tells_itself = rank.role == Role::Server && exit == Exit::Code(0) && self.joined.contains(&rank);
        if !tells_itself {
            self.rendezvous.order(Order::Gone(rank, exit.to_string()));
        }
        self.conclude(rank);
    }

    /// The job goes on without it.
    pub(super) fn gone(&mut self, departure: Departure) {
        let rank = departure.rank;
        self.lost.insert(rank);
        let loss = self.losses.open.entry(rank).or_default();
        loss.departure = Some(departure);
        if rank.role == Role::Worker {
            self.losses.departed.insert(rank);
            loss.exit = loss.exit.or(self.processes.exit(rank)); // it may have ended well, and yet not have finished
        }
        // Whatever it was that kept it silent: it is of the job no more.
        self.processes.signal(rank, Signal::SIGKILL);
        self.conclude(rank);
    }

    /// Tells a loss once all is known of it, and starts the server again.
    fn conclude(&mut self, rank: Rank) {
        let Some(loss) = self.losses.open.get(&rank) else { return };
        let ours = self.processes.has_started(rank);
        let joined = self.joined.contains(&rank);
        if ours && loss.exit.is_none() || joined && loss.departure.is_none() {
            return;
        }
        let (end, killed) = self.losses.end_of(rank);
        let Loss { departure, .. } = self.losses.open.remove(&rank).unwrap_or_default();
        self.losses.ends.insert(rank, (end.clone(), killed));
        self.joined.remove(&rank);
        if self.ending.is_some() || self.losses.lost.is_some() {
            return;
        }
        let text = departure.map_or(format!("{rank} {end} before it had joined"), |departure| words(&departure, &end));
        self.tell(&text);
        let restarts = self.options.config.on_worker_loss == OnWorkerLoss::Restart
            && !self.losses.leaving.contains(&rank)
            && !self.workers_reported();
        // Where shards move a server is started again when somebody wants it.
        let may_restart = match rank.role {
            Role::Server => !self.options.config.moves_shards(),
            Role::Worker => restarts,
        };
        if !may_restart {
            return self.check_finished();
        }
        let stays = match rank.role {
            Role::Server => "its shards stay without a backup",
            Role::Worker => "the job goes on without it",
        };
        let tries = self.losses.tries.get(&rank).copied().unwrap_or_default();
        match self.processes.hindrance(rank) {
            Some(why) => self.tell(&format!("{rank} is not started again ({why}): {stays}")),
            None if tries >= TRIES_MAX => {
                let what = match rank.role {
                    Role::Server => "bringing a shard's second copy back",
                    Role::Worker => "taking part again",
                };
                self.tell(&format!(
                    "{rank} has been started {TRIES_MAX} times without {what}: it is not started again, and {stays}"
                ));
            }
            None => {
                self.losses.restarts.insert(rank, Instant::now() + PAUSE * 2u32.pow(tries));
            }
        }
        self.check_finished();
    }

    pub(super) fn next_restart(&self) -> Option<Instant> {
        self.losses.restarts.values().min().copied()
    }

    /// Starts servers again whose pause is over.
    pub(super) fn restart(&mut self, now: Instant) {
        let due = self.losses.restarts.iter().filter(|(_, at)| **at <= now);
        for rank in due.map(|(rank, _)| *rank).collect::<Vec<_>>() {
            self.losses.restarts.remove(&rank);
            if self.ending.is_some() || self.settle_at.is_some() {
                continue;
            }
            if self.processes.alive().any(|alive| alive == rank) {
                self.losses.restarts.insert(rank, now + PAUSE); // the last one has finished, and takes its time to end
                continue;
            }
            self.losses.retired.remove(&rank);
            *self.losses.tries.entry(rank).or_default() += 1;
            self.lost.remove(&rank);
            let context = Context {
                directory: &self.directory,
                token: &self.token,
                listening: self.rendezvous.listening(),
                may_lose: self.losable(),
            };
            if let Err(error) = self.processes.restart(rank, &context) {
                self.tell(&format!("{rank} could not be started again: {error}"));
                self.backed_exited(rank, Exit::Code(1));
            }
        }
    }

    /// A shard is served in another way.
    pub(super) fn tenure(&mut self, shard: ShardId, tenure: Tenure, alone: &[ShardId]) {
        let Tenure { epoch, primary, other, is_paired } = tenure;
        if self.options.config.moves_shards() {
            return;
        }
        if is_paired {
            for lane in other.into_iter().chain([primary]) {
                self.losses.tries.remove(&lane.rank);
            }
        }
        let backup = if is_paired { "with a complete backup" } else { "without a backup" };
        self.tell(&format!("shard {}: {} serves since epoch {epoch}, {backup}", shard.0, primary.rank));
        let was_alone = std::mem::replace(&mut self.losses.was_alone, !alone.is_empty());
        if was_alone && alone.is_empty() {
            self.tell("redundancy is full again");
        }
    }

    /// A server is to join.
    fn start_server(&mut self, rank: Rank) {
        match self.processes.hindrance(rank) {
            Some(why) => {
                let why = format!("cannot be started from here ({why})");
                self.rendezvous.order(Order::NotStarted(rank, why));
            }
            None => drop(self.losses.restarts.insert(rank, Instant::now())),
        }
    }

    /// A server that had no shard any more has left; its process may have been seen to end before.
    pub(super) fn retired(&mut self, rank: Rank) {
        self.losses.open.remove(&rank);
        self.losses.retired.insert(rank);
        self.joined.remove(&rank);
        self.tell(&format!("{rank} has no shard any more, and leaves"));
    }

    pub(super) fn store_unavailable(&self, why: &str) {
        self.tell(&format!("no copy of a shard can take over, since that cannot be written down: {why}"));
    }

    /// A shard has no copy left.
    pub(super) fn copies_lost(&mut self, shard: ShardId, servers: Vec<Rank>) {
        if matches!(&self.ending, Some(Ending { end: End::Failed(_) | End::Interrupted(_), .. })) {
            return;
        }
        self.losses.lost = Some((shard, servers));
        self.settle(SETTLE_TIME);
    }

    /// Adds to what was seen how the servers ended whose shard is lost.
    pub(super) fn tell_copies_lost(&mut self) {
        let Some((shard, servers)) = self.losses.lost.take() else { return };
        let ends: Vec<(String, bool)> = servers.iter().map(|rank| self.losses.end_of(*rank)).collect();
        let texts: Vec<String> = servers.iter().zip(&ends).map(|(rank, (end, _))| format!("{rank} {end}")).collect();
        let texts = texts.join(", ");
        let text = match self.options.config.has_replicas() {
            true => format!("shard {} has lost both copies: {texts}", shard.0),
            false => format!("shard {} is lost: {texts}", shard.0),
        };
        self.sights.push(Sight::CopiesLost { text, killed: ends.iter().any(|(_, killed)| *killed) });
    }
}

/// "server 1 (process 123 on host) was killed by signal 9 (SIGKILL); its shards go on with server 2".
fn words(departure: &Departure, end: &str) -> String {
    let Departure { rank, pid, host, others, .. } = departure;
    if rank.role == Role::Worker {
        return format!("{rank} (process {pid} on {host}) {end}; the job goes on without it");
    }
    if others.is_empty() {
        return format!("{rank} (process {pid} on {host}) {end}; it served no shard");
    }
    let others: Vec<String> = others.iter().map(Rank::to_string).collect();
    format!("{rank} (process {pid} on {host}) {end}; its shards go on with {}", others.join(" and "))
}
