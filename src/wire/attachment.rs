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

    /// Reads it from a note of kind `Attach`. Sums of its offset and any length in memory do not overflow.
    pub fn from_note(note: &Note) -> Result<Attachment, WireError> {
        let rkey =
            u32::try_from(note.version).map_err(|_| WireError::Unassigned { field: "rkey", value: note.version })?;
        let bytes = u64::from(note.chunk.0) * u64::from(note.length);
        if note.clock.checked_add(bytes).is_none_or(|end| end > i64::MAX as u64) {
            return Err(WireError::Unassigned { field: "offset", value: note.clock });
        }
        Ok(Attachment { rkey, offset: note.clock, slot_bytes: note.length, slots: note.chunk.0, credit: note.credit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum of such an offset and a chunk's own overflowed in the thread of a shard.
    #[test]
    fn an_offset_beyond_all_memory_is_refused() {
        let attachment = Attachment { rkey: 1, offset: 1 << 40, slot_bytes: 1 << 20, slots: 8, credit: 3 };
        assert_eq!(Attachment::from_note(&attachment.to_note()), Ok(attachment));
        for offset in [u64::MAX, i64::MAX as u64, 1 << 63] {
            assert!(Attachment::from_note(&Attachment { offset, ..attachment }.to_note()).is_err());
        }
    }
}
