//! A backup's protocol as a pure state machine: records of the primary in, work and acknowledgements out.
//!
//! Records are counted over all paths between the two, and taken in strictly in their order: one is acknowledged when it and all
//! before it are part of this copy's state. So what has been acknowledged is a prefix of what the primary has sent, and this copy is
//! the state after that prefix, bit for bit: the primary's sums, weights and clocks go through the same optimizer. Where steps are
//! decided upon, a sum waits in its chunk's accumulator, and a decision counts as taken in as soon as it is known: what follows from
//! it is done before the next record.
//!
//! Invariant: one record at a time is worked on; its landing slot is armed again only after that.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    Error, Result,
    layout::Layout,
    mem::Lease,
    optim::{LiveChange, LossScaleConfig, LossScaler},
    server::{Contribution, Decided, Decision, Part, Reduced, ShardConfig, Task, Work, shard::set_limit},
    transport::WorkRequest,
    types::{ChunkId, Clock, PeerId, ShardId, Version},
    wire::{Attachment, Note, NoteKind},
};

/// What a backup wants done.
#[derive(Debug)]
pub enum BackupEffect {
    /// Open a landing slot to one more write by the primary.
    Arm(Lease),
    /// Send this.
    Post(WorkRequest),
    /// Compute this and hand it to [`Backup::handle_computed`].
    Compute(Work),
    /// Settings change from a clock on.
    Change(Clock, LiveChange),
}

/// What a copy knows beside its state: all that whoever takes over must know.
#[derive(Clone, Debug, PartialEq)]
pub struct Inheritance {
    /// By chunk, in shard order: how many clocks are in it.
    pub clocks: Vec<Clock>,
    /// By chunk, in shard order: its version.
    pub versions: Vec<Version>,
    /// To how many clocks anybody has pushed; what was passed beyond that may never begin.
    pub clocks_pushed: Clock,
    /// By worker: the last process in its seat that has finished, and all that it gave is in, by the number of the change by which that one
    /// joined; 0 of those with which the job began.
    pub finished: Vec<Option<u64>>,
    /// Where the shard moves: the next clock of the periodic checkpoint that the lane before has not taken; 0 if there is none.
    pub stores_next: Clock,
    /// By chunk, in shard order: the sum that it holds and that is not decided upon.
    pub reduced: Vec<Option<Reduced>>,
    /// What it knows of decisions, if any are taken.
    pub decided: Option<Decided>,
}

impl Inheritance {
    fn new(config: &ShardConfig, chunks: usize, versions: Option<&[Version]>) -> Inheritance {
        Inheritance {
            clocks: vec![config.start_clock; chunks],
            versions: versions.map_or_else(|| vec![config.start_clock; chunks], <[Version]>::to_vec),
            clocks_pushed: config.start_clock,
            finished: vec![None; config.workers.into()],
            stores_next: 0,
            reduced: vec![None; chunks],
            decided: Decided::new(config),
        }
    }

    /// By chunk, in shard order: how many clocks' gradients are in its state, or in the sum that it holds.
    pub fn through(&self) -> impl Iterator<Item = Clock> {
        self.clocks.iter().zip(&self.reduced).map(|(clock, reduced)| clock + u64::from(reduced.is_some()))
    }
}

/// The protocol of one backup.
#[derive(Debug)]
pub struct Backup {
    primary: PeerId,
    shard: ShardId,
    layout: Arc<Layout>,
    holds: Inheritance,
    /// What has come and is not in the state yet.
    queue: VecDeque<(Note, Option<Lease>)>,
    /// The first of the queue is being computed, or the step of a chunk that is decided upon.
    is_computing: bool,
    /// Places of chunks whose sums are decided upon: they are stepped before the next record.
    stepping: VecDeque<usize>,
    /// Records that have come, over all paths.
    received: u64,
    /// Records that are in the state.
    taken: u64,
    /// Of these the primary knows.
    told: u64,
    /// All of the primary's state is in this copy's.
    is_whole: bool,
    /// The primary has nothing to go on with: this copy is to begin anew.
    is_refused: bool,
    /// The path is there, and the primary has been told what has come.
    is_attached: bool,
    loss_scale: LossScaleConfig,
    effects: VecDeque<BackupEffect>,
    request_next: u64,
}

