//! Readiness: one epoll instance for a transport, and the tokens by which its events name what they are about.
//!
//! Everything is level-triggered: what a bounded read left in a socket is told again by the next wait, and the epoll descriptor
//! is readable for as long as anything has something to say. So it can be the driver's wake-up descriptor.
//!
//! Invariant: a token is never used twice (until its serial number wraps), so an event of a socket that was closed in the meantime
//! finds nobody.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use crate::{Error, Result};

/// Events taken in one wait; the kernel gives the others their turn in the next one.
const EVENTS_MAX: usize = 256;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The listening socket.
    Listener = 0,
    /// A caller that is not authenticated.
    Stranger = 1,
    /// A connection to or from a known peer.
    Socket = 2,
    /// A peer's process: it has ended.
    Process = 3,
    /// The socket or the process of a peer that is fenced and may still be writing.
    Withheld = 4,
}

/// Names what is watched: kind (bits 61 to 63), serial number (bits 32 to 60), index (bits 0 to 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(u64);

impl Token {
    pub(super) fn kind(self) -> Option<Kind> {
        let all = [Kind::Listener, Kind::Stranger, Kind::Socket, Kind::Process, Kind::Withheld];
        all.into_iter().find(|kind| *kind as u64 == self.0 >> 61)
    }

    pub(super) fn index(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }
}

/// What is watched, and can do something now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Readiness {
    pub(super) token: Token,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
    serial: u64,
}

impl Poller {
    pub(super) fn new() -> Result<Poller> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|e| Error::os("epoll_create1", "the shm transport", e))?;
        Ok(Poller { epoll, events: vec![EpollEvent::empty(); EVENTS_MAX], serial: 0 })
    }

    /// Watches for something to read, or an end.
    pub(super) fn add(&mut self, watched: impl AsFd, kind: Kind, index: usize) -> Result<Token> {
        self.serial = (self.serial + 1) & ((1 << 29) - 1);
        let token = Token((kind as u64) << 61 | self.serial << 32 | index as u64);
        self.epoll
            .add(watched, EpollEvent::new(EpollFlags::EPOLLIN, token.0))
            .map_err(|e| Error::os("epoll_ctl(ADD)", "a descriptor", e))?;
        Ok(token)
    }

    /// Watches for room to write as well, or no longer.
    pub(super) fn watch_writable(&self, socket: impl AsFd, token: Token, writable: bool) -> Result<()> {
        let write = if writable { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | write, token.0);
        self.epoll.modify(socket, &mut event).map_err(|e| Error::os("epoll_ctl(MOD)", "a socket", e))
    }

    /// Ends the watch. Closing alone would not do: a child process may hold a copy.
    pub(super) fn remove(&self, watched: impl AsFd) {
        // It fails only if it is not watched, and that is what is wanted.
        let _ = self.epoll.delete(watched);
    }

    /// Collects what is ready, without waiting; returns how many there are for [`Poller::ready`].
    pub(super) fn collect(&mut self) -> Result<usize> {
        match self.epoll.wait(&mut self.events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => Ok(0),
            result => result.map_err(|e| Error::os("epoll_wait", "the shm transport", e)),
        }
    }

    /// One of the events of the last [`Poller::collect`].
    pub(super) fn ready(&self, at: usize) -> Readiness {
        let event = &self.events[at];
        let flags = event.events();
        // An error or a hang-up is found out by reading.
        let ends = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        Readiness {
            token: Token(event.data()),
            readable: flags.intersects(EpollFlags::EPOLLIN | ends),
            writable: flags.contains(EpollFlags::EPOLLOUT),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
