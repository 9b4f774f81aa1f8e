//! Who serves a shard, and since when: what its lanes agree on before anything else.
//!
//! One lane of a shard serves (the primary); another one may follow (the backup). With two copies these are a fixed *pair*: the lane
//! of the shard's own server, and a further lane of the next one. Where shards move, the launcher names the lane that is to follow
//! ([`Tenure::given_to`]), and that one serves as soon as it has everything. A *tenure* says who serves and who follows, in which
//! epoch, and whether the other one holds all that the first has acknowledged. It changes by a [`Claim`] of one of the two, or by the
//! launcher's word, one at a time: the store compares the epoch that is known with the present one.
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
    /// The lane that follows, or is to; nobody's while a shard that may move stays where it is.
    pub other: Option<PeerId>,
    /// Whether the other lane holds everything that workers have been told of: then, and only then, it may take over.
    pub is_paired: bool,
}

/// What one of a shard's two lanes wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// The backup: to serve from now on, alone, since the primary is gone.
    TakeOver,
    /// The primary: to go on alone, since the backup is gone, or to know that it is alone.
    GoAlone,
    /// The primary: the other one has everything.
    Pair,
    /// The lane to which the shard moves: to serve from now on, and the one before is done.
    Succeed,
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
        Tenure { epoch: 0, primary: pair[0], other: Some(pair[1]), is_paired: true }
    }

    /// How a job begins whose shards may move: nobody follows.
    pub fn alone(lane: PeerId) -> Tenure {
        Tenure { epoch: 0, primary: lane, other: None, is_paired: false }
    }

    /// Whether a lane has a part in it: it serves, or follows, or is to.
    pub fn names(&self, lane: PeerId) -> bool {
        self.primary == lane || self.other == Some(lane)
    }

    /// Whether a lane of this rank has a part in it.
    pub fn names_rank(&self, rank: Rank) -> bool {
        self.primary.rank == rank || self.other.is_some_and(|other| other.rank == rank)
    }

    /// Whether a rank has a part in it that counts: it serves, or could take over.
    pub fn needs(&self, rank: Rank) -> bool {
        self.primary.rank == rank || (self.is_paired && self.other.is_some_and(|other| other.rank == rank))
    }

    /// The tenure that follows when the launcher has another lane follow, or none: not while one is counted on.
    pub fn given_to(&self, other: Option<PeerId>) -> Option<Tenure> {
        let may = !self.is_paired && self.other != other && other != Some(self.primary);
        may.then_some(Tenure { epoch: self.epoch + 1, other, ..*self })
    }

    /// The tenure that follows if `claimant`, who knows of `epoch`, has its way.
    ///
    /// # Errors
    ///
    /// Why it cannot: somebody was faster, or it is not the claimant's to claim.
    pub fn after(&self, claimant: PeerId, epoch: Epoch, claim: Claim) -> Result<Tenure, String> {
        if epoch != self.epoch {
            return Err(format!("epoch {epoch} is over: it is {}", self.epoch));
        }
        let epoch = epoch + 1;
        let serves = claimant == self.primary;
        let has_all = self.other == Some(claimant) && self.is_paired;
        match claim {
            Claim::TakeOver if has_all => {
                Ok(Tenure { epoch, primary: claimant, other: Some(self.primary), is_paired: false })
            }
            Claim::Succeed if has_all => Ok(Tenure { epoch, ..Tenure::alone(claimant) }),
            // Where nobody counts, too: whatever else was asked of this epoch comes to nothing then.
            Claim::GoAlone if serves && self.other.is_some() => Ok(Tenure { epoch, is_paired: false, ..*self }),
            Claim::Pair if serves && self.other.is_some() && !self.is_paired => {
                Ok(Tenure { epoch, is_paired: true, ..*self })
            }
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
        let taken = first.after(lanes[1], 0, Claim::TakeOver).unwrap();
        assert_eq!(taken, Tenure { epoch: 1, primary: lanes[1], other: Some(lanes[0]), is_paired: false });
        assert!(taken.after(lanes[0], 0, Claim::GoAlone).is_err(), "the epoch is over");
        assert!(taken.after(lanes[0], 1, Claim::TakeOver).is_err(), "it has not everything");
        assert!(taken.after(lanes[0], 1, Claim::Pair).is_err(), "only who serves knows that");
        let again = taken.after(lanes[1], 1, Claim::Pair).unwrap();
        assert!(again.is_paired && again.needs(lanes[0].rank));
        let alone = again.after(lanes[1], 2, Claim::GoAlone).unwrap();
        assert!(!alone.needs(lanes[0].rank));
        assert!(alone.after(lanes[0], 3, Claim::TakeOver).is_err());
        let known = alone.after(lanes[1], 3, Claim::GoAlone).unwrap();
        assert_eq!(known, Tenure { epoch: 4, ..alone });
        assert!(known.after(lanes[1], 3, Claim::Pair).is_err(), "a claim whose answer was lost comes to nothing");
    }

    #[test]
    fn a_shard_moves_to_whom_the_launcher_names_and_only_with_everything() {
        let [from, to] = [0, 1].map(|server| PeerId::server(server, 0));
        let first = Tenure::alone(from);
        assert!(first.after(from, 0, Claim::Pair).is_err(), "nobody follows");
        assert_eq!(first.given_to(Some(from)), None);
        let given = first.given_to(Some(to)).unwrap();
        assert!(given.epoch == 1 && given.names(to) && !given.needs(to.rank));
        assert!(given.after(to, 1, Claim::Succeed).is_err(), "it has not everything");
        assert_eq!(given.given_to(None).map(|tenure| tenure.epoch), Some(2));
        let paired = given.after(from, 1, Claim::Pair).unwrap();
        assert_eq!(paired.given_to(None), None, "it is counted on");
        let moved = paired.after(to, 2, Claim::Succeed).unwrap();
        assert_eq!(moved, Tenure { epoch: 3, ..Tenure::alone(to) });
        assert!(!moved.names(from));
    }
}
