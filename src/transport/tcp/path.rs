//! One peer's path: expected, being called, open, ending or dead; and the reading and writing while it is open.
//!
//! An open connection is moved in one of two ways: by readiness, then [`Path::read`] and [`Path::write`] make the system calls; or
//! by a ring, then [`Path::write`] hands a send to the kernel, and [`Path::finished`] takes what comes back and hands it the next
//! receive or send.
//!
//! Invariant: one call does a bounded amount of work, so that no peer keeps the others waiting; nothing is read or written once the
//! path is dead, and it is not dead before the kernel is done with its memory.
#![forbid(unsafe_code)]

use std::{
    io::{self, IoSlice, Read},
    net::TcpStream,
    time::Instant,
};

use super::{
    connecting::Call,
    flow::Flow,
    framing::{Inbound, Outbound, Queued, RANGES_MAX},
    ring::{Finished, Operation, Ring},
    socket,
};
use crate::{
    Error, Result,
    mem::{Lease, SharedLease},
    transport::{
        Completion,
        done::Done,
        poller::{Poller, Token},
        region_table::RegionTable,
    },
    types::PeerId,
    wire::FrameHeader,
};

/// Bytes that one connection may receive in one poll, give or take a buffer: two of the largest usual chunks.
const READ_BYTES_MAX: usize = 2 << 20;

/// Bytes that one connection may send in one flush or poll, give or take one payload.
const WRITE_BYTES_MAX: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Path {
    pub(super) peer: PeerId,
    pub(super) state: State,
    /// What is posted and not yet taken over by a ring.
    outbound: Outbound,
    /// What a ring had taken over and not sent when the path ended.
    begun: Outbound,
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
    /// Broken for this reason; the kernel still has some of its memory.
    Ending { open: Open, reason: String },
    /// Broken and reported; armed slots wait for the fence.
    Dead,
}

#[derive(Debug)]
pub(super) struct Open {
    token: Token,
    link: Link,
    /// Sending failed: what the peer sent before is still read, then the path ends with this reason.
    send_error: Option<io::Error>,
}

/// How an open connection's bytes are moved.
#[derive(Debug)]
enum Link {
    Readiness { stream: TcpStream, inbound: Inbound, waits_for_room: bool },
    Ring(Flow),
}

impl Open {
    /// A connection that the poller watches under `token`. With a ring, that takes it over from the poller.
    pub(super) fn new(stream: TcpStream, token: Token, poller: &Poller, ring: Option<&mut Ring>) -> io::Result<Open> {
        socket::prepare(&stream)?;
        let link = match ring {
            None => Link::Readiness { stream, inbound: Inbound::default(), waits_for_room: false },
            Some(ring) => {
                poller.remove(&stream);
                let mut flow = Flow::new(stream, token)?;
                flow.receive(READ_BYTES_MAX, ring)?;
                Link::Ring(flow)
            }
        };
        Ok(Open { token, link, send_error: None })
    }

    fn is_busy(&self) -> bool {
        matches!(&self.link, Link::Ring(flow) if flow.is_busy())
    }
}

impl Path {
    pub(super) fn new(peer: PeerId, state: State) -> Path {
        Path { peer, state, outbound: Outbound::default(), begun: Outbound::default(), is_dirty: false }
    }

    /// Queues a write; `true` if the path was not in the list of those to flush, and is to be put there.
    pub(super) fn push(&mut self, id: u64, header: &FrameHeader, source: Option<SharedLease>) -> bool {
        self.outbound.push(id, header, source);
        !std::mem::replace(&mut self.is_dirty, true)
    }

    /// Writes that are posted and not sent.
    pub(super) fn unsent(&self) -> usize {
        let begun = match &self.state {
            State::Open(Open { link: Link::Ring(flow), .. }) => flow.unsent(),
            State::Ending { open: Open { link: Link::Ring(flow), .. }, .. } => flow.unsent(),
            _ => 0,
        };
        self.outbound.len() + begun
    }

    /// Whether a flush can send anything: not while the socket is full, for then the room itself is what continues the sending.
    pub(super) fn can_write(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        !matches!(open.link, Link::Readiness { waits_for_room: true, .. })
    }

