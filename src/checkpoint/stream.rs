//! A file that is written from one end to the other at the disk's rate: past the page cache (O_DIRECT) in large blocks, by an
//! io_uring, so that the next block is filled while the disk takes the last ones.
//!
//! Where the file system has no direct writes (tmpfs) they go through the page cache, where io_uring is refused (a seccomp profile)
//! each write is waited for, and what fits into one buffer is one ordinary write. The last bytes, less than a block, go through the
//! page cache; everything is durable after [`DiskFile::sync`].
//!
//! Invariant: a buffer that has been handed to the kernel is not touched before its completion has been seen; the file ends after
//! all of them.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};

use super::disk::DiskFile;

/// Bytes of a buffer: so large that calls cost nothing, a multiple of every disk's block.
const BUFFER_BYTES: usize = 4 << 20;

/// One is filled, the others are on their way.
const BUFFERS: usize = 3;

/// What addresses, lengths and places of direct writes must be multiples of.
const BLOCK: usize = 4096;

/// A buffer on its way.
#[derive(Clone, Copy)]
struct Flight {
    offset: u64,
    len: usize,
}

pub(super) struct StreamFile {
    file: File,
    /// `None`: each write is waited for.
    ring: Option<IoUring>,
    may_use_ring: bool,
    /// The buffers, one after the other; page-aligned, and only what is used of them is there.
    memory: MmapMut,
    buffer_bytes: usize,
    current: usize,
    filled: usize,
    flying: [Option<Flight>; BUFFERS],
    /// Where the buffer that is being filled will lie.
    offset: u64,
    is_direct: bool,
}

impl StreamFile {
    /// Over an empty file.
    pub fn new(file: File) -> io::Result<StreamFile> {
        StreamFile::with(file, BUFFER_BYTES, true)
    }

    fn with(file: File, buffer_bytes: usize, may_use_ring: bool) -> io::Result<StreamFile> {
        Ok(StreamFile {
            file,
            ring: None,
            may_use_ring,
            memory: MmapMut::map_anon(BUFFERS * buffer_bytes)?,
            buffer_bytes,
            current: 0,
            filled: 0,
            flying: [None; BUFFERS],
            offset: 0,
            is_direct: false,
        })
    }

    /// There is more than a buffer: from here on it pays.
    fn begin(&mut self) {
        self.set_direct(true);
        self.ring = self.may_use_ring.then(|| IoUring::new(BUFFERS as u32)).and_then(|ring| match ring {
            Ok(ring) => Some(ring),
            Err(error) => {
                tracing::debug!(%error, "checkpoints are written without io_uring");
                None
            }
        });
    }

    fn set_direct(&mut self, wanted: bool) {
        let set = fcntl(&self.file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain).and_then(|mut flags| {
            flags.set(OFlag::O_DIRECT, wanted);
            fcntl(&self.file, FcntlArg::F_SETFL(flags))
        });
        if let Err(error) = &set {
            tracing::debug!(%error, "checkpoints are written through the page cache");
        }
        self.is_direct = wanted && set.is_ok();
    }

    fn bytes(&self, buffer: usize, len: usize) -> &[u8] {
        &self.memory[buffer * self.buffer_bytes..][..len]
    }

    /// Has the first `len` bytes of the current buffer written, and waits until the next one is free.
    fn send(&mut self, len: usize) -> io::Result<()> {
        let flight = Flight { offset: self.offset, len };
        if self.ring.is_some() {
            self.submit(flight)?;
        } else {
            self.write_now(self.current, 0, flight)?;
        }
        self.offset += len as u64;
        self.filled = 0;
        self.current = (self.current + 1) % BUFFERS;
        self.wait_for(self.current)
    }

    fn submit(&mut self, flight: Flight) -> io::Result<()> {
        let (fd, start) = (self.file.as_raw_fd(), self.bytes(self.current, flight.len).as_ptr());
        let entry = opcode::Write::new(types::Fd(fd), start, flight.len as u32).offset(flight.offset);
        let entry = entry.build().user_data(self.current as u64);
        let ring = self.ring.as_mut().expect("looked at by the caller");
        // SAFETY: the buffer lies in `memory`, is not touched while `flying` says that it is on its way, and outlives the ring's
        // use of it: `drop` waits for all that are. The file is open as long as this value.
        unsafe { ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the ring has room for every buffer"))?;
        self.flying[self.current] = Some(flight);
        loop {
            match ring.submit() {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                submitted => return submitted.map(drop),
            }
        }
    }

    /// Writes what of a flight has not been written yet, and waits for it.
    fn write_now(&mut self, buffer: usize, done: usize, flight: Flight) -> io::Result<()> {
        let rest = |file: &StreamFile| {
            file.file.write_all_at(&file.bytes(buffer, flight.len)[done..], flight.offset + done as u64)
        };
        match rest(self) {
            // This file system has other blocks, or none.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && self.is_direct => {
                self.set_direct(false);
                rest(self)
            }
            written => written,
        }
    }

