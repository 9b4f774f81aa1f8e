//! A region: one memfd, mapped once, handed out as leases; or a buffer on a device, handed out the same way.
//!
//! Invariant: a mapping lives as long as any lease of it, and its file can neither shrink nor grow (sealed), so a lease's
//! pointer is always valid. That of a device's region is an address of the device, and nothing here reads or writes there.

use std::{
    ffi::CString,
    fmt,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
    },
};

use super::{Lease, pages};
use crate::{Error, Result, cuda::DeviceBuffer};

/// Whether to ask for 2 MiB pages: a NIC's translation cache and the TLB then hold 512 times as much of the region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Where enough of them are free (and the region is at least one of them long); else ordinary pages, and one log line a
    /// process that says why.
    #[default]
    Auto,
    /// Ordinary pages.
    Never,
    /// Huge pages or an error.
    Always,
}

/// Whether the region must stay in memory. Locked pages stay from their first touch on; [`RegionOptions::prefault`] touches
/// all of them at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// A DMA device will register the region: a limit that is too small is [`Error::Memlock`].
    Required,
    /// Try; a refusal is said once a process. For everything that only CPUs touch.
    #[default]
    BestEffort,
    /// Leave it to the kernel.
    None,
}

/// How to allocate a [`Region`].
#[derive(Clone, Debug, Default)]
pub struct RegionOptions {
    /// What the region holds, for messages and /proc/PID/maps.
    pub name: String,
    /// Which page size.
    pub huge_pages: HugePages,
    /// The NUMA node to put the pages on (its number in /sys/devices/system/node). A node that is full or that the kernel
    /// refuses is a warning and `None` in [`RegionReport::node`], never an error.
    pub numa_node: Option<u32>,
    /// Whether the pages must not be swapped out.
    pub lock: Locking,
    /// Have every page there on return (touched by several threads), so that none is faulted in on the data path.
    pub prefault: bool,
}

/// What a region got of what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionReport {
    /// Length of the region in bytes, whole pages.
    pub bytes: usize,
    /// Bytes of one page.
    pub page_bytes: usize,
    /// Whether its pages stay in memory once touched.
    pub locked: bool,
    /// Whether all pages were there when `allocate` returned.
    pub prefaulted: bool,
    /// The node that was asked for, if the kernel took the wish and no page looked at lies elsewhere.
    pub node: Option<u32>,
}

/// The number of a region, unique in this process and never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u64);

/// A page-aligned range of host memory with a file descriptor behind it, zeroed at birth.
///
/// The descriptor ([`AsFd`]) is there to be registered with a device or passed to a peer process. Whoever writes through it, or
/// maps it, owes what a transport owes: to stay out of ranges that somebody else holds a lease on.
#[derive(Clone, Debug)]
pub struct Region {
    mapping: Arc<Mapping>,
}

#[derive(Debug)]
pub(super) struct Mapping {
    id: RegionId,
    backing: Backing,
    start: NonNull<u8>,
    len: usize,
    report: RegionReport,
}

/// What a mapping's addresses stand for.
#[derive(Debug)]
pub(super) enum Backing {
    /// Host memory: a memfd, mapped at `start`.
    File(OwnedFd),
    /// Device memory, which frees itself.
    Device(DeviceBuffer),
}

// SAFETY: `start` is the only field that is not Send by itself, and it is an address of a process-wide mapping that any thread
// may use or unmap; exclusive access to ranges of it is what `Lease` upholds.
unsafe impl Send for Mapping {}
// SAFETY: all fields are written once, before the mapping is shared, and `&Mapping` gives out the address but no access to the
// bytes; those are reached through `Lease` alone, whose blocks never overlap. A device buffer gives out numbers and descriptors.
unsafe impl Sync for Mapping {}

