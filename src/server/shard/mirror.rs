//! The primary's side of a shard with two copies: what the backup is sent, and what must wait until it has it.
//!
//! Every sum goes to the backup before the step that it makes is told to anybody: while a chunk's record is not acknowledged, the
//! chunk answers nobody and begins no further step, and its position in the window stays unfinished, so that workers keep the
//! gradients of which it is made. So does a step's decision, for which all chunks wait. A backup that has nothing is sent the state
//! first, chunk by chunk, while training goes on; a chunk's sums follow from the moment its state has been copied.
//!
//! Records are kept until they are acknowledged, and sent again over a path that was rebuilt.
//!
//! Invariant: while the tenure is paired nothing leaves to a worker that the backup does not hold; a step without the backup is told
//! to somebody only after the tenure says that this lane serves alone.

mod filling;

use std::time::Duration;

use super::*;
use crate::{
    consistency::Unproven,
    server::{Part, replica::change_notes},
    session::Claim,
};

/// Set in the ids of requests to the backup, whose payloads are no wire copies.
pub(super) const FOR_BACKUP: u64 = 1 << 63;

/// The other lane of a shard with two copies.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// The lane that follows, if one does.
    pub peer: Option<PeerId>,
    /// Whether it holds everything as this shard begins.
    pub is_paired: bool,
    /// Whoever follows is to serve as soon as it has everything: the shard moves.
    pub moves: bool,
    /// How long the other lane may be silent before it counts as gone.
    pub suspicion: Duration,
    /// Parts of a chunk's state: parameters, and the optimizer's slots.
    pub parts: usize,
    /// Sums and parts of state that may be under way.
    pub slots: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody follows.
    Alone,
    /// A backup that has nothing is there, and is told the changes of the past first.
    Greeting,
    /// The backup gets the state: chunks from this place on have not been copied, and of this one so many parts.
    Filling { place: usize, part: usize },
    /// It has everything that has been acknowledged: that is being told to the store.
    Pairing,
    /// It has everything that workers have been told of.
    Paired,
    /// It is gone; the store has been asked to say so, or has yet to answer whether the two were a pair.
    Parting,
}

/// What the backup was sent.
#[derive(Debug)]
struct Record {
    note: Note,
    /// The number of the payload among all payloads, and the payload.
    payload: Option<(u64, SharedLease)>,
    then: Then,
}

/// What waits for a record to be acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    Nothing,
    /// Of a sum: its chunk answers and goes on, and the position is finished.
    GoOn {
        place: usize,
        position: u64,
    },
    /// The process that has joined a worker's seat by the change of this number has finished and may go.
    Dismiss(u16, u64),
    /// The last decision may be told.
    Tell,
    /// The lane of another shard may hear that it is known to measure nothing any more.
    Part(usize),
}

/// What a primary knows of its backup.
#[derive(Debug)]
pub(super) struct Mirror {
    peer: Option<PeerId>,
    stage: Stage,
    moves: bool,
    parts: usize,
    /// The backup has been told that it has been sent everything.
    is_whole: bool,
    /// Payloads that may be under way.
    slots: usize,
    landing: Option<Attachment>,
    /// Where one that has nothing may be written to, as soon as the store knows that this lane is alone.
    newcomer: Option<Attachment>,
    /// What the backup has said to have, over this path.
    resumes_at: Option<u64>,
    sent: Unproven<Record>,
    payloads: u64,
    pool: Vec<Lease>,
    /// Payloads that have been acknowledged and that the transport still reads.
    parting: Vec<SharedLease>,
    claim: Option<Claim>,
    /// The store has been asked to make them a pair: it may have done so, whatever came of the answer.
    is_asked: bool,
}

impl Mirror {
    pub fn new(config: &MirrorConfig, pool: Vec<Lease>) -> Mirror {
        Mirror {
            peer: config.peer,
            stage: if config.is_paired { Stage::Paired } else { Stage::Alone },
            moves: config.moves,
            parts: config.parts,
            is_whole: config.is_paired,
            slots: pool.len(),
            landing: None,
            newcomer: None,
            resumes_at: None,
            sent: Unproven::default(),
            payloads: 0,
            pool,
            parting: Vec::new(),
            claim: None,
            is_asked: false,
        }
    }

