//! What only trying tells: whether the kernel lets this process have an io_uring, and what shared memory needs.
//!
//! Invariant: what was tried is gone afterwards.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Item, Tree};
use crate::sys::kernel;

pub(super) fn io_uring(tree: &Tree) -> Item {
    judge_io_uring(tree, kernel::io_uring_setup())
}

/// What the kernel's answer means, by what else /proc says.
pub(super) fn judge_io_uring(tree: &Tree, answer: io::Result<()>) -> Item {
    let error = match answer {
        Ok(()) => return Item::fine("io_uring", "allowed"),
        Err(error) => error,
    };
    let refused = |by: &str| Item::not_here("io_uring", format!("refused ({error}) by {by}; epoll is used"));
    let filtered = tree.field("/proc/self/status", "Seccomp:").is_some_and(|mode| mode == "2");
    match (error.raw_os_error(), tree.number("/proc/sys/kernel/io_uring_disabled")) {
        (Some(libc::EPERM), Some(2)) => {
            refused("the sysctl kernel.io_uring_disabled=2").mend("sysctl kernel.io_uring_disabled=0")
        }
        (Some(libc::EPERM), Some(1)) if !filtered => {
            refused("the sysctl kernel.io_uring_disabled=1, for all but one group")
                .mend("sysctl kernel.io_uring_disabled=0, or join the group in kernel.io_uring_group")
        }
        (Some(libc::EPERM | libc::ENOSYS), _) if filtered => refused("a seccomp filter, as container runtimes set")
            .mend("docker run --security-opt seccomp=PROFILE.json, with io_uring_{setup,enter,register} allowed"),
        (Some(libc::ENOSYS), _) => Item::not_here("io_uring", "this kernel was built without it; epoll is used"),
        _ => refused("the kernel"),
    }
}

/// Shared memory between ranks passes memfds over a socket with an abstract name, and knows a peer's death by its pidfd.
pub(super) fn shared_memory() -> Item {
    let name = format!("gradwire-doctor-{}", std::process::id());
    let socket = SocketAddr::from_abstract_name(name).and_then(|name| UnixListener::bind_addr(&name)).map(drop);
    let memfd = memfd_create(c"gradwire-doctor", MFdFlags::MFD_CLOEXEC).map(drop).map_err(io::Error::from);
    judge_shared_memory([("memfd_create", memfd), ("pidfd_open", kernel::pidfd_open()), ("an abstract socket", socket)])
}

pub(super) fn judge_shared_memory(tried: [(&str, io::Result<()>); 3]) -> Item {
    let failed = tried.iter().filter_map(|(what, result)| Some(format!("{what}: {}", result.as_ref().err()?)));
    let failed: Vec<String> = failed.collect();
    match failed.is_empty() {
        true => Item::fine("shared memory", "memfd, pidfd and abstract sockets are allowed"),
        false => Item::wrong(
            "shared memory",
            failed.join("; "),
            "a kernel from 5.3 on; in a container a seccomp profile that allows memfd_create and pidfd_open",
        ),
    }
}
