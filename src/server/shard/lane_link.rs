//! What goes between two shards: notes that must arrive exactly once, each way.
//!
//! Invariant: notes leave in the order of sending; after a path has been rebuilt none leaves before those that the other end lacks.

use super::*;
use crate::consistency::Unproven;

/// One shard's end of what lies between it and another.
#[derive(Debug, Default)]
pub(super) struct LaneLink {
    /// Notes of the other that have come, over all paths.
    received: u64,
    sent: Unproven<Note>,
    /// The path has been rebuilt, and the other has not said yet what it has.
    resuming: bool,
}

impl Shard {
    /// Another path to a lane is there: it is told how many of its notes have come.
    pub fn resume_lane(&mut self, lane: PeerId) {
        self.recall(lane);
        let link = self.links.entry(lane).or_default();
        link.resuming = true;
        let credit = link.received;
        self.post(lane, Note { credit, ..Note::new(NoteKind::Resume) }, None);
    }

    /// Sends a note that must arrive exactly once.
    pub(super) fn post_lane(&mut self, lane: PeerId, note: Note) {
        let link = self.links.entry(lane).or_default();
        link.sent.push(note);
        if !link.resuming {
            self.post(lane, note, None);
        }
    }

    /// A note of another shard.
    pub(super) fn on_lane_note(&mut self, from: PeerId, note: &Note) -> Result<()> {
        let link = self.links.entry(from).or_default();
        if note.kind == NoteKind::Resume {
            if !link.resuming || !link.sent.allows(note.credit) {
                return Err(protocol(from, format!("it says to have {} notes of ours", note.credit)));
            }
            link.resuming = false;
            while link.sent.prove(note.credit).is_some() {}
            let again: Vec<Note> = link.sent.iter().copied().collect();
            again.into_iter().for_each(|note| self.post(from, note, None));
            return Ok(());
        }
        link.received += 1;
        // A decision answers all measures of its clock; a measure of the next clock follows upon it.
        let is_answered = |sent: &Note| match (sent.kind, note.kind) {
            (NoteKind::Measured, NoteKind::Decided) => sent.clock <= note.clock,
            (NoteKind::Decided, NoteKind::Measured) => sent.clock < note.clock,
            (_, NoteKind::Goodbye) => true,
            _ => false,
        };
        while link.sent.front().is_some_and(is_answered) {
            link.sent.prove(u64::MAX);
        }
        self.on_decision_note(from, note)
    }
}