impl Region {
    /// Allocates at least `len` bytes (rounded up to whole pages) and the one lease that covers all of them.
    ///
    /// Errors: [`Error::Memlock`] if locking is required and the limit too small; [`Error::Config`] if huge pages are required
    /// and not to be had, or `len` is beyond any address space; [`Error::Os`] for the rest.
    pub fn allocate(len: usize, options: &RegionOptions) -> Result<(Region, Lease)> {
        static NO_HUGE_PAGES: Once = Once::new();
        let name = &options.name;
        let mapping = match options.huge_pages {
            HugePages::Always => Mapping::huge(len, options)?.map_err(|why| {
                Error::Config(format!("region `{name}` must have huge pages, but {why}; or set huge pages to `auto`"))
            })?,
            HugePages::Auto if len >= pages::HUGE_BYTES => match Mapping::huge(len, options)? {
                Ok(mapping) => mapping,
                Err(why) => {
                    NO_HUGE_PAGES.call_once(|| tracing::info!("ordinary pages for region `{name}` and others: {why}"));
                    Mapping::ordinary(len, options)?
                }
            },
            HugePages::Auto | HugePages::Never => Mapping::ordinary(len, options)?,
        };
        let mapping = Arc::new(mapping);
        Ok((Region { mapping: mapping.clone() }, Lease::whole(mapping)))
    }

    /// The region's number.
    pub fn id(&self) -> RegionId {
        self.mapping.id
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Never true: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// What was got of what the options asked for.
    pub fn report(&self) -> RegionReport {
        self.mapping.report
    }

    /// Where the region is mapped, or where its device has it, for a device that is to reach it. The bytes there are touched
    /// through leases only.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.mapping.start
    }

    pub(super) fn of(mapping: Arc<Mapping>) -> Region {
        Region { mapping }
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Whether `other` is this very region, not one like it.
    pub fn is_same(&self, other: &Region) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Whether `lease` is a range of this region.
    pub fn holds(&self, lease: &Lease) -> bool {
        self.id() == lease.region_id()
    }
}

impl AsFd for Region {
    /// # Panics
    ///
    /// For device memory, which has no memfd; [`Region::host_only`] comes first.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.mapping.backing {
            Backing::File(fd) => fd.as_fd(),
            Backing::Device(_) => panic!("{} is device memory and has no memfd", self.id()),
        }
    }
}

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

impl fmt::Display for RegionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let locked = if self.locked { "locked" } else { "not locked" };
        write!(f, "{} bytes in pages of {} KiB, {locked}", self.bytes, self.page_bytes / 1024)?;
        if self.prefaulted {
            write!(f, ", prefaulted")?;
        }
        match self.node {
            Some(node) => write!(f, ", on NUMA node {node}"),
            None => write!(f, ", on no particular NUMA node"),
        }
    }
}

