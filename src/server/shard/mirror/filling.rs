//! Filling a backup that has nothing, while training goes on: what was changed in the past first, then the state, chunk by chunk.
//!
//! Invariant: the parts of a chunk that a backup gets are all of one clock, and its sums follow from that clock on.

use super::*;

impl Shard {
    /// A backup that has nothing is there.
    pub(super) fn begin_to_fill(&mut self) {
        let mirror = self.mirror.as_mut().expect("the caller has looked");
        mirror.stage = Stage::Greeting;
        for worker in 0..self.contributors.len() {
            if self.contributors[worker].said_goodbye {
                let version = self.contributors[worker].membership.joined_by();
                let note = Note { chunk: ChunkId(worker as u32), version, ..Note::new(NoteKind::Left) };
                self.write_down(note, None, Then::Nothing);
            }
        }
        self.greet_with_decisions();
        self.effects.push_back(Effect::TellChanges);
    }

    /// The changes of the past have been told to a backup that has nothing: the state follows.
    pub fn begin_copying(&mut self) {
        if let Some(mirror) = self.mirror.as_mut().filter(|mirror| mirror.stage == Stage::Greeting) {
            mirror.stage = Stage::Filling { place: 0, part: 0 };
            self.fill();
        }
    }

    /// Copies the next part of the state for a backup that has nothing, if one is to be copied and there is room.
    pub(in super::super) fn fill(&mut self) {
        let Some(Mirror { stage: Stage::Filling { place, part }, pool, .. }) = &mut self.mirror else { return };
        let (place, part) = (*place, *part);
        if place == self.chunks.len() {
            return self.pair();
        }
        let chunk = &self.chunks[place];
        if chunk.busy || chunk.reduced.is_some() {
            return; // its computation looks here again when it is done
        }
        let Some(lease) = pool.pop() else { return };
        let (id, clock) = (chunk.id, chunk.gate.slowest());
        let work = Work::new(Task::CopyOut(Part::ALL[part]), id, clock);
        let contributions = self.spare.pop().unwrap_or_default();
        self.compute(place, Work { contributions, sum: Some(lease), version: chunk.version, ..work });
    }

    /// A part of the state has been copied.
    pub(in super::super) fn copied_out(&mut self, index: usize, work: Work, part: Part) {
        let sum = work.sum.expect("a copy has somewhere to go");
        let mirror = self.mirror.as_mut().expect("only a mirror copies");
        let is_awaited = mirror.stage == Stage::Filling { place: index, part: part as usize };
        if !is_awaited {
            mirror.pool.push(sum); // the backup was lost meanwhile
            return;
        }
        let next = match part as usize + 1 {
            next if next < mirror.parts => Stage::Filling { place: index, part: next },
            _ => Stage::Filling { place: index + 1, part: 0 },
        };
        mirror.stage = next;
        let length = self.chunks[index].len * 4;
        let (chunk, clock) = (work.chunk, work.clock);
        let note = Note {
            chunk,
            clock,
            weight: part as u16,
            version: work.version,
            credit: work.steps,
            length,
            ..Note::new(NoteKind::State)
        };
        self.write_down(note, Some(sum.freeze()), Then::Nothing);
        self.fill();
    }

    /// Whether the chunk at `place` is being copied for the backup: no step begins before all parts of one clock are there.
    pub(in super::super) fn is_copying(&self, place: usize) -> bool {
        let stage = self.mirror.as_ref().map(|mirror| mirror.stage);
        matches!(stage, Some(Stage::Filling { place: copied, part }) if copied == place && part > 0)
    }

    /// All of the state has been copied: once the backup has it all, it may count.
    fn pair(&mut self) {
        let mirror = self.mirror.as_mut().expect("the caller has looked");
        if !std::mem::replace(&mut mirror.is_whole, true) {
            let clock = self.checkpointing.stores_next();
            return self.write_down(Note { clock, ..Note::new(NoteKind::Whole) }, None, Then::Nothing);
        }
        if mirror.sent.is_empty() {
            mirror.stage = Stage::Pairing;
            mirror.claim = Some(Claim::Pair);
        }
    }
}
