//! Workers that are lost or told to leave while a simulated job runs, and others that come: what breaks, the launcher's part, and new
//! processes.
//!
//! Invariant: at least one worker that trains is left; a process begins only after the launcher has heard from every lane that the
//! one before it was expelled, if there was one.

use super::*;
use crate::session::{Change, NEVER};

/// Workers that leave a job and come again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElasticOptions {
    /// So many are lost, at random moments: they die, or stop for good.
    pub losses: u32,
    /// Other processes take the places of those that were lost or have left.
    pub restarts: bool,
    /// So many are told to leave, at random moments.
    pub leaves: u32,
    /// So many of the last workers are not there at first: processes come for them at random moments.
    pub empty: u16,
    /// What every shard knows from the start: a worker, the clock from which on it is not of the job, and perhaps the one from which
    /// on it is again. Its process goes on, and gives nothing in between.
    pub told: Vec<(u16, Clock, Option<Clock>)>,
}

impl ElasticOptions {
    /// Whether anything is to happen at all.
    pub(super) fn is_active(&self) -> bool {
        self.losses > 0 || self.leaves > 0 || self.empty > 0
    }

    /// Whether the seat of a worker, of so many, is empty at first.
    pub(super) fn is_empty(&self, worker: u16, workers: usize) -> bool {
        usize::from(worker) + usize::from(self.empty) >= workers
    }

    pub(super) fn told_of(&self, worker: u16) -> Option<(Clock, Option<Clock>)> {
        self.told.iter().find(|(of, ..)| *of == worker).map(|(_, from, until)| (*from, *until))
    }
}

/// Where a worker that was lost is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// It does not run until then, and goes on as if nothing had been.
    Asleep(Instant),
    /// The launcher does not know yet; at this round it will, if no lane tells it before.
    Unnoticed(u64),
    /// The lanes are being told.
    Noticed,
    /// It was settled; another process begins at this round, or none ever.
    Out(Option<u64>),
    /// Another process has begun; whether the launcher knows that all its paths are there.
    Begun(bool),
    /// It is told its first clock at this round.
    Settled(u64, Clock),
    /// Somebody wants it to leave.
    Leaving,
    /// It is told at this round from which clock on it is of the job no more.
    Told(u64, Clock),
    /// It was told; whether somebody wants another process in its place.
    Left(bool),
}

/// The launcher's part, and the processes'.
#[derive(Debug, Default)]
pub(super) struct Elastic {
    absences: BTreeMap<u16, Absence>,
    lost: u32,
    /// So many were told to leave, and when the next one may be.
    told: u32,
    told_next: u64,
    /// Processes that have begun in the place of others.
    lives: u64,
    next: u64,
    /// Processes that came again too late.
    refused: u64,
    /// Workers that went on, or may, after they were lost.
    pub ghosts: u64,
    pub lacked: Vec<(u16, ChunkId, Clock)>,
}