impl Backup {
    /// A copy of a shard at the beginning: either the primary is at the beginning too, and this is all of it, or it sends the state
    /// first.
    pub fn new(
        primary: PeerId,
        config: &ShardConfig,
        layout: Arc<Layout>,
        versions: Option<&[Version]>,
        is_whole: bool,
    ) -> Backup {
        let chunks = layout.shards[usize::from(config.shard.0)].len();
        Backup {
            primary,
            shard: config.shard,
            layout,
            holds: Inheritance::new(config, chunks, versions),
            queue: VecDeque::new(),
            is_computing: false,
            stepping: VecDeque::new(),
            received: 0,
            taken: 0,
            told: 0,
            is_whole,
            is_refused: false,
            is_attached: false,
            loss_scale: config.loss_scale,
            effects: VecDeque::new(),
            request_next: 0,
        }
    }

    /// Whether the primary has said that this copy is to begin anew.
    pub fn is_refused(&self) -> bool {
        self.is_refused
    }

    /// Whether all of the primary's state is in this copy's.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whose copy this is.
    pub fn primary(&self) -> PeerId {
        self.primary
    }

    /// The limit of the norm changes from a clock on.
    pub fn limit_norm(&mut self, limit: f32, clock: Clock) {
        if let Some(decided) = &mut self.holds.decided {
            set_limit(&mut decided.limits, limit, clock, decided.until);
        }
    }

    /// The path is there, perhaps once more: the primary is told what has come, and where it may write.
    pub fn attach(&mut self, landing: Attachment) {
        self.effects.retain(|effect| !matches!(effect, BackupEffect::Post(_)));
        self.is_attached = true;
        self.told = 0;
        self.post(Note { credit: self.received, ..Note::new(NoteKind::Resume) });
        self.post(landing.to_note());
    }

    /// The path is gone.
    pub fn detach(&mut self) {
        self.is_attached = false;
    }

    /// A record has come.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when it is none; the path must be fenced then.
    pub fn handle_arrived(&mut self, from: PeerId, note: Note, lease: Option<Lease>) -> Result<()> {
        let protocol = |what: &str| Error::Protocol { peer: from, what: format!("{:?} note: {what}", note.kind) };
        if from != self.primary {
            return Err(protocol("it is not the primary of this copy"));
        }
        match (note.kind, &lease) {
            (NoteKind::Replica | NoteKind::State, Some(_)) | (NoteKind::Passed, None) => {
                let own = self.layout.chunks.get(note.chunk.index()).filter(|chunk| chunk.shard == self.shard);
                let own = own.ok_or_else(|| protocol("a chunk of another shard"))?;
                if lease.is_some() && note.length != own.len * 4 {
                    return Err(protocol("a payload that is not the chunk's"));
                }
                if note.kind == NoteKind::State && usize::from(note.weight) >= Part::ALL.len() {
                    return Err(protocol("no such part"));
                }
            }
            (NoteKind::Resume, None) => {
                self.is_refused = true;
                return Ok(());
            }
            (NoteKind::Whole, None) => {}
            (NoteKind::Change, None) if change_of(&note).is_some() => {}
            (NoteKind::Left, None) if (note.chunk.0 as usize) < self.holds.finished.len() => {}
            (NoteKind::Decided | NoteKind::LossScale | NoteKind::Finished, None) if self.may_decide(&note) => {}
            _ => return Err(protocol("it has no place here")),
        }
        self.received += 1;
        self.queue.push_back((note, lease));
        self.work()
    }

