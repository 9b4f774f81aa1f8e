//! Bytes to types and back: notes, frames, handshake, endpoints. No I/O.
//!
//! Invariant: decoding never panics, never allocates in proportion to a length that it read, and refuses what it cannot name.
//! The byte tables stand in docs/wire.md.
#![forbid(unsafe_code)]

mod attachment;
mod endpoint;
mod frame;
pub mod handshake;
mod note;
mod share;
mod token;

pub use attachment::Attachment;
pub use endpoint::{ADDRESSES_MAX, format_addresses, parse_addresses, split_incarnation, with_incarnation};
pub use frame::{FrameHeader, FrameTarget};
pub use note::{Note, NoteFlags, NoteKind};
pub use share::ShareMessage;
pub(crate) use token::random_bytes;
pub use token::{JobToken, job_id};

/// Why bytes could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A checksum does not match: the bytes were damaged, or are not ours.
    #[error("the checksum of the {0} does not match")]
    Checksum(&'static str),
    /// A field has a value that nothing is assigned to.
    #[error("{field} has the unassigned value {value}")]
    Unassigned {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// Fewer bytes than the structure needs.
    #[error("{what} needs {needed} bytes and has {got}")]
    Short {
        /// Which structure.
        what: &'static str,
        /// Its size or minimum.
        needed: usize,
        /// What was there.
        got: usize,
    },
    /// A length or count beyond its limit.
    #[error("{field} is {value}, the limit is {limit}")]
    TooLarge {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
        /// What is allowed.
        limit: u64,
    },
}
