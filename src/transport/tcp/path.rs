//! One peer's path: expected, being called, open or dead; and the reading and writing while it is open.
//!
//! Invariant: one call of [`Path::read`] or [`Path::write`] does a bounded amount of work, so that no peer keeps the others
//! waiting; nothing is read or written once the path is dead.
#![forbid(unsafe_code)]

use std::{
    io::{self, IoSlice, Read},
    net::TcpStream,
    time::Instant,
};

use super::{
    connecting::Call,
    epoll::{Poller, Token},
    framing::{Inbound, Outbound, RANGES_MAX},
    socket,
};
use crate::{
    Error, Result,
    transport::{Completion, region_table::RegionTable},
    types::PeerId,
    wire::FrameHeader,
};

/// Bytes that one connection may receive in one poll, give or take a buffer: two of the largest usual chunks.
const READ_BYTES_MAX: usize = 2 << 20;

/// Bytes that one connection may send in one flush or poll, give or take one payload.
const WRITE_BYTES_MAX: usize = 4 << 20;

/// What is to be told at the next poll, and whom it is about.
pub(super) type Done = Vec<(PeerId, Completion)>;

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    pub(super) state: State,
    pub(super) outbound: Outbound,
    /// Whether the path is in the list of those to flush.
    pub(super) is_dirty: bool,
}

#[derive(Debug)]
pub(super) enum State {
    /// The peer will call us.
    Expecting { deadline: Instant },
    /// We call the peer.
    Calling(Box<Call>),
    /// Connected.
    Open(Open),
    /// Broken and reported; armed slots wait for the fence.
    Dead,
}

#[derive(Debug)]
pub(super) struct Open {
    stream: TcpStream,
    token: Token,
    inbound: Inbound,
    waits_for_room: bool,
    /// Sending failed: what the peer sent before is still read, then the path ends with this reason.
    send_error: Option<io::Error>,
}

impl Open {
    pub(super) fn new(stream: TcpStream, token: Token) -> io::Result<Open> {
        // Coalescing is done by flush; the kernel must not hold small writes back for more.
        stream.set_nodelay(true)?;
        Ok(Open { stream, token, inbound: Inbound::default(), waits_for_room: false, send_error: None })
    }
}

impl Path {
    /// Whether a flush can send anything: not while the socket is full, for then the room itself is what continues the sending.
    pub(super) fn can_write(&self) -> bool {
        matches!(&self.state, State::Open(open) if !open.waits_for_room)
    }

    /// Whether an event under `token` is about this path's open connection.
    pub(super) fn is_open_as(&self, token: Token) -> bool {
        matches!(&self.state, State::Open(open) if open.token == token)
    }

    /// Receives what is here, up to a bound. An error is the reason why the path ends.
    pub(super) fn read(&mut self, table: &mut RegionTable, done: &mut Done) -> Result<(), String> {
        let State::Open(open) = &mut self.state else { return Ok(()) };
        let peer = self.peer;
        let mut left = READ_BYTES_MAX;
        while left > 0 {
            let mut targets = open.inbound.targets(left);
            let room: usize = targets.iter().map(|target| target.len()).sum();
            let count = match open.stream.read_vectored(&mut targets) {
                Ok(0) => return Err(open.end_of_stream()),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(open.send_error.take().unwrap_or(e).to_string()),
            };
            open.inbound.received(count);
            let mut take = |header: &FrameHeader| {
                let target = header.target.expect("only a write with payload opens a slot");
                table.take(peer, target.rkey, target.offset, header.note.length)
            };
            while let Some((note, lease)) = open.inbound.next(&mut take).map_err(|defect| defect.to_string())? {
                done.push((peer, Completion::Arrived { from: peer, note, lease }));
            }
            if count < room {
                // The socket is empty, or nearly: the next wait tells.
                return Ok(());
            }
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// Sends what is queued, as far as there is room and up to a bound. An error is the reason why the path ends.
    pub(super) fn write(&mut self, poller: &Poller, done: &mut Done) -> Result<(), String> {
        let State::Open(open) = &mut self.state else { return Ok(()) };
        let peer = self.peer;
        let mut left = WRITE_BYTES_MAX;
        while open.send_error.is_none() && left > 0 && !self.outbound.is_empty() {
            let mut ranges = [IoSlice::new(&[]); RANGES_MAX];
            let (count, bytes) = self.outbound.gather(&mut ranges, left);
            match socket::send(&open.stream, &ranges[..count]) {
                Ok(Some(sent)) => {
                    self.outbound.advance(sent, |queued| {
                        done.push((peer, Completion::Sent { id: queued.id, source: queued.source }));
                    });
                    if sent < bytes {
                        break;
                    }
                    left = left.saturating_sub(sent);
                }
                Ok(None) => break,
                Err(e) if is_end_of_connection(&e) => open.send_error = Some(e),
                Err(e) => return Err(format!("sending failed: {e}")),
            }
        }
        let waits_for_room = open.send_error.is_none() && !self.outbound.is_empty();
        if waits_for_room != open.waits_for_room {
            open.waits_for_room = waits_for_room;
            poller.watch_writable(&open.stream, open.token, waits_for_room).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Ends the path without a word to anybody: the socket is closed, a half-filled slot goes back to the table.
    pub(super) fn end(&mut self, poller: &Poller, table: &mut RegionTable) {
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Open(open) => {
                poller.remove(&open.stream);
                socket::end(&open.stream);
                if let Some(slot) = open.inbound.into_slot() {
                    table.put_back(self.peer, slot);
                }
            }
            State::Calling(call) => call.hang_up(poller),
            State::Expecting { .. } | State::Dead => {}
        }
    }

    /// Reports everything that was queued as failed.
    pub(super) fn fail_queued(&mut self, reason: &str, done: &mut Done) {
        let peer = self.peer;
        for queued in self.outbound.drain() {
            let error = Error::Broken { peer, reason: reason.to_string() };
            done.push((peer, Completion::Failed { id: queued.id, source: queued.source, error }));
        }
    }
}

impl Open {
    fn end_of_stream(&mut self) -> String {
        match self.send_error.take() {
            Some(error) => error.to_string(),
            None if self.inbound.is_between_frames() => "the peer closed the connection".into(),
            None => "the peer closed the connection in the middle of a frame".into(),
        }
    }
}

/// Errors after which the connection is over, and reading is sure to find that out too.
fn is_end_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::TimedOut
            | io::ErrorKind::ConnectionAborted
    )
}
