//! What an `Attach` note says: where its receiver may write.
//!
//! A server lane tells each worker its landing slots; a worker tells each lane where its parameters lie.
//!
//! Invariant: `from_note(to_note(a)) == a`.

use super::{Note, NoteKind, WireError};
use crate::types::ChunkId;

/// A range of the sender's memory that the receiver may write to, once armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The sender's key of the region.
    pub rkey: u32,
    /// Offset of the range's first byte.
    pub offset: u64,
    /// Bytes of a slot; 0 where the range is not divided into slots (a worker's parameters).
    pub slot_bytes: u32,
    /// Number of slots.
    pub slots: u32,
    /// The first window position that may not yet be pushed.
    pub credit: u64,
}

impl Attachment {
    /// The note that carries it: rkey in `version`, offset in `clock`, slots in `chunk`, slot bytes in `length`.
    pub fn to_note(self) -> Note {
        Note {
            version: self.rkey.into(),
            clock: self.offset,
            chunk: ChunkId(self.slots),
            length: self.slot_bytes,
            credit: self.credit,
            ..Note::new(NoteKind::Attach)
        }
    }

    /// Reads it from a note of kind `Attach`.
    pub fn from_note(note: &Note) -> Result<Attachment, WireError> {
        let rkey =
            u32::try_from(note.version).map_err(|_| WireError::Unassigned { field: "rkey", value: note.version })?;
        Ok(Attachment { rkey, offset: note.clock, slot_bytes: note.length, slots: note.chunk.0, credit: note.credit })
    }
}
