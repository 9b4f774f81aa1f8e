//! Callers that are not authenticated yet: how many, how long, how many bytes, and what they are told.
//!
//! Invariant: at most [`STRANGERS_MAX`] of them hold a socket, none longer than [`STRANGER_TIME`]; each has its hello's 104 bytes
//! read and no more; whatever one of them does closes its own socket and nothing else, with one line in the log.
#![forbid(unsafe_code)]

use std::{
    io::{self, IoSlice, Read},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::socket;
use crate::{
    Result,
    transport::poller::{Kind, Poller, Token},
    types::PeerId,
    wire::{
        handshake::{Answering, Heard, Identity, Refusal},
        random_bytes,
    },
};

/// Unauthenticated connections at one time (about 300 bytes each): a job's start brings more callers than that, but each stays for
/// one round trip only.
pub(super) const STRANGERS_MAX: usize = 64;

/// How long one of them may take.
pub(super) const STRANGER_TIME: Duration = Duration::from_secs(5);

/// When all seats are taken, one that has been held for so long is cleared for the next caller; who knows the protocol needs one
/// round trip. Before that, callers wait in the kernel's queue.
const SEAT_TIME: Duration = Duration::from_millis(250);

/// What a refused caller may still send before its socket is closed on it.
const FAREWELL_BYTES_MAX: usize = 4096;

/// The waiting room of a listener.
#[derive(Debug)]
pub(super) struct Strangers {
    listener: TcpListener,
    listener_token: Token,
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
    stream: TcpStream,
    token: Token,
    from: SocketAddr,
    since: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Answering(Answering),
    /// Refused. To close at once could take the refusal away from it: unread bytes turn a close into a reset.
    Leaving {
        read: usize,
    },
}

/// A caller that has proved who it is.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) peer: PeerId,
    pub(super) stream: TcpStream,
}

impl Strangers {
    pub(super) fn new(listener: TcpListener, poller: &mut Poller) -> Result<Strangers> {
        let listener_token = poller.add(&listener, Kind::Listener, 0)?;
        let seats = (0..STRANGERS_MAX).map(|_| None).collect();
        Ok(Strangers { listener, listener_token, pause: None, seats, taken: 0 })
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
            self.listener_token = poller.add(&self.listener, Kind::Listener, 0)?;
        }
        Ok(())
    }

    /// The listener has callers: seats them and challenges each.
    pub(super) fn welcome(&mut self, now: Instant, poller: &mut Poller) -> Result<()> {
        for _ in 0..STRANGERS_MAX {
            if self.taken == STRANGERS_MAX && !self.clear_a_seat(now, poller) {
                self.pause(now, poller, true);
                return Ok(());
            }
            match socket::accept(&self.listener) {
                Ok(None) => return Ok(()),
                Ok(Some((stream, from))) => self.seat(stream, from, now, poller)?,
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
        let mut rest = [0; 512];
        let space = match &mut stranger.stage {
            Stage::Answering(answering) => answering.space(),
            Stage::Leaving { .. } => &mut rest,
        };
        let count = match stranger.stream.read(space) {
            Ok(0) => {
                self.dismiss(index, poller, "it hung up before it had said who it is");
                return None;
            }
            Ok(count) => count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return None,
            Err(e) => {
                self.dismiss(index, poller, &e.to_string());
                return None;
            }
        };
        match &mut stranger.stage {
            Stage::Leaving { read } => {
                *read += count;
                if *read > FAREWELL_BYTES_MAX {
                    self.dismiss(index, poller, "");
                }
                None
            }
            Stage::Answering(answering) => {
                let heard = answering.received(count, identity, admit);
                match heard {
                    Ok(Heard::More) => None,
                    Ok(Heard::Accept { peer, reply }) => self.accept(index, poller, peer, &reply),
                    Ok(Heard::Refuse { why, caller, reply }) => {
                        self.refuse(index, poller, why, caller, &reply);
                        None
                    }
                    Err(error) => {
                        self.dismiss(index, poller, &error.to_string());
                        None
                    }
                }
            }
        }
    }

    /// The listener's address.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    fn seat(&mut self, stream: TcpStream, from: SocketAddr, now: Instant, poller: &mut Poller) -> Result<()> {
        let index = self.seats.iter().position(Option::is_none).expect("a seat was cleared before");
        let answering = Answering::begin(random_bytes()?);
        let challenged = socket::send(&stream, &[IoSlice::new(answering.challenge())]);
        if !matches!(challenged, Ok(Some(count)) if count == answering.challenge().len()) {
            // Gone again, before it was here: its socket is dropped.
            return Ok(());
        }
        let token = poller.add(&stream, Kind::Stranger, index)?;
        self.seats[index] = Some(Stranger { stream, token, from, since: now, stage: Stage::Answering(answering) });
        self.taken += 1;
        Ok(())
    }

    fn accept(&mut self, index: usize, poller: &Poller, peer: PeerId, reply: &[u8]) -> Option<Guest> {
        let stream = &self.seats[index].as_ref()?.stream;
        match socket::send(stream, &[IoSlice::new(reply)]) {
            Ok(Some(count)) if count == reply.len() => {
                self.taken -= 1;
                self.seats[index].take().map(|stranger| Guest { peer, stream: stranger.stream })
            }
            _ => {
                self.dismiss(index, poller, "it hung up during the handshake");
                None
            }
        }
    }

    fn refuse(&mut self, index: usize, poller: &Poller, why: Refusal, caller: Option<PeerId>, reply: &[u8]) {
        let Some(stranger) = &mut self.seats[index] else { return };
        let caller = caller.map_or("somebody".to_string(), |caller| caller.to_string());
        let from = stranger.from;
        match why.is_passing() {
            // A peer that heard of a change before us; it calls again.
            true => tracing::debug!(%from, %caller, reason = %why, "refused a connection"),
            false => tracing::warn!(%from, %caller, reason = %why, "refused a connection"),
        }
        stranger.stage = Stage::Leaving { read: 0 };
        let told = socket::send(&stranger.stream, &[IoSlice::new(reply)]);
        if !matches!(told, Ok(Some(_))) || stranger.stream.shutdown(Shutdown::Write).is_err() {
            self.dismiss(index, poller, "");
        }
    }

    /// Closes a seat. One that was refused has had its line in the log already.
    fn dismiss(&mut self, index: usize, poller: &Poller, reason: &str) {
        let Some(stranger) = self.seats[index].take() else { return };
        self.taken -= 1;
        if matches!(stranger.stage, Stage::Answering(_)) {
            tracing::warn!(from = %stranger.from, reason, "closed a connection that was not authenticated");
        }
        poller.remove(&stranger.stream);
        socket::end(&stranger.stream);
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
            socket::end(&stranger.stream);
        }
    }
}