    /// A record has become part of the state.
    ///
    /// # Errors
    ///
    /// As [`Backup::handle_arrived`], of a later record.
    pub fn handle_computed(&mut self, mut work: Work) -> Result<()> {
        self.is_computing = false;
        for contribution in work.contributions.drain(..) {
            self.effects.push_back(BackupEffect::Arm(contribution.lease));
        }
        let place = self.place(work.chunk);
        let (clock, weight, squared_norm) = (work.clock, work.weight, work.squared_norm.unwrap_or(0.0));
        match work.task {
            Task::Step => self.pass(place),
            Task::Reduce => self.hold(place, Reduced { clock, weight, squared_norm }),
            Task::Apply => {
                self.pass(place);
                return self.work(); // the record that it belongs to has been counted
            }
            _ => (self.holds.clocks[place], self.holds.versions[place]) = (work.clock, work.version),
        }
        self.taken += 1;
        self.work()
    }

    /// What is to be done next.
    pub fn poll_effect(&mut self) -> Option<BackupEffect> {
        if self.effects.is_empty() && self.is_attached && self.told < self.taken {
            self.told = self.taken;
            self.post(Note { version: self.taken, ..Note::new(NoteKind::Holds) });
        }
        self.effects.pop_front()
    }

    /// Whether all that has come is part of the state.
    pub fn is_settled(&self) -> bool {
        self.queue.is_empty() && !self.is_computing && self.stepping.is_empty()
    }

    /// What it knows, for whoever takes over with its state.
    pub fn holds(&self) -> &Inheritance {
        &self.holds
    }

    /// Takes in what can be, in order.
    fn work(&mut self) -> Result<()> {
        while !self.is_computing {
            if let Some(place) = self.stepping.pop_front() {
                self.step(place);
                continue;
            }
            let Some((note, lease)) = self.queue.pop_front() else { break };
            let place = self.place(note.chunk);
            let clock = self.holds.clocks.get(place).copied();
            if matches!(note.kind, NoteKind::Replica | NoteKind::Passed) {
                self.holds.clocks_pushed = self.holds.clocks_pushed.max(note.credit);
            }
            let wrong = |what: String| Error::Protocol { peer: self.primary, what };
            match (note.kind, lease) {
                (NoteKind::Replica, Some(lease))
                    if clock == Some(note.clock) && self.holds.reduced[place].is_none() =>
                {
                    let contributions = vec![Contribution { worker: 0, weight: 1, lease }];
                    let weight = u32::try_from(note.version).map_err(|_| wrong("a weight beyond all reason".into()))?;
                    let (task, scale) = match self.holds.decided {
                        None => (Task::Step, Decision::taken(self.loss_scale.first()).scale),
                        Some(_) => (Task::Reduce, 1.0),
                    };
                    self.compute(Work { contributions, weight, scale, ..Work::new(task, note.chunk, note.clock) });
                    continue;
                }
                (NoteKind::State, Some(lease)) => {
                    let contributions = vec![Contribution { worker: 0, weight: 1, lease }];
                    let work = Work::new(Task::CopyIn(Part::ALL[usize::from(note.weight)]), note.chunk, note.clock);
                    self.compute(Work { contributions, steps: note.credit, version: note.version, ..work });
                    continue;
                }
                (NoteKind::Passed, None) if clock == Some(note.clock) && self.holds.reduced[place].is_none() => {
                    let reduced = Reduced { clock: note.clock, weight: 0, squared_norm: 0.0 };
                    match self.holds.decided {
                        None => self.pass(place),
                        Some(_) => self.hold(place, reduced),
                    }
                }
                (NoteKind::Change, None) => {
                    let (clock, change) = change_of(&note).expect("looked at when it came");
                    self.effects.push_back(BackupEffect::Change(clock, change));
                }
                (NoteKind::Left, None) => self.holds.finished[note.chunk.index()] = Some(note.version),
                (NoteKind::Decided | NoteKind::LossScale | NoteKind::Finished, None) => self.decide(&note),
                (NoteKind::Whole, None) => (self.is_whole, self.holds.stores_next) = (true, note.clock),
                _ => {
                    let has = clock.unwrap_or(0);
                    return Err(wrong(format!(
                        "chunk {} at clock {} while clock {has} is the next",
                        note.chunk.0, note.clock
                    )));
                }
            }
            self.taken += 1;
        }
        Ok(())
    }