    /// Whether it is open, and nothing but what comes can happen to it.
    pub(super) fn waits_only_to_read(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        matches!(open.link, Link::Readiness { waits_for_room: false, .. })
    }

    /// Whether an event under `token` is about this path's connection.
    pub(super) fn is_connected_as(&self, token: Token) -> bool {
        matches!(&self.state, State::Open(open) | State::Ending { open, .. } if open.token == token)
    }

    /// The name of its connection.
    pub(super) fn token(&self) -> Option<Token> {
        match &self.state {
            State::Open(open) | State::Ending { open, .. } => Some(open.token),
            _ => None,
        }
    }

    /// Whether the kernel has some of the path's memory.
    pub(super) fn is_busy(&self) -> bool {
        matches!(&self.state, State::Open(open) | State::Ending { open, .. } if open.is_busy())
    }

    /// Receives what is here, up to a bound. An error is the reason why the path ends.
    pub(super) fn read(&mut self, table: &mut RegionTable, done: &mut Done) -> Result<(), String> {
        let State::Open(open) = &mut self.state else { return Ok(()) };
        let Link::Readiness { stream, inbound, .. } = &mut open.link else { return Ok(()) };
        let mut left = READ_BYTES_MAX;
        while left > 0 {
            let mut targets = inbound.targets(left);
            let room: usize = targets.iter().map(|target| target.len()).sum();
            let count = match stream.read_vectored(&mut targets) {
                Ok(0) => return Err(end_of_stream(&mut open.send_error, inbound)),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(open.send_error.take().unwrap_or(e).to_string()),
            };
            inbound.received(count);
            deliver(self.peer, inbound, table, done)?;
            if count < room {
                // The socket is empty, or nearly: the next wait tells.
                return Ok(());
            }
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// Sends what is queued, as far as there is room and up to a bound. An error is the reason why the path ends.
    pub(super) fn write(&mut self, poller: &Poller, ring: Option<&mut Ring>, done: &mut Done) -> Result<(), String> {
        let State::Open(open) = &mut self.state else { return Ok(()) };
        if open.send_error.is_some() {
            return Ok(());
        }
        let peer = self.peer;
        let (stream, waits_for_room) = match &mut open.link {
            Link::Readiness { stream, waits_for_room, .. } => (stream, waits_for_room),
            Link::Ring(flow) => {
                let ring = ring.expect("a flow has its ring");
                return flow.send(&mut self.outbound, WRITE_BYTES_MAX, ring).map_err(|e| e.to_string());
            }
        };
        let mut left = WRITE_BYTES_MAX;
        while left > 0 && !self.outbound.is_empty() {
            let mut ranges = [IoSlice::new(&[]); RANGES_MAX];
            let (count, bytes) = self.outbound.gather(&mut ranges, left);
            match socket::send(stream, &ranges[..count]) {
                Ok(Some(sent)) => {
                    self.outbound.advance(sent, |queued| tell_sent(peer, queued, done));
                    if sent < bytes {
                        break;
                    }
                    left = left.saturating_sub(sent);
                }
                Ok(None) => break,
                Err(e) => {
                    open.send_error = Some(end_of_connection(e)?);
                    break;
                }
            }
        }
        let waits = open.send_error.is_none() && !self.outbound.is_empty();
        if waits != *waits_for_room {
            *waits_for_room = waits;
            poller.watch_writable(stream, open.token, waits).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Takes an operation that the kernel is done with, and begins the next. An error is the reason why the path ends.
    pub(super) fn finished(
        &mut self,
        finished: Finished,
        ring: &mut Ring,
        table: &mut RegionTable,
        done: &mut Done,
    ) -> Result<(), String> {
        let State::Open(Open { link: Link::Ring(flow), send_error, .. }) = &mut self.state else {
            self.take_back(finished, done);
            return Ok(());
        };
        let peer = self.peer;
        if finished.operation() == Operation::Send {
            return match flow.sent(finished, |queued| tell_sent(peer, queued, done)) {
                Err(e) if !is_transient(&e) => {
                    *send_error = Some(end_of_connection(e)?);
                    Ok(())
                }
                _ => flow.send(&mut self.outbound, WRITE_BYTES_MAX, ring).map_err(|e| e.to_string()),
            };
        }
        let count = flow.received(finished);
        let inbound = flow.inbound().expect("its receive is done");
        match count {
            Ok(0) => return Err(end_of_stream(send_error, inbound)),
            Ok(_) => deliver(peer, inbound, table, done)?,
            Err(e) if is_transient(&e) => {}
            Err(e) => return Err(send_error.take().unwrap_or(e).to_string()),
        }
        flow.receive(READ_BYTES_MAX, ring).map_err(|e| e.to_string())
    }

    /// Takes an operation that the kernel is done with, and begins no other. What was sent was sent; what was received is not
    /// looked at.
    pub(super) fn take_back(&mut self, finished: Finished, done: &mut Done) {
        let (State::Open(open) | State::Ending { open, .. }) = &mut self.state else { return };
        let Link::Ring(flow) = &mut open.link else { return };
        let peer = self.peer;
        // How it ended makes no difference any more.
        let _ = match finished.operation() {
            Operation::Send => flow.sent(finished, |queued| tell_sent(peer, queued, done)),
            _ => flow.received(finished).map(|_| ()),
        };
    }

    /// Ends the connection while the kernel has some of its memory: the operations are on their way to their end.
    pub(super) fn begin_end(&mut self, reason: &str, ring: &mut Ring) {
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Open(open) => {
                if let Link::Ring(flow) = &open.link {
                    flow.end(ring);
                }
                self.state = State::Ending { open, reason: reason.to_string() };
            }
            other => self.state = other,
        }
    }

    /// Ends the path without a word to anybody, once the kernel has none of its memory: the socket is closed, a half-filled slot
    /// comes back.
    pub(super) fn end(&mut self, poller: &Poller) -> Option<Lease> {
        assert!(!self.is_busy(), "the kernel still uses the path's memory");
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Open(open) | State::Ending { open, .. } => match open.link {
                Link::Readiness { stream, inbound, .. } => {
                    poller.remove(&stream);
                    socket::end(&stream);
                    inbound.into_slot()
                }
                Link::Ring(flow) => {
                    let (inbound, begun) = flow.close();
                    self.begun = begun;
                    inbound.into_slot()
                }
            },
            State::Calling(call) => {
                call.hang_up(poller);
                None
            }
            State::Expecting { .. } | State::Dead => None,
        }
    }

    /// Reports everything that was queued as failed.
    pub(super) fn fail_queued(&mut self, reason: &str, done: &mut Done) {
        let peer = self.peer;
        for queued in self.begun.drain().chain(self.outbound.drain()) {
            let error = Error::Broken { peer, reason: reason.to_string() };
            done.push((peer, Completion::Failed { id: queued.id, source: queued.source, error }));
        }
    }
}

/// Tells of every write that is complete.
fn deliver(peer: PeerId, inbound: &mut Inbound, table: &mut RegionTable, done: &mut Done) -> Result<(), String> {
    let mut take = |header: &FrameHeader| {
        let target = header.target.expect("only a write with payload opens a slot");
        table.take(peer, target.rkey, target.offset, header.note.length)
    };
    while let Some((note, lease)) = inbound.next(&mut take).map_err(|defect| defect.to_string())? {
        done.push((peer, Completion::Arrived { from: peer, note, lease }));
    }
    Ok(())
}

fn tell_sent(peer: PeerId, queued: Queued, done: &mut Done) {
    done.push((peer, Completion::Sent { id: queued.id, source: queued.source }));
}

fn end_of_stream(send_error: &mut Option<io::Error>, inbound: &Inbound) -> String {
    match send_error.take() {
        Some(error) => error.to_string(),
        None if inbound.is_between_frames() => "the peer closed the connection".into(),
        None => "the peer closed the connection in the middle of a frame".into(),
    }
}

/// Errors after which the same is simply tried again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Passes a failed send on if the connection is over with it, which reading is sure to find out too; other errors are the path's
/// end at once.
fn end_of_connection(error: io::Error) -> Result<io::Error, String> {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::TimedOut
        | io::ErrorKind::ConnectionAborted => Ok(error),
        _ => Err(format!("sending failed: {error}")),
    }
}
