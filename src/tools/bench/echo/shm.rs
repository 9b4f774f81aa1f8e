//! The echo over shared memory: a memfd that driver and peer both map, an eventfd each to wake whoever sleeps.
//!
//! The driver copies bytes from memory of its own to where the peer would read them and counts up; the peer, once it sees that,
//! copies as many from memory of *its* own to where the driver reads them and counts up. One copy in each direction, then, and
//! neither side reads what it was sent, but for once, at the end, to see that the right bytes are there.
//!
//! Invariant: a count is stored after the bytes that it speaks of; whoever falls asleep says so before its last look, and
//! whoever counts up looks for sleepers after, so no wake-up is lost. A control connection tells when the other process is
//! gone.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::atomic::{Ordering, fence},
};

use nix::{
    poll::PollFd,
    sys::eventfd::{EfdFlags, EventFd},
    unistd::{read, write},
};

use super::{
    Form, Hello, failed, io, pattern, touched,
    waiting::{Line, WAIT_TIME, Wait, Waiting, complete, readable},
};
use crate::{
    Result,
    mem::{Locking, Region, RegionOptions, SharedMapping, receive_files, send_files},
    tools::bench::{Measured, Pace},
};

/// Bytes of a page; the control words have the first one.
const PAGE: usize = 4096;

/// Bytes between control words: two cache lines, since processors fetch them in pairs.
const STRIDE: usize = 128;

/// The peer's own bytes repeat with this period; the driver's with another.
const PEER_PERIOD: u64 = 241;

/// What one process writes of the shared memory.
#[derive(Clone, Copy)]
struct Side {
    /// How many pieces it has written, ever.
    written: usize,
    /// 1 while it sleeps, or is about to.
    asleep: usize,
    /// Where its pieces go.
    bytes: usize,
}

/// The driver's side, the peer's, and bytes of all.
fn layout(bytes: u64) -> (Side, Side, usize) {
    let room = (bytes as usize).next_multiple_of(PAGE);
    let side = |first: usize, bytes| Side { written: first, asleep: first + STRIDE, bytes };
    (side(0, PAGE), side(2 * STRIDE, PAGE + room), PAGE + 2 * room)
}

/// One process' end of the shared memory.
struct End {
    memory: SharedMapping,
    own: Side,
    theirs: Side,
    own_bell: OwnedFd,
    their_bell: OwnedFd,
    control: UnixStream,
    /// What is copied.
    source: Vec<u8>,
    piece: usize,
}

impl End {
    fn pieces(&self) -> u64 {
        self.source.len().div_ceil(self.piece) as u64
    }

    /// Writes the next piece after `written` ones.
    fn write(&self, written: u64) -> Result<()> {
        let at = (written % self.pieces()) as usize * self.piece;
        let end = self.source.len().min(at + self.piece);
        self.memory.write(self.own.bytes + at, &self.source[at..end]);
        self.memory.word(self.own.written).store(written + 1, Ordering::Release);
        fence(Ordering::SeqCst); // against the fence in `arm`: one of the two sees the other's store
        if self.memory.word(self.theirs.asleep).load(Ordering::Relaxed) == 1 {
            write(&self.their_bell, &1u64.to_ne_bytes()).map_err(|error| io("write")(error.into()))?;
        }
        Ok(())
    }

    /// How many pieces the other side has written, ever.
    fn seen(&self) -> u64 {
        self.memory.word(self.theirs.written).load(Ordering::Acquire)
    }

    /// Says that we fall asleep; whether the other side still has written no more than `known`.
    fn arm(&self, known: u64) -> bool {
        self.memory.word(self.own.asleep).store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.seen() == known
    }

    fn woken(&self, rung: bool) {
        self.memory.word(self.own.asleep).store(0, Ordering::Relaxed);
        if rung {
            // It was ready, so it holds a count.
            let _ = read(&self.own_bell, &mut [0; 8]);
        }
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend([readable(&self.own_bell), readable(&self.control)]);
    }
}

fn prepare(control: &UnixStream) -> Result<()> {
    let both = control.set_read_timeout(Some(WAIT_TIME)).and_then(|()| control.set_write_timeout(Some(WAIT_TIME)));
    both.map_err(io("setsockopt"))
}

/// A listener under an abstract name, and how a driver calls it.
pub(super) fn listen() -> Result<(UnixListener, String)> {
    let name = format!("{:016x}", u64::from_le_bytes(crate::wire::random_bytes()?));
    let listener = UnixListener::bind_addr(&address(&name)?).map_err(io("bind"))?;
    Ok((listener, name))
}

fn address(name: &str) -> Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("gradwire-echo-{name}")).map_err(io("bind"))
}

/// The peer's end.
struct Peer {
    end: End,
    written: u64,
    hung_up: bool,
}

