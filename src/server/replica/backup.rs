//! A backup's protocol as a pure state machine: records of the primary in, work and acknowledgements out.
//!
//! Records are counted over all paths between the two, and taken in strictly in their order: one is acknowledged when it and all
//! before it are part of this copy's state. So what has been acknowledged is a prefix of what the primary has sent, and this copy is
//! the state after that prefix, bit for bit: the primary's sums, weights and clocks go through the same optimizer.
//!
//! Invariant: one record at a time is worked on; its landing slot is armed again only after that.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    Error, Result,
    layout::Layout,
    mem::Lease,
    optim::LiveChange,
    server::{Contribution, Part, Task, Work},
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inheritance {
    /// By chunk, in shard order: how many clocks are in it.
    pub clocks: Vec<Clock>,
    /// By chunk, in shard order: its version.
    pub versions: Vec<Version>,
    /// By worker: it has finished, and all that it gave is in.
    pub finished: Vec<bool>,
    /// Where the shard moves: the next clock of the periodic checkpoint that the lane before has not taken; 0 if there is none.
    pub stores_next: Clock,
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
    /// The first of the queue is being computed.
    is_computing: bool,
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
    scale: f32,
    effects: VecDeque<BackupEffect>,
    request_next: u64,
}

impl Backup {
    /// A copy of a shard at the beginning: either the primary is at the beginning too, and this is all of it, or it sends the state
    /// first.
    pub fn new(primary: PeerId, shard: ShardId, layout: Arc<Layout>, holds: Inheritance, is_whole: bool) -> Backup {
        Backup {
            primary,
            shard,
            layout,
            holds,
            queue: VecDeque::new(),
            is_computing: false,
            received: 0,
            taken: 0,
            told: 0,
            is_whole,
            is_refused: false,
            is_attached: false,
            scale: 1.0,
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

    /// The factor on every step's gradient.
    pub fn scale_by(&mut self, scale: f32) {
        self.scale = scale;
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
        match work.task {
            Task::Step => self.pass(place),
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
        self.queue.is_empty() && !self.is_computing
    }

    /// What it knows, for whoever takes over with its state.
    pub fn holds(&self) -> &Inheritance {
        &self.holds
    }

    /// Takes in what can be, in order.
    fn work(&mut self) -> Result<()> {
        while !self.is_computing
            && let Some((note, lease)) = self.queue.pop_front()
        {
            let place = self.place(note.chunk);
            let clock = self.holds.clocks.get(place).copied();
            let wrong = |what: String| Error::Protocol { peer: self.primary, what };
            match (note.kind, lease) {
                (NoteKind::Replica, Some(lease)) if clock == Some(note.clock) => {
                    let contributions = vec![Contribution { worker: 0, weight: 1, lease }];
                    let weight = u32::try_from(note.version).map_err(|_| wrong("a weight beyond all reason".into()))?;
                    let work = Work::new(Task::Step, note.chunk, note.clock);
                    self.compute(Work { contributions, weight, scale: self.scale, ..work });
                    continue;
                }
                (NoteKind::State, Some(lease)) => {
                    let contributions = vec![Contribution { worker: 0, weight: 1, lease }];
                    let work = Work::new(Task::CopyIn(Part::ALL[usize::from(note.weight)]), note.chunk, note.clock);
                    self.compute(Work { contributions, steps: note.credit, version: note.version, ..work });
                    continue;
                }
                (NoteKind::Passed, None) if clock == Some(note.clock) => self.pass(place),
                (NoteKind::Change, None) => {
                    let (clock, change) = change_of(&note).expect("looked at when it came");
                    self.effects.push_back(BackupEffect::Change(clock, change));
                }
                (NoteKind::Left, None) => self.holds.finished[note.chunk.index()] = true,
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
    rate.into_iter().chain(change.weight_decay.map(|decay| note(1, decay)))
}

/// What [`change_notes`] wrote.
fn change_of(note: &Note) -> Option<(Clock, LiveChange)> {
    let value = f64::from_bits(note.version);
    let change = match note.chunk.0 {
        0 => LiveChange { learning_rate: Some(value), ..LiveChange::default() },
        1 => LiveChange { weight_decay: Some(value), ..LiveChange::default() },
        _ => return None,
    };
    (0.0..=f64::from(f32::MAX)).contains(&value).then_some((note.clock, change))
}
