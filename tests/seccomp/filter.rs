//! A seccomp filter such as container runtimes install: io_uring_setup is answered with an errno, everything else is allowed.
//!
//! Invariant: it is installed between fork and exec of a child and nowhere else, so no test is disturbed by another's filter.

use std::{io, os::unix::process::CommandExt, process::Command};

/// Has `command` and all its descendants hear `errno` from io_uring_setup.
pub fn refuse_io_uring(command: &mut Command, errno: i32) {
    // SAFETY: the closure runs in the child between fork and exec; it makes two system calls on values of its own stack and
    // neither allocates nor locks.
    unsafe { command.pre_exec(move || install(errno)) };
}

fn install(errno: i32) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number of the call is the first word of what a filter sees; io_uring came so late that it has the same number on every
    // architecture.
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls read their arguments only; the program outlives the second, and the kernel keeps a copy.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) == 0
    };
    if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
}
