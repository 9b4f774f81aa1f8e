//! What follows for a job from its number of copies of each shard.
//!
//! Invariant: with one copy nothing here changes anything.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::{DeviceChoice, JobConfig, StoreChoice};
use crate::{Error, Result};

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
            2 if self.decides() => refuse(
                "with two copies `optimizer.clip.global_norm`, `skip_nonfinite` and a dynamic `loss_scale.mode` are not built yet",
            ),
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

    /// Whether reduce and apply are two passes.
    pub fn is_two_step(&self) -> bool {
        self.two_step || self.decides() || self.has_replicas()
    }

    /// Whether every shard has two copies.
    pub fn has_replicas(&self) -> bool {
        self.replicas > 1
    }

    /// The lanes of each server: one for each of its own shards, and one for each that it holds the second copy of.
    pub fn lanes_per_server(&self) -> u16 {
        self.shards_per_server * self.replicas
    }

    /// How long the other lane of a pair may be silent before it counts as gone.
    pub fn suspicion(&self) -> Duration {
        Duration::from_millis(self.suspect_ms)
    }

    /// Slots of each lane for what the other one of its pair sends, each of the shard's largest chunk in f32.
    pub fn replica_slots(&self) -> u32 {
        if self.has_replicas() { 8 } else { 0 }
    }
}
