//! The frame: how a write travels on a byte stream. 64 bytes of header (where the payload goes, and the note), then the payload.
//!
//! Where a fabric carries headers into memory and checks what it carries by itself, they go *unsealed*: zero in the place of each of the
//! two checksums.
//!
//! Invariant: `decode(encode(header)) == header`, sealed or not; any change of a single bit of a sealed one is refused by one of the two
//! checksums; a frame names a target if and only if its note's kind has a payload.

use super::{
    Note, WireError,
    note::{u32_at, u64_at},
};

const PREFIX: usize = 16;

/// The prefix of a header without target: zeros and their checksum.
const NO_TARGET: [u8; PREFIX] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x5d, 0xb5, 0x60, 0x2b];

/// Where in the receiver's memory a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameTarget {
    /// The receiver's key of the region; never 0.
    pub rkey: u32,
    /// Offset of the first byte in the region.
    pub offset: u64,
}

/// What precedes a payload on a byte stream, or stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Where the `note.length` bytes that follow go; `None` if no payload follows.
    pub target: Option<FrameTarget>,
    /// What the write means.
    pub note: Note,
}

impl FrameHeader {
    /// Bytes of an encoded header.
    pub const SIZE: usize = PREFIX + Note::SIZE;

    /// Bytes of payload that follow the header.
    pub fn payload_bytes(&self) -> usize {
        match self.target {
            Some(_) => self.note.length as usize,
            None => 0,
        }
    }

    /// The header's bytes; all integers little-endian.
    pub fn encode(&self) -> [u8; FrameHeader::SIZE] {
        let mut bytes = [0; FrameHeader::SIZE];
        bytes[..PREFIX].copy_from_slice(&NO_TARGET);
        if let Some(target) = self.target {
            bytes[0..4].copy_from_slice(&target.rkey.to_le_bytes());
            bytes[4..12].copy_from_slice(&target.offset.to_le_bytes());
            let checksum = crc32c::crc32c(&bytes[..12]);
            bytes[12..PREFIX].copy_from_slice(&checksum.to_le_bytes());
        }
        bytes[PREFIX..].copy_from_slice(&self.note.encode());
        bytes
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; FrameHeader::SIZE]) -> Result<FrameHeader, WireError> {
        if bytes[..PREFIX] != NO_TARGET && u32_at(bytes, 12) != crc32c::crc32c(&bytes[..12]) {
            return Err(WireError::Checksum("frame prefix"));
        }
        let note = Note::decode(&note_of(bytes))?;
        FrameHeader::join(bytes, note)
    }

    /// The header's bytes with zero for both checksums.
    #[inline]
    pub fn encode_unsealed(&self) -> [u8; FrameHeader::SIZE] {
        let mut bytes = [0; FrameHeader::SIZE];
        if let Some(target) = self.target {
            bytes[0..4].copy_from_slice(&target.rkey.to_le_bytes());
            bytes[4..12].copy_from_slice(&target.offset.to_le_bytes());
        }
        bytes[PREFIX..].copy_from_slice(&self.note.encode_fields());
        bytes
    }

    /// Reads a header that has zero for both checksums.
    #[inline]
    pub fn decode_unsealed(bytes: &[u8; FrameHeader::SIZE]) -> Result<FrameHeader, WireError> {
        for (at, field) in [(12, "checksum of an unsealed frame prefix"), (60, "checksum of an unsealed note")] {
            let value = u32_at(bytes, at);
            if value != 0 {
                return Err(WireError::Unassigned { field, value: value.into() });
            }
        }
        let note = Note::decode_fields(&note_of(bytes))?;
        FrameHeader::join(bytes, note)
    }

    /// The header whose note has been read.
    #[inline]
    fn join(bytes: &[u8; FrameHeader::SIZE], note: Note) -> Result<FrameHeader, WireError> {
        let target = FrameTarget { rkey: u32_at(bytes, 0), offset: u64_at(bytes, 4) };
        if note.kind.has_payload() {
            if target.rkey == 0 {
                return Err(WireError::Unassigned { field: "rkey of a note with payload", value: 0 });
            }
            return Ok(FrameHeader { target: Some(target), note });
        }
        // One encoding per meaning: bytes that nobody reads would be a place to hide a mistake in.
        if target.rkey != 0 {
            return Err(WireError::Unassigned { field: "rkey of a note without payload", value: target.rkey.into() });
        }
        if target.offset != 0 {
            return Err(WireError::Unassigned { field: "offset of a note without payload", value: target.offset });
        }
        Ok(FrameHeader { target: None, note })
    }
}

#[inline]
fn note_of(bytes: &[u8; FrameHeader::SIZE]) -> [u8; Note::SIZE] {
    bytes[PREFIX..].try_into().expect("a header is a prefix and a note")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::NoteKind;

    fn any_header() -> impl Strategy<Value = FrameHeader> {
        any::<(bool, u32, u64, u32, u64)>().prop_map(|(payload, rkey, offset, length, clock)| {
            let kind = if payload { NoteKind::Push } else { NoteKind::Heartbeat };
            let length = if payload { length } else { 0 };
            let target = payload.then_some(FrameTarget { rkey: rkey.max(1), offset });
            FrameHeader { target, note: Note { length, clock, ..Note::new(kind) } }
        })
    }

    proptest! {
        #[test]
        fn round_trip(header in any_header()) {
            prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
            prop_assert_eq!(FrameHeader::decode_unsealed(&header.encode_unsealed()), Ok(header));
        }

        #[test]
        fn any_flipped_bit_is_refused(header in any_header(), bit in 0usize..FrameHeader::SIZE * 8) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let part = if bit / 8 < PREFIX { "frame prefix" } else { "note" };
            prop_assert_eq!(FrameHeader::decode(&bytes), Err(WireError::Checksum(part)));
        }
    }

    proptest! {
        /// Whatever lies in a ring: it is refused, or it is what would have been written.
        #[test]
        fn what_decodes_unsealed_is_what_encodes(header in any_header(), spoilt in prop::collection::vec(any::<(u8, u8)>(), 0..4)) {
            let mut bytes = header.encode_unsealed();
            for (place, value) in spoilt {
                bytes[usize::from(place) % FrameHeader::SIZE] = value;
            }
            if let Ok(header) = FrameHeader::decode_unsealed(&bytes) {
                prop_assert_eq!(header.encode_unsealed(), bytes);
            }
        }
    }

    #[test]
    fn sealed_and_unsealed_are_told_apart() {
        let header = FrameHeader { target: None, note: Note::new(NoteKind::Heartbeat) };
        assert!(matches!(FrameHeader::decode_unsealed(&header.encode()), Err(WireError::Unassigned { .. })));
        assert_eq!(FrameHeader::decode(&header.encode_unsealed()), Err(WireError::Checksum("frame prefix")));
    }

    #[test]
    fn the_prefix_without_target_has_its_checksum() {
        assert_eq!(u32_at(&NO_TARGET, 12), crc32c::crc32c(&NO_TARGET[..12]));
    }

    #[test]
    fn a_target_and_a_payload_come_together_or_not_at_all() {
        let target = Some(FrameTarget { rkey: 1, offset: 0 });
        let idle = FrameHeader { target, note: Note::new(NoteKind::Heartbeat) };
        assert!(matches!(FrameHeader::decode(&idle.encode()), Err(WireError::Unassigned { value: 1, .. })));
        let nowhere = FrameHeader { target: None, note: Note { length: 8, ..Note::new(NoteKind::Push) } };
        assert!(matches!(FrameHeader::decode(&nowhere.encode()), Err(WireError::Unassigned { value: 0, .. })));
    }
}
