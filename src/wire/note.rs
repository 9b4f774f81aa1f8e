//! The note: 48 bytes that every write carries and that are delivered with its completion.
//!
//! Invariant: `decode(encode(note)) == note`, and any change of a single bit is refused by the checksum.

use super::WireError;
use crate::types::{ChunkId, Clock, Epoch, Version};

/// What a note says. The meaning of its fields depends on this; docs/wire.md has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum NoteKind {
    /// "Write here": the region and slots that the receiver of this note may write to.
    Attach = 1,
    /// A sign of life.
    Heartbeat = 2,
    /// A gradient of one chunk; the payload lies in the landing slot.
    Push = 3,
    /// The contributor has nothing to give to this chunk at this clock.
    Absent = 4,
    /// The parameters of one chunk; the payload lies in the worker's tensor.
    Parameters = 5,
    /// Asks for a chunk at a minimum version; when its time is up, what there is comes back, whatever its version.
    Pull = 6,
    /// The window moved: positions below `credit` may be pushed.
    Credit = 7,
    /// A new learning rate from a clock on.
    SetLearningRate = 8,
    /// The worker has pushed all that it ever will.
    Finished = 9,
    /// The server has taken note of `Finished` and owes the worker nothing more.
    Goodbye = 10,
    /// The squared norm of a chunk's gradient at a clock, from its shard to the one that decides.
    Measured = 11,
    /// What has been decided about the step of a clock.
    Decided = 12,
    /// The factor on the loss of a clock, from a shard to a worker.
    LossScale = 13,
    /// A path has been rebuilt: how many of its receiver's notes the sender has.
    Resume = 14,
    /// The sum of a chunk's gradients at a clock, from who serves it to the backup.
    Replica = 15,
    /// Nobody gave anything to a chunk at a clock; from who serves it to the backup.
    Passed = 16,
    /// A part of a chunk's state, for a backup that has nothing yet.
    State = 17,
    /// How many notes the backup has taken in.
    Holds = 18,
    /// A live change, from who serves a shard to the backup.
    Change = 19,
    /// A worker has finished, and all that it gave is in; from who serves a shard to the backup.
    Left = 20,
    /// The backup has been sent all of the state.
    Whole = 21,
}

impl NoteKind {
    const ALL: [NoteKind; 21] = [
        NoteKind::Attach,
        NoteKind::Heartbeat,
        NoteKind::Push,
        NoteKind::Absent,
        NoteKind::Parameters,
        NoteKind::Pull,
        NoteKind::Credit,
        NoteKind::SetLearningRate,
        NoteKind::Finished,
        NoteKind::Goodbye,
        NoteKind::Measured,
        NoteKind::Decided,
        NoteKind::LossScale,
        NoteKind::Resume,
        NoteKind::Replica,
        NoteKind::Passed,
        NoteKind::State,
        NoteKind::Holds,
        NoteKind::Change,
        NoteKind::Left,
        NoteKind::Whole,
    ];

    /// Whether a note of this kind travels with a payload.
    pub const fn has_payload(self) -> bool {
        matches!(self, NoteKind::Push | NoteKind::Parameters | NoteKind::Replica | NoteKind::State)
    }
}

impl TryFrom<u8> for NoteKind {
    type Error = WireError;

    fn try_from(value: u8) -> Result<NoteKind, WireError> {
        // In the order of their numbers, from 1 on.
        let kind = NoteKind::ALL.get(usize::from(value).wrapping_sub(1)).copied();
        kind.ok_or(WireError::Unassigned { field: "note kind", value: value.into() })
    }
}

/// Bits that refine a note.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NoteFlags(u8);

impl NoteFlags {
    /// Nothing said.
    pub const NONE: NoteFlags = NoteFlags(0);
    /// The sender of a push wants the parameters back as soon as consistency allows.
    pub const WANTS_REPLY: NoteFlags = NoteFlags(1);
    /// A pull asks once more for the reply to the push of its clock: the path that was to bring it has been rebuilt.
    pub const REPLY_AGAIN: NoteFlags = NoteFlags(2);
    /// The sender of a resume has taken over: it has everything below a position, and counts from there anew.
    pub const INHERITED: NoteFlags = NoteFlags(4);
    const ALL: u8 = 7;

