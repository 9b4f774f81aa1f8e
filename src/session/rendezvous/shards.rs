//! What is told of shards whose servers may change.
//!
//! Invariant: it says what the store has granted, not what somebody has claimed.

use serde::{Deserialize, Serialize};

use crate::types::{Epoch, Rank, ShardId};

/// A shard that has two copies or may move, as the launcher sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// Which.
    pub shard: ShardId,
    /// Counts its tenures.
    pub epoch: Epoch,
    /// The server that serves it.
    pub primary: Rank,
    /// The server of the other copy, or to which the shard moves.
    pub backup: Option<Rank>,
    /// The other copy: "complete" (it may take over), "catching up" or "gone"; "none" while a shard that may move stays.
    pub backup_state: String,
    /// Shards move between servers, and have one copy otherwise.
    #[serde(default)]
    pub moves: bool,
}

impl ShardStatus {
    /// Whether the other copy may take over.
    pub fn has_backup(&self) -> bool {
        self.backup_state == "complete"
    }
}

/// How far a job is on its way to another number of servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    /// Shards that have moved.
    pub moved: u32,
    /// Shards that are to move in all.
    pub moves: u32,
    /// The shard that has just moved, and to whom; nothing as it begins.
    pub shard: Option<(ShardId, Rank)>,
}