    fn compute(&mut self, work: Work) {
        self.is_computing = true;
        self.effects.push_back(BackupEffect::Compute(work));
    }

    /// Whether a note about decisions has a meaning here.
    fn may_decide(&self, note: &Note) -> bool {
        let Some(decided) = &self.holds.decided else { return false };
        match note.kind {
            NoteKind::Decided => Decision::from_note(note).is_some(),
            NoteKind::Finished => note.chunk.index() < decided.parted.len(),
            _ => u32::try_from(note.version).is_ok(),
        }
    }

    /// A decision of the primary, or what it knows of decisions.
    fn decide(&mut self, note: &Note) {
        let decided = self.holds.decided.as_mut().expect("looked at when it came");
        match note.kind {
            NoteKind::Decided => {
                let decision = Decision::from_note(note).expect("looked at when it came");
                decided.take(note.clock, decision, &self.loss_scale);
                let until = decided.until;
                let is_due = |reduced: &Option<Reduced>| reduced.is_some_and(|reduced| reduced.clock < until);
                let due = self.holds.reduced.iter().enumerate().filter(|(_, reduced)| is_due(reduced));
                self.stepping.extend(due.map(|(place, _)| place));
            }
            NoteKind::Finished => decided.parted[note.chunk.index()] = true,
            _ => {
                let scale = f32::from_bits(note.version as u32);
                (decided.skipped, decided.scaler) = (note.clock, LossScaler { scale, streak: note.credit });
            }
        }
    }

    /// A sum lies in the accumulator: it makes a step as soon as that is decided upon, and may be already.
    fn hold(&mut self, place: usize, reduced: Reduced) {
        self.holds.reduced[place] = Some(reduced);
        if self.holds.decided.as_ref().is_some_and(|decided| reduced.clock < decided.until) {
            self.stepping.push_back(place);
        }
    }

    /// The step of a chunk that is decided upon.
    fn step(&mut self, place: usize) {
        let decision = self.holds.decided.as_ref().expect("there is a decision").last;
        let Some(Reduced { clock, weight, .. }) = self.holds.reduced[place].take() else { return };
        if weight == 0 || decision.skips {
            return self.pass(place);
        }
        let chunk = self.layout.shards[usize::from(self.shard.0)][place];
        self.compute(Work { weight, scale: decision.scale, ..Work::new(Task::Apply, chunk, clock) });
    }

    fn pass(&mut self, place: usize) {
        self.holds.clocks[place] += 1;
        self.holds.versions[place] += 1;
    }

    fn place(&self, chunk: ChunkId) -> usize {
        self.layout.chunks.get(chunk.index()).map_or(0, |chunk| chunk.position as usize)
    }

    fn post(&mut self, note: Note) {
        let id = self.request_next;
        self.request_next += 1;
        self.effects.push_back(BackupEffect::Post(WorkRequest { id, peer: self.primary, note, payload: None }));
    }
}

/// A live change as a note, one value each: which one stands in `chunk`.
pub(in crate::server) fn change_notes(clock: Clock, change: LiveChange) -> impl Iterator<Item = Note> {
    let note = move |which: u32, value: f64| Note {
        chunk: ChunkId(which),
        clock,
        version: value.to_bits(),
        ..Note::new(NoteKind::Change)
    };
    let rate = change.learning_rate.map(|rate| note(0, rate));
    let decay = change.weight_decay.map(|decay| note(1, decay));
    let limit = change.clip_norm.map(|limit| note(2, limit.into()));
    rate.into_iter().chain(decay).chain(limit)
}

/// What [`change_notes`] wrote.
fn change_of(note: &Note) -> Option<(Clock, LiveChange)> {
    let value = f64::from_bits(note.version);
    let change = match note.chunk.0 {
        0 => LiveChange { learning_rate: Some(value), ..LiveChange::default() },
        1 => LiveChange { weight_decay: Some(value), ..LiveChange::default() },
        2 => LiveChange { clip_norm: Some(value as f32), ..LiveChange::default() },
        _ => return None,
    };
    (0.0..=f64::from(f32::MAX)).contains(&value).then_some((note.clock, change))
}
