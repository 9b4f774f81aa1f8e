//! System calls that the kernel may refuse altogether, tried with arguments that leave nothing behind.
//!
//! Invariant: what a call opens is closed before its wrapper returns.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// Bytes of `struct io_uring_params` (linux/io_uring.h): thirty words, of which none must be set.
const IO_URING_PARAMS: usize = 120;

fn opened(result: libc::c_long) -> io::Result<()> {
    match libc::c_int::try_from(result) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this process may have an io_uring.
pub(crate) fn io_uring_setup() -> io::Result<()> {
    let mut params = [0u64; IO_URING_PARAMS / 8];
    // SAFETY: the parameters are as long as the kernel reads and writes, and live until the call returns.
    opened(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })
}

/// Whether this process may hold another one (here itself) by a descriptor.
pub(crate) fn pidfd_open() -> io::Result<()> {
    // SAFETY: takes two numbers and no memory.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(std::process::id()), 0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thousand and more tries would run out of descriptors if one were left open at each.
    #[test]
    fn what_is_tried_is_closed_again() {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..200 {
            let _ = (io_uring_setup(), pidfd_open());
        }
        assert!(open() < before + 100, "{before} open before, {} after", open());
    }
}
