//! What two ends of the shared-memory fabric say over their socket once they know each other: 16 bytes, some with descriptors.
//!
//! Invariant: `decode(encode(message)) == message`; fields that a message does not use are zero, and anything else is refused.

use super::{
    WireError,
    note::{u32_at, u64_at},
};

/// A message beside the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareMessage {
    /// The ring that the receiver of this message writes to; one descriptor.
    Ring,
    /// A region whose armed slots the receiver of this message may write; one descriptor.
    Region {
        /// The sender's key of the region; never 0.
        rkey: u32,
        /// Bytes of the region; never 0.
        len: u64,
    },
    /// Look at the rings; no descriptor.
    Wake,
}

impl ShareMessage {
    /// Bytes of an encoded message.
    pub const SIZE: usize = 16;

    /// How many descriptors travel with it.
    pub const fn descriptors(&self) -> usize {
        match self {
            ShareMessage::Ring | ShareMessage::Region { .. } => 1,
            ShareMessage::Wake => 0,
        }
    }

    /// The message's bytes; all integers little-endian.
    pub fn encode(&self) -> [u8; ShareMessage::SIZE] {
        let (kind, rkey, len) = match *self {
            ShareMessage::Ring => (1u32, 0, 0),
            ShareMessage::Region { rkey, len } => (2, rkey, len),
            ShareMessage::Wake => (3, 0, 0),
        };
        let mut bytes = [0; ShareMessage::SIZE];
        bytes[0..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&rkey.to_le_bytes());
        bytes[8..16].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8]) -> Result<ShareMessage, WireError> {
        let got = bytes.len();
        if got < ShareMessage::SIZE {
            return Err(WireError::Short { what: "a share message", needed: ShareMessage::SIZE, got });
        }
        if got > ShareMessage::SIZE {
            let limit = ShareMessage::SIZE as u64;
            return Err(WireError::TooLarge { field: "length of a share message", value: got as u64, limit });
        }
        let (kind, rkey, len) = (u32_at(bytes, 0), u32_at(bytes, 4), u64_at(bytes, 8));
        let message = match kind {
            1 => ShareMessage::Ring,
            2 => ShareMessage::Region { rkey, len },
            3 => ShareMessage::Wake,
            _ => return Err(WireError::Unassigned { field: "kind of a share message", value: kind.into() }),
        };
        let is_region = matches!(message, ShareMessage::Region { .. });
        if is_region != (rkey != 0) {
            return Err(WireError::Unassigned { field: "rkey of a share message", value: rkey.into() });
        }
        if is_region != (len != 0) {
            return Err(WireError::Unassigned { field: "length in a share message", value: len });
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn round_trip() {
        for message in [ShareMessage::Ring, ShareMessage::Wake, ShareMessage::Region { rkey: 1, len: u64::MAX }] {
            assert_eq!(ShareMessage::decode(&message.encode()), Ok(message));
        }
    }

    proptest! {
        /// One encoding for each meaning: what can be read is what would have been written.
        #[test]
        fn what_decodes_is_what_encodes(kind in 0u32..6, rkey in 0u32..3, len in 0u64..3, cut in 0usize..18) {
            let mut bytes = [kind.to_le_bytes(), rkey.to_le_bytes()].concat();
            bytes.extend(len.to_le_bytes());
            bytes.resize(cut, 0);
            match ShareMessage::decode(&bytes) {
                Ok(message) => prop_assert_eq!(&message.encode()[..], &bytes[..]),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}
