//! Regions on a device, and host regions that a device copies from and to.
//!
//! Invariant: the bytes of a region on a device are never read or written by the processor; a pinned region is unpinned before it
//! is unmapped.

use std::{os::fd::BorrowedFd, ptr::NonNull, sync::Arc};

use super::{
    Lease, Region,
    region::{Backing, Mapping},
};
use crate::{
    Error, Result,
    cuda::{Context, DeviceBuffer, HostPin, Stream},
};

/// A region on a device, for a NIC that is to reach it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRange<'a> {
    /// The dma-buf of the allocation that holds the region, and where in it the region begins; none where the device exports none.
    pub dma_buf: Option<(BorrowedFd<'a>, u64)>,
    /// The device's number.
    pub ordinal: u32,
    /// The device's address of the first byte.
    pub address: u64,
    /// Bytes.
    pub len: usize,
}

/// A host region that is page-locked for a device, so that copies go on without the processor.
#[derive(Debug)]
pub struct PinnedRegion {
    /// Dropped before the region.
    _pin: HostPin,
    _region: Region,
}

/// A worker's memory on a device: regions that a NIC may be given, and copies out of and into their leases, each of which is waited
/// for.
pub struct DeviceMemory {
    stream: Stream,
    context: Context,
    needs_flush: bool,
}

impl DeviceMemory {
    /// Of this device.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the driver refuses a stream.
    pub fn new(context: &Context) -> Result<DeviceMemory> {
        let (stream, needs_flush) = (Stream::new(context)?, context.needs_flush()?);
        Ok(DeviceMemory { stream, context: context.clone(), needs_flush })
    }

    /// A region of `bytes` zeros, and the lease that covers it.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device has not so much left.
    pub fn allocate(&self, bytes: usize) -> Result<(Region, Lease)> {
        let buffer = DeviceBuffer::exportable(&self.context, bytes)?;
        // SAFETY: the buffer is as long, and nobody else has it yet.
        unsafe { self.stream.fill(buffer.address(), 0, bytes) }?;
        self.stream.synchronize()?;
        Region::on_device(buffer)
    }

    /// Writes `bytes` into a lease, from its byte `start` on.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device fails.
    ///
    /// # Panics
    ///
    /// Here and in `get`: if the lease is none of a device, or too short.
    pub fn put(&self, lease: &mut Lease, start: usize, bytes: &[u8]) -> Result<()> {
        assert!(start + bytes.len() <= lease.len(), "{} bytes at {start} of {}", bytes.len(), lease.len());
        let address = lease.device_address().expect("a lease of a device") + start as u64;
        // SAFETY: within the lease, which is ours alone; the bytes stay until the stream is done, below.
        unsafe { self.stream.copy_to_device(address, NonNull::from(bytes).cast(), bytes.len()) }?;
        self.stream.synchronize()
    }

    /// Reads out of a lease, from its byte `start` on.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device fails.
    pub fn get(&self, lease: &Lease, start: usize, out: &mut [u8]) -> Result<()> {
        assert!(start + out.len() <= lease.len(), "{} bytes at {start} of {}", out.len(), lease.len());
        let address = lease.device_address().expect("a lease of a device") + start as u64;
        // SAFETY: within the lease, whom nobody writes to while it is borrowed; `out` is borrowed until the stream is done, below.
        unsafe { self.stream.copy_to_host(NonNull::from(&mut *out).cast(), address, out.len()) }?;
        self.stream.synchronize()
    }

    /// Has kernels and copies from now on see what NICs have written.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device fails.
    pub fn settle(&self) -> Result<()> {
        if self.needs_flush { self.context.flush_direct_writes() } else { Ok(()) }
    }
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "memory of {}", self.context.info())
    }
}

impl Mapping {
    /// Whether the processor can reach the bytes.
    pub(super) fn is_host(&self) -> bool {
        matches!(self.backing(), Backing::File(_))
    }
}

impl Region {
    /// A region over device memory, and the one lease that covers all of it. What it holds at birth is not defined; its leases have
    /// no bytes for the processor ([`Lease::bytes`] panics), and are otherwise like all leases.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the buffer has no address.
    pub fn on_device(buffer: DeviceBuffer) -> Result<(Region, Lease)> {
        let mapping = Arc::new(Mapping::on_device(buffer)?);
        Ok((Region::of(mapping.clone()), Lease::whole(mapping)))
    }

    /// Where a device has the region; `None` for host memory.
    pub fn device_range(&self) -> Option<DeviceRange<'_>> {
        match self.mapping().backing() {
            Backing::File(_) => None,
            Backing::Device(buffer) => {
                let ordinal = buffer.context().info().ordinal;
                Some(DeviceRange { dma_buf: buffer.dma_buf(), ordinal, address: buffer.address(), len: buffer.len() })
            }
        }
    }

    /// Refuses device memory on behalf of a fabric that reaches host memory alone.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] naming region and fabric.
    pub fn host_only(&self, fabric: &str) -> Result<()> {
        if self.mapping().is_host() {
            return Ok(());
        }
        Err(Error::Config(format!(
            "{} is device memory, which the fabric {fabric} cannot reach: send from a host region that it is copied to",
            self.id()
        )))
    }

    /// Page-locks the region for a device.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for device memory; [`Error::Gpu`] if the driver refuses.
    pub fn pin(&self, context: &Context) -> Result<PinnedRegion> {
        if !self.mapping().is_host() {
            return Err(Error::Config(format!("{} is device memory, and need not be pinned", self.id())));
        }
        // SAFETY: the mapping lives as long as the region beside the pin, which is dropped after it.
        let pin = unsafe { HostPin::new(context, self.start(), self.len()) }?;
        Ok(PinnedRegion { _pin: pin, _region: self.clone() })
    }
}