    /// Whether the sums of the chunk at `place` go to the backup.
    fn covers(&self, place: usize) -> bool {
        match self.stage {
            Stage::Alone | Stage::Greeting => false,
            Stage::Filling { place: next, .. } => place < next,
            Stage::Pairing | Stage::Paired | Stage::Parting => true,
        }
    }
}

impl Shard {
    /// The other lane of this shard, if one follows or is to.
    pub fn backup(&self) -> Option<PeerId> {
        self.mirror.as_ref().and_then(|mirror| mirror.peer)
    }

    /// Another lane is to follow, or none: the one before, whose path is fenced, has nothing that counts.
    pub fn set_backup(&mut self, peer: Option<PeerId>) {
        let Some(mirror) = &mut self.mirror else { return };
        (mirror.landing, mirror.newcomer, mirror.resumes_at, mirror.claim) = (None, None, None, None);
        self.part_from_backup();
        self.mirror.as_mut().expect("looked at above").peer = peer;
    }

    /// Whether the shard is about to be served by another lane: that one takes the checkpoints from here on.
    pub fn is_handing_over(&self) -> bool {
        let settles = |mirror: &Mirror| mirror.is_whole || mirror.stage == Stage::Parting;
        self.mirror.as_ref().is_some_and(|mirror| mirror.moves && settles(mirror))
    }