    /// Waits until a buffer may be filled again.
    fn wait_for(&mut self, buffer: usize) -> io::Result<()> {
        while self.flying[buffer].is_some() {
            let ring = self.ring.as_mut().expect("what flies was submitted");
            let Some(entry) = ring.completion().next() else {
                match ring.submit_and_wait(1) {
                    Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
                    _ => continue,
                }
            };
            let ended = entry.user_data() as usize;
            let flight = self.flying[ended].take().expect("each is ended once");
            match usize::try_from(entry.result()) {
                Ok(done) if done >= flight.len => {}
                Ok(done) => self.write_now(ended, done / BLOCK * BLOCK, flight)?,
                Err(_) if entry.result() == -libc::EINVAL => self.write_now(ended, 0, flight)?,
                Err(_) => return Err(Errno::from_raw(-entry.result()).into()),
            }
        }
        Ok(())
    }
}

impl DiskFile for StreamFile {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.filled == self.buffer_bytes {
                if self.offset == 0 {
                    self.begin();
                }
                self.send(self.buffer_bytes)?;
            }
            let count = bytes.len().min(self.buffer_bytes - self.filled);
            let start = self.current * self.buffer_bytes + self.filled;
            self.memory[start..start + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let (buffer, filled, offset) = (self.current, self.filled, self.offset);
        let blocks = if offset == 0 { 0 } else { filled / BLOCK * BLOCK };
        if blocks > 0 {
            self.send(blocks)?;
        }
        for buffer in 0..BUFFERS {
            self.wait_for(buffer)?;
        }
        if self.is_direct {
            self.set_direct(false);
        }
        self.file.write_all_at(&self.bytes(buffer, filled)[blocks..], offset + blocks as u64)?;
        self.file.sync_all()
    }
}

impl Drop for StreamFile {
    /// After an error some buffers may still be on their way.
    fn drop(&mut self) {
        for buffer in 0..BUFFERS {
            while self.flying[buffer].is_some() {
                let Some(ring) = self.ring.as_mut() else { break };
                let _ = ring.submit_and_wait(1);
                let ended: Vec<u64> = ring.completion().map(|entry| entry.user_data()).collect();
                ended.into_iter().for_each(|ended| self.flying[ended as usize] = None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: usize = 2 * BLOCK;

    fn check_written(path: &std::path::Path, len: usize, piece: usize, ring: bool) {
        let mut file = StreamFile::with(File::create(path).unwrap(), SMALL, ring).unwrap();
        let bytes: Vec<u8> = (0..len).map(|at| (at * 7 % 251) as u8).collect();
        bytes.chunks(piece).for_each(|piece| file.write(piece).unwrap());
        file.sync().unwrap();
        drop(file);
        assert_eq!(std::fs::read(path).unwrap(), bytes, "{len} bytes in pieces of {piece}, io_uring: {ring}");
    }

    #[test]
    fn any_length_in_any_pieces_is_there_by_every_way() {
        // The second is a tmpfs on most machines.
        for dir in [std::env::temp_dir(), "/dev/shm".into()].into_iter().filter(|dir| dir.is_dir()) {
            let dir = tempfile::tempdir_in(dir).unwrap();
            let path = dir.path().join("file");
            for ring in [true, false] {
                for len in [0, 1, BLOCK, SMALL - 1, SMALL, SMALL + 1, SMALL + BLOCK, 3 * SMALL, 7 * SMALL + BLOCK + 5] {
                    for piece in [1000, BLOCK, 100_000] {
                        check_written(&path, len, piece, ring);
                    }
                }
            }
        }
    }

    #[test]
    fn a_full_disk_is_told_of_at_the_latest_by_the_sync() {
        for ring in [true, false] {
            for len in [10, SMALL + 1, 20 * SMALL] {
                let full = File::options().write(true).open("/dev/full").unwrap();
                let mut file = StreamFile::with(full, SMALL, ring).unwrap();
                let said = file.write(&vec![1; len]).and_then(|()| file.sync());
                let error = said.expect_err("it was taken");
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{len} bytes, io_uring: {ring}");
            }
        }
    }

    #[test]
    fn what_is_under_way_is_waited_for_when_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..50 {
            let mut file = StreamFile::with(File::create(dir.path().join("file")).unwrap(), SMALL, true).unwrap();
            file.write(&vec![1; 3 * SMALL]).unwrap();
        }
    }
}
