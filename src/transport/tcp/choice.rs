//! Which of the kernel's two interfaces moves a transport's bytes: epoll, or io_uring where that is asked for.
//!
//! Whether io_uring may be used is found out by trying and not by looking at versions: seccomp profiles (Docker's default is one), a
//! sysctl, a limit or an old kernel can each forbid it to a process, and each answers with an errno of its own.
//!
//! Invariant: a transport without a word from anybody needs nothing of io_uring.
#![forbid(unsafe_code)]

use nix::errno::Errno;

use super::ring::{Trouble, attempt};
use crate::{Error, Result};

/// The interface that a transport uses. Which is better where: docs/performance.md, "io_uring and epoll".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// Readiness by epoll, then one system call for each receive and each send.
    #[default]
    Epoll,
    /// Receives and sends handed to the kernel through io_uring; an error where that is forbidden.
    Uring,
}

impl Io {
    /// Reads `epoll` or `uring`.
    pub(super) fn parse(text: &str) -> Result<Io> {
        match text {
            "epoll" => Ok(Io::Epoll),
            "uring" => Ok(Io::Uring),
            _ => Err(Error::Config(format!("GRADWIRE_TCP_IO is `{text}`; it must be epoll or uring"))),
        }
    }

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Io::Epoll => "epoll",
            Io::Uring => "io_uring",
        }
    }

    /// Tries what is wanted.
    pub(super) fn attempt(self) -> Result<()> {
        match self {
            Io::Epoll => Ok(()),
            Io::Uring => attempt().map_err(|trouble| refused(&trouble)),
        }
    }
}

/// What whoever asked for io_uring is told where there is none.
pub(super) fn refused(trouble: &Trouble) -> Error {
    let hint = "leave GRADWIRE_TCP_IO away, which is epoll";
    Error::Config(format!("io_uring was asked for and cannot be used: {}; {hint}", explain(trouble)))
}

/// What a refusal means to whoever runs the process.
fn explain(trouble: &Trouble) -> String {
    let (call, errno) = match trouble {
        Trouble::Call { call, errno } => (*call, *errno),
        Trouble::Lacks(what) => return format!("this kernel's io_uring lacks {what}"),
    };
    let cause = match errno {
        Errno::EPERM | Errno::EACCES => match disabled_by_sysctl() {
            Some(value) => format!("the sysctl kernel.io_uring_disabled is {value}"),
            None => "a seccomp profile such as Docker's default forbids it".into(),
        },
        Errno::ENOSYS => "this kernel was built without it, or a sandbox hides it".into(),
        Errno::ENOMEM => "no memory for the rings: on kernels before 5.12 they count as locked, see `ulimit -l`".into(),
        other => other.desc().into(),
    };
    format!("{call}: {errno:?} ({cause})")
}

fn disabled_by_sysctl() -> Option<u8> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    text.trim().parse().ok().filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_word_is_an_error_that_shows_it() {
        assert_eq!(Io::parse("uring").unwrap(), Io::Uring);
        let error = Io::parse("io_uring").unwrap_err().to_string();
        assert!(error.contains("`io_uring`") && error.contains("epoll or uring"), "{error}");
    }

    #[test]
    fn a_refusal_names_the_call_the_errno_and_what_it_means() {
        for (errno, expected) in [(Errno::ENOSYS, "built without"), (Errno::ENOMEM, "ulimit -l"), (Errno::EMFILE, "")] {
            let text = explain(&Trouble::Call { call: "io_uring_setup", errno });
            assert!(text.starts_with(&format!("io_uring_setup: {errno:?} (")) && text.contains(expected), "{text}");
        }
    }
}
