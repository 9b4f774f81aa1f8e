//! Who serves a shard, and since when: what replicas agree on before anything else.
//!
//! With two copies every shard has a *pair* of lanes: the lane of its own server, and a further lane of the next one. One of them
//! serves (the primary), the other follows (the backup). A *tenure* says which, in which epoch, and whether the other one holds all
//! that the first has acknowledged. It changes by a [`Claim`] of one of the two alone, one at a time: the store
//! compares the epoch that the claimant knows with the present one.
//!
//! Invariant: a tenure is followed by one of the next epoch, and by one only; only a backup that has everything takes over.

use serde::{Deserialize, Serialize};

use crate::types::{Epoch, PeerId, Rank, ShardId};

/// Who serves a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenure {
    /// Counts the tenures of this shard.
    pub epoch: Epoch,
    /// The lane that serves.
    pub primary: PeerId,
    /// Whether the other lane of the pair holds everything that workers have been told of: then, and only then, it may take over.
    pub is_paired: bool,
}

/// What one of a shard's two lanes wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// The backup: to serve from now on, alone, since the primary is gone.
    TakeOver,
    /// The primary: to go on alone, since the backup is gone.
    GoAlone,
    /// The primary: the other one has everything again.
    Pair,
}

/// The lanes of a shard with two copies: that of its own server, and a further one of the next server.
pub fn pair(shard: ShardId, servers: u16, shards_per_server: u16) -> [PeerId; 2] {
    let (server, lane) = (shard.0 / shards_per_server, shard.0 % shards_per_server);
    [PeerId::server(server, lane), PeerId::server((server + 1) % servers, shards_per_server + lane)]
}

/// The shard that a lane is one of the pair of.
pub fn shard_of(lane: PeerId, servers: u16, shards_per_server: u16) -> ShardId {
    let server = match lane.lane < shards_per_server {
        true => lane.rank.index,
        false => (lane.rank.index + servers - 1) % servers,
    };
    ShardId(server * shards_per_server + lane.lane % shards_per_server)
}

impl Tenure {
    /// How a job begins: the first lane of the pair serves, and both hold the same first values.
    pub fn first(pair: [PeerId; 2]) -> Tenure {
        Tenure { epoch: 0, primary: pair[0], is_paired: true }
    }

    /// The lane that does not serve.
    pub fn other(&self, pair: [PeerId; 2]) -> PeerId {
        if self.primary == pair[0] { pair[1] } else { pair[0] }
    }

    /// Whether a rank has a part in it: it serves, or could take over.
    pub fn needs(&self, rank: Rank, pair: [PeerId; 2]) -> bool {
        self.primary.rank == rank || (self.is_paired && self.other(pair).rank == rank)
    }

    /// The tenure that follows if `claimant`, who knows of `epoch`, has its way.
    ///
    /// # Errors
    ///
    /// Why it cannot: somebody was faster, or it is not the claimant's to claim.
    pub fn after(&self, pair: [PeerId; 2], claimant: PeerId, epoch: Epoch, claim: Claim) -> Result<Tenure, String> {
        if epoch != self.epoch {
            return Err(format!("epoch {epoch} is over: it is {}", self.epoch));
        }
        let epoch = epoch + 1;
        let serves = claimant == self.primary;
        match claim {
            Claim::TakeOver if claimant == self.other(pair) && self.is_paired => {
                Ok(Tenure { epoch, primary: claimant, is_paired: false })
            }
            Claim::GoAlone if serves && self.is_paired => Ok(Tenure { epoch, is_paired: false, ..*self }),
            Claim::Pair if serves && !self.is_paired => Ok(Tenure { epoch, is_paired: true, ..*self }),
            _ => Err(format!("{claimant} may not claim that (it is served by {}, {})", self.primary, self.state())),
        }
    }

    fn state(&self) -> &'static str {
        if self.is_paired { "with a backup" } else { "alone" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lane_is_of_one_pair_and_no_pair_is_on_one_server() {
        for (servers, shards_per_server) in [(2, 1), (3, 2), (5, 4)] {
            let mut seen = std::collections::BTreeSet::new();
            for shard in (0..servers * shards_per_server).map(ShardId) {
                let lanes = pair(shard, servers, shards_per_server);
                assert_ne!(lanes[0].rank, lanes[1].rank);
                assert!(lanes.iter().all(|lane| shard_of(*lane, servers, shards_per_server) == shard));
                assert!(lanes.into_iter().all(|lane| seen.insert(lane)), "{lanes:?} twice");
            }
        }
    }

    #[test]
    fn of_two_claims_of_one_epoch_one_is_granted() {
        let lanes = pair(ShardId(0), 2, 1);
        let first = Tenure::first(lanes);
        let taken = first.after(lanes, lanes[1], 0, Claim::TakeOver).unwrap();
        assert_eq!((taken.epoch, taken.primary, taken.is_paired), (1, lanes[1], false));
        assert!(taken.after(lanes, lanes[0], 0, Claim::GoAlone).is_err(), "the epoch is over");
        assert!(taken.after(lanes, lanes[0], 1, Claim::TakeOver).is_err(), "it has not everything");
        assert!(taken.after(lanes, lanes[0], 1, Claim::Pair).is_err(), "only who serves knows that");
        let again = taken.after(lanes, lanes[1], 1, Claim::Pair).unwrap();
        assert!(again.is_paired && again.needs(lanes[0].rank, lanes));
        let alone = again.after(lanes, lanes[1], 2, Claim::GoAlone).unwrap();
        assert!(!alone.needs(lanes[0].rank, lanes));
        assert!(alone.after(lanes, lanes[0], 3, Claim::TakeOver).is_err());
    }
}
