//! Memory that another process maps too, and how its file gets there.
//!
//! Invariant: nothing is mapped whose file could shrink, so no access is a SIGBUS; no reference to shared bytes exists, only to
//! atomic words, so a process that writes at the wrong moment yields wrong values and nothing worse.

use std::{
    io::{IoSlice, IoSliceMut},
    num::NonZeroUsize,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
        stat::fstat,
    },
};

use crate::{Error, Result};

/// Most files that [`send_files`] sends at once.
const FILES_MAX: usize = 4;

/// A sealed memfd, mapped to be written and read by copies.
///
/// Whoever maps the file of a [`super::Region`] owes what a transport owes: to stay out of ranges that somebody in this process
/// holds a lease on.
#[derive(Debug)]
pub struct SharedMapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `start` is an address of a process-wide mapping that any thread may use or unmap, and `SharedMapping` is its only
// owner.
unsafe impl Send for SharedMapping {}

impl SharedMapping {
    /// Maps all of `file`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a file whose size is not sealed; [`Error::Os`] naming the call that failed.
    pub(crate) fn new(file: impl AsFd) -> Result<SharedMapping> {
        const SUBJECT: &str = "shared memory";
        let refused = |call| move |error: nix::Error| Error::os(call, SUBJECT, error);
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(refused("fcntl(F_GET_SEALS)"))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW) {
            return Err(Error::Config("shared memory must be sealed against growing and shrinking".into()));
        }
        let size = fstat(&file).map_err(refused("fstat"))?.st_size;
        let len = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or_else(|| Error::Config("shared memory of no bytes cannot be mapped".into()))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so the kernel picks free space and no existing memory changes.
        let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, &file, 0) };
        Ok(SharedMapping { start: start.map_err(refused("mmap"))?.cast(), len: len.get() })
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Copies `source` to `offset`.
    ///
    /// # Panics
    ///
    /// If it does not fit there.
    pub fn write(&self, offset: usize, source: &[u8]) {
        self.check(offset, source.len());
        // SAFETY: the range lies within the mapping, which lives as long as `self`. `source` is memory of this process alone,
        // or of a lease, which by the duty on this type does not overlap. When the other process looks is for both to agree on.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.start.as_ptr().add(offset), source.len()) }
    }

    /// Copies what is at `offset` to `target`.
    ///
    /// # Panics
    ///
    /// If there are not as many bytes.
    pub fn read(&self, offset: usize, target: &mut [u8]) {
        self.check(offset, target.len());
        // SAFETY: as in `write`, the other way round; all values of a byte are valid.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr().add(offset), target.as_mut_ptr(), target.len()) }
    }

    /// The word at `offset`.
    ///
    /// # Panics
    ///
    /// If it is not aligned to 8 bytes, or lies outside.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, size_of::<u64>());
        assert!(offset.is_multiple_of(align_of::<AtomicU64>()), "no word begins at {offset}");
        // SAFETY: within the mapping and aligned (a mapping begins with a page), which lives as long as the reference; both
        // processes reach the words that they agree on through atomics alone.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    fn check(&self, offset: usize, len: usize) {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "{len} bytes at {offset} are outside of shared memory of {} bytes", self.len);
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those of our mmap, and no reference into it outlives `self`.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}

/// Hands open files to the process at the other end.
///
/// # Errors
///
/// [`Error::Os`] if they cannot be sent.
///
/// # Panics
///
/// If there are more than four.
pub(crate) fn send_files(connection: &UnixStream, files: &[BorrowedFd<'_>]) -> Result<()> {
    assert!(files.len() <= FILES_MAX, "{} files at once", files.len());
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let bytes = [IoSlice::new(&[0])]; // files travel beside a byte only
    let sent = sendmsg::<UnixAddr>(connection.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None);
    sent.map(drop).map_err(|error| Error::os("sendmsg(SCM_RIGHTS)", "shared memory", error))
}

/// Takes the files that the other end hands over: exactly `N` of them. Waits as long as the connection's timeout says.
///
/// # Errors
///
/// [`Error::Os`] if nothing came; [`Error::Config`] if it was another number of files.
pub(crate) fn receive_files<const N: usize>(connection: &UnixStream) -> Result<[OwnedFd; N]> {
    let refused = |error: nix::Error| Error::os("recvmsg(SCM_RIGHTS)", "shared memory", error);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!([RawFd; FILES_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(connection.as_raw_fd(), &mut bytes, Some(&mut control), flags).map_err(refused)?;
    let mut files = Vec::new();
    for part in message.cmsgs().map_err(refused)? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
            files.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    files.try_into().map_err(|files: Vec<OwnedFd>| {
        Error::Config(format!("{} files were handed over where {N} were to come", files.len()))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::mem::{Region, RegionOptions};

    #[test]
    fn what_one_end_writes_the_other_reads() {
        let (region, _) = Region::allocate(5000, &RegionOptions::default()).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        send_files(&here, &[region.as_fd()]).unwrap();
        let [file] = receive_files(&there).unwrap();
        let (one, other) = (SharedMapping::new(&region).unwrap(), SharedMapping::new(&file).unwrap());
        assert_eq!(one.len(), 8192);
        one.write(4093, b"seven b");
        one.word(8).store(9, Ordering::Release);
        let mut target = [0; 7];
        other.read(4093, &mut target);
        assert_eq!((&target, other.word(8).load(Ordering::Acquire)), (b"seven b", 9));
    }

    #[test]
    fn what_is_not_sealed_is_not_mapped() {
        let error = SharedMapping::new(tempfile::tempfile().unwrap()).unwrap_err().to_string();
        assert!(error.contains("F_GET_SEALS"), "{error}");
        let plain = nix::sys::memfd::memfd_create(c"plain", nix::sys::memfd::MFdFlags::empty()).unwrap();
        assert!(SharedMapping::new(&plain).unwrap_err().to_string().contains("sealed"));
    }

    #[test]
    #[should_panic(expected = "outside of shared memory")]
    fn nothing_is_copied_beyond_the_end() {
        let (region, _) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        SharedMapping::new(&region).unwrap().write(4090, &[0; 7]);
    }

    #[test]
    fn another_number_of_files_is_refused() {
        let (here, there) = UnixStream::pair().unwrap();
        send_files(&here, &[here.as_fd()]).unwrap();
        assert!(receive_files::<2>(&there).unwrap_err().to_string().contains("1 files"));
    }
}
