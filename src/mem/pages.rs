//! The system calls that decide how a fresh mapping's pages are had: huge, on which node, locked, touched.
//!
//! Invariant: these functions are called on a mapping that nobody has leased yet, and they never change a byte of it.

use std::{io, ptr::NonNull, thread};

use nix::sys::mman::{MmapAdvise, madvise};

use crate::{Error, Result};

/// Bytes of a huge page. Other sizes exist; this one does on every x86-64 and on ARM with 4 KiB base pages.
pub(super) const HUGE_BYTES: usize = 2 << 20;

/// The largest node number that a kernel can be built for is 1023.
const NODES_MAX: usize = 1024;
const WORD_BITS: usize = usize::BITS as usize;

/// Below this a second thread costs more than it zeroes.
const PREFAULT_BYTES_PER_THREAD: usize = 64 << 20;

/// How many pages `page_elsewhere` looks at.
const PAGES_SAMPLED_MAX: usize = 64;

/// Bytes of an ordinary page on this machine.
pub(super) fn ordinary_bytes() -> usize {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    bytes.ok().flatten().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(4096)
}

/// Has every page there, by several threads; an error where touching would be a SIGBUS. Threads run on the caller's cores, so
/// pages that prefer no node come to lie beside those.
pub(super) fn populate(start: NonNull<u8>, len: usize, page_bytes: usize) -> io::Result<()> {
    let threads = len.div_ceil(PREFAULT_BYTES_PER_THREAD).min(thread::available_parallelism().map_or(1, usize::from));
    let share = len.div_ceil(threads).next_multiple_of(page_bytes);
    // Numbers, not pointers, cross to the threads: they are only ever handed to the kernel, which checks them.
    let first = start.as_ptr().expose_provenance();
    thread::scope(|scope| {
        let populate_share = |from: usize| populate_part(first + from, share.min(len - from), page_bytes);
        let others: Vec<_> =
            (share..len).step_by(share).map(|from| scope.spawn(move || populate_share(from))).collect();
        let mine = populate_share(0);
        others.into_iter().fold(mine, |result, other| {
            result.and(other.join().unwrap_or_else(|_| Err(io::Error::other("a prefaulting thread died"))))
        })
    })
}

fn populate_part(first: usize, len: usize, page_bytes: usize) -> io::Result<()> {
    let start =
        NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(first)).expect("a mapping is not at address 0");
    // SAFETY: the range is part of a live mapping of ours (caller), and populating changes no byte of it.
    match unsafe { madvise(start.cast(), len, MmapAdvise::MADV_POPULATE_WRITE) } {
        // Linux before 5.14 does not know the advice. Ordinary pages can be touched by hand; huge ones might be a SIGBUS.
        Err(nix::Error::EINVAL) if page_bytes != HUGE_BYTES => {
            touch(start, len, page_bytes);
            Ok(())
        }
        result => Ok(result?),
    }
}

/// Faults in a range page by page.
fn touch(start: NonNull<u8>, len: usize, page_bytes: usize) {
    for offset in (0..len).step_by(page_bytes) {
        // SAFETY: within a mapping of ours that nobody has leased yet (invariant of this file), each thread in its own part; it
        // was zeroed at birth, so a zero changes nothing.
        unsafe { start.add(offset).write_volatile(0) };
    }
}

/// Asks for pages of this range on one node. A preference and not `MPOL_BIND`: under that a full node means that the process is
/// killed, and [`page_elsewhere`] finds the pages that went astray.
pub(super) fn prefer_node(start: NonNull<u8>, len: usize, node: u32) -> io::Result<()> {
    let node = node as usize;
    if node >= NODES_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut mask = [0usize; NODES_MAX / WORD_BITS];
    mask[node / WORD_BITS] = 1 << (node % WORD_BITS);
    // SAFETY: the range is a live mapping of ours (caller); the kernel reads NODES_MAX bits of `mask`, which is that long. (It
    // takes the bit count plus one.)
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, start.as_ptr(), len, libc::MPOL_PREFERRED, mask.as_ptr(), NODES_MAX + 1, 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The node of the first page found that does not lie on `node`, out of at most 64 spread over the range; pages that are not
/// there yet do not count.
pub(super) fn page_elsewhere(start: NonNull<u8>, len: usize, page_bytes: usize, node: u32) -> Option<i32> {
    let pages = len / page_bytes;
    let step = pages.div_ceil(PAGES_SAMPLED_MAX);
    let addresses: Vec<*const u8> =
        (0..pages).step_by(step).map(|page| start.as_ptr().wrapping_add(page * page_bytes).cast_const()).collect();
    let mut nodes = vec![-1i32; addresses.len()];
    let (own_process, nowhere) = (0, std::ptr::null::<i32>());
    // SAFETY: `addresses` and `nodes` hold as many entries as we say; with no target nodes the call moves nothing, it only
    // writes each page's node (or a negative errno) to `nodes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            own_process,
            addresses.len(),
            addresses.as_ptr(),
            nowhere,
            nodes.as_mut_ptr(),
            0,
        )
    };
    // A kernel without NUMA has one node, and then nothing lies elsewhere.
    if result == 0 { nodes.into_iter().find(|&found| found >= 0 && found != node as i32) } else { None }
}

