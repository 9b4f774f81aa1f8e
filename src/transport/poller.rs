//! Readiness: one epoll instance for a transport, and the tokens by which its events name their socket.
//!
//! Everything is level-triggered. What a bounded read left in a socket is told again by the next wait, and the epoll descriptor
//! itself is readable for as long as any socket has something to say: hence it can be the driver's wake-up descriptor without
//! anything being armed.
//!
//! Invariant: a token is never used for two sockets (until its serial number wraps), so an event of a socket that was closed in
//! the meantime finds nobody.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use crate::{Error, Result};

/// Events taken in one wait; the kernel gives the others their turn in the next one.
const EVENTS_MAX: usize = 256;

/// What kind of socket an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The listening socket.
    Listener = 0,
    /// A caller that is not authenticated.
    Stranger = 1,
    /// A connection to or from a known peer.
    Path = 2,
}

/// Names a socket: kind (bits 62 and 63), serial number (bits 32 to 61), index (bits 0 to 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(u64);

impl Token {
    pub(super) fn kind(self) -> Option<Kind> {
        [Kind::Listener, Kind::Stranger, Kind::Path].into_iter().find(|kind| *kind as u64 == self.0 >> 62)
    }

    pub(super) fn index(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }

    /// Serial number and index alone, for whoever needs the two highest bits for something else.
    pub(super) fn without_kind(self) -> u64 {
        self.0 & !(0b11 << 62)
    }

    /// The token of a path, from [`Token::without_kind`]; the two highest bits are not looked at.
    pub(super) fn of_path(bits: u64) -> Token {
        Token((Kind::Path as u64) << 62 | Token(bits).without_kind())
    }
}

/// What a socket can do now.
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
            .map_err(|e| Error::os("epoll_create1", "the tcp transport", e))?;
        Ok(Poller { epoll, events: vec![EpollEvent::empty(); EVENTS_MAX], serial: 0 })
    }

    /// Watches a socket for something to read.
    pub(super) fn add(&mut self, socket: impl AsFd, kind: Kind, index: usize) -> Result<Token> {
        let token = self.fresh(kind, index);
        self.epoll
            .add(socket, EpollEvent::new(EpollFlags::EPOLLIN, token.0))
            .map_err(|e| Error::os("epoll_ctl(ADD)", "a socket", e))?;
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

    /// Ends the watch. Closing alone would not do: a child process may hold a copy of the socket.
    pub(super) fn remove(&self, socket: impl AsFd) {
        // It fails only if the socket is not watched, and that is what is wanted.
        let _ = self.epoll.delete(socket);
    }

    /// Collects what is ready, without waiting; returns how many there are for [`Poller::ready`].
    pub(super) fn collect(&mut self) -> Result<usize> {
        match self.epoll.wait(&mut self.events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => Ok(0),
            result => result.map_err(|e| Error::os("epoll_wait", "the tcp transport", e)),
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
        self.serial = (self.serial + 1) & ((1 << 30) - 1);
        Token((kind as u64) << 62 | self.serial << 32 | index as u64)
    }

    fn modify(&self, socket: impl AsFd, mut event: EpollEvent) -> Result<()> {
        self.epoll.modify(socket, &mut event).map_err(|e| Error::os("epoll_ctl(MOD)", "a socket", e))
    }
}
