//! A gradient that waits for its turn.
//!
//! Invariant: of several the one with the lowest position comes first.

use std::cmp::Ordering;

use crate::{
    mem::Lease,
    types::{ChunkId, Clock},
};

/// What is to be pushed when its position is below the lane's credit.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub position: u64,
    pub chunk: ChunkId,
    pub clock: Clock,
    pub wants_reply: bool,
    /// `None`: absent.
    pub gradient: Option<Lease>,
}

impl Ord for Outgoing {
    /// The heap's greatest is the lowest position.
    fn cmp(&self, other: &Outgoing) -> Ordering {
        other.position.cmp(&self.position)
    }
}

impl PartialOrd for Outgoing {
    fn partial_cmp(&self, other: &Outgoing) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Outgoing {
    fn eq(&self, other: &Outgoing) -> bool {
        self.position == other.position
    }
}

impl Eq for Outgoing {}
