//! Memory of the card and addresses for it, had separately; and descriptors of it.
//!
//! Invariant: memory can be touched only where it is mapped and access was given; a descriptor is given for a whole mapping.

use std::ffi::{c_int, c_uint, c_void};

use crate::{
    state::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Status, call, give},
    streams::finish_all,
};

/// What allocations come in, on cards of today.
const GRANULARITY: usize = 2 << 20;

/// `CUmemAllocationProp`, as far as it is looked at: kind, handle types, location.
#[repr(C)]
pub struct MemAllocationProp {
    kind: c_int,
    handle_types: c_int,
    location: [c_int; 2],
}

/// `CUmemAccessDesc`.
#[repr(C)]
pub struct MemAccessDesc {
    location: [c_int; 2],
    flags: c_int,
}

/// # Safety
///
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationGranularity(
    bytes: *mut usize,
    _prop: *const MemAllocationProp,
    _option: c_uint,
) -> Status {
    // SAFETY: the caller's word.
    call("cuMemGetAllocationGranularity", |_| unsafe { give(bytes, GRANULARITY) })
}

/// # Safety
///
/// `handle` is valid for a write, `prop` for a read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(
    handle: *mut u64,
    bytes: usize,
    prop: *const MemAllocationProp,
    _flags: u64,
) -> Status {
    call("cuMemCreate", |state| {
        let device = state.current()?;
        // SAFETY: the caller's word.
        let prop = unsafe { prop.as_ref() }.ok_or(INVALID_VALUE)?;
        let is_ours = prop.kind == 1 && prop.handle_types == 0 && prop.location == [1, device as c_int];
        if !is_ours || bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        if bytes > state.devices[device].memory.bytes_left() {
            return Err(OUT_OF_MEMORY);
        }
        let made = state.handle() as u64;
        state.physical.insert(made, bytes);
        // SAFETY: the caller's word.
        unsafe { give(handle, made) }
    })
}

/// # Safety
///
/// None is needed: a handle is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemRelease(handle: u64) -> Status {
    call("cuMemRelease", |state| {
        let is_mapped = state.mapped.values().any(|mapped| *mapped == handle);
        if is_mapped { Err(INVALID_VALUE) } else { state.physical.remove(&handle).map(|_| ()).ok_or(INVALID_HANDLE) }
    })
}

/// # Safety
///
/// `address` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(
    address: *mut u64,
    bytes: usize,
    _alignment: usize,
    _wish: u64,
    _flags: u64,
) -> Status {
    call("cuMemAddressReserve", |state| {
        let device = state.current()?;
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        let reserved = state.devices[device].memory.reserve(bytes, GRANULARITY as u64);
        // SAFETY: the caller's word.
        unsafe { give(address, reserved) }
    })
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressFree(address: u64, _bytes: usize) -> Status {
    call("cuMemAddressFree", |state| if state.mapped.contains_key(&address) { Err(INVALID_VALUE) } else { Ok(()) })
}

/// # Safety
///
/// None is needed: addresses and handles are numbers here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, _flags: u64) -> Status {
    call("cuMemMap", |state| {
        state.current()?;
        if offset != 0 || state.physical.get(&handle) != Some(&bytes) || state.mapped.contains_key(&address) {
            return Err(INVALID_VALUE);
        }
        state.mapped.insert(address, handle);
        Ok(())
    })
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: u64, _bytes: usize) -> Status {
    call("cuMemUnmap", |state| {
        finish_all(state)?;
        let device = state.current()?;
        state.devices[device].memory.free(address);
        state.mapped.remove(&address).map(|_| ()).ok_or(INVALID_VALUE)
    })
}

/// # Safety
///
/// `access` is valid for a read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(
    address: u64,
    bytes: usize,
    access: *const MemAccessDesc,
    count: usize,
) -> Status {
    call("cuMemSetAccess", |state| {
        let device = state.current()?;
        // SAFETY: the caller's word.
        let access = unsafe { access.as_ref() }.ok_or(INVALID_VALUE)?;
        let is_ours = count == 1 && access.location == [1, device as c_int] && access.flags == 3;
        let handle = *state.mapped.get(&address).ok_or(INVALID_VALUE)?;
        if !is_ours || state.physical.get(&handle) != Some(&bytes) {
            return Err(INVALID_VALUE);
        }
        if state.devices[device].memory.put_at(address, bytes) { Ok(()) } else { Err(OUT_OF_MEMORY) }
    })
}

/// # Safety
///
/// `handle` is valid for writing a C int. The descriptor is that of a memfd as long as the mapping: enough to be told apart and
/// closed, and without the card's bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetHandleForAddressRange(
    handle: *mut c_void,
    address: u64,
    bytes: usize,
    kind: c_uint,
    _flags: u64,
) -> Status {
    call("cuMemGetHandleForAddressRange", |state| {
        state.current()?;
        let mapped = state.mapped.get(&address).and_then(|handle| state.physical.get(handle));
        if kind != 1 || mapped != Some(&bytes) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: a name that ends with a zero byte.
        let fd = unsafe { libc::memfd_create(c"soft-cuda-dma-buf".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor was made above.
        if fd < 0 || unsafe { libc::ftruncate(fd, bytes as libc::off_t) } != 0 {
            return Err(NOT_SUPPORTED);
        }
        // SAFETY: the caller's word.
        unsafe { give(handle.cast::<c_int>(), fd) }
    })
}