/// Locks the range, page by page as they are touched.
pub(super) fn lock(start: NonNull<u8>, len: usize, subject: &str) -> Result<()> {
    // SAFETY: the range is a live mapping of ours (caller); locking changes no byte.
    if unsafe { libc::mlock2(start.as_ptr().cast(), len, libc::MLOCK_ONFAULT as libc::c_uint) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    let limits = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK);
    // The kernel answers ENOMEM (EPERM when the limit is 0) for a limit that is too small and for much else. Whether we have
    // CAP_IPC_LOCK is no help in telling: in a container's user namespace it shows, and does not count.
    match limits {
        Ok((soft, hard)) => {
            let needed = locked_bytes() + len as u64;
            if needed > soft && matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)) {
                let subject = subject.to_owned();
                return Err(Error::Memlock {
                    subject,
                    needed_bytes: needed,
                    limit_bytes: soft,
                    hard_limit_bytes: hard,
                });
            }
            Err(Error::os("mlock2", subject, error))
        }
        Err(_) => Err(Error::os("mlock2", subject, error)),
    }
}

/// What this process has locked already.
fn locked_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmLck:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0u64) * 1024
}

/// Why huge pages for `len` bytes are not to be had, and what would help.
pub(super) fn why_not_huge(len: usize, call: &str, error: impl Into<io::Error>) -> String {
    let error = error.into();
    let needed = len.div_ceil(HUGE_BYTES) as u64;
    let count = |file: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{file}", HUGE_BYTES / 1024);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let (Some(total), Some(free), Some(reserved)) =
        (count("nr_hugepages"), count("free_hugepages"), count("resv_hugepages"))
    else {
        return format!("this kernel has no huge pages of 2 MiB ({call}: {error})");
    };
    let unused = free.saturating_sub(reserved);
    if unused >= needed {
        let limits = "a hugetlb limit of the container, a cpuset, or a kernel before 5.14 does that";
        return format!("{unused} huge pages are free and {needed} needed, yet {call}: {error} ({limits})");
    }
    let wanted = total + needed - unused;
    format!(
        "{needed} huge pages are needed and {unused} of {total} free; root can add them: `sysctl -w vm.nr_hugepages={wanted}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Region, RegionOptions};

    /// How many pages of a lease are in memory.
    fn resident(lease: &crate::mem::Lease) -> usize {
        let mut present = vec![0u8; lease.len() / ordinary_bytes()];
        let bytes = lease.bytes();
        // SAFETY: the range is mapped (a live lease) and `present` has a byte for each of its pages.
        let result = unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), present.as_mut_ptr()) };
        assert_eq!(result, 0);
        present.iter().filter(|&&page| page & 1 == 1).count()
    }

    fn untouched(len: usize) -> (NonNull<u8>, crate::mem::Lease) {
        let options = RegionOptions { huge_pages: crate::mem::HugePages::Never, ..Default::default() };
        let (_, mut lease) = Region::allocate(len, &options).unwrap();
        (NonNull::new(lease.bytes_mut().as_mut_ptr()).unwrap(), lease)
    }

    #[test]
    fn every_page_is_there_after_populating_with_one_thread_or_several() {
        for len in [ordinary_bytes(), PREFAULT_BYTES_PER_THREAD + 3 * ordinary_bytes()] {
            let (start, lease) = untouched(len);
            assert_eq!(resident(&lease), 0);
            populate(start, len, ordinary_bytes()).unwrap();
            assert_eq!(resident(&lease), len / ordinary_bytes());
            assert!(lease.bytes().iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn touching_by_hand_does_what_older_kernels_cannot() {
        let len = 9 * ordinary_bytes();
        let (start, lease) = untouched(len);
        touch(start, len, ordinary_bytes());
        assert_eq!(resident(&lease), 9);
    }

    #[test]
    fn populating_what_is_not_mapped_is_an_error_and_not_a_crash() {
        // The lowest pages of an address space are never mapped. Called huge, so that nothing is touched by hand.
        let lowest = NonNull::new(std::ptr::without_provenance_mut::<u8>(ordinary_bytes())).unwrap();
        assert!(populate(lowest, ordinary_bytes(), HUGE_BYTES).is_err());
    }

    #[test]
    fn a_page_on_another_node_is_noticed() {
        let len = 100 * ordinary_bytes();
        let (start, _lease) = untouched(len);
        assert_eq!(page_elsewhere(start, len, ordinary_bytes(), 77), None, "no page is there yet");
        touch(start, len, ordinary_bytes());
        // No machine of ours has a node 77, so the pages lie elsewhere.
        assert!(page_elsewhere(start, len, ordinary_bytes(), 77).is_some());
    }

    #[test]
    fn the_want_of_huge_pages_is_explained_with_the_line_to_type() {
        let error = || io::Error::from_raw_os_error(libc::ENOMEM);
        let text = why_not_huge(1 << 50, "mmap", error());
        assert!(text.contains(&(1u64 << 29).to_string()), "{text}");
        assert!(text.contains("sysctl -w vm.nr_hugepages=") || text.contains("no huge pages"), "{text}");
        let text = why_not_huge(0, "mmap", error());
        assert!(text.contains("yet mmap") || text.contains("no huge pages"), "{text}");
    }
}