impl World<'_> {
    /// Everything about workers that come and go that happens between two rounds.
    pub(super) fn tend_workers(&mut self, round: u64) -> Result<(), String> {
        if !self.options.elastic.is_active() {
            return Ok(());
        }
        if round == 0 {
            self.leave_seats_empty();
        }
        for worker in self.hear_lanes() {
            self.notice_loss(worker, round);
        }
        self.lose(round);
        self.ask_to_leave(round);
        if self.elastic.absences.values().any(|absence| matches!(absence, Absence::Out(Some(_)) | Absence::Begun(_))) {
            self.progressed = self.now; // somebody is still to come
        }
        for (worker, absence) in self.elastic.absences.clone() {
            match absence {
                // Unless some lane has lost it meanwhile, it has kept the others waiting, and no more.
                Absence::Asleep(until) if until <= self.now => drop(self.elastic.absences.remove(&worker)),
                Absence::Unnoticed(at) if at <= round => self.notice_loss(worker, round),
                Absence::Out(Some(at)) if at <= round => self.begin_again(worker)?,
                Absence::Begun(false) if self.trainers[usize::from(worker)].engine.is_attached() => {
                    self.elastic.absences.insert(worker, Absence::Begun(true));
                    let at = self.clock_ahead();
                    self.changing.wanted.push_back((round + self.random.below(50), Change::Joins(worker), at));
                }
                Absence::Settled(at, clock) if at <= round => {
                    self.elastic.absences.remove(&worker);
                    self.trainers[usize::from(worker)].begin_at(clock);
                }
                Absence::Told(at, clock) if at <= round => {
                    self.elastic.absences.insert(worker, Absence::Left(false));
                    self.trainers[usize::from(worker)].engine.leave(clock);
                }
                Absence::Left(false)
                    if self.options.elastic.restarts && self.trainers[usize::from(worker)].is_finished() =>
                {
                    self.elastic.absences.insert(worker, Absence::Left(true));
                    self.changing.wanted.push_back((round + self.random.below(100), Change::Opens(worker), 0));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Nobody is there for the last workers yet.
    fn leave_seats_empty(&mut self) {
        let workers = self.trainers.len();
        let empty = |worker: &u16| self.options.elastic.is_empty(*worker, workers);
        for worker in (0..workers as u16).filter(empty).collect::<Vec<_>>() {
            self.halted.push(PeerId::worker(worker));
            let at = self.random.below(2000);
            self.elastic.absences.insert(worker, Absence::Out(Some(at)));
        }
    }

    /// A clock that somebody names: one that lies ahead, mostly, or any that is possible.
    fn clock_ahead(&mut self) -> Clock {
        let done = self.served().map(|server| server.shard().clock_done()).min().unwrap_or(0);
        if self.random.once_in(2) { 0 } else { done + self.random.below(4) }
    }

    /// Somebody wants a worker to leave, if it is time and another one stays.
    fn ask_to_leave(&mut self, round: u64) {
        if self.elastic.told >= self.options.elastic.leaves || round < self.elastic.told_next {
            return;
        }
        let worker = self.random.below(self.trainers.len() as u64) as u16;
        let trains =
            |worker: u16| !self.elastic.absences.contains_key(&worker) && self.trainers[usize::from(worker)].trains();
        let mut others = (0..self.trainers.len() as u16).filter(|other| *other != worker);
        if !trains(worker) || !self.trainers[usize::from(worker)].engine.is_attached() || !others.any(trains) {
            return;
        }
        self.elastic.told += 1;
        self.elastic.told_next = round + self.random.below(3000);
        self.elastic.absences.insert(worker, Absence::Leaving);
        let joined = self.changing.settled.iter().filter(|(_, change)| *change == Change::Joins(worker));
        let first = joined.map(|(clock, _)| clock + 1).max().unwrap_or(0);
        let at = self.clock_ahead().max(first);
        self.changing.wanted.push_back((round, Change::Leaves(worker), at));
    }

    /// What the lanes say of workers: whose paths they have lost. What steps lacked is written down.
    pub(super) fn hear_lanes(&mut self) -> Vec<u16> {
        let tenures = self.copies.tenures.clone();
        let (lacked, lost) = self.hear_lanes_of(|node| tenures[node.shard].primary == node.me);
        self.elastic.lacked.extend(lacked);
        lost
    }

    /// What lanes say of workers: what steps lacked, and whose paths they have lost.
    pub(super) fn hear_lanes_of(&mut self, is_heard: impl Fn(&Node) -> bool) -> (Vec<(u16, ChunkId, Clock)>, Vec<u16>) {
        let heard = self.servers.iter_mut().filter(|node| is_heard(node));
        let (mut lacked, mut lost) = (Vec::new(), Vec::new());
        for serving in heard.filter_map(|node| node.replica.as_mut()?.serves()) {
            lacked.extend(serving.take_lacked());
            lost.extend(serving.take_losses().map(|(worker, _)| worker));
        }
        (lacked, lost)
    }

    /// Its paths to those who serve break.
    fn break_paths_of(&mut self, worker: u16) {
        let lanes = self.copies.tenures.iter().map(|tenure| tenure.primary);
        lanes.for_each(|lane| self.network.break_path(PeerId::worker(worker), lane));
    }

    /// A worker is lost, if it is time and if it hits something.
    fn lose(&mut self, round: u64) {
        let elastic = &self.elastic;
        if elastic.lost >= self.options.elastic.losses || round < elastic.next {
            return;
        }
        let worker = self.random.below(self.trainers.len() as u64) as u16;
        let me = PeerId::worker(worker);
        let trains = |worker: u16| {
            let trainer = &self.trainers[usize::from(worker)];
            match self.elastic.absences.get(&worker) {
                None | Some(Absence::Begun(_) | Absence::Leaving) => trainer.trains(),
                Some(Absence::Told(..) | Absence::Left(false)) => !trainer.is_finished(),
                Some(_) => false,
            }
        };
        let others = (0..self.trainers.len() as u16).filter(|other| *other != worker);
        let stays = others.filter(|other| !self.elastic.absences.contains_key(other)).any(trains);
        let flows = self.copies.tenures.iter().any(|tenure| self.network.in_flight(me, tenure.primary) > 0);
        if !trains(worker) || !stays || !flows {
            return;
        }
        self.elastic.lost += 1;
        self.elastic.next = round + self.random.below(3000);
        if !self.elastic.absences.contains_key(&worker) && self.random.once_in(6) {
            let until = self.now + Duration::from_micros(self.random.below(20_000_000));
            self.asleep.push((me, until));
            self.elastic.absences.insert(worker, Absence::Asleep(until));
            return;
        }
        self.halted.push(me);
        if !self.random.once_in(4) || self.elastic.absences.contains_key(&worker) {
            // It dies: its paths break, and mostly the launcher sees at once that it is gone.
            self.break_paths_of(worker);
            let most = if self.random.once_in(4) { 5000 } else { 100 };
            let noticed = Absence::Unnoticed(round + self.random.below(most));
            self.elastic.absences.insert(worker, noticed);
        } else {
            self.elastic.absences.insert(worker, Absence::Unnoticed(u64::MAX)); // it stops: the lanes notice its silence
        }
    }

    fn notice_loss(&mut self, worker: u16, round: u64) {
        match self.elastic.absences.get(&worker) {
            Some(Absence::Unnoticed(_)) => {}
            Some(Absence::Asleep(_)) | None => self.elastic.ghosts += 1, // it may have gone on just now
            Some(_) => return,
        }
        self.elastic.absences.insert(worker, Absence::Noticed);
        self.relay.retain(|(_, _, offer)| offer.peer != PeerId::worker(worker)); // the launcher has hung up
        let is_void = |change: Change| [Change::Joins(worker), Change::Leaves(worker)].contains(&change);
        self.changing.wanted.retain(|(_, change, _)| !is_void(*change));
        self.changing.wanted.push_back((round, Change::Lost(worker), 0));
    }

    /// All lanes have prepared a change of who is of the job.
    pub(super) fn membership_settled(&mut self, round: u64, (clock, change): (Clock, Change)) {
        self.progressed = self.now;
        match change {
            Change::Settings(_) => {}
            Change::Leaves(worker) if self.elastic.absences.get(&worker) == Some(&Absence::Leaving) => {
                let at = round + 1 + self.random.below(200);
                self.elastic.absences.insert(worker, Absence::Told(at, clock));
            }
            Change::Leaves(_) => {} // it was lost meanwhile
            Change::Lost(worker) | Change::Opens(worker) => {
                let restarts = self.options.elastic.restarts && self.elastic.refused == 0;
                let at = restarts.then(|| round + self.random.below(1000));
                self.elastic.absences.insert(worker, Absence::Out(at));
            }
            Change::Joins(worker) if clock == NEVER => {
                // All others that have a part in a shard had finished: the launcher ends the process.
                if self.elastic.absences.get(&worker) == Some(&Absence::Begun(true)) {
                    self.halted.push(PeerId::worker(worker));
                    self.break_paths_of(worker);
                    self.elastic.absences.insert(worker, Absence::Unnoticed(round));
                    self.elastic.refused += 1;
                }
            }
            Change::Joins(worker) if self.elastic.absences.get(&worker) == Some(&Absence::Begun(true)) => {
                let at = round + 1 + self.random.below(100);
                self.elastic.absences.insert(worker, Absence::Settled(at, clock));
            }
            Change::Joins(_) => {} // it was lost again meanwhile
        }
    }

    /// Another process takes a worker's place.
    fn begin_again(&mut self, worker: u16) -> Result<(), String> {
        let index = usize::from(worker);
        drop(self.trainers.remove(index));
        self.elastic.lives += 1;
        let life = self.elastic.lives << 32;
        let trainer = Trainer::again(self.options, &self.layout, &self.network, worker, life, self.now);
        let mut trainer = trainer.map_err(|error| error.to_string())?;
        for (shard, tenure) in self.copies.tenures.iter().enumerate() {
            trainer.engine.set_tenure(ShardId(shard as u16), tenure.primary, self.now);
        }
        self.trainers.insert(index, trainer);
        self.halted.retain(|halted| *halted != PeerId::worker(worker));
        self.asleep.retain(|(asleep, _)| *asleep != PeerId::worker(worker));
        self.elastic.absences.insert(worker, Absence::Begun(false));
        Ok(())
    }

    /// A worker's process has failed: whether that is a loss that is known already.
    pub(super) fn fails_in_vain(&mut self, worker: u16) -> bool {
        let is_out = matches!(self.elastic.absences.get(&worker), Some(Absence::Noticed | Absence::Out(_)));
        if is_out {
            self.halted.push(PeerId::worker(worker));
        }
        is_out
    }

    /// Whether a node is a worker that was lost: the launcher has hung up.
    pub(super) fn is_cut_off(&self, node: PeerId) -> bool {
        let absence = self.elastic.absences.get(&node.rank.index);
        !self.is_server(node) && matches!(absence, Some(Absence::Noticed | Absence::Out(_)))
    }

    /// Whether a worker was lost, and no other process has begun in its place, nor will.
    pub(super) fn is_lost(&self, worker: u16) -> bool {
        matches!(self.elastic.absences.get(&worker), Some(Absence::Out(None)))
    }
}
