//! Device memory, and host memory that the device copies from by itself.
//!
//! Invariant: an allocation is freed once, by its buffer; where it has a descriptor, that descriptor stands for the whole
//! allocation that holds the buffer and for nothing else.

use std::{
    ffi::c_int,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::Once,
};

use super::Context;
use crate::{
    Error, Result,
    sys::cuda::{self, DeviceAddress, MemAccessDesc, MemAllocationProp, MemLocation, Table},
};

/// A range of a device's memory. What it holds at birth is not defined.
#[derive(Debug)]
pub struct DeviceBuffer {
    context: Context,
    address: DeviceAddress,
    len: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// `cuMemAlloc`.
    Plain,
    /// `cuMemCreate`, mapped, and exported.
    Mapped { memory: u64, mapped_len: usize, dma_buf: OwnedFd },
}

impl DeviceBuffer {
    /// Allocates `len` bytes that only this device is to touch.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device has not so much left.
    pub fn allocate(context: &Context, len: usize) -> Result<DeviceBuffer> {
        let mut address = 0;
        // SAFETY: a place for the address; the context is current.
        context.call("cuMemAlloc_v2", |table| unsafe { (table.mem_alloc)(&raw mut address, len.max(1)) })?;
        Ok(DeviceBuffer { context: context.clone(), address, len, source: Source::Plain })
    }

    /// Allocates `len` bytes that a NIC may be given: an allocation of its own, exported as a dma-buf where driver and device can
    /// do that, and an ordinary one otherwise (said once).
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if the device has not so much left.
    pub fn exportable(context: &Context, len: usize) -> Result<DeviceBuffer> {
        static NOT_EXPORTED: Once = Once::new();
        DeviceBuffer::mapped(context, len).or_else(|why| {
            NOT_EXPORTED.call_once(|| tracing::info!("device memory is not exported as a dma-buf: {why}"));
            DeviceBuffer::allocate(context, len)
        })
    }

    fn mapped(context: &Context, len: usize) -> Result<DeviceBuffer> {
        let parts = MappedParts::make(context, len)?;
        let dma_buf = parts.export()?;
        let (memory, address, mapped_len) = parts.into_raw();
        let source = Source::Mapped { memory, mapped_len, dma_buf };
        Ok(DeviceBuffer { context: context.clone(), address, len, source })
    }

