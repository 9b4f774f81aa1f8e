//! Registered memory: regions that a device may reach (those in a GPU: `device_memory`), and the ring into which a peer writes its notes.
//!
//! A region is registered with addresses that begin at 0: the address of a byte is its offset in the region, here and at the
//! peer, so that a key and an offset name it and nobody learns where it is mapped.
//!
//! Invariant: a registration keeps its region mapped; a ring's entry is read only after the completion that names it and before
//! the credit for it goes back, when the peer has no leave to write it.

use std::{ffi::c_void, fmt, fs, io, ptr::NonNull, sync::Arc};

use nix::sys::resource::{Resource, getrlimit};

use super::{device::Device, device_memory};
use crate::{
    Error, Result,
    mem::{HugePages, Lease, Locking, Region, RegionOptions},
    sys::verbs::{self, IbvMr},
    wire::FrameHeader,
};

/// What peers may do with registered memory. The order in which a payload's bytes reach memory is nobody's concern: its note's
/// completion comes after all of them.
pub(super) const ACCESS: u32 = verbs::ACCESS_LOCAL_WRITE | verbs::ACCESS_REMOTE_WRITE | verbs::ACCESS_RELAXED_ORDERING;

/// Memory that a device may reach, by its keys.
pub(super) struct Keys {
    device: Arc<Device>,
    raw: NonNull<IbvMr>,
}

/// A region's registration with a device.
pub(super) struct Registration {
    keys: Keys,
    /// The device's pages are this region's.
    region: Region,
}

// SAFETY: libibverbs' objects belong to the process and not to a thread, and its functions lock what they share.
unsafe impl Send for Keys {}

impl Keys {
    /// Has the device reach `len` bytes from `start` on.
    ///
    /// # Safety
    ///
    /// The range stays mapped as long as these keys live; what peers write into it is read through leases alone.
    pub(super) unsafe fn of_pages(device: &Arc<Device>, start: *mut c_void, len: usize) -> io::Result<Keys> {
        // SAFETY: the domain is valid, and the range our caller's.
        let raw = unsafe { (device.table().reg_mr_iova2)(device.pd(), start, len, 0, ACCESS) };
        Keys::had(device, raw)
    }

    /// What a function of libibverbs that registers has answered: the one way to keys, and so where registrations are counted.
    pub(super) fn had(device: &Arc<Device>, raw: *mut IbvMr) -> io::Result<Keys> {
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        device.count_registration();
        Ok(Keys { device: device.clone(), raw })
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

impl Drop for Keys {
    fn drop(&mut self) {
        // SAFETY: ended once; the keys are given to nobody after.
        let result = unsafe { (self.device.table().dereg_mr)(self.raw.as_ptr()) };
        if result != 0 {
            tracing::error!("ibv_dereg_mr failed: {}", io::Error::from_raw_os_error(result));
        }
    }
}

impl Registration {
    /// Registers all of `region`, for our own requests and for peers' writes.
    pub(super) fn new(device: &Arc<Device>, region: &Region) -> Result<Registration> {
        let keys = match region.device_range() {
            // SAFETY: the allocation stays as long as `region` is held here, and the processor never touches it.
            Some(range) => unsafe { device_memory::register(device, &range) }?,
            // SAFETY: the range is the region's mapping, which stays as long as `region` is held here. What the device writes goes
            // to ranges that peers were given by `arm` (or to a ring), of which no safe code holds a reference.
            None => unsafe { Keys::of_pages(device, region.start().as_ptr().cast(), region.len()) }
                .map_err(|error| explain(error, device, region))?,
        };
        Ok(Registration { keys, region: region.clone() })
    }

    /// The key for our own requests.
    pub(super) fn lkey(&self) -> u32 {
        self.keys.lkey()
    }

    /// The key for peers' requests.
    pub(super) fn rkey(&self) -> u32 {
        self.keys.rkey()
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

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("region", &self.region.id()).finish_non_exhaustive()
    }
}

/// Where one peer writes its notes: an entry of 64 bytes each (docs/wire.md), used in turn.
#[derive(Debug)]
pub(super) struct NoteRing {
    registration: Registration,
    lease: Lease,
    /// A power of 2.
    entries: u16,
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
        Ok(NoteRing { registration, lease, entries })
    }

    pub(super) fn rkey(&self) -> u32 {
        self.registration.rkey()
    }

    #[inline]
    pub(super) fn entries(&self) -> u16 {
        self.entries
    }

    /// What the peer wrote as its note number `count`.
    #[inline]
    pub(super) fn read(&self, count: u16) -> [u8; FrameHeader::SIZE] {
        let (entries, _) = self.lease.bytes().as_chunks();
        entries[usize::from(entry_of(count, self.entries))]
    }
}

/// The entry of note number `count` in a ring of `entries`, a power of 2.
#[inline]
pub(super) fn entry_of(count: u16, entries: u16) -> u16 {
    count & entries.wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::{
        super::fake::{Call, Fake},
        *,
    };

    #[test]
    fn a_region_is_registered_from_0_with_all_of_it_and_given_back_once() {
        let fake = Fake::new();
        let (region, _lease) = Region::allocate(8192, &RegionOptions::default()).unwrap();
        let registration = Registration::new(&fake.device(), &region).unwrap();
        assert_eq!((registration.lkey(), registration.rkey()), (Fake::LKEY, Fake::RKEY));
        let start = region.start().as_ptr().addr() as u64;
        let registered = Call::Pages { address: start, length: region.len(), iova: 0, access: ACCESS };
        assert_eq!(fake.calls(), std::slice::from_ref(&registered));
        drop(registration);
        assert_eq!(fake.calls(), [registered, Call::Ended]);
    }

    #[test]
    fn a_refusal_is_told_with_the_region_and_the_device() {
        let fake = Fake::new();
        fake.refuse_pages(libc::EINVAL);
        let (region, _lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        let error = Registration::new(&fake.device(), &region).unwrap_err().to_string();
        assert!(error.contains("of 4096 bytes with RDMA device fake0") && error.contains("Invalid"), "{error}");
        // With memory short and the limit high enough, the limit is not what is wrong.
        fake.refuse_pages(libc::ENOMEM);
        let error = Registration::new(&fake.device(), &region).unwrap_err().to_string();
        assert!(error.contains("would allow it") || error.contains("RLIMIT_MEMLOCK"), "{error}");
        assert!(!fake.calls().contains(&Call::Ended), "what was never registered is not given back");
    }
}