/// One driver's rounds, until it hangs up; then whether the last one's bytes are here.
pub(super) fn answer(control: UnixStream, wait: Wait) -> Result<()> {
    prepare(&control)?;
    let [file, own_bell, their_bell] = receive_files(&control)?;
    let hello = Hello::read(&control)?;
    let (theirs, own, len) = layout(hello.bytes);
    let memory = SharedMapping::new(file)?;
    if memory.len() < len {
        return Err(failed("was given less memory than a round takes"));
    }
    let (source, piece) = (pattern(hello.bytes, PEER_PERIOD), hello.piece.min(hello.bytes) as usize);
    let end = End { memory, own, theirs, own_bell, their_bell, control, source, piece };
    let mut peer = [Peer { end, written: 0, hung_up: false }];
    complete(&mut peer, &mut Waiting::new(wait))?;
    let [Peer { end, .. }] = &mut peer;
    let mut arrived = vec![0; end.source.len()];
    end.memory.read(end.theirs.bytes, &mut arrived);
    if arrived != touched(hello.bytes) {
        return Err(failed("got other bytes than were sent"));
    }
    // A driver that was killed does not hear it.
    let _ = end.control.write_all(&[1]);
    Ok(())
}

impl Line for Peer {
    fn is_done(&self) -> bool {
        self.hung_up
    }

    fn advance(&mut self) -> Result<bool> {
        let more = self.end.seen() > self.written;
        if more {
            self.end.write(self.written)?;
            self.written += 1;
        }
        Ok(more)
    }

    fn arm(&mut self) -> bool {
        self.end.arm(self.written)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.end.wants(fds);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.end.woken(ready[0]);
        self.hung_up = ready[1];
        Ok(())
    }
}

/// A driver's end.
struct Driver {
    end: End,
    /// Pieces written and seen, ever.
    written: u64,
    seen: u64,
    /// How many there are once the round is over.
    goal: u64,
}

impl Driver {
    fn call(name: &str, bytes: u64, piece: u64) -> Result<Driver> {
        let mut control = UnixStream::connect_addr(&address(name)?).map_err(io("connect"))?;
        prepare(&control)?;
        let (own, theirs, len) = layout(bytes);
        let options = RegionOptions { name: "echo".into(), lock: Locking::None, prefault: true, ..Default::default() };
        let (region, _) = Region::allocate(len, &options)?;
        let bell = || {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            EventFd::from_flags(flags).map(OwnedFd::from).map_err(|error| io("eventfd")(error.into()))
        };
        let (own_bell, their_bell) = (bell()?, bell()?);
        send_files(&control, &[region.as_fd(), their_bell.as_fd(), own_bell.as_fd()])?;
        control.write_all(&Hello { bytes, piece }.encode()).map_err(io("send"))?;
        let (memory, source, piece) = (SharedMapping::new(&region)?, touched(bytes), piece.min(bytes) as usize);
        let end = End { memory, own, theirs, own_bell, their_bell, control, source, piece };
        Ok(Driver { end, written: 0, seen: 0, goal: 0 })
    }

    /// Hangs up, and hears whether both sides have what they were sent.
    fn finish(&mut self) -> Result<()> {
        self.end.control.shutdown(std::net::Shutdown::Write).map_err(io("shutdown"))?;
        let mut arrived = vec![0; self.end.source.len()];
        self.end.memory.read(self.end.theirs.bytes, &mut arrived);
        let right = arrived == pattern(arrived.len() as u64, PEER_PERIOD);
        if !right || self.end.control.read(&mut [0]).map_err(io("recv"))? == 0 {
            return Err(failed("has other bytes than it was sent"));
        }
        Ok(())
    }
}

impl Line for Driver {
    fn is_done(&self) -> bool {
        self.seen == self.goal
    }

    fn advance(&mut self) -> Result<bool> {
        let writes = self.written < self.goal;
        if writes {
            self.end.write(self.written)?;
            self.written += 1;
        }
        let before = std::mem::replace(&mut self.seen, self.end.seen());
        Ok(writes || self.seen > before)
    }

    fn arm(&mut self) -> bool {
        self.end.arm(self.seen)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.end.wants(fds);
    }

    fn woken(&mut self, ready: &[bool]) -> Result<()> {
        self.end.woken(ready[0]);
        if ready[1] { Err(failed("hung up")) } else { Ok(()) }
    }
}

/// A driver of peers: name and bytes of each.
pub(super) fn drive(peers: &[(String, u64)], piece: u64, form: Form, wait: Wait, pace: Pace) -> Result<Measured> {
    let piece_of = |bytes: u64| if form == Form::Whole { bytes } else { piece };
    let lines = peers.iter().map(|(name, bytes)| Driver::call(name, *bytes, piece_of(*bytes)));
    let mut lines = lines.collect::<Result<Vec<Driver>>>()?;
    let total = peers.iter().map(|(_, bytes)| bytes).sum();
    let mut waiting = Waiting::new(wait);
    let measured = Measured::take(total, pace, || {
        lines.iter_mut().for_each(|line| line.goal += line.end.pieces());
        complete(&mut lines, &mut waiting)
    })?;
    lines.iter_mut().try_for_each(Driver::finish)?;
    Ok(measured)
}
