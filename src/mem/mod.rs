//! Memory that every fabric can share: regions (memfd, or a buffer on a device), exclusive ranges of them (leases), and where in the
//! machine they lie.
//!
//! Invariant: the bytes of a region are reached through a [`Lease`] (exclusive) or a [`SharedLease`] (read-only) and through
//! nothing else.

mod device;
mod lease;
mod owner;
mod pages;
mod region;
mod shared;
pub mod topology;

pub use device::{DeviceMemory, DeviceRange, PinnedRegion};
pub use lease::{Lease, SharedLease};
pub use owner::Owner;
pub use region::{HugePages, Locking, Region, RegionId, RegionOptions, RegionReport};
pub use shared::SharedMapping;
pub(crate) use shared::{receive_files, send_files};
pub use topology::Topology;
