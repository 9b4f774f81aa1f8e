//! A region: one memfd, mapped once, handed out as leases.
//!
//! Invariant: a mapping lives as long as any lease of it, so a lease's pointer is always valid.

use std::{
    ffi::CString,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    mman::{MapFlags, ProtFlags, mmap, munmap},
};

use super::Lease;
use crate::{Error, Result};

/// How to allocate a [`Region`].
#[derive(Clone, Debug, Default)]
pub struct RegionOptions {
    /// What the region holds, for messages and /proc/PID/maps.
    pub name: String,
}

/// A page-aligned range of host memory with a file descriptor behind it, zeroed at birth.
#[derive(Clone, Debug)]
pub struct Region {
    mapping: Arc<Mapping>,
}

#[derive(Debug)]
pub(super) struct Mapping {
    fd: OwnedFd,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory; exclusive access to ranges of it is what `Lease` upholds.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself offers no access to the bytes.
unsafe impl Sync for Mapping {}

impl Region {
    /// Allocates at least `len` bytes (rounded up to whole pages) and the one lease that covers all of them.
    pub fn allocate(len: usize, options: &RegionOptions) -> Result<(Region, Lease)> {
        let len = len.max(1).next_multiple_of(4096);
        let name = CString::new(format!("gradwire-{}", options.name)).unwrap_or_default();
        let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC)
            .map_err(|e| Error::os("memfd_create", &options.name, e))?;
        nix::unistd::ftruncate(&fd, len as i64).map_err(|e| Error::os("ftruncate", &options.name, e))?;
        let size = NonZeroUsize::new(len).expect("rounded up from at least one byte");
        // SAFETY: a fresh shared mapping of a file descriptor that only we hold; nothing else points into it.
        let start =
            unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &fd, 0) }
                .map_err(|e| Error::os("mmap", &options.name, e))?;
        let mapping = Arc::new(Mapping { fd, start: start.cast(), len });
        Ok((Region { mapping: mapping.clone() }, Lease::whole(mapping)))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Never true: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether `other` is this very region, not one like it.
    pub fn is_same(&self, other: &Region) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Whether `lease` is a range of this region.
    pub fn holds(&self, lease: &Lease) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.mapping), lease.mapping())
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mapping.fd.as_fd()
    }
}

impl Mapping {
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those of our mmap, and no lease is left (they hold this mapping alive).
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}
