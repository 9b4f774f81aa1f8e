//! Memory of the card and addresses for it, had separately; and descriptors of it.
//!
//! Such memory is what a NIC may be given. Here it is a memfd, mapped at its address on the card: so an RDMA device reaches it by
//! that address, as it reaches a real card's where nvidia-peermem is loaded.
//!
//! Invariant: memory can be touched only where it is mapped and access was given; a descriptor is given for a whole mapping.

use std::{
    ffi::{c_int, c_uint, c_void},
    io,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    ptr,
};

use gradwire_ptx::SharedBytes;

use crate::{
    state::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Status, call, give},
    streams::finish_all,
};

/// What allocations come in, on cards of today.
const GRANULARITY: usize = 2 << 20;

/// Memory that was created.
pub(crate) struct Physical {
    bytes: usize,
    file: OwnedFd,
}

/// Memory at an address of this process, for as long as it is mapped.
#[derive(Debug)]
struct Mapped {
    start: usize,
    len: usize,
}

impl SharedBytes for Mapped {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.len);
        // SAFETY: within the mapping, which `cuMemUnmap` ends after it has taken this out of the card's memory. Others may write at
        // the same time, as to any device's memory; who reads then has not waited for them.
        unsafe { ptr::copy_nonoverlapping((self.start + at) as *const u8, out.as_mut_ptr(), out.len()) }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), (self.start + at) as *mut u8, bytes.len()) }
    }
}

/// Maps a file, or nothing at all, over addresses that were reserved.
fn map_over(address: u64, bytes: usize, file: Option<&OwnedFd>) -> Result<(), Status> {
    let (access, flags, fd) = match file {
        Some(file) => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
    };
    // SAFETY: the addresses were reserved by `cuMemAddressReserve` and are nobody else's.
    let at = unsafe { libc::mmap(address as *mut c_void, bytes, access, flags | libc::MAP_FIXED, fd, 0) };
    if at == libc::MAP_FAILED { Err(OUT_OF_MEMORY) } else { Ok(()) }
}

fn memory_file(bytes: usize) -> io::Result<OwnedFd> {
    // SAFETY: a name that ends with a zero byte.
    let fd = unsafe { libc::memfd_create(c"soft-cuda".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made above and has no other owner.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a descriptor and a number.
    match unsafe { libc::ftruncate(file.as_raw_fd(), bytes as libc::off_t) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

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
        let file = memory_file(bytes).map_err(|_| OUT_OF_MEMORY)?;
        let made = state.handle() as u64;
        state.physical.insert(made, Physical { bytes, file });
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
        state.current()?;
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let wide = bytes + GRANULARITY;
        // SAFETY: no address is asked for, so the kernel picks free space.
        let found = unsafe { libc::mmap(ptr::null_mut(), wide, libc::PROT_NONE, flags, -1, 0) };
        if found == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        let (begin, start) = (found as usize, (found as usize).next_multiple_of(GRANULARITY));
        for (at, len) in [(begin, start - begin), (start + bytes, begin + wide - start - bytes)] {
            if len > 0 {
                // SAFETY: what was mapped above and is not given out.
                unsafe { libc::munmap(at as *mut c_void, len) };
            }
        }
        // SAFETY: the caller's word.
        unsafe { give(address, start as u64) }
    })
}

/// # Safety
///
/// The addresses were reserved, all of them together.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> Status {
    call("cuMemAddressFree", |state| {
        if state.mapped.contains_key(&address) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's word.
        if unsafe { libc::munmap(address as *mut c_void, bytes) } == 0 { Ok(()) } else { Err(INVALID_VALUE) }
    })
}

/// # Safety
///
/// None is needed: addresses and handles are numbers here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, _flags: u64) -> Status {
    call("cuMemMap", |state| {
        state.current()?;
        let physical = state.physical.get(&handle).filter(|physical| physical.bytes == bytes && offset == 0);
        let physical = physical.filter(|_| !state.mapped.contains_key(&address)).ok_or(INVALID_VALUE)?;
        map_over(address, bytes, Some(&physical.file))?;
        state.mapped.insert(address, handle);
        Ok(())
    })
}

/// # Safety
///
/// None is needed: an address of the card is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> Status {
    call("cuMemUnmap", |state| {
        finish_all(state)?;
        let device = state.current()?;
        state.devices[device].memory.free(address);
        state.mapped.remove(&address).ok_or(INVALID_VALUE)?;
        map_over(address, bytes, None)
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
        if !is_ours || state.physical.get(&handle).is_none_or(|physical| physical.bytes != bytes) {
            return Err(INVALID_VALUE);
        }
        let mapped = Box::new(Mapped { start: address as usize, len: bytes });
        if state.devices[device].memory.put_shared(address, mapped) { Ok(()) } else { Err(OUT_OF_MEMORY) }
    })
}

/// # Safety
///
/// `handle` is valid for writing a C int. The descriptor is that of the memory's memfd.
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
        let mapped = mapped.filter(|physical| kind == 1 && physical.bytes == bytes).ok_or(INVALID_VALUE)?;
        let fd = mapped.file.try_clone().map_err(|_| NOT_SUPPORTED)?.into_raw_fd();
        // SAFETY: the caller's word.
        unsafe { give(handle.cast::<c_int>(), fd) }
    })
}
