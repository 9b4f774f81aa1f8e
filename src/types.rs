//! The words that every layer shares: who (ranks, lanes), what (chunks, shards), when (clocks, versions, epochs), and in which
//! number format.
//!
//! Invariant: plain values with fixed sizes; nothing here does I/O, holds memory or knows a protocol.
#![forbid(unsafe_code)]

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use serde::{Deserialize, Serialize};

/// What a process of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds shards of the parameters and of the optimizer state.
    Server,
    /// Computes gradients.
    Worker,
}

/// A process of a job: servers and workers are counted separately, both from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rank {
    /// Server or worker.
    pub role: Role,
    /// Its number within its role.
    pub index: u16,
}

impl Rank {
    /// Server number `index`.
    pub const fn server(index: u16) -> Rank {
        Rank { role: Role::Server, index }
    }

    /// Worker number `index`.
    pub const fn worker(index: u16) -> Rank {
        Rank { role: Role::Worker, index }
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Server => "server",
            Role::Worker => "worker",
        };
        write!(f, "{role} {}", self.index)
    }
}

/// One end of a path: a rank and, for a server, the lane (shard thread) of it. A worker has lane 0 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerId {
    /// The process.
    pub rank: Rank,
    /// The thread of that process which owns the path.
    pub lane: u16,
}

impl Hash for PeerId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // One word instead of three: peers are looked up for every write.
        state.write_u64(self.to_bits());
    }
}

impl PeerId {
    /// Lane `lane` of server `index`.
    pub const fn server(index: u16, lane: u16) -> PeerId {
        PeerId { rank: Rank::server(index), lane }
    }

    /// Worker `index`.
    pub const fn worker(index: u16) -> PeerId {
        PeerId { rank: Rank::worker(index), lane: 0 }
    }

    /// The form in which a peer travels: role (bit 32), index (bits 16 to 31), lane (bits 0 to 15).
    pub const fn to_bits(self) -> u64 {
        let role = match self.rank.role {
            Role::Server => 0,
            Role::Worker => 1,
        };
        (role << 32) | ((self.rank.index as u64) << 16) | self.lane as u64
    }

    /// The inverse of [`PeerId::to_bits`]; `None` if the bits name no peer.
    pub const fn from_bits(bits: u64) -> Option<PeerId> {
        let role = match bits >> 32 {
            0 => Role::Server,
            1 => Role::Worker,
            _ => return None,
        };
        Some(PeerId { rank: Rank { role, index: (bits >> 16) as u16 }, lane: bits as u16 })
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank.role {
            Role::Server if self.lane > 0 => write!(f, "{} lane {}", self.rank, self.lane),
            _ => write!(f, "{}", self.rank),
        }
    }
}

/// A part of the model that one server thread owns; shards are numbered over the whole job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u16);

/// The unit of transfer, aggregation, versioning and checkpointing; chunks are numbered in layout order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkId(pub u32);

impl ChunkId {
    /// The chunk's number as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// How many steps a worker has begun: its first push carries clock 0.
pub type Clock = u64;

/// How many times a chunk has been brought up to date: 0 is the initial state; under `Aggregate` version = clock + 1.
pub type Version = u64;

/// A membership of the job. Constant (0) as long as membership cannot change.
pub type Epoch = u32;

/// A number format on the wire or in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

const _: () = assert!(size_of::<Rank>() == 4 && size_of::<PeerId>() == 6 && size_of::<ChunkId>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_bits_round_trip() {
        for peer in [PeerId::server(0, 0), PeerId::server(65535, 7), PeerId::worker(3), PeerId::worker(65535)] {
            assert_eq!(PeerId::from_bits(peer.to_bits()), Some(peer));
        }
        assert_eq!(PeerId::from_bits(2 << 32), None);
        assert_eq!(PeerId::from_bits(u64::MAX), None);
    }
}