    /// Whether every bit of `other` is set.
    pub const fn contains(self, other: NoteFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// All but the bits of `other`.
    pub const fn without(self, other: NoteFlags) -> NoteFlags {
        NoteFlags(self.0 & !other.0)
    }
}

/// The 48 bytes that tell the receiver what a write means. Fields that a kind does not use are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// What it says.
    pub kind: NoteKind,
    /// Refinements.
    pub flags: NoteFlags,
    /// How many workers' gradients the payload already sums (1 for a plain push).
    pub weight: u16,
    /// The chunk it is about.
    pub chunk: ChunkId,
    /// The worker's clock.
    pub clock: Clock,
    /// The version of the parameters carried or asked for.
    pub version: Version,
    /// The membership in which it was said.
    pub epoch: Epoch,
    /// Bytes of payload.
    pub length: u32,
    /// Cumulative: the first window position that may *not* yet be pushed.
    pub credit: u64,
    /// CRC-32C of the payload; 0 while payload checksums are off.
    pub payload_checksum: u32,
}

impl Note {
    /// Bytes of an encoded note.
    pub const SIZE: usize = 48;

    /// A note of `kind` with every other field zero.
    pub const fn new(kind: NoteKind) -> Note {
        Note {
            kind,
            flags: NoteFlags::NONE,
            weight: 0,
            chunk: ChunkId(0),
            clock: 0,
            version: 0,
            epoch: 0,
            length: 0,
            credit: 0,
            payload_checksum: 0,
        }
    }

    /// The note's bytes; all integers little-endian, the last four a CRC-32C of the first 44.
    pub fn encode(&self) -> [u8; Note::SIZE] {
        let mut bytes = self.encode_fields();
        let checksum = crc32c::crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a note.
    pub fn decode(bytes: &[u8; Note::SIZE]) -> Result<Note, WireError> {
        if u32_at(bytes, 44) != crc32c::crc32c(&bytes[..44]) {
            return Err(WireError::Checksum("note"));
        }
        Note::decode_fields(bytes)
    }

    /// The bytes with zero for the checksum.
    #[inline]
    pub(super) fn encode_fields(&self) -> [u8; Note::SIZE] {
        let mut bytes = [0; Note::SIZE];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags.0;
        bytes[2..4].copy_from_slice(&self.weight.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.chunk.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.clock.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.version.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.length.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.credit.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.payload_checksum.to_le_bytes());
        bytes
    }

    /// Reads all but the checksum.
    #[inline]
    pub(super) fn decode_fields(bytes: &[u8; Note::SIZE]) -> Result<Note, WireError> {
        if bytes[1] & !NoteFlags::ALL != 0 {
            return Err(WireError::Unassigned { field: "note flags", value: bytes[1].into() });
        }
        let note = Note {
            kind: NoteKind::try_from(bytes[0])?,
            flags: NoteFlags(bytes[1]),
            weight: u16::from_le_bytes([bytes[2], bytes[3]]),
            chunk: ChunkId(u32_at(bytes, 4)),
            clock: u64_at(bytes, 8),
            version: u64_at(bytes, 16),
            epoch: u32_at(bytes, 24),
            length: u32_at(bytes, 28),
            credit: u64_at(bytes, 32),
            payload_checksum: u32_at(bytes, 40),
        };
        if !note.kind.has_payload() && note.kind != NoteKind::Attach && note.length != 0 {
            return Err(WireError::Unassigned { field: "length of a note without payload", value: note.length.into() });
        }
        Ok(note)
    }
}

/// Reads a little-endian u32. The offsets in this module are constants within the array.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

/// Reads a little-endian u64.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_note() -> impl Strategy<Value = Note> {
        (0..NoteKind::ALL.len(), any::<(bool, u16, u32, u64, u64, u32, u32, u64, u32)>()).prop_map(|(kind, f)| {
            let kind = NoteKind::ALL[kind];
            Note {
                kind,
                flags: if f.0 { NoteFlags::WANTS_REPLY } else { NoteFlags::NONE },
                weight: f.1,
                chunk: ChunkId(f.2),
                clock: f.3,
                version: f.4,
                epoch: f.5,
                length: if kind.has_payload() { f.6 } else { 0 },
                credit: f.7,
                payload_checksum: f.8,
            }
        })
    }

    proptest! {
        #[test]
        fn round_trip(note in any_note()) {
            prop_assert_eq!(Note::decode(&note.encode()), Ok(note));
        }

        #[test]
        fn any_flipped_bit_is_refused(note in any_note(), bit in 0usize..Note::SIZE * 8) {
            let mut bytes = note.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Note::decode(&bytes), Err(WireError::Checksum("note")));
        }

        #[test]
        fn random_bytes_never_panic(bytes in any::<[u8; 32]>()) {
            let mut note = [0; Note::SIZE];
            note[..32].copy_from_slice(&bytes);
            let checksum = crc32c::crc32c(&note[..44]);
            note[44..].copy_from_slice(&checksum.to_le_bytes());
            let _ = Note::decode(&note);
        }
    }
}
