//! Memory that a peer shares with us: a file whose size is sealed, mapped, and never touched but by words and whole copies.
//!
//! Invariant: nothing is mapped whose file could shrink, so no access is ever a SIGBUS by a peer's cutting it; no reference to
//! shared bytes exists, only to atomic words, so a peer that writes at the wrong moment yields wrong values and nothing worse.

use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{self, AtomicU64, Ordering},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        stat::fstat,
    },
};

use super::ring::{CONTROLS, Control, ENTRY_WORDS, Shared, Word};
use crate::{
    Error, Result,
    mem::{HugePages, Locking, Region, RegionOptions},
};

/// Entries of a ring: 64 KiB of them. A worker's window is a few hundred pushes at most; more wait in the writer's own queue.
pub(super) const RING_ENTRIES: usize = 1024;
/// Bytes between control words: two cache lines, since processors fetch them in pairs.
const CONTROL_STRIDE: usize = 128;
/// Where the entries begin.
const ENTRIES_OFFSET: usize = 4096;
const ENTRY_BYTES: usize = ENTRY_WORDS * 8;
/// Bytes of a ring.
const RING_BYTES: usize = ENTRIES_OFFSET + RING_ENTRIES * ENTRY_BYTES;

/// The parts of a ring as docs/wire.md has them: name, offset, bytes.
#[doc(hidden)]
pub const RING_LAYOUT: [(&str, usize, usize); CONTROLS + 1] = [
    ("tail", Control::Tail as usize * CONTROL_STRIDE, 8),
    ("head", Control::Head as usize * CONTROL_STRIDE, 8),
    ("sleeping", Control::Sleeping as usize * CONTROL_STRIDE, 8),
    ("waiting", Control::Waiting as usize * CONTROL_STRIDE, 8),
    ("copying", Control::Copying as usize * CONTROL_STRIDE, 8),
    ("fenced", Control::Fenced as usize * CONTROL_STRIDE, 8),
    ("entries", ENTRIES_OFFSET, RING_ENTRIES * ENTRY_BYTES),
];

const _: () = assert!(RING_ENTRIES.is_power_of_two() && CONTROLS * CONTROL_STRIDE <= ENTRIES_OFFSET);

/// A peer's file, or one that a peer knows, in our address space.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `start` is an address of a process-wide mapping that any thread may use or unmap, and `Mapping` is its only owner.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file, if it is sealed against shrinking and growing and has as many.
    pub(super) fn import(file: impl AsFd, len: u64) -> Result<Mapping, String> {
        let seals =
            fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|e| format!("it cannot be sealed: F_GET_SEALS: {e}"))?;
        let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        if !SealFlag::from_bits_truncate(seals).contains(needed) {
            return Err("its size is not sealed".into());
        }
        let there = fstat(&file).map_err(|e| format!("fstat: {e}"))?.st_size;
        if u64::try_from(there).is_ok_and(|there| there < len) {
            return Err(format!("it has {there} bytes, {len} were announced"));
        }
        // A Rust slice is at most isize::MAX bytes long.
        let size = isize::try_from(len).ok().and_then(|len| NonZeroUsize::new(len as usize));
        let size = size.ok_or_else(|| format!("{len} bytes cannot be mapped"))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so the kernel picks free space and no existing memory changes.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, 0) };
        let start = start.map_err(|e| format!("mmap of {len} bytes: {e}"))?;
        Ok(Mapping { start: start.cast(), len: size.get() })
    }

    /// Writes `bytes` at `offset`; false, and nothing written, if they do not lie within the mapping.
    #[must_use]
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(end) = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(bytes.len())) else {
            return false;
        };
        if end > self.len {
            return false;
        }
        // SAFETY: the range lies within the mapping (checked above), which lives as long as `self`. `bytes` is a lease's, and
        // nobody has armed a range of ours for ourselves, so source and target are different memory. That nobody reads the target
        // meanwhile is what its owner upholds by arming it.
        unsafe {
            let target = self.start.as_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
        true
    }

    /// The word at `offset`.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "no word at {offset} of {} bytes", self.len);
        // SAFETY: within the mapping and aligned (a mapping begins with a page), which lives as long as the reference; everybody
        // in this process reaches these bytes through atomics alone, and what another process does is as if it did.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those of our mmap, and no reference into it outlives `self`.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}

