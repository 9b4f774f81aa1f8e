//! Workers of a job that goes on without those that are lost: who is of it, from which clock on, and who comes again.
//!
//! A worker that is gone is expelled by every lane before anybody takes its seat again, and from a clock that all lanes agree on it is
//! out. Another process that has taken the seat and reached every lane is in again from a clock that is settled in the same way. So is
//! one for which somebody has asked, in a seat that was empty ([`ordering`](super::ordering)).
//!
//! Invariant: a change of who is of the job is made on every lane or on none, one after the other, in the order in which workers left
//! and came; the job does not end before all of them are made.

use super::*;
use crate::session::{Change, Finding, Owed, rendezvous::notice::Departure};

/// A worker that left a running job, or came again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerTurn {
    /// Which.
    pub worker: u16,
    /// From which clock on.
    pub clock: Clock,
    /// Whether it is of the job from there on.
    pub is_in: bool,
}

impl std::fmt::Display for WorkerTurn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.is_in { "in" } else { "out" };
        write!(f, "{} is {how} from clock {} on", Rank::worker(self.worker), self.clock)
    }
}

/// Turns that are remembered; of older ones the log tells.
const TURNS_MAX: usize = 1000;

/// Who is of the job.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// Changes that wait for their turn.
    pub(super) wanted: VecDeque<Change>,
    /// Workers that are not of the job, or will not be as soon as that is settled.
    pub(super) out: BTreeSet<u16>,
    /// What was asked of workers that leave or come on a command, and by whom.
    pub(super) orders: ordering::Orders,
    pub turns: VecDeque<WorkerTurn>,
    /// Steps that lack what a lost worker had not given in whole.
    pub lacked: u64,
}

impl Members {
    /// Whether the last process in a worker's seat has not been expelled by every lane yet.
    fn is_leaving(&self, worker: u16, open: Option<Change>) -> bool {
        let leaves = |change| [Change::Lost(worker), Change::Opens(worker)].contains(&change);
        self.wanted.iter().copied().chain(open).any(leaves)
    }

    /// Whether somebody has asked that this worker leave, and it has not yet.
    pub(super) fn is_told_to_leave(&self, worker: u16) -> bool {
        self.orders.leaving.contains(&worker)
    }
}

impl Roster {
    /// Whether the job goes on where this worker is gone; it does where the worker takes no part yet.
    pub(super) fn may_lose(&self, rank: Rank) -> bool {
        let is_out = || self.members.out.contains(&rank.index);
        rank.role == Role::Worker && (self.config.may_lose_workers() || is_out()) && self.running && !self.ended
    }

    /// A worker's process is gone, or is to count as gone.
    pub(super) fn worker_gone(&mut self, rank: Rank, why: Option<String>) {
        let before = self.seat(rank).presence;
        let worker = rank.index;
        if before == Presence::Gone {
            self.answer_order(worker, Err(format!("{rank} ended before it joined")));
        }
        if self.seat(rank).finished || before == Presence::Gone {
            return;
        }
        let (pid, host) = self.vacate(rank);
        self.members.wanted.retain(|change| ![Change::Joins(worker), Change::Leaves(worker)].contains(change));
        self.members.orders.leaving.remove(&worker);
        self.answer_order(worker, Err("its process has ended".into()));
        if before != Presence::Waiting {
            self.members.out.insert(worker);
            self.members.wanted.push_back(Change::Lost(worker));
        }
        self.notice(Notice::Gone(Box::new(Departure { rank, pid, host, why, others: Vec::new() })));
        let workers = || self.seats.iter().filter(|(rank, _)| rank.role == Role::Worker);
        let is_left = |(rank, seat): (&Rank, &Seat)| seat.finished || !self.members.out.contains(&rank.index);
        if !workers().any(is_left) {
            (self.over, self.ended) = (true, true);
            return self.notice(Notice::Deserted);
        }
        self.pass_barriers();
        self.make_changes();
        self.end_servers();
    }

    /// A lane has lost its path to a worker. Where another lane serves in its place it is that one which was lost.
    pub(super) fn on_worker_lost(&mut self, lane: PeerId, worker: u16, text: String) -> Result<(), String> {
        let (rank, server) = (Rank::worker(worker), lane.rank);
        if server.role != Role::Server || !self.seats.contains_key(&rank) {
            return Err(format!("it cannot have lost {rank}"));
        }
        if self.serves(lane) {
            self.gone(rank, Some(format!("was lost to {server}: {text}")));
        }
        Ok(())
    }

