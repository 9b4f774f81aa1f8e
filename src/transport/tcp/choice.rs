//! Which of the kernel's two interfaces moves a transport's bytes: io_uring where it may be used and is wanted, epoll otherwise.
//!
//! It is found out by trying and not by looking at versions: seccomp profiles (Docker's default is one), a sysctl, a limit or an
//! old kernel can each forbid io_uring to a process, and each answers with an errno of its own.
//!
//! Invariant: a transport without a word from anybody always comes to be; whichever interface it has, it can say why.
#![forbid(unsafe_code)]

use std::{fmt, sync::Once};

use nix::errno::Errno;

use super::ring::{Trouble, attempt};
use crate::{Error, Result};

/// The interface that a transport is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// What is better here, as far as it may be used.
    #[default]
    Auto,
    /// Readiness by epoll, then one system call for each receive and each send.
    Epoll,
    /// Receives and sends handed to the kernel through io_uring; an error where that is forbidden.
    Uring,
}

/// What a transport uses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoChoice {
    /// "epoll" or "io_uring".
    pub name: &'static str,
    /// In words, with the system call and its errno where the kernel had a say.
    pub reason: String,
}

const EPOLL: &str = "epoll";
const URING: &str = "io_uring";

/// Why io_uring is preferred: docs/performance.md, "io_uring and epoll".
const MEASURED: &str = "chosen by measurement: on loopback the median round is nowhere slower than over epoll";

impl Io {
    /// Reads `auto`, `epoll` or `uring`.
    pub(super) fn parse(text: &str) -> Result<Io> {
        match text {
            "auto" => Ok(Io::Auto),
            "epoll" => Ok(Io::Epoll),
            "uring" => Ok(Io::Uring),
            _ => Err(Error::Config(format!("GRADWIRE_TCP_IO is `{text}`; it must be auto, epoll or uring"))),
        }
    }

    /// Tries what is wanted.
    pub(super) fn choose(self) -> Result<IoChoice> {
        let choice = match self {
            Io::Epoll => IoChoice { name: EPOLL, reason: "it was asked for".into() },
            Io::Auto | Io::Uring => match (attempt(), self) {
                (Ok(()), Io::Auto) => IoChoice { name: URING, reason: MEASURED.into() },
                (Ok(()), _) => IoChoice { name: URING, reason: "it was asked for".into() },
                (Err(trouble), _) => self.without_uring(&trouble)?,
            },
        };
        // A process has many transports, and what one finds all find.
        static TOLD: Once = Once::new();
        TOLD.call_once(|| tracing::info!("tcp uses {choice}"));
        Ok(choice)
    }

    /// Epoll instead, or an error if io_uring was insisted on.
    pub(super) fn without_uring(self, trouble: &Trouble) -> Result<IoChoice> {
        let reason = explain(trouble);
        if self == Io::Uring {
            let hint = "say GRADWIRE_TCP_IO=auto to have epoll instead";
            return Err(Error::Config(format!("io_uring was asked for and cannot be used: {reason}; {hint}")));
        }
        Ok(IoChoice { name: EPOLL, reason })
    }
}

impl IoChoice {
    pub(super) fn is_uring(&self) -> bool {
        self.name == URING
    }
}

impl fmt::Display for IoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
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
        assert!(error.contains("`io_uring`") && error.contains("auto, epoll or uring"), "{error}");
    }

    #[test]
    fn a_refusal_names_the_call_the_errno_and_what_it_means() {
        for (errno, expected) in [(Errno::ENOSYS, "built without"), (Errno::ENOMEM, "ulimit -l"), (Errno::EMFILE, "")] {
            let text = explain(&Trouble::Call { call: "io_uring_setup", errno });
            assert!(text.starts_with(&format!("io_uring_setup: {errno:?} (")) && text.contains(expected), "{text}");
        }
    }
}
