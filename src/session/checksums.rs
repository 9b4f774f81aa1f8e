//! Checksums of payloads: which fabrics' payloads carry one of ours.
//!
//! Invariant: a checksum is made of the sender's registered memory and looked at in the receiver's slot, so nothing in between
//! escapes it; a payload that does not match is never handed on.

use serde::{Deserialize, Serialize};

/// Whose payloads carry a CRC-32C from the sender's memory to the receiver's slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PayloadChecksums {
    /// Those of fabrics that have no good check of their own: tcp, whose sum has 16 bits. RDMA's invariant CRC and soft's have 32,
    /// and shared memory has no wire.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

impl PayloadChecksums {
    /// Whether payloads on this fabric carry one.
    pub fn cover(self, fabric: &str) -> bool {
        match self {
            PayloadChecksums::Auto => fabric == "tcp",
            PayloadChecksums::On => true,
            PayloadChecksums::Off => false,
        }
    }
}

/// A checksum as a note carries it: 0 there means that none was made.
pub(super) fn on_the_wire(checksum: u32) -> u32 {
    if checksum == 0 { u32::MAX } else { checksum }
}