    /// Its first byte's address on the device.
    pub fn address(&self) -> DeviceAddress {
        self.address
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that it lies on.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The dma-buf of the allocation that holds it, and where in that the buffer begins.
    pub fn dma_buf(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.source {
            Source::Plain => None,
            Source::Mapped { dma_buf, .. } => Some((dma_buf.as_fd(), 0)),
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        match &self.source {
            // SAFETY: allocated by `allocate`, freed once; the driver waits for what still uses it.
            Source::Plain => self.context.end("cuMemFree_v2", |table| unsafe { (table.mem_free)(self.address) }),
            Source::Mapped { memory, mapped_len, .. } => {
                drop(MappedParts {
                    context: self.context.clone(),
                    memory: Some(*memory),
                    address: Some(self.address),
                    is_mapped: true,
                    len: *mapped_len,
                });
            }
        }
    }
}

/// An allocation on its way: whatever there is of it is given back when it is dropped.
struct MappedParts {
    context: Context,
    memory: Option<u64>,
    address: Option<DeviceAddress>,
    is_mapped: bool,
    len: usize,
}

impl MappedParts {
    fn make(context: &Context, len: usize) -> Result<MappedParts> {
        let driver = context.driver();
        let table = &driver.table;
        let granularity = driver.newer("cuMemGetAllocationGranularity", table.mem_get_allocation_granularity)?;
        let create = driver.newer("cuMemCreate", table.mem_create)?;
        let reserve = driver.newer("cuMemAddressReserve", table.mem_address_reserve)?;
        let map = driver.newer("cuMemMap", table.mem_map)?;
        let set_access = driver.newer("cuMemSetAccess", table.mem_set_access)?;
        let ordinal = context.info().ordinal;
        let direct = super::device::attribute_of(driver, ordinal, cuda::GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)?;
        let location = MemLocation { kind: cuda::LOCATION_TYPE_DEVICE, id: ordinal as c_int };
        let prop = MemAllocationProp {
            kind: cuda::ALLOCATION_TYPE_PINNED,
            requested_handle_types: 0,
            location,
            win32_handle_meta_data: std::ptr::null_mut(),
            compression_type: 0,
            gpu_direct_rdma_capable: u8::from(direct != 0),
            usage: 0,
            reserved: [0; 4],
        };
        let mut step = 0usize;
        // SAFETY: a place for the number, and a description that lives until the call returns.
        context.call("cuMemGetAllocationGranularity", |_| unsafe {
            granularity(&raw mut step, &raw const prop, cuda::GRANULARITY_MINIMUM)
        })?;
        let len = len.max(1).checked_next_multiple_of(step.max(1)).ok_or_else(|| too_long(len))?;
        let mut parts = MappedParts { context: context.clone(), memory: None, address: None, is_mapped: false, len };
        let (mut memory, mut address) = (0u64, 0u64);
        // SAFETY: a place for the handle, and the description.
        context.call("cuMemCreate", |_| unsafe { create(&raw mut memory, len, &raw const prop, 0) })?;
        parts.memory = Some(memory);
        // SAFETY: a place for the address.
        context.call("cuMemAddressReserve", |_| unsafe { reserve(&raw mut address, len, 0, 0, 0) })?;
        parts.address = Some(address);
        // SAFETY: addresses just reserved, and memory just made, of the same length.
        context.call("cuMemMap", |_| unsafe { map(address, len, 0, memory, 0) })?;
        parts.is_mapped = true;
        let access = MemAccessDesc { location, flags: cuda::ACCESS_READ_WRITE };
        // SAFETY: mapped above; one description that lives until the call returns.
        context.call("cuMemSetAccess", |_| unsafe { set_access(address, len, &raw const access, 1) })?;
        Ok(parts)
    }

    /// A descriptor of the whole allocation.
    fn export(&self) -> Result<OwnedFd> {
        const CALL: &str = "cuMemGetHandleForAddressRange";
        let driver = self.context.driver();
        let export = driver.newer(CALL, driver.table.mem_get_handle_for_address_range)?;
        let address = self.address.expect("made with addresses");
        let mut fd: c_int = -1;
        // SAFETY: the range is one live allocation, and for this type of handle the result is a C int.
        self.context.call(CALL, |_| unsafe {
            export((&raw mut fd).cast(), address, self.len, cuda::RANGE_HANDLE_DMA_BUF, 0)
        })?;
        if fd < 0 {
            let device = self.context.info().to_string();
            return Err(Error::Gpu { call: CALL, device, cause: format!("it gave the descriptor {fd}") });
        }
        // SAFETY: the driver has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn into_raw(mut self) -> (u64, DeviceAddress, usize) {
        self.is_mapped = false;
        let memory = self.memory.take().expect("made with memory");
        (memory, self.address.take().expect("made with addresses"), self.len)
    }
}

impl Drop for MappedParts {
    fn drop(&mut self) {
        let table: &'static Table = &self.context.driver().table;
        if let (Some(address), true, Some(unmap)) = (self.address, self.is_mapped, table.mem_unmap) {
            // SAFETY: mapped by `make` and by nobody unmapped; who owned the buffer is done with it.
            self.context.end("cuMemUnmap", |_| unsafe { unmap(address, self.len) });
        }
        if let (Some(address), Some(free)) = (self.address, table.mem_address_free) {
            // SAFETY: reserved by `make`, and nothing is mapped there any more.
            self.context.end("cuMemAddressFree", |_| unsafe { free(address, self.len) });
        }
        if let (Some(memory), Some(release)) = (self.memory, table.mem_release) {
            // SAFETY: made by `make`, released once.
            self.context.end("cuMemRelease", |_| unsafe { release(memory) });
        }
    }
}

fn too_long(len: usize) -> Error {
    Error::Config(format!("no device has {len} bytes"))
}

/// Host memory that is page-locked for the devices, so that copies from and to it go on by themselves.
#[derive(Debug)]
pub struct HostPin {
    context: Context,
    start: NonNull<u8>,
}

// SAFETY: the address is only ever handed to the driver, which locks what threads share.
unsafe impl Send for HostPin {}

impl HostPin {
    /// Page-locks `len` bytes.
    ///
    /// # Safety
    ///
    /// They stay mapped as long as the result lives.
    pub unsafe fn new(context: &Context, start: NonNull<u8>, len: usize) -> Result<HostPin> {
        let register = |table: &Table| {
            // SAFETY: mapped memory, by the caller's word. Page-locking changes none of its bytes.
            unsafe { (table.mem_host_register)(start.as_ptr().cast(), len, cuda::HOST_REGISTER_PORTABLE) }
        };
        context.call("cuMemHostRegister_v2", register)?;
        Ok(HostPin { context: context.clone(), start })
    }
}

impl Drop for HostPin {
    fn drop(&mut self) {
        let start = self.start.as_ptr();
        // SAFETY: registered in `new`, ended once; the driver waits for what still uses it.
        self.context.end("cuMemHostUnregister", |table| unsafe { (table.mem_host_unregister)(start.cast()) });
    }
}
