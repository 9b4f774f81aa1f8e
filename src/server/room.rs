//! The memory of a shard that a transport works on: landing slots, wire copies, and what goes to the backup.
//!
//! Invariant: all of it is allocated and registered at once, before anybody is connected who uses it.
#![forbid(unsafe_code)]

use super::{
    Memory, ShardConfig,
    landing::{Landing, LandingShape, slots},
    memory::elements_max,
};
use crate::{
    Result,
    layout::Layout,
    mem::{Lease, RegionOptions},
    session::Paths,
    transport::Transport,
};

/// The memory of a shard that a transport works on.
pub(super) struct Room {
    pub landing: Landing,
    /// For wire copies.
    pub pool: Vec<Lease>,
    /// For what the backup is sent.
    pub sums: Vec<Lease>,
}

impl Room {
    /// Allocates and registers it.
    pub(super) fn allocate<T: Transport>(
        config: &ShardConfig,
        layout: &Layout,
        memory: &mut Memory,
        paths: &mut Paths<T>,
        region: &RegionOptions,
    ) -> Result<Room> {
        let order = &layout.shards[usize::from(config.shard.0)];
        let elements = elements_max(layout, config.shard);
        let copies = match memory.sent_from() {
            Some(region) => {
                paths.register(region)?;
                order.len()
            }
            // Two a chunk: one being read by slow workers while the next is being written.
            None => 2 * order.len(),
        };
        let shape = LandingShape {
            workers: config.workers.into(),
            slots: config.slots as usize,
            slot_bytes: elements * config.gradient_dtype.size(),
            copies: copies.max(1),
            copy_bytes: elements * config.parameter_dtype.size(),
            region: region.clone(),
        };
        let (landing, pool) = Landing::allocate(&shape, memory, paths)?;
        let count = config.mirror.as_ref().map_or(0, |mirror| mirror.slots as usize);
        let (_, sums) = slots("sums", (count, 4 * elements), region, paths)?;
        Ok(Room { landing, pool, sums })
    }
}
