//! What is asked from outside, and above all workers that leave and come because of it: `gradwire remove-worker` and
//! `gradwire add-worker`.
//!
//! One that leaves goes on until a clock that all lanes agree on, and finishes. One that comes is a process that the launcher starts in
//! a seat that is empty, or whose last process has finished or was lost; that one every lane has expelled before.
//!
//! Invariant: whoever asks is answered once, when the clock is settled or when it is known that there will be none; one worker at least
//! stays.

use super::*;
use crate::session::Change;

/// What was asked of workers.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// Who asked, by worker.
    askers: BTreeMap<u16, ConnectionId>,
    /// The clocks that were named, by worker.
    clocks: BTreeMap<u16, Clock>,
    /// Workers that are to leave and have not finished.
    pub leaving: BTreeSet<u16>,
}

impl Orders {
    /// The clock from which on a change is wanted, at the earliest.
    pub fn clock_of(&mut self, change: Change) -> Clock {
        let named = match change {
            Change::Leaves(worker) | Change::Joins(worker) => self.clocks.remove(&worker),
            _ => None,
        };
        named.unwrap_or(0)
    }
}

impl Roster {
    /// Something is asked from outside: carries it out, or says why not.
    pub(super) fn control(&mut self, connection: ConnectionId, control: Control, now: Instant) {
        let outcome = match control {
            Control::Status => {
                let status = self.status(now);
                self.send(vec![connection], FromLauncher::Status(Box::new(status)));
                Ok(())
            }
            Control::Change(change) => self.begin_change(connection, change),
            Control::Scale { servers } => self.begin_scale(connection, servers),
            Control::Checkpoint => self.request_checkpoint(None, Some(connection)),
            Control::RemoveWorker { worker, at } => self.remove_worker(connection, worker, at),
            Control::AddWorker { worker, at } => self.add_worker(connection, worker, at),
        };
        if let Err(text) = outcome {
            self.send(vec![connection], FromLauncher::Refused(text));
        }
    }

    /// A worker is to leave, not before clock `at`.
    fn remove_worker(&mut self, connection: ConnectionId, worker: u16, at: Clock) -> Result<(), String> {
        self.may_turn()?;
        let rank = Rank::worker(worker);
        let stays = |(other, seat): (&Rank, &Seat)| {
            let is_other = other.role == Role::Worker && *other != rank;
            is_other && !self.is_through(*other, seat) && !self.members.is_told_to_leave(other.index)
        };
        match self.seats.get(&rank) {
            None => return Err(format!("there is no {rank}")),
            Some(Seat { finished: true, .. }) => return Err(format!("{rank} has finished")),
            Some(_) if self.members.out.contains(&worker) => return Err(format!("{rank} is not of the job")),
            Some(_) if self.members.is_told_to_leave(worker) => return Err(format!("{rank} leaves already")),
            Some(_) if !self.seats.iter().any(stays) => {
                return Err(format!("{rank} is the last one, and a job needs one worker"));
            }
            Some(_) => {}
        }
        self.members.orders.leaving.insert(worker);
        // Whoever has come is of the job for one clock at least.
        let joined = self.members.turns.iter().rev().find(|turn| turn.worker == worker && turn.is_in);
        let at = joined.map_or(at, |turn| at.max(turn.clock + 1));
        self.begin_order(connection, worker, at, Some(Change::Leaves(worker)));
        Ok(())
    }

    /// Another worker is to take part, not before clock `at`.
    fn add_worker(&mut self, connection: ConnectionId, worker: Option<u16>, at: Clock) -> Result<(), String> {
        self.may_turn()?;
        if self.config.rebuild_ms == 0 {
            return Err(
                "a worker that comes later builds its paths by itself, and `rebuild_ms` is 0 in this job".into()
            );
        }
        let seats = self.config.seats();
        let is_free = |worker: &u16| self.is_free(Rank::worker(*worker));
        let worker = match worker {
            None => (0..seats).find(is_free).ok_or_else(|| {
                format!("all {seats} seats for workers are taken; more are made at the start, with --max-workers")
            })?,
            Some(worker) if worker >= seats => {
                return Err(format!(
                    "there is no seat for {}: this job has {seats}, counted from 0; more are made at the start, with --max-workers",
                    Rank::worker(worker)
                ));
            }
            Some(worker) if !is_free(&worker) => {
                return Err(format!("the seat of {} is taken", Rank::worker(worker)));
            }
            Some(worker) => worker,
        };
        let rank = Rank::worker(worker);
        self.seats.entry(rank).or_insert_with(|| Seat { presence: Presence::Gone, taken: true, ..Seat::default() });
        let before = std::mem::take(&mut self.seat(rank).finished).then_some(Change::Opens(worker));
        if before.is_some() {
            self.vacate(rank);
        }
        self.members.orders.leaving.remove(&worker);
        self.members.out.insert(worker);
        self.notice(Notice::Wanted(rank));
        self.begin_order(connection, worker, at, before);
        Ok(())
    }

    /// Whether nobody is in a worker's seat, nor is to be.
    fn is_free(&self, rank: Rank) -> bool {
        let is_asked_for = self.members.orders.askers.contains_key(&rank.index);
        let is_empty = |seat: &Seat| seat.finished || seat.presence == Presence::Gone;
        !is_asked_for && self.seats.get(&rank).is_none_or(is_empty)
    }

    fn may_turn(&self) -> Result<(), String> {
        match (self.config.keeps_workers(), self.running, self.ended) {
            (Some(why), ..) => Err(format!("workers cannot leave this job or come to it: {why}")),
            (None, _, true) => Err("the job is ending".into()),
            (None, false, false) => Err("the job has not begun to train".into()),
            (None, true, false) => Ok(()),
        }
    }

    fn begin_order(&mut self, connection: ConnectionId, worker: u16, at: Clock, change: Option<Change>) {
        self.members.orders.askers.insert(worker, connection);
        self.members.orders.clocks.insert(worker, at);
        self.members.wanted.extend(change);
        self.make_changes();
    }

    /// Tells whoever asked for something of a worker what became of it.
    pub(super) fn answer_order(&mut self, worker: u16, outcome: Result<WorkerTurn, String>) {
        let Some(asker) = self.members.orders.askers.remove(&worker) else { return };
        self.members.orders.clocks.remove(&worker);
        self.send(vec![asker], outcome.map_or_else(FromLauncher::Refused, FromLauncher::Turned));
    }

    /// Nothing that was asked for is done any more.
    pub(super) fn refuse_orders(&mut self, why: &str) {
        for asker in std::mem::take(&mut self.members.orders.askers).into_values() {
            self.send(vec![asker], FromLauncher::Refused(why.into()));
        }
    }
}
