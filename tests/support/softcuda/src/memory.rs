//! Memory of the card, page-locked memory of the host, and copies.
//!
//! Invariant: an address that the card gives is never one of the host; page-locked memory lives until it is freed.

use std::ffi::{c_uchar, c_uint, c_void};

use crate::{
    state::{INVALID_VALUE, OUT_OF_MEMORY, State, Status, call, give, log},
    streams::{Work, finish_all, put},
};

/// # Safety
///
/// `address` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    call("cuMemAlloc_v2", |state| {
        let device = state.current()?;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let allocated = state.devices[device].memory.allocate(bytes).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: the caller's word.
        unsafe { give(address, allocated) }
    })
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> Status {
    call("cuMemFree_v2", |state| {
        finish_all(state)?;
        let device = state.current()?;
        if state.devices[device].memory.free(address) { Ok(()) } else { Err(INVALID_VALUE) }
    })
}

/// # Safety
///
/// Both are valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    call("cuMemGetInfo_v2", |state| {
        let device = state.current()?;
        let left = state.devices[device].memory.bytes_left();
        // SAFETY: the caller's word.
        unsafe {
            give(free, left)?;
            give(total, crate::state::setting("SOFTCUDA_MEMORY", 1 << 30))
        }
    })
}

/// # Safety
///
/// `address` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> Status {
    call("cuMemHostAlloc", |state| {
        state.current()?;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let mut memory = vec![0u128; bytes.div_ceil(16)].into_boxed_slice();
        let start = memory.as_mut_ptr();
        state.pinned.insert(start as usize, memory);
        // SAFETY: the caller's word.
        unsafe { give(address, start.cast()) }
    })
}

/// # Safety
///
/// Nobody touches the memory afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> Status {
    call("cuMemFreeHost", |state| {
        finish_all(state)?;
        state.pinned.remove(&(address as usize)).map(|_| ()).ok_or(INVALID_VALUE)
    })
}

/// # Safety
///
/// The memory stays mapped until it is unregistered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, _flags: c_uint) -> Status {
    call("cuMemHostRegister_v2", |state| {
        state.current()?;
        if address.is_null() || bytes == 0 || state.registered.contains_key(&(address as usize)) {
            return Err(INVALID_VALUE);
        }
        state.registered.insert(address as usize, bytes);
        Ok(())
    })
}

/// # Safety
///
/// None is needed: an address is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: *mut c_void) -> Status {
    call("cuMemHostUnregister", |state| {
        finish_all(state)?;
        state.registered.remove(&(address as usize)).map(|_| ()).ok_or(INVALID_VALUE)
    })
}

/// A card copies pageable memory while its caller waits, which is not to happen on a data path.
fn note_pageable(state: &State, start: usize, bytes: usize) {
    if !state.is_pinned(start, bytes) {
        log(&format!("pageable {bytes}"));
    }
}

/// # Safety
///
/// `from` is readable for `bytes` bytes until the stream has done the copy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: usize) -> Status {
    call("cuMemcpyHtoDAsync_v2", |state| match (from.is_null(), bytes) {
        (_, 0) => Ok(()),
        (true, _) => Err(INVALID_VALUE),
        _ => {
            note_pageable(state, from as usize, bytes);
            put(state, stream, Work::HostToDevice { to, from: from as usize, bytes })
        }
    })
}

/// # Safety
///
/// `to` is writable for `bytes` bytes until the stream has done the copy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: usize) -> Status {
    call("cuMemcpyDtoHAsync_v2", |state| match (to.is_null(), bytes) {
        (_, 0) => Ok(()),
        (true, _) => Err(INVALID_VALUE),
        _ => {
            note_pageable(state, to as usize, bytes);
            put(state, stream, Work::DeviceToHost { to: to as usize, from, bytes })
        }
    })
}

/// # Safety
///
/// None is needed: addresses of the card are numbers here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Status {
    call("cuMemcpyDtoDAsync_v2", |state| put(state, stream, Work::DeviceToDevice { to, from, bytes }))
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(to: u64, value: c_uchar, bytes: usize, stream: usize) -> Status {
    call("cuMemsetD8Async", |state| put(state, stream, Work::Fill { to, value, bytes }))
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8_v2(to: u64, value: c_uchar, bytes: usize) -> Status {
    call("cuMemsetD8_v2", |state| {
        finish_all(state)?;
        put(state, 0, Work::Fill { to, value, bytes })?;
        finish_all(state)
    })
}
