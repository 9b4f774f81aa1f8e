//! Readiness: one epoll instance for a driver, and the tokens by which its events name what they are about.
//!
//! Everything is level-triggered. What a bounded read left in a socket is told again by the next wait, and the epoll descriptor
//! itself is readable for as long as anything has something to say: hence it can be the driver's wake-up descriptor without
//! anything being armed.
//!
//! Invariant: a token is never used twice (until its serial number wraps), so an event of a descriptor that was closed in the
//! meantime finds nobody.
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
    Path = 2,
    /// A peer's process: it has ended.
    Process = 3,
    /// What is left of a path whose peer is fenced and may still be writing.
    Withheld = 4,
}

/// Where a token's kind begins.
const KIND_SHIFT: u32 = 61;

/// Names what is watched: kind (bits 61 to 63), serial number (bits 32 to 60), index (bits 0 to 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(u64);

impl Token {
    pub(super) fn kind(self) -> Option<Kind> {
        let all = [Kind::Listener, Kind::Stranger, Kind::Path, Kind::Process, Kind::Withheld];
        all.into_iter().find(|kind| *kind as u64 == self.0 >> KIND_SHIFT)
    }

    pub(super) fn index(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }

    /// Serial number and index alone, for whoever needs the highest bits for something else.
    pub(super) fn without_kind(self) -> u64 {
        self.0 & ((1 << KIND_SHIFT) - 1)
    }

    /// The token of a path, from [`Token::without_kind`]; the bits of the kind are not looked at.
    pub(super) fn of_path(bits: u64) -> Token {
        Token((Kind::Path as u64) << KIND_SHIFT | Token(bits).without_kind())
    }
}

/// What is watched, and can do something now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Readiness {
    pub(super) token: Token,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// What a driver watches.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
    serial: u64,
}

impl Poller {
    /// Nothing is watched yet.
    pub(super) fn new() -> Result<Poller> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| Error::os("epoll_create1", "a transport", e))?;
        Ok(Poller { epoll, events: vec![EpollEvent::empty(); EVENTS_MAX], serial: 0 })
    }

    /// Watches for something to read, or an end.
    pub(super) fn add(&mut self, watched: impl AsFd, kind: Kind, index: usize) -> Result<Token> {
        let token = self.fresh(kind, index);
        self.epoll
            .add(watched, EpollEvent::new(EpollFlags::EPOLLIN, token.0))
            .map_err(|e| Error::os("epoll_ctl(ADD)", "a descriptor", e))?;
        Ok(token)
    }

    /// Gives a watched socket a new name.
    pub(super) fn rename(&mut self, socket: impl AsFd, kind: Kind, index: usize) -> Result<Token> {
        let token = self.fresh(kind, index);
        self.modify(socket, EpollEvent::new(EpollFlags::EPOLLIN, token.0))?;
        Ok(token)
    }

    /// Watches a socket for room to write as well, or no longer.
    pub(super) fn watch_writable(&self, socket: impl AsFd, token: Token, writable: bool) -> Result<()> {
        let write = if writable { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        self.modify(socket, EpollEvent::new(EpollFlags::EPOLLIN | write, token.0))
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
            result => result.map_err(|e| Error::os("epoll_wait", "a transport", e)),
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

    fn fresh(&mut self, kind: Kind, index: usize) -> Token {
        self.serial = (self.serial + 1) & ((1 << (KIND_SHIFT - 32)) - 1);
        Token((kind as u64) << KIND_SHIFT | self.serial << 32 | index as u64)
    }

    fn modify(&self, socket: impl AsFd, mut event: EpollEvent) -> Result<()> {
        self.epoll.modify(socket, &mut event).map_err(|e| Error::os("epoll_ctl(MOD)", "a socket", e))
    }
}
