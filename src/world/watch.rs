//! What must be so at every moment of a job whose shards have two copies.
//!
//! Invariant: it only looks; a world that is watched goes on as one that is not.

use super::*;
use crate::types::Epoch;

/// What has been seen so far.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// By shard and epoch: the lane that served, and its life.
    primaries: BTreeMap<(usize, Epoch), (PeerId, u64)>,
    /// By backup and chunk: the last clock at which it was compared with its primary.
    compared: BTreeMap<(PeerId, ChunkId), Clock>,
}

impl World<'_> {
    /// One lane serves a shard in an epoch, and a backup that counts has the bits of its primary wherever both have come to the same
    /// clock.
    pub(super) fn watch_copies(&mut self) -> Result<(), String> {
        if !self.options.has_tenures() {
            return Ok(());
        }
        for node in &self.servers {
            let Some(replica) = node.replica.as_ref().filter(|replica| replica.served().is_some()) else { continue };
            let (epoch, who) = (replica.tenure().epoch, (node.me, self.copies.life(node.me)));
            let known = *self.watch.primaries.entry((node.shard, epoch)).or_insert(who);
            if known != who {
                return Err(format!("shard {}: {who:?} serves in epoch {epoch}, and {known:?} did", node.shard));
            }
        }
        (0..usize::from(self.options.servers)).try_for_each(|shard| self.compare_copies(shard))
    }

    /// When all is done nobody follows who counts and whom nobody knows of, or no shard would move any more.
    pub(super) fn watch_the_end(&self) -> Result<(), String> {
        let copies = &self.copies;
        let is_stuck = |(shard, tenure): (usize, &Tenure)| {
            let serves =
                self.servers.iter().filter(|node| node.shard == shard).filter_map(|node| node.replica.as_ref());
            let serving =
                serves.filter(|replica| replica.served().is_some()).max_by_key(|replica| replica.tenure().epoch);
            tenure.is_paired && serving.is_some_and(|replica| replica.tenure() == *tenure)
        };
        match self.options.moves && copies.tenures.iter().enumerate().any(is_stuck) {
            true => Err(format!("a shard has two lanes that count, and goes nowhere: {}", self.standing())),
            false => Ok(()),
        }
    }

    /// Who serves and who follows, in words.
    pub(super) fn standing(&self) -> String {
        let lane = |node: &Node| {
            let part = match &node.replica {
                None => "is gone".into(),
                Some(replica) => match replica.followed() {
                    None => format!("serves in epoch {}", replica.tenure().epoch),
                    Some(standby) => format!("follows {}, paired: {}", standby.primary(), standby.is_paired()),
                },
            };
            format!("{} of shard {} {part}", node.me, node.shard)
        };
        let lanes = self.servers.iter().filter(|node| node.replica.is_some() || self.options.copies);
        let lanes: Vec<String> = lanes.map(lane).collect();
        format!("{}; the store: {:?}; halted: {:?}", lanes.join(", "), self.copies.tenures, self.halted)
    }

    fn compare_copies(&mut self, shard: usize) -> Result<(), String> {
        let replicas =
            || self.servers.iter().filter(|node| node.shard == shard).filter_map(|node| node.replica.as_ref());
        let tenure = self.copies.tenures[shard];
        let mut present = replicas().filter(|replica| replica.tenure().epoch == tenure.epoch);
        let Some(serving) = present.find_map(Replica::served) else { return Ok(()) };
        let follows = |replica: &&Replica<_>| replica.followed().is_some_and(|standby| standby.is_paired());
        let Some(standby) = replicas().find(follows).and_then(Replica::followed) else { return Ok(()) };
        let Some(backup) = tenure.other.filter(|_| standby.primary() == tenure.primary) else { return Ok(()) };
        for chunk in &self.layout.shards[shard] {
            let (Some(ours), Some(theirs)) = (serving.view(*chunk), standby.view(*chunk)) else { continue };
            if ours.clock != theirs.clock
                || self.watch.compared.insert((backup, *chunk), ours.clock) == Some(ours.clock)
            {
                continue;
            }
            self.copies.counts.compared += 1;
            if !ours.is_same(&theirs) {
                return Err(format!("chunk {} of {backup} is not its primary's at clock {}", chunk.0, ours.clock));
            }
        }
        Ok(())
    }
}