/// A ring in a mapping.
#[derive(Debug)]
pub(super) struct Ring(Mapping);

impl Ring {
    /// A fresh ring, and the file by which a peer maps it too. `name` stands in /proc/PID/maps.
    pub(super) fn create(name: &str) -> Result<(Ring, OwnedFd)> {
        let options = RegionOptions {
            name: name.to_string(),
            huge_pages: HugePages::Never,
            lock: Locking::None,
            prefault: true,
            ..Default::default()
        };
        let (region, _) = Region::allocate(RING_BYTES, &options)?;
        let file = region.as_fd().try_clone_to_owned().map_err(|e| Error::os("fcntl(F_DUPFD_CLOEXEC)", name, e))?;
        let ring = Ring::import(&file).map_err(|defect| Error::Config(format!("{name}: {defect}")))?;
        Ok((ring, file))
    }

    /// A peer's ring.
    pub(super) fn import(file: impl AsFd) -> Result<Ring, String> {
        Mapping::import(file, RING_BYTES as u64).map(Ring)
    }
}

impl Word for AtomicU64 {
    fn load(&self, ordering: Ordering) -> u64 {
        AtomicU64::load(self, ordering)
    }

    fn store(&self, value: u64, ordering: Ordering) {
        AtomicU64::store(self, value, ordering);
    }
}

impl Shared for Ring {
    type Word = AtomicU64;
    const ENTRIES: u64 = RING_ENTRIES as u64;

    fn control(&self, which: Control) -> &AtomicU64 {
        self.0.word(which as usize * CONTROL_STRIDE)
    }

    fn entry(&self, slot: u64, word: usize) -> &AtomicU64 {
        self.0.word(ENTRIES_OFFSET + slot as usize * ENTRY_BYTES + word * 8)
    }

    fn full_fence() {
        atomic::fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file(bytes: i64, seals: SealFlag) -> OwnedFd {
        let file = memfd_create(c"gradwire-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&file, bytes).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    #[test]
    fn a_file_that_its_owner_could_cut_is_not_mapped() {
        let both = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        for seals in [SealFlag::empty(), SealFlag::F_SEAL_GROW, SealFlag::F_SEAL_SHRINK] {
            assert!(Mapping::import(file(8192, seals), 8192).unwrap_err().contains("not sealed"));
        }
        let told = Mapping::import(file(4096, both), 8192).unwrap_err();
        assert!(told.contains("4096") && told.contains("8192"), "{told}");
        for absurd in [0, u64::MAX, 1 << 62] {
            assert!(Mapping::import(file(4096, both), absurd).is_err());
        }
        let (pipe, _) = nix::unistd::pipe().unwrap();
        assert!(Mapping::import(pipe, 4096).is_err(), "no memory at all");
        assert!(Mapping::import(file(8192, both), 8192).is_ok());
        assert!(Ring::import(file(RING_BYTES as i64 - 1, both)).is_err());
    }

    #[test]
    fn nothing_is_written_beyond_the_end() {
        let both = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        let mapping = Mapping::import(file(4096, both), 4096).unwrap();
        assert!(mapping.write(4088, &[7; 8]) && mapping.write(4096, &[]));
        for (offset, len) in [(4089, 8), (4096, 1), (u64::MAX, 1), (u64::MAX - 7, 8), (0, 4097)] {
            assert!(!mapping.write(offset, &vec![1; len]), "{len} bytes at {offset}");
        }
        assert_eq!(mapping.word(4088).load(Ordering::Relaxed), u64::from_ne_bytes([7; 8]));
        assert_eq!(mapping.word(0).load(Ordering::Relaxed), 0);
    }

    /// Every control word and every entry has its own place, within the ring.
    #[test]
    fn the_words_of_a_ring_do_not_overlap() {
        let (ring, _) = Ring::create("test").unwrap();
        let all =
            [Control::Tail, Control::Head, Control::Sleeping, Control::Waiting, Control::Copying, Control::Fenced];
        assert_eq!(all.len(), CONTROLS);
        let mut places: Vec<usize> = all.iter().map(|which| ring.control(*which).as_ptr() as usize).collect();
        for slot in 0..RING_ENTRIES as u64 {
            places.extend((0..ENTRY_WORDS).map(|word| ring.entry(slot, word).as_ptr() as usize));
        }
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= 8));
        assert!(places[places.len() - 1] - places[0] < RING_BYTES);
    }
}
