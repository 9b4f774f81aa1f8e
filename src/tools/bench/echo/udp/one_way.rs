//! Datagrams one way. To the peer: after each batch it says in one small datagram how many have come so far. From the peer: a
//! small datagram says how many may come, up to which it sends. Numbers go up, so a later small datagram replaces an earlier one.
//!
//! Invariant: what is under way is at most the window, so that it fits into the receiving socket's buffer.

use std::{net::TcpStream, os::fd::AsFd};

use nix::poll::{PollFd, PollFlags};

use super::{BATCH, Datagrams, NUMBER, call, is_right, number_of, numbered};
use crate::{
    Result,
    tools::bench::{
        Load, Measured,
        echo::{
            Drive, failed,
            messages::{Messages, NOTE},
            touched,
            waiting::{Line, Wait, Waiting, complete, readable},
        },
    },
};

/// One end of a one-way flow. Datagrams are counted over all rounds.
struct End {
    datagrams: Datagrams,
    control: TcpStream,
    hung_up: bool,
    is_driver: bool,
    /// Bytes of a place in `memory`, and what has come.
    place: usize,
    memory: Vec<u8>,
    lens: Vec<usize>,
}

impl End {
    fn new(datagrams: Datagrams, control: TcpStream, is_driver: bool, place: u64, places: u64) -> End {
        let (memory, lens) = (touched(place * places), Vec::with_capacity(places as usize));
        End { datagrams, control, hung_up: false, is_driver, place: place as usize, memory, lens }
    }

    /// Takes what small datagrams are here; the largest number that any of them says, or `known`.
    fn largest(&mut self, known: u64) -> Result<u64> {
        self.lens.clear();
        let count = self.datagrams.receive(&mut self.memory, self.place, &mut self.lens)?;
        Ok(self.memory.chunks(self.place).take(count).map(number_of).fold(known, u64::max))
    }

    /// Sends a small datagram that says `number`; false if there is no room for it now.
    fn say(&mut self, number: u64) -> Result<bool> {
        let mut note = [0; NOTE as usize];
        note[..NUMBER].copy_from_slice(&number.to_le_bytes());
        Ok(self.datagrams.send(std::iter::once(&note[..]))? == 1)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>, has_to_send: bool) {
        let flags = if has_to_send { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        fds.extend([PollFd::new(self.datagrams.socket.as_fd(), flags), readable(&self.control)]);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.hung_up = ready[1];
        if self.hung_up && self.is_driver { Err(failed("hung up")) } else { Ok(()) }
    }
}

/// Whoever sends the bytes.
struct Source {
    end: End,
    bytes: Vec<u8>,
    piece: usize,
    sent: u64,
    /// What the other end has told: how many have come, or how many may come.
    told: u64,
    /// How many may go beyond what was told.
    ahead: u64,
    /// How many there are in all; a peer knows no such number.
    goal: Option<u64>,
    to_be_answered: bool,
}

impl Source {
    fn new(end: End, messages: Messages, ahead: u64, goal: Option<u64>) -> Source {
        let piece = messages.piece as usize;
        let bytes = numbered(messages.bytes, piece);
        Source { end, bytes, piece, sent: 0, told: 0, ahead, goal, to_be_answered: true }
    }

    fn may_send(&self) -> u64 {
        self.goal.unwrap_or(u64::MAX).min(self.told + self.ahead)
    }
}

impl Line for Source {
    fn is_done(&self) -> bool {
        match (self.goal, self.to_be_answered) {
            (None, _) => self.end.hung_up,
            (Some(goal), true) => self.told == goal,
            (Some(goal), false) => self.sent == goal,
        }
    }