    /// Whether the backup holds everything.
    pub fn is_paired(&self) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| matches!(mirror.stage, Stage::Paired | Stage::Parting))
    }

    /// What is to be asked of the store; `stores` while a checkpoint of this lane is not on the disk, which has to come before another
    /// lane serves in its place.
    pub fn take_claim(&mut self, stores: bool) -> Option<Claim> {
        let Mirror { moves, claim, is_asked, .. } = self.mirror.as_mut()?;
        let taken = claim.take_if(|claim| !(*moves && stores && *claim == Claim::Pair));
        *is_asked |= taken == Some(Claim::Pair);
        taken
    }

    /// Whether the backup counts, by the tenure that is known, and whether that one is new: if not, the store has given no answer, and may
    /// have done what it was asked all the same.
    pub fn set_paired(&mut self, is_paired: bool, is_new: bool) {
        let Some(mirror) = &mut self.mirror else { return };
        match (mirror.stage, is_paired) {
            (Stage::Pairing, true) => mirror.stage = Stage::Paired,
            (Stage::Pairing, false) => mirror.claim = Some(Claim::Pair),
            (Stage::Parting, false) if is_new => self.part_from_backup(),
            // They are a pair, or may be.
            (Stage::Parting, _) => mirror.claim = Some(Claim::GoAlone),
            _ => {}
        }
    }

    /// The path to the backup is gone, or what came over it cannot be: it is to be gone on without it.
    pub fn lose_backup(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        (mirror.landing, mirror.newcomer, mirror.resumes_at) = (None, None, None);
        match mirror.stage {
            Stage::Alone | Stage::Parting => {}
            Stage::Greeting | Stage::Filling { .. } => self.part_from_backup(),
            Stage::Pairing if !mirror.is_asked => {
                mirror.claim = None;
                self.part_from_backup();
            }
            Stage::Pairing => {
                // They may be a pair: until that is known nobody is told anything. While an answer is to come nothing else is asked.
                mirror.stage = Stage::Parting;
                mirror.claim = mirror.claim.take().map(|_| Claim::GoAlone);
            }
            Stage::Paired => {
                mirror.stage = Stage::Parting;
                mirror.claim = Some(Claim::GoAlone);
            }
        }
    }

    /// The path to the backup is broken for now.
    pub fn detach_backup(&mut self) {
        if let Some(mirror) = &mut self.mirror {
            (mirror.landing, mirror.newcomer, mirror.resumes_at) = (None, None, None);
            let peer = mirror.peer;
            peer.into_iter().for_each(|peer| self.recall(peer));
        }
    }

    /// Nobody follows any more, and everybody may know: what waited for the backup goes on.
    fn part_from_backup(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        let (former, newcomer) = (mirror.landing.take(), mirror.newcomer.take());
        (mirror.stage, mirror.landing) = (Stage::Alone, newcomer);
        (mirror.payloads, mirror.is_whole, mirror.is_asked) = (0, false, false);
        let sent = std::mem::take(&mut mirror.sent);
        sent.into_entries().for_each(|record| self.settle(record));
        (0..self.chunks.len()).for_each(|index| self.touch(index));
        if newcomer.is_some() {
            self.begin_to_fill();
        } else if former.is_some() {
            self.refuse_backup();
        }
    }

    /// A note of the backup.
    pub(super) fn on_backup_note(&mut self, from: PeerId, note: &Note) -> Result<()> {
        let mirror = self.mirror.as_mut().expect("the caller has looked");
        match note.kind {
            NoteKind::Resume => mirror.resumes_at = Some(note.credit),
            NoteKind::Attach => {
                let landing = Attachment::from_note(note).map_err(|error| protocol(from, error))?;
                let Some(received) = mirror.resumes_at.take() else {
                    return Err(protocol(from, "it does not say what it has"));
                };
                if (landing.slots as usize) < mirror.slots {
                    return Err(protocol(from, format!("{} slots for what it is sent", landing.slots)));
                }
                mirror.landing = Some(landing);
                self.resume_backup(received);
            }
            NoteKind::Holds => {
                let (first, end) = (mirror.sent.first(), mirror.sent.end());
                if note.version > end {
                    return Err(protocol(from, format!("it says to hold {} of {end} records", note.version)));
                }
                for _ in first..note.version {
                    let mirror = self.mirror.as_mut().expect("looked at above");
                    let Some(record) = mirror.sent.prove(note.version) else { break };
                    self.settle(record);
                }
            }
            kind => return Err(protocol(from, format!("a {kind:?} note has no place here"))),
        }
        Ok(())
    }

    /// The backup has said over a new path how many records it has.
    fn resume_backup(&mut self, received: u64) {
        let mirror = self.mirror.as_mut().expect("the caller has looked");
        if mirror.stage == Stage::Alone {
            if received == 0 {
                return self.begin_to_fill();
            }
            return self.refuse_backup();
        }
        if !mirror.sent.allows(received) {
            // It is not the one that we knew: a process that has begun anew.
            let landing = mirror.landing;
            self.lose_backup();
            let mirror = self.mirror.as_mut().expect("looked at above");
            if mirror.stage == Stage::Alone {
                mirror.landing = landing;
                self.resume_backup(received);
            } else if received == 0 {
                mirror.newcomer = landing;
            }
            return;
        }
        let skip = (received - mirror.sent.first()) as usize;
        let again = mirror.sent.iter().skip(skip).map(|record| (record.note, record.payload.clone()));
        let again: Vec<_> = again.collect();
        again.into_iter().for_each(|(note, payload)| self.post_record(note, payload));
    }

    /// It counts what it had of an earlier stream: only one that has nothing can be filled.
    fn refuse_backup(&mut self) {
        let mirror = self.mirror.as_mut().expect("the caller has looked");
        mirror.landing = None;
        let peer = mirror.peer.expect("a note came from it");
        self.post(peer, Note::new(NoteKind::Resume), None);
    }

    /// Live changes go to the backup.
    pub fn mirror_change(&mut self, clock: Clock, change: crate::optim::LiveChange) {
        for note in change_notes(clock, change) {
            self.mirror_note(note, Then::Nothing);
        }
    }

    /// A note goes to the backup as a record of its own. `false` if there is nobody to tell: what waits for it need not.
    pub(super) fn mirror_note(&mut self, note: Note, then: Then) -> bool {
        let follows = self.mirror.as_ref().is_some_and(|mirror| mirror.stage != Stage::Alone);
        if follows {
            self.write_down(note, None, then);
        }
        follows
    }

    /// Whether the sum of the chunk at `place` goes to the backup before it is applied.
    pub(super) fn is_mirrored(&self, place: usize) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| mirror.covers(place))
    }

    /// A slot for the sum of the chunk at `place`, if the backup is to have it.
    pub(super) fn take_room_for_sum(&mut self, place: usize) -> Option<Lease> {
        self.mirror.as_mut().filter(|mirror| mirror.covers(place))?.pool.pop()
    }

    /// Whether there is such a slot, or nobody is to have one.
    pub(super) fn has_room_for_sum(&self, place: usize) -> bool {
        self.mirror.as_ref().is_none_or(|mirror| !mirror.covers(place) || !mirror.pool.is_empty())
    }

    /// A chunk has been reduced, or nobody gave anything to it: the backup is told. `false` if there is nobody to tell.
    pub(super) fn mirror_sum(
        &mut self,
        index: usize,
        position: u64,
        (clock, weight): (Clock, u32),
        sum: Option<Lease>,
    ) -> bool {
        let Some(mirror) = &mut self.mirror else { return false };
        if !mirror.covers(index) {
            mirror.pool.extend(sum); // the backup was lost meanwhile
            return false;
        }
        debug_assert!(sum.is_some() == (weight > 0), "a chunk is copied while nothing is computed over it");
        let (chunk, credit) = (self.chunks[index].id, self.clocks_pushed);
        let note = match &sum {
            None => Note { chunk, clock, credit, ..Note::new(NoteKind::Passed) },
            Some(_) => {
                let length = self.chunks[index].len * 4;
                Note { chunk, clock, version: weight.into(), credit, length, ..Note::new(NoteKind::Replica) }
            }
        };
        self.chunks[index].is_unheld = true;
        self.write_down(note, sum.map(Lease::freeze), Then::GoOn { place: index, position });
        true
    }

    /// A worker has finished, and all that it gave is in; it may go once the backup knows that too.
    pub(super) fn mirror_left(&mut self, worker: u16, joined_by: u64) -> bool {
        let note = Note { chunk: ChunkId(worker.into()), version: joined_by, ..Note::new(NoteKind::Left) };
        self.mirror_note(note, Then::Dismiss(worker, joined_by))
    }

    /// Whether nothing waits for the backup.
    pub(super) fn is_held_by_backup(&self) -> bool {
        self.mirror.as_ref().is_none_or(|mirror| match mirror.stage {
            Stage::Paired | Stage::Parting => mirror.sent.is_empty(),
            _ => !self.is_decision_unheld && !self.chunks.iter().any(|chunk| chunk.is_unheld),
        })
    }

    /// The transport has given up its share of a payload.
    pub(super) fn retire_payload(&mut self, payload: SharedLease) {
        let Some(mirror) = &mut self.mirror else { return };
        drop(payload);
        let parting = std::mem::take(&mut mirror.parting);
        for shared in parting {
            match shared.thaw() {
                Ok(lease) => mirror.pool.push(lease),
                Err(shared) => mirror.parting.push(shared),
            }
        }
        self.fill();
    }

    /// A record is acknowledged, or nobody is left to do so: what waited for it goes on.
    fn settle(&mut self, record: Record) {
        let Record { payload, then, .. } = record;
        if let (Some((_, shared)), Some(mirror)) = (payload, &mut self.mirror) {
            match shared.thaw() {
                Ok(lease) => mirror.pool.push(lease),
                Err(shared) => mirror.parting.push(shared),
            }
        }
        match then {
            Then::Nothing => {}
            Then::GoOn { place, position } => {
                self.chunks[place].is_unheld = false;
                self.measure(place);
                self.finish_position(0, position);
                self.touch(place);
            }
            Then::Dismiss(worker, joined_by) => self.dismiss(worker, joined_by),
            Then::Tell => self.tell_decision(),
            Then::Part(shard) => self.part_from_shard(shard),
        }
        self.fill();
    }

    fn write_down(&mut self, note: Note, payload: Option<SharedLease>, then: Then) {
        let mirror = self.mirror.as_mut().expect("only a mirror records");
        let payload = payload.map(|payload| {
            mirror.payloads += 1;
            (mirror.payloads - 1, payload)
        });
        let carried = payload.clone();
        let is_attached = mirror.landing.is_some();
        mirror.sent.push(Record { note, payload, then });
        if is_attached {
            self.post_record(note, carried);
        }
    }

    fn post_record(&mut self, note: Note, payload: Option<(u64, SharedLease)>) {
        let mirror = self.mirror.as_ref().expect("the caller has looked");
        let peer = mirror.peer.expect("it has said where it lands what it is sent");
        let landing = mirror.landing.expect("the caller has looked");
        let payload = payload.map(|(number, payload)| {
            let slot = number % u64::from(landing.slots);
            let offset = landing.offset + slot * u64::from(landing.slot_bytes);
            (payload, RemoteSlot { rkey: landing.rkey, offset, len: landing.slot_bytes })
        });
        let id = self.request_next | FOR_BACKUP;
        self.request_next += 1;
        let note = Note { epoch: self.config.epoch, ..note };
        self.effects.push_back(Effect::Post(WorkRequest { id, peer, note, payload }));
    }
}