    /// Workers that compute while the others have waited for too long count as lost.
    pub(super) fn drop_stragglers(&mut self, now: Instant) {
        let (limit, waited) = (self.config.straggler_deadline_ms, self.waiting.workers_waited_ms());
        let verdict = self.waiting.verdict(now).filter(|_| limit > 0 && waited >= limit && self.running);
        let Some(verdict) = verdict.filter(|verdict| verdict.finding == Finding::Alive && verdict.owed == Owed::Push)
        else {
            return;
        };
        let (stragglers, clock) = (verdict.ranks.clone(), verdict.clock);
        self.waiting.forget();
        let at = clock.map_or(String::new(), |clock| format!(" at clock {clock}"));
        for rank in stragglers.into_iter().filter(|rank| rank.role == Role::Worker) {
            let why = format!(
                "kept the others waiting{at} for {:.1} s, longer than `straggler_deadline_ms` allows",
                waited as f64 / 1000.0
            );
            self.gone(rank, Some(why));
        }
    }

    /// Another process in a worker's seat has reached every lane.
    pub(super) fn on_connected(&mut self, rank: Rank) -> Result<(), String> {
        if self.seat(rank).presence != Presence::Admitted || rank.role != Role::Worker {
            return Err("only a worker that comes again waits for its first clock".into());
        }
        if !self.ended {
            self.members.wanted.push_back(Change::Joins(rank.index));
            self.make_changes();
        }
        Ok(())
    }

    /// Steps of a clock were taken without what a lost worker had not given in whole.
    pub(super) fn on_lacked(&mut self, worker: u16, clock: Clock, chunks: u64) {
        self.members.lacked += chunks;
        let rank = Rank::worker(worker);
        let what = if chunks == 1 { "1 chunk" } else { &format!("{chunks} chunks") };
        let text = format!("{what} of clock {clock} went on without {rank}, which was lost while it gave them");
        self.notice(Notice::Lacked(text));
    }

    /// Begins the next change of who is of the job, if none is being made.
    pub(super) fn make_changes(&mut self) {
        if self.changes.is_open() || self.over {
            return;
        }
        let Some(change) = self.members.wanted.pop_front() else { return };
        let at = self.members.orders.clock_of(change);
        if let Ok((number, clock)) = self.changes.begin(change, at, self.clock_reached()) {
            let command = Command::Prepare { number, clock, change };
            self.send(self.everybody(), FromLauncher::Command(command));
        }
    }

    /// A worker has come again too late: some shard has nobody else for whom decisions are taken.
    pub(super) fn cannot_join(&mut self, change: Change) {
        if let Change::Joins(worker) = change {
            let why = "came again when all others that have a part in a shard had finished";
            self.gone(Rank::worker(worker), Some(why.into()));
        }
    }

    /// A change of who is of the job has been settled.
    pub(super) fn member_turned(&mut self, worker: u16, clock: Clock, is_in: bool) {
        let was_in = self.members.turns.iter().rev().find(|turn| turn.worker == worker).is_none_or(|turn| turn.is_in);
        let turn = WorkerTurn { worker, clock, is_in };
        if was_in != is_in {
            self.members.turns.push_back(turn);
            self.members.turns.drain(..self.members.turns.len().saturating_sub(TURNS_MAX));
        }
        if is_in || self.members.is_told_to_leave(worker) {
            self.answer_order(worker, Ok(turn));
        }
        if is_in && self.seat(Rank::worker(worker)).presence == Presence::Admitted {
            self.members.out.remove(&worker);
        }
        self.admit();
        self.end_servers();
    }

    /// The job ends: workers that have come again and take no part yet are not needed any more.
    pub(super) fn dismiss_joining(&mut self) {
        let joining = |(rank, seat): &(&Rank, &Seat)| {
            let waits = matches!(seat.presence, Presence::Waiting | Presence::Admitted);
            rank.role == Role::Worker && waits && self.is_through(**rank, seat) && !seat.finished
        };
        for rank in self.seats.iter().filter(joining).map(|(rank, _)| *rank).collect::<Vec<_>>() {
            let (pid, host) = self.vacate(rank);
            let why = Some("came again as the job ended".into());
            self.notice(Notice::Gone(Box::new(Departure { rank, pid, host, why, others: Vec::new() })));
        }
    }

    /// Whether changes of who is of the job are to be made yet.
    pub(super) fn turns_members(&self) -> bool {
        !self.members.wanted.is_empty()
            || self.changes.open().is_some_and(|change| !matches!(change, Change::Settings(_)))
    }

    /// Whether a worker will push no more: it has finished, or it is out.
    pub(super) fn is_through(&self, rank: Rank, seat: &Seat) -> bool {
        seat.finished || self.members.out.contains(&rank.index)
    }

    /// Whether another process of a worker may be shown the job.
    pub(super) fn may_be_shown(&self, rank: Rank) -> bool {
        rank.role != Role::Worker || !self.members.is_leaving(rank.index, self.changes.open())
    }

    /// What the process that takes a seat again has declared: it must be what the one before it had.
    pub(super) fn declare_again(&mut self, rank: Rank, specs: &[TensorSpec]) -> Result<(), String> {
        let before = self.view.as_ref().and_then(|view| view.of(rank.index));
        match before.is_some_and(|before| before == specs) {
            true => Ok(()),
            false => Err("it has other tensors than the process before it".into()),
        }
    }
}