impl Mapping {
    pub(super) fn id(&self) -> RegionId {
        self.id
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// What the addresses stand for.
    pub(super) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// A number for a new mapping.
    fn next_id() -> RegionId {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        RegionId(NEXT_ID.fetch_add(1, Ordering::Relaxed))
    }

    /// Device memory. It is locked and there by nature, on the node that the device is attached to.
    pub(super) fn on_device(buffer: DeviceBuffer) -> Result<Mapping> {
        let (address, len) = (buffer.address() as usize, buffer.len());
        let info = buffer.context().info();
        let start = NonNull::new(std::ptr::without_provenance_mut(address));
        let start = start.ok_or_else(|| Error::Config(format!("{info} gave memory at address 0")))?;
        let page_bytes = pages::ordinary_bytes();
        let report = RegionReport { bytes: len, page_bytes, locked: true, prefaulted: true, node: info.numa_node };
        Ok(Mapping { id: Mapping::next_id(), backing: Backing::Device(buffer), start, len, report })
    }

    /// A mapping of ordinary pages.
    fn ordinary(len: usize, options: &RegionOptions) -> Result<Mapping> {
        let page_bytes = pages::ordinary_bytes();
        let mut mapping = Mapping::map(round_up(len, page_bytes, options)?, page_bytes, options)
            .map_err(|(call, error)| Error::os(call, subject(options), error))?;
        // Locked before it is touched: a limit that is too small is then found before minutes of zeroing.
        mapping.settle(options)?;
        if options.prefault {
            pages::populate(mapping.start, mapping.len, page_bytes)
                .map_err(|e| Error::os("madvise(MADV_POPULATE_WRITE)", subject(options), e))?;
            mapping.report.prefaulted = true;
        }
        mapping.look_at_node(options);
        Ok(mapping)
    }

    /// A mapping of huge pages, or in words why there is none. All pages are there on return, whatever the options say: a
    /// mapping that the kernel granted may still be refused page by page (a container's hugetlb limit, a cpuset without the
    /// node that has them), and then a touch is a SIGBUS and not an error.
    fn huge(len: usize, options: &RegionOptions) -> Result<Result<Mapping, String>> {
        let len = round_up(len, pages::HUGE_BYTES, options)?;
        let mut mapping = match Mapping::map(len, pages::HUGE_BYTES, options) {
            Ok(mapping) => mapping,
            Err((call, error)) => return Ok(Err(pages::why_not_huge(len, call, error))),
        };
        mapping.settle(options)?;
        if let Err(error) = pages::populate(mapping.start, len, pages::HUGE_BYTES) {
            return Ok(Err(pages::why_not_huge(len, "madvise(MADV_POPULATE_WRITE)", error)));
        }
        // The kernel never swaps huge pages.
        mapping.report.locked = true;
        mapping.report.prefaulted = true;
        mapping.look_at_node(options);
        Ok(Ok(mapping))
    }

    /// Creates the memfd, seals its size and maps it. `Err` is the call that failed, and how.
    fn map(len: usize, page_bytes: usize, options: &RegionOptions) -> Result<Mapping, (&'static str, nix::Error)> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if page_bytes == pages::HUGE_BYTES {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let fd = memfd_create(file_name(&options.name).as_c_str(), flags).map_err(|e| ("memfd_create", e))?;
        let file_len = i64::try_from(len).map_err(|_| ("ftruncate", nix::Error::EFBIG))?;
        nix::unistd::ftruncate(&fd, file_len).map_err(|e| ("ftruncate", e))?;
        // The descriptor travels to peer processes; none of them may cut the file under our feet.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| ("fcntl(F_ADD_SEALS)", e))?;
        let size = NonZeroUsize::new(len).expect("rounded up from at least one byte");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so the kernel picks free space and no existing memory changes.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &fd, 0) }.map_err(|e| ("mmap", e))?;
        let id = Mapping::next_id();
        let report = RegionReport { bytes: len, page_bytes, locked: false, prefaulted: false, node: None };
        Ok(Mapping { id, backing: Backing::File(fd), start: start.cast(), len, report })
    }

    /// Says where the pages are to lie and that they are to stay, before any of them exists.
    fn settle(&mut self, options: &RegionOptions) -> Result<()> {
        static NOT_BOUND: Once = Once::new();
        static NOT_LOCKED: Once = Once::new();
        let name = &options.name;
        if let Some(node) = options.numa_node {
            match pages::prefer_node(self.start, self.len, node) {
                Ok(()) => self.report.node = Some(node),
                Err(error) => NOT_BOUND.call_once(|| {
                    tracing::warn!(
                        "region `{name}` is not bound to NUMA node {node}: mbind: {error}; expect remote memory"
                    )
                }),
            }
        }
        if options.lock == Locking::None {
            return Ok(());
        }
        match pages::lock(self.start, self.len, &subject(options)) {
            Ok(()) => self.report.locked = true,
            Err(error) if options.lock == Locking::Required => return Err(error),
            // Huge pages stay in memory without being locked.
            Err(_) if self.report.page_bytes == pages::HUGE_BYTES => {}
            Err(error) => NOT_LOCKED.call_once(|| tracing::warn!("memory may be swapped out: {error}")),
        }
        Ok(())
    }

    /// A full node gives no pages and no error; so look where they came to lie.
    fn look_at_node(&mut self, options: &RegionOptions) {
        static ELSEWHERE: Once = Once::new();
        let Some(node) = self.report.node else { return };
        if let Some(other) = pages::page_elsewhere(self.start, self.len, self.report.page_bytes, node) {
            self.report.node = None;
            let name = &options.name;
            ELSEWHERE.call_once(|| {
                tracing::warn!(
                    "region `{name}` was to lie on NUMA node {node}, but pages of it lie on node {other}: is it full?"
                )
            });
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let Backing::File(_) = &self.backing else { return };
        // SAFETY: start and len are those of our mmap, and no lease is left to use them (each holds this mapping alive).
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}

fn subject(options: &RegionOptions) -> String {
    format!("region `{}`", options.name)
}

fn round_up(len: usize, page_bytes: usize, options: &RegionOptions) -> Result<usize> {
    // A Rust slice is at most isize::MAX bytes long.
    len.max(1).checked_next_multiple_of(page_bytes).filter(|&len| isize::try_from(len).is_ok()).ok_or_else(|| {
        Error::Config(format!("{} cannot be {len} bytes long: no address space is that large", subject(options)))
    })
}

/// The name under which the region stands in /proc/PID/maps; the kernel takes at most 249 bytes and no NUL.
fn file_name(name: &str) -> CString {
    let text = format!("gradwire-{name}");
    let bytes: Vec<u8> = text.bytes().filter(|&byte| byte != 0).take(200).collect();
    CString::new(bytes).expect("NULs were filtered out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_zeroed_whole_pages_under_a_name_and_an_id_of_its_own() {
        let options = RegionOptions { name: "a\0b".repeat(200), prefault: true, ..Default::default() };
        let (one, lease) = Region::allocate(1, &options).unwrap();
        assert_eq!((one.len(), lease.len()), (pages::ordinary_bytes(), pages::ordinary_bytes()));
        assert!(lease.bytes().iter().all(|&byte| byte == 0));
        assert!(one.report().prefaulted && !one.is_empty());
        let (two, other) = Region::allocate(1, &options).unwrap();
        assert_ne!(one.id(), two.id());
        assert!(one.holds(&lease) && two.holds(&other) && !one.holds(&other) && !two.holds(&lease));
    }

    #[test]
    fn nobody_can_cut_the_file_while_it_is_mapped() {
        let (region, mut lease) = Region::allocate(8192, &RegionOptions::default()).unwrap();
        assert_eq!(nix::unistd::ftruncate(region.as_fd(), 0), Err(nix::Error::EPERM));
        lease.bytes_mut()[8191] = 7;
        assert_eq!(lease.bytes()[8191], 7);
    }

    #[test]
    fn a_lease_outlives_its_region() {
        let (region, mut lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        drop(region);
        lease.bytes_mut().fill(9);
        assert!(lease.bytes().iter().all(|&byte| byte == 9));
    }

    #[test]
    fn absurd_lengths_are_refused_in_words() {
        for len in [usize::MAX, isize::MAX as usize - 1] {
            let error = Region::allocate(len, &RegionOptions::default()).unwrap_err();
            assert!(error.to_string().contains("no address space"), "{error}");
        }
        let error =
            Region::allocate(1 << 60, &RegionOptions { name: "vast".into(), ..Default::default() }).unwrap_err();
        assert!(error.to_string().contains("vast"), "{error}");
    }

    #[test]
    fn a_node_that_is_there_is_used_and_one_that_is_not_is_no_error() {
        let on = |node| RegionOptions { numa_node: Some(node), prefault: true, ..Default::default() };
        let (region, _) = Region::allocate(1 << 20, &on(0)).unwrap();
        assert_eq!(region.report().node, Some(0));
        for absent in [1000, 1 << 20] {
            let (region, lease) = Region::allocate(1 << 20, &on(absent)).unwrap();
            assert_eq!(region.report().node, None);
            assert_eq!(lease.bytes()[0], 0);
        }
    }

    #[test]
    fn a_report_reads_as_a_sentence() {
        let mut report =
            RegionReport { bytes: 4 << 20, page_bytes: 2 << 20, locked: true, prefaulted: true, node: Some(1) };
        assert_eq!(report.to_string(), "4194304 bytes in pages of 2048 KiB, locked, prefaulted, on NUMA node 1");
        report = RegionReport { bytes: 4096, page_bytes: 4096, locked: false, prefaulted: false, node: None };
        assert_eq!(report.to_string(), "4096 bytes in pages of 4 KiB, not locked, on no particular NUMA node");
    }
}