    fn advance(&mut self) -> Result<bool> {
        let before = (self.told, self.sent);
        self.told = self.end.largest(self.told)?;
        let count = self.bytes.len().div_ceil(self.piece) as u64;
        let (first, room) = (self.sent % count, self.may_send() - self.sent);
        let next = self.bytes.chunks(self.piece).skip(first as usize).take(room as usize);
        self.sent += self.end.datagrams.send(next)? as u64;
        Ok((self.told, self.sent) != before)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.end.wants(fds, self.sent < self.may_send());
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.end.woken(ready)
    }
}

/// A peer that sends what it is asked for.
pub(super) fn give(datagrams: Datagrams, control: TcpStream, messages: Messages, wait: Wait) -> Result<()> {
    let end = End::new(datagrams, control, false, NOTE, BATCH as u64);
    complete(&mut [Source::new(end, messages, 0, None)], &mut Waiting::new(wait))
}

/// A driver that pushes.
pub(super) fn push(drive: &Drive) -> Result<Measured> {
    let line = |(port, bytes): &(String, u64)| -> Result<Source> {
        let (datagrams, control, messages) = call(drive, port, *bytes)?;
        let window = datagrams.window(messages.piece)? as u64;
        let end = End::new(datagrams, control, true, NOTE, BATCH as u64);
        Ok(Source::new(end, messages, window, Some(0)))
    };
    let mut lines = drive.peers.iter().map(line).collect::<Result<Vec<Source>>>()?;
    let mut waiting = Waiting::new(drive.wait);
    let round = |lines: &mut Vec<Source>| {
        for line in lines.iter_mut() {
            let count = line.bytes.len().div_ceil(line.piece) as u64;
            line.goal = line.goal.map(|goal| goal + count);
            line.to_be_answered = false;
        }
        complete(lines, &mut waiting)
    };
    let end = |lines: &mut Vec<Source>| {
        lines.iter_mut().for_each(|line| line.to_be_answered = true);
        complete(lines, &mut Waiting::new(drive.wait))
    };
    Measured::take_until(&mut lines, Load { round: drive.load(), end: 0 }, drive.pace, round, end)
}

/// A peer that takes what is pushed.
struct Sink {
    end: End,
    received: u64,
    said: u64,
}

/// One driver's datagrams, until it hangs up.
pub(super) fn take(datagrams: Datagrams, control: TcpStream, messages: Messages, wait: Wait) -> Result<()> {
    let end = End::new(datagrams, control, false, messages.piece, BATCH as u64);
    complete(&mut [Sink { end, received: 0, said: 0 }], &mut Waiting::new(wait))
}

impl Line for Sink {
    fn is_done(&self) -> bool {
        self.end.hung_up
    }

    fn advance(&mut self) -> Result<bool> {
        self.end.lens.clear();
        self.received += self.end.datagrams.receive(&mut self.end.memory, self.end.place, &mut self.end.lens)? as u64;
        let says = self.received > self.said && self.end.say(self.received)?;
        if says {
            self.said = self.received;
        }
        Ok(says)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.end.wants(fds, self.said < self.received);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.end.woken(ready)
    }
}

/// A driver that pulls: the datagrams of a round lie in memory in the order of their coming.
struct Puller {
    end: End,
    messages: Messages,
    window: u64,
    received: u64,
    granted: u64,
    goal: u64,
}

impl Puller {
    /// What to grant now, if that is worth a datagram: the rest of the round, or half a window more.
    fn grant(&self) -> Option<u64> {
        let grant = self.goal.min(self.received + self.window);
        let is_worth_it =
            grant > self.granted && (grant == self.goal || grant - self.granted >= self.window.div_ceil(2));
        is_worth_it.then_some(grant)
    }
}

impl Line for Puller {
    fn is_done(&self) -> bool {
        self.received == self.goal
    }

    fn advance(&mut self) -> Result<bool> {
        let (before, granted) = (self.received, self.granted);
        let at = self.end.lens.len();
        if self.received < self.granted {
            let places = &mut self.end.memory[at * self.end.place..];
            self.received += self.end.datagrams.receive(places, self.end.place, &mut self.end.lens)? as u64;
        }
        if let Some(grant) = self.grant()
            && self.end.say(grant)?
        {
            self.granted = grant;
        }
        Ok((self.received, self.granted) != (before, granted))
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.end.wants(fds, self.grant().is_some());
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.end.woken(ready)
    }
}

/// A driver that pulls.
pub(super) fn pull(drive: &Drive) -> Result<Measured> {
    let line = |(port, bytes): &(String, u64)| -> Result<Puller> {
        let (datagrams, control, messages) = call(drive, port, *bytes)?;
        let window = datagrams.window(messages.piece)? as u64;
        let end = End::new(datagrams, control, true, messages.piece, messages.count());
        Ok(Puller { end, messages, window, received: 0, granted: 0, goal: 0 })
    };
    let mut lines = drive.peers.iter().map(line).collect::<Result<Vec<Puller>>>()?;
    let mut waiting = Waiting::new(drive.wait);
    let measured = Measured::take(drive.load(), drive.pace, || {
        for line in &mut lines {
            line.end.lens.clear();
            line.goal += line.messages.count();
        }
        complete(&mut lines, &mut waiting)
    })?;
    let right = |line: &Puller| {
        let source = numbered(line.messages.bytes, line.end.place);
        is_right(&line.end.memory, line.end.place, &line.end.lens, &source)
    };
    match lines.iter().all(right) {
        true => Ok(measured),
        false => Err(failed("sent other datagrams than it was asked for")),
    }
}
