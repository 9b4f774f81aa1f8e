//! Callers that are not authenticated yet: whose they are, how many, how long, and what they are told.
//!
//! Invariant: a caller of another user is hung up on before a word is said; at most [`STRANGERS_MAX`] others hold a socket, none
//! longer than [`STRANGER_TIME`]; each has its hello's 104 bytes read and no more; whatever one of them does closes its own socket
//! and nothing else, with one line in the log.
#![forbid(unsafe_code)]

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::socket::{self, Owner};
use crate::{
    Result,
    transport::poller::{Kind, Poller, Token},
    types::PeerId,
    wire::{
        handshake::{Answering, Heard, Identity, Refusal},
        random_bytes,
    },
};

/// Unauthenticated connections at one time. Each stays for one round trip only, unless its process was stopped.
const STRANGERS_MAX: usize = 64;

/// How long one of them may take.
const STRANGER_TIME: Duration = Duration::from_secs(5);

/// When all seats are taken, one that has been held for so long is cleared for the next caller. Before that, callers wait in the
/// kernel's queue.
const SEAT_TIME: Duration = Duration::from_millis(250);

/// The waiting room of a listener.
#[derive(Debug)]
pub(super) struct Strangers {
    listener: OwnedFd,
    /// While set, the listener is not looked at.
    pause: Option<Pause>,
    seats: Vec<Option<Stranger>>,
    taken: usize,
}

#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    /// A free seat ends it; otherwise the process has no descriptor left, and only time can help.
    for_a_seat: bool,
}

#[derive(Debug)]
struct Stranger {
    socket: OwnedFd,
    owner: Owner,
    token: Token,
    since: Instant,
    answering: Answering,
}

/// A caller that has proved who it is.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) peer: PeerId,
    pub(super) socket: OwnedFd,
    pub(super) owner: Owner,
}

impl Strangers {
    pub(super) fn new(listener: OwnedFd, poller: &mut Poller) -> Result<Strangers> {
        poller.add(&listener, Kind::Listener, 0)?;
        let seats = (0..STRANGERS_MAX).map(|_| None).collect();
        Ok(Strangers { listener, pause: None, seats, taken: 0 })
    }

    /// When [`Strangers::tick`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let pause = self.pause.map(|pause| pause.until);
        if self.taken == 0 {
            return pause;
        }
        let leaves = self.seats.iter().flatten().map(|stranger| stranger.since + STRANGER_TIME).min();
        [leaves, pause].into_iter().flatten().min()
    }

    /// Clears the seats whose time is up, and looks at the listener again after a pause.
    pub(super) fn tick(&mut self, now: Instant, poller: &mut Poller) -> Result<()> {
        if self.taken > 0 {
            for index in 0..self.seats.len() {
                let slow = |stranger: &Stranger| now.saturating_duration_since(stranger.since) >= STRANGER_TIME;
                if self.seats[index].as_ref().is_some_and(slow) {
                    self.dismiss(index, poller, "it took too long to say who it is");
                }
            }
        }
        let is_over = |pause: Pause| now >= pause.until || (pause.for_a_seat && self.taken < STRANGERS_MAX);
        if self.pause.is_some_and(is_over) {
            self.pause = None;
            poller.add(&self.listener, Kind::Listener, 0)?;
        }
        Ok(())
    }

    /// The listener has callers: seats those of our own user and challenges each.
    pub(super) fn welcome(&mut self, now: Instant, poller: &mut Poller) -> Result<()> {
        for _ in 0..STRANGERS_MAX {
            if self.taken == STRANGERS_MAX && !self.clear_a_seat(now, poller) {
                self.pause(now, poller, true);
                return Ok(());
            }
            match socket::accept(&self.listener) {
                Ok(None) => return Ok(()),
                Ok(Some(socket)) => match socket::owner(&socket) {
                    Ok(owner) => self.seat(socket, owner, now, poller)?,
                    Err(reason) => tracing::warn!(reason, "hung up on a caller"),
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections for the moment");
                    self.pause(now, poller, false);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A seated caller has said something. `admit` says whether an authenticated one is wanted.
    pub(super) fn readable(
        &mut self,
        token: Token,
        identity: &Identity,
        poller: &mut Poller,
        admit: impl FnOnce(PeerId, u32) -> Result<(), Refusal>,
    ) -> Option<Guest> {
        let index = token.index();
        let stranger = self.seats.get_mut(index)?.as_mut().filter(|stranger| stranger.token == token)?;
        let count = match socket::receive_bytes(&stranger.socket, stranger.answering.space()) {
            Ok(Some(0)) => {
                self.dismiss(index, poller, "it hung up before it had said who it is");
                return None;
            }
            Ok(Some(count)) => count,
            Ok(None) => return None,
            Err(e) => {
                self.dismiss(index, poller, &e.to_string());
                return None;
            }
        };
        match stranger.answering.received(count, identity, admit) {
            Ok(Heard::More) => {}
            Ok(Heard::Accept { peer, reply }) => {
                if matches!(socket::send_bytes(&stranger.socket, &reply), Ok(true)) {
                    self.taken -= 1;
                    let Stranger { socket, owner, .. } = self.seats[index].take()?;
                    poller.remove(&socket);
                    return Some(Guest { peer, socket, owner });
                }
                self.dismiss(index, poller, "it hung up during the handshake");
            }
            Ok(Heard::Refuse { why, caller, reply }) => {
                // Whether it is told changes nothing for us.
                let _ = socket::send_bytes(&stranger.socket, &reply);
                let caller = caller.map_or("somebody".to_string(), |caller| caller.to_string());
                self.dismiss(index, poller, &format!("{caller} was refused: {why}"));
            }
            Err(error) => self.dismiss(index, poller, &error.to_string()),
        }
        None
    }

    fn seat(&mut self, socket: OwnedFd, owner: Owner, now: Instant, poller: &mut Poller) -> Result<()> {
        let index = self.seats.iter().position(Option::is_none).expect("a seat was cleared before");
        let answering = Answering::begin(random_bytes()?);
        if !matches!(socket::send_bytes(&socket, answering.challenge()), Ok(true)) {
            // Gone again, before it was here: its socket is dropped.
            return Ok(());
        }
        let token = poller.add(&socket, Kind::Stranger, index)?;
        self.seats[index] = Some(Stranger { socket, owner, token, since: now, answering });
        self.taken += 1;
        Ok(())
    }

    /// Closes a seat.
    fn dismiss(&mut self, index: usize, poller: &Poller, reason: &str) {
        let Some(stranger) = self.seats[index].take() else { return };
        self.taken -= 1;
        tracing::warn!(from = %stranger.owner, reason, "closed a connection that was not authenticated");
        poller.remove(&stranger.socket);
        socket::end(&stranger.socket);
    }

    fn clear_a_seat(&mut self, now: Instant, poller: &Poller) -> bool {
        let seated = self.seats.iter().enumerate().filter_map(|(at, seat)| Some((seat.as_ref()?.since, at)));
        match seated.min() {
            Some((since, index)) if now.saturating_duration_since(since) >= SEAT_TIME => {
                self.dismiss(index, poller, "others are waiting for its seat");
                true
            }
            _ => false,
        }
    }

    fn pause(&mut self, now: Instant, poller: &Poller, for_a_seat: bool) {
        poller.remove(&self.listener);
        self.pause = Some(Pause { until: now + SEAT_TIME, for_a_seat });
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        for stranger in self.seats.iter().flatten() {
            socket::end(&stranger.socket);
        }
        // A child process that holds a copy must not keep callers waiting.
        socket::end(&self.listener);
    }
}
