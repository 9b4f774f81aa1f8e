//! A shard's memory for what comes and goes: landing slots, into which workers write gradients, and the pool of wire copies, which
//! leave as replies.
//!
//! Where the shard computes on a GPU and a fabric's device reaches the GPU's memory, slots lie there, and gradients arrive without
//! passing through the host's; workers on other fabrics get slots in the host's memory, out of which they are copied. Wire copies
//! leave from the GPU only if every fabric can take them there, for one copy serves all workers.
//!
//! Invariant: everything is allocated and registered here, at start; a worker's slots are all in one region.
#![forbid(unsafe_code)]

use std::sync::Once;

use super::Memory;
use crate::{
    Error, Result,
    mem::{Lease, Region, RegionOptions},
    session::Paths,
    transport::{MemoryRegion, Transport},
};

/// How much of it there is.
#[derive(Clone, Debug)]
pub(super) struct LandingShape {
    pub workers: usize,
    /// Landing slots of a worker, and bytes of each.
    pub slots: usize,
    pub slot_bytes: usize,
    /// Wire copies, and bytes of each.
    pub copies: usize,
    pub copy_bytes: usize,
    /// How host memory is allocated.
    pub region: RegionOptions,
}

/// Slots by worker, until the worker is connected.
pub(super) struct Landing {
    host: Option<(MemoryRegion, Vec<Vec<Lease>>)>,
    direct: Option<(MemoryRegion, Vec<Vec<Lease>>)>,
}

impl Landing {
    /// Allocates and registers slots and wire copies; the copies are the second part of the answer.
    ///
    /// # Errors
    ///
    /// Those of [`Region::allocate`] and [`Transport::register`].
    pub(super) fn allocate<T: Transport>(
        shape: &LandingShape,
        memory: &mut Memory,
        paths: &mut Paths<T>,
    ) -> Result<(Landing, Vec<Lease>)> {
        let landing_bytes = shape.workers * shape.slots * shape.slot_bytes;
        let direct = on_device(landing_bytes, memory, paths)?;
        let is_everywhere = direct.as_ref().is_some_and(|(region, _)| region.is_everywhere());
        let direct = direct.map(|(region, lease)| (region, shape.cut(lease)));
        let host = match is_everywhere {
            true => None,
            false => {
                let (region, lease) = on_host("landing", landing_bytes, shape, memory, paths)?;
                Some((region, shape.cut(lease)))
            }
        };
        let reply_bytes = shape.copies * shape.copy_bytes;
        let replies = match is_everywhere {
            true => on_device(reply_bytes, memory, paths)?.map(|(_, lease)| lease),
            false => None,
        };
        let replies = match replies {
            Some(lease) => lease,
            None => on_host("replies", reply_bytes, shape, memory, paths)?.1,
        };
        let mut pool = replies.chunks(shape.copy_bytes.max(1));
        pool.truncate(shape.copies);
        Ok((Landing { host, direct }, pool))
    }

    /// The slots of a worker whose path is over `fabric`, and their region's key there; once a worker.
    pub(super) fn take(&mut self, worker: u16, fabric: &str) -> (u32, Vec<Lease>) {
        let is_direct = self.direct.as_ref().is_some_and(|(region, _)| region.rkey(fabric) != 0);
        let of = if is_direct { &mut self.direct } else { &mut self.host };
        let (region, by_worker) = of.as_mut().expect("what is not everywhere is on the host as well");
        (region.rkey(fabric), std::mem::take(&mut by_worker[usize::from(worker)]))
    }
}

impl LandingShape {
    fn cut(&self, lease: Lease) -> Vec<Vec<Lease>> {
        let mut pieces = lease.chunks(self.slot_bytes.max(1)).into_iter();
        (0..self.workers).map(|_| pieces.by_ref().take(self.slots).collect()).collect()
    }
}

/// So many slots of so many bytes in the host's memory, registered.
pub(super) fn slots<T: Transport>(
    what: &str,
    (count, bytes): (usize, usize),
    region: &RegionOptions,
    paths: &mut Paths<T>,
) -> Result<(Option<MemoryRegion>, Vec<Lease>)> {
    if count == 0 {
        return Ok((None, Vec::new()));
    }
    let bytes = bytes.max(64);
    let options = RegionOptions { name: format!("{}-{what}", region.name), ..region.clone() };
    let (region, lease) = Region::allocate(count * bytes, &options)?;
    let registered = paths.register(&region)?;
    let mut slots = lease.chunks(bytes);
    slots.truncate(count);
    Ok((Some(registered), slots))
}

fn on_host<T: Transport>(
    what: &str,
    bytes: usize,
    shape: &LandingShape,
    memory: &mut Memory,
    paths: &mut Paths<T>,
) -> Result<(MemoryRegion, Lease)> {
    let options = RegionOptions { name: format!("{}-{what}", shape.region.name), ..shape.region.clone() };
    let (region, lease) = Region::allocate(bytes, &options)?;
    let registered = paths.register(&region)?;
    memory.adopt(&region)?;
    Ok((registered, lease))
}

/// Memory of the shard's GPU, registered; `None`, with the reason said once a process, where that cannot be.
fn on_device<T: Transport>(
    bytes: usize,
    memory: &Memory,
    paths: &mut Paths<T>,
) -> Result<Option<(MemoryRegion, Lease)>> {
    static STAGED: Once = Once::new();
    let direct = match memory.shared(bytes.max(1)) {
        Ok(None) => return Ok(None),
        Ok(Some((region, lease))) => paths.register(&region).map(|registered| (registered, lease)),
        Err(error) => Err(error),
    };
    match direct {
        Ok(direct) => Ok(Some(direct)),
        Err(why @ (Error::Config(_) | Error::Gpu { .. })) => {
            STAGED.call_once(|| tracing::info!("gradients reach the GPU through the host's memory: {why}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
