//! Datagrams there and back: a peer returns every one of them at once.
//!
//! Invariant: what is under way is at most the window, so that it fits into either socket's buffer.

use std::{net::TcpStream, os::fd::AsFd};

use nix::poll::{PollFd, PollFlags};

use super::{BATCH, Datagrams, call, is_right, numbered};
use crate::{
    Result,
    tools::bench::{
        Measured,
        echo::{
            Drive, failed,
            messages::Messages,
            touched,
            waiting::{Line, Wait, Waiting, complete, readable},
        },
    },
};

/// The peer's end.
struct Peer {
    datagrams: Datagrams,
    control: TcpStream,
    memory: Vec<u8>,
    place: usize,
    /// Lengths of the datagrams in memory, and how many of these have gone back.
    lens: Vec<usize>,
    returned: usize,
    hung_up: bool,
}

/// One driver's datagrams, until it hangs up.
pub(super) fn answer(datagrams: Datagrams, control: TcpStream, messages: Messages, wait: Wait) -> Result<()> {
    let place = messages.piece as usize;
    let (memory, lens) = (touched(messages.piece * BATCH as u64), Vec::with_capacity(BATCH));
    let mut peer = [Peer { datagrams, control, memory, place, lens, returned: 0, hung_up: false }];
    complete(&mut peer, &mut Waiting::new(wait))
}

impl Line for Peer {
    fn is_done(&self) -> bool {
        self.hung_up
    }

    fn advance(&mut self) -> Result<bool> {
        if self.returned == self.lens.len() {
            self.returned = 0;
            self.lens.clear();
            if self.datagrams.receive(&mut self.memory, self.place, &mut self.lens)? == 0 {
                return Ok(false);
            }
        }
        let places = self.memory.chunks(self.place).zip(&self.lens).skip(self.returned);
        let sent = self.datagrams.send(places.map(|(place, len)| &place[..*len]))?;
        self.returned += sent;
        Ok(sent > 0)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let flags = if self.returned < self.lens.len() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        fds.extend([PollFd::new(self.datagrams.socket.as_fd(), flags), readable(&self.control)]);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.hung_up = ready[1];
        Ok(())
    }
}

/// A driver's end.
struct Driver {
    datagrams: Datagrams,
    control: TcpStream,
    source: Vec<u8>,
    /// A place for each datagram of a round, in the order of their coming.
    target: Vec<u8>,
    place: usize,
    lens: Vec<usize>,
    sent: usize,
    window: usize,
}

impl Driver {
    fn call(drive: &Drive, port: &str, bytes: u64) -> Result<Driver> {
        let (datagrams, control, messages) = call(drive, port, bytes)?;
        let window = datagrams.window(messages.piece)?;
        let (place, places) = (messages.piece as usize, messages.count() as usize);
        let (source, target) = (numbered(bytes, place), touched((places * place) as u64));
        Ok(Driver { datagrams, control, source, target, place, lens: Vec::with_capacity(places), sent: 0, window })
    }

    fn places(&self) -> usize {
        self.source.len().div_ceil(self.place)
    }
}

impl Line for Driver {
    fn is_done(&self) -> bool {
        self.lens.len() == self.places()
    }

    fn advance(&mut self) -> Result<bool> {
        let received = self.lens.len();
        let came = match received < self.sent {
            true => {
                let places = &mut self.target[received * self.place..self.sent * self.place];
                self.datagrams.receive(places, self.place, &mut self.lens)?
            }
            false => 0,
        };
        let room = self.window - (self.sent - self.lens.len());
        let next = self.source.chunks(self.place).skip(self.sent).take(room);
        let sent = self.datagrams.send(next)?;
        self.sent += sent;
        Ok(came + sent > 0)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        // With nothing under way it is room to send that is lacking.
        let flags = if self.sent == self.lens.len() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        fds.extend([PollFd::new(self.datagrams.socket.as_fd(), flags), readable(&self.control)]);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        if ready[1] { Err(failed("hung up")) } else { Ok(()) }
    }
}

/// A driver of peers.
pub(super) fn drive(drive: &Drive) -> Result<Measured> {
    let lines = drive.peers.iter().map(|(port, bytes)| Driver::call(drive, port, *bytes));
    let mut lines = lines.collect::<Result<Vec<Driver>>>()?;
    let mut waiting = Waiting::new(drive.wait);
    let measured = Measured::take(drive.load(), drive.pace, || {
        for line in &mut lines {
            line.sent = 0;
            line.lens.clear();
        }
        complete(&mut lines, &mut waiting)
    })?;
    match lines.iter().all(|line| is_right(&line.target, line.place, &line.lens, &line.source)) {
        true => Ok(measured),
        false => Err(failed("sent back other datagrams than it got")),
    }
}
