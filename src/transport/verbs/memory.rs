//! Registered memory: regions that a device may reach, and the ring into which a peer writes its notes.
//!
//! A region is registered with addresses that begin at 0: the address of a byte is its offset in the region, here and at the
//! peer, so that a key and an offset name it and nobody learns where it is mapped.
//!
//! Invariant: a registration keeps its region mapped; a ring's entry is read only after the completion that names it and before
//! the credit for it goes back, when the peer has no leave to write it.

use std::{fmt, fs, io, ptr::NonNull, sync::Arc};

use nix::sys::resource::{Resource, getrlimit};

use super::device::Device;
use crate::{
    Error, Result,
    mem::{HugePages, Lease, Locking, Region, RegionOptions},
    sys::verbs::{self, IbvMr},
    wire::FrameHeader,
};

/// A region's registration with a device.
pub(super) struct Registration {
    device: Arc<Device>,
    raw: NonNull<IbvMr>,
    /// The device's pages are this region's.
    region: Region,
}

// SAFETY: libibverbs' objects belong to the process and not to a thread, and its functions lock what they share.
unsafe impl Send for Registration {}

impl Registration {
    /// Registers all of `region`, for our own requests and for peers' writes.
    pub(super) fn new(device: &Arc<Device>, region: &Region) -> Result<Registration> {
        // The order in which a payload's bytes reach memory is nobody's concern: its note's completion comes after all of them.
        let access = verbs::ACCESS_LOCAL_WRITE | verbs::ACCESS_REMOTE_WRITE | verbs::ACCESS_RELAXED_ORDERING;
        // SAFETY: the domain is valid; the range is the region's mapping, which stays as long as `region` is held here. What the
        // device writes goes to ranges that peers were given by `arm` (or to a ring), of which no safe code holds a reference.
        let raw = unsafe {
            (device.table().reg_mr_iova2)(device.pd(), region.start().as_ptr().cast(), region.len(), 0, access)
        };
        let Some(raw) = NonNull::new(raw) else {
            return Err(explain(io::Error::last_os_error(), device, region));
        };
        Ok(Registration { device: device.clone(), raw, region: region.clone() })
    }

    /// The key for our own requests.
    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: valid until `drop`.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// The key for peers' requests.
    pub(super) fn rkey(&self) -> u32 {
        // SAFETY: valid until `drop`.
        unsafe { (*self.raw.as_ptr()).rkey }
    }
}

/// The kernel pins what it registers, up to the limit on locked memory.
fn explain(error: io::Error, device: &Device, region: &Region) -> Error {
    let subject = format!("{} of {} bytes with RDMA device {}", region.id(), region.len(), device.place.device);
    let is_limit = matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM));
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else {
        return Error::os("ibv_reg_mr", subject, error);
    };
    let needed_bytes = pinned_bytes() + region.len() as u64;
    if is_limit && needed_bytes > soft {
        return Error::Memlock { subject, needed_bytes, limit_bytes: soft, hard_limit_bytes: hard };
    }
    if is_limit {
        let why = format!("{error}; the limit on locked memory (`ulimit -l`) would allow it: is there memory enough?");
        return Error::os("ibv_reg_mr", subject, io::Error::new(error.kind(), why));
    }
    Error::os("ibv_reg_mr", subject, error)
}

/// What devices hold of this process already.
fn pinned_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmPin:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0u64) * 1024
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: ended once; the keys are given to nobody after.
        let result = unsafe { (self.device.table().dereg_mr)(self.raw.as_ptr()) };
        if result != 0 {
            tracing::error!("ibv_dereg_mr failed: {}", io::Error::from_raw_os_error(result));
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("region", &self.region.id()).finish_non_exhaustive()
    }
}

/// Where one peer writes its notes: an entry of 64 bytes each (docs/wire.md), used in turn.
#[derive(Debug)]
pub(super) struct NoteRing {
    registration: Registration,
    entries: Vec<Lease>,
}

impl NoteRing {
    pub(super) fn new(device: &Arc<Device>, entries: u16) -> Result<NoteRing> {
        let options = RegionOptions {
            name: "notes".into(),
            huge_pages: HugePages::Never,
            lock: Locking::None,
            ..RegionOptions::default()
        };
        let bytes = usize::from(entries) * FrameHeader::SIZE;
        let (region, lease) = Region::allocate(bytes, &options)?;
        let registration = Registration::new(device, &region)?;
        let (lease, _) = lease.split_at(bytes);
        Ok(NoteRing { registration, entries: lease.chunks(FrameHeader::SIZE) })
    }

    pub(super) fn rkey(&self) -> u32 {
        self.registration.rkey()
    }

    pub(super) fn entries(&self) -> u16 {
        self.entries.len() as u16
    }

    /// What the peer wrote as its note number `count`.
    pub(super) fn read(&self, count: u16) -> [u8; FrameHeader::SIZE] {
        let entry = &self.entries[usize::from(count % self.entries())];
        entry.bytes().try_into().expect("an entry has the size of a header")
    }
}
