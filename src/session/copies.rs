//! What follows for a job from its number of copies of each shard, and from its room for more servers: which lanes hold which shards.
//!
//! Invariant: with one copy that stays where it is nothing here changes anything.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::{DeviceChoice, JobConfig, RANKS_MAX, StoreChoice, Tenure, pair, shard_of};
use crate::{
    Error, Result,
    types::{PeerId, Rank, Role, ShardId},
};

impl JobConfig {
    /// Refuses what two copies of each shard cannot be had with.
    pub(super) fn validate_replicas(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::Config(format!("`replicas` is {}; {why}", self.replicas)));
        match self.replicas {
            1 if self.store != StoreChoice::Embedded => refuse("a `store` is needed with 2 only"),
            1 => Ok(()),
            2 if self.servers < 2 => {
                refuse("the copies of a shard are on different servers: `servers` must be at least 2")
            }
            2 if !self.consistency.aggregates() => refuse("that needs `consistency` bsp"),
            2 if self.rebuild_ms == 0 => {
                refuse("workers reach another copy by rebuilding paths: `rebuild_ms` must not be 0")
            }
            2 if self.suspect_ms >= self.rebuild_ms.min(self.deadline_ms) => refuse(
                "workers would give a lost server up before another takes over: `suspect_ms` must be below `rebuild_ms` and `deadline_ms`",
            ),
            2 if self.device != DeviceChoice::Cpu => refuse("that needs `device` cpu: on GPUs it is not built yet"),
            2 => Ok(()),
            _ => refuse("it must be 1 or 2"),
        }
    }

    /// Refuses what shards cannot move in.
    pub(super) fn validate_room(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::Config(format!("`max_servers` is {}; {why}", self.max_servers)));
        match self.max_servers {
            0 => Ok(()),
            room if room < self.servers => refuse(&format!("the job begins with {} `servers`", self.servers)),
            room if room > RANKS_MAX => refuse(&format!("it must be at most {RANKS_MAX}")),
            _ if self.has_replicas() => {
                refuse("together with two copies of each shard (`replicas`) it is not built yet")
            }
            _ if !self.consistency.aggregates() => refuse("servers that join and leave need `consistency` bsp"),
            _ if self.rebuild_ms == 0 => {
                refuse("workers reach another server by rebuilding paths: `rebuild_ms` must not be 0")
            }
            _ if self.device != DeviceChoice::Cpu => {
                refuse("servers that join and leave need `device` cpu: on GPUs it is not built yet")
            }
            _ => Ok(()),
        }
    }

    /// Whether reduce and apply are two passes.
    pub fn is_two_step(&self) -> bool {
        self.two_step || self.decides() || self.has_replicas()
    }

    /// Whether sums have memory of their own: steps in two passes need it, and so do those of a chunk that is on the move.
    pub fn accumulates(&self) -> bool {
        self.is_two_step() || self.moves_shards()
    }

    /// Whether servers may join and leave while the job runs, and shards move between them.
    pub fn moves_shards(&self) -> bool {
        self.max_servers > 0
    }

    /// Whether it is written down who serves each shard, since that may change.
    pub fn has_tenures(&self) -> bool {
        self.has_replicas() || self.moves_shards()
    }

    /// The most servers that the job may have at a time; the seats of those that it does not begin with stay free.
    pub fn server_seats(&self) -> u16 {
        self.servers.max(self.max_servers)
    }

    /// How many ranks of one role the job begins with, and servers that it has room for.
    pub fn ranks_of(&self, role: Role) -> u16 {
        match role {
            Role::Server => self.server_seats(),
            Role::Worker => self.workers,
        }
    }

    /// Shards of the whole job, from its beginning to its end.
    pub fn shard_count(&self) -> u32 {
        u32::from(self.server_seats()) * u32::from(self.shards_per_server)
    }

    /// Whether the job begins without this rank.
    pub fn is_vacant(&self, rank: Rank) -> bool {
        rank.role == Role::Server && rank.index >= self.servers
    }

    /// The lane of a server that holds a shard, where shards move: every server has one for each.
    pub fn seat(shard: ShardId, server: u16) -> PeerId {
        PeerId::server(server, shard.0)
    }

    /// The shard that a server's lane holds, or may hold.
    pub fn shard_of(&self, lane: PeerId) -> ShardId {
        if self.moves_shards() { ShardId(lane.lane) } else { shard_of(lane, self.servers, self.shards_per_server) }
    }

    /// Who serves a shard as the job begins: where shards move they are dealt in turn to the servers that are there.
    pub fn first_tenure(&self, shard: ShardId) -> Tenure {
        if self.moves_shards() {
            return Tenure::alone(JobConfig::seat(shard, shard.0 % self.servers));
        }
        let pair = pair(shard, self.servers, self.shards_per_server);
        if self.has_replicas() { Tenure::first(pair) } else { Tenure::alone(pair[0]) }
    }

    /// The lanes of a server as the job begins.
    pub fn first_lanes(&self, server: Rank) -> Vec<PeerId> {
        let all = 0..if self.moves_shards() { self.shard_count() as u16 } else { self.lanes_per_server() };
        let lanes = all.map(|lane| PeerId { rank: server, lane });
        lanes.filter(|lane| !self.moves_shards() || self.first_tenure(self.shard_of(*lane)).names(*lane)).collect()
    }

    /// Whether every shard has two copies.
    pub fn has_replicas(&self) -> bool {
        self.replicas > 1
    }

    /// The lanes of each server, as the job begins: one for each of its own shards, and one for each that it holds the second copy of.
    pub fn lanes_per_server(&self) -> u16 {
        if self.moves_shards() {
            return self.shard_count().div_ceil(self.servers.into()) as u16;
        }
        self.shards_per_server * self.replicas
    }

    /// How long the other lane of a pair may be silent before it counts as gone.
    pub fn suspicion(&self) -> Duration {
        Duration::from_millis(self.suspect_ms)
    }

    /// Slots of each lane for what another one of its shard sends, each of the shard's largest chunk in f32.
    pub fn replica_slots(&self) -> u32 {
        if self.has_tenures() { 8 } else { 0 }
    }
}
