//! What a shared-memory transport is told at its birth.
//!
//! Invariant: there is nothing to choose that could let another user in.
#![forbid(unsafe_code)]

use crate::wire::handshake::Identity;

/// How to make a [`super::ShmTransport`].
#[derive(Clone, Debug)]
pub struct ShmOptions {
    /// Job, token, epoch and our own name: what both ends of a path prove to each other.
    pub identity: Identity,
    /// Requests that may wait for room in one peer's ring before `post` answers `QueueFull`.
    pub queue_limit: usize,
}

impl ShmOptions {
    /// Up to 4,096 requests queued to a peer, beside the 1,024 in its ring.
    pub fn new(identity: Identity) -> ShmOptions {
        ShmOptions { identity, queue_limit: 4096 }
    }
}
