//! The echo over shared memory: a memfd that driver and peer both map, an eventfd each to wake whoever sleeps.
//!
//! The driver copies bytes from memory of its own to where the peer would read them and counts up; the peer, once it sees that,
//! copies as many from memory of *its* own to where the driver reads them and counts up. One copy in each direction, then, and
//! neither side reads what it was sent, but for once, at the end, to see that the right bytes are there. Where buffers rotate, a
//! round of one message lands in another place than the one before, and the peer copies from two places in turn: what a job's
//! landing slots and wire copies do. A flow of no bytes leaves the counts alone: a cache line each way.
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
    Drive, Flow, Hello, failed, io,
    messages::Way,
    pattern,
    waiting::{Line, WAIT_TIME, Wait, Waiting, complete, readable},
};
use crate::{
    Result,
    mem::{Locking, Region, RegionOptions, SharedMapping, receive_files, send_files},
    tools::bench::{Load, Measured},
};

/// Bytes of a page; the control words have the first one.
const PAGE: usize = 4096;

/// Bytes between control words: two cache lines, since processors fetch them in pairs.
const STRIDE: usize = 128;

/// The driver's own bytes repeat with this period, the peer's with another.
const DRIVER_PERIOD: u64 = 251;
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

/// Copies of a round's bytes that one end keeps: where rounds rotate through them, a round finds other memory than the one
/// before.
fn copies(rotate: bool, wanted: u64) -> u64 {
    if rotate { wanted } else { 1 }
}

/// How often the landing memory has room for a round: a job has at least two slots, and no more than a clock's worth.
fn landing_copies(hello: &Hello) -> u64 {
    copies(hello.rotate, if hello.messages.count() == 1 { 2 } else { 1 })
}

/// The driver's side, the peer's, and bytes of all.
fn layout(hello: &Hello) -> (Side, Side, usize) {
    let room = |bytes: u64| (bytes as usize).next_multiple_of(PAGE);
    let there = room(hello.messages.there().total * landing_copies(hello));
    let side = |first: usize, bytes| Side { written: first, asleep: first + STRIDE, bytes };
    (side(0, PAGE), side(2 * STRIDE, PAGE + there), PAGE + there + room(hello.messages.back().total))
}

/// One process' end of the shared memory.
struct End {
    memory: SharedMapping,
    own: Side,
    theirs: Side,
    /// What this end writes, what the other one does.
    way: Way,
    their_way: Way,
    /// How many rounds' bytes `source` holds, and the place where they go.
    source_copies: u64,
    target_copies: u64,
    own_bell: OwnedFd,
    their_bell: OwnedFd,
    control: UnixStream,
    /// What is copied.
    source: Vec<u8>,
}

impl End {
    /// Writes message `message`, counted from 0 over all rounds.
    fn write(&self, message: u64) -> Result<()> {
        let round = message / self.way.count;
        let (start, end) = (self.way.at(message), self.way.at(message + 1));
        let range = |copies: u64| {
            // Where the round's own bytes begin, then where they do in its copy.
            let first = start - round * self.way.total + round % copies * self.way.total;
            first as usize..(first + end - start) as usize
        };
        if end > start {
            let target = range(self.target_copies).start;
            self.memory.write(self.own.bytes + target, &self.source[range(self.source_copies)]);
        }
        self.memory.word(self.own.written).store(message + 1, Ordering::Release);
        fence(Ordering::SeqCst); // against the fence in `arm`: one of the two sees the other's store
        if self.memory.word(self.theirs.asleep).load(Ordering::Relaxed) == 1 {
            write(&self.their_bell, &1u64.to_ne_bytes()).map_err(|error| io("write")(error.into()))?;
        }
        Ok(())
    }

    /// How many messages the other side has written, ever.
    fn seen(&self) -> u64 {
        self.memory.word(self.theirs.written).load(Ordering::Acquire)
    }

    /// Whether the bytes of the other side's last round are here: `copies` of them have room, and they repeat with `period`.
    fn is_right(&self, copies: u64, period: u64) -> bool {
        let rounds = self.seen() / self.their_way.count;
        let mut arrived = vec![0; self.their_way.total as usize];
        let start = rounds.saturating_sub(1) % copies * self.their_way.total;
        self.memory.read(self.theirs.bytes + start as usize, &mut arrived);
        arrived == pattern(self.their_way.total, period)
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
    let (theirs, own, len) = layout(&hello);
    let memory = SharedMapping::new(file)?;
    if memory.len() < len {
        return Err(failed("was given less memory than a round takes"));
    }
    let (way, their_way) = (hello.messages.back(), hello.messages.there());
    // A job's server keeps two copies of what it sends, and uses them in turn.
    let source_copies = copies(hello.rotate, 2);
    let source = pattern(way.total, PEER_PERIOD).repeat(source_copies as usize);
    let end = End {
        memory,
        own,
        theirs,
        way,
        their_way,
        source_copies,
        target_copies: 1,
        own_bell,
        their_bell,
        control,
        source,
    };
    let mut peer = [Peer { end, written: 0, hung_up: false }];
    complete(&mut peer, &mut Waiting::new(wait))?;
    let [Peer { end, .. }] = &mut peer;
    if !end.is_right(landing_copies(&hello), DRIVER_PERIOD) {
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

/// A driver's end. Messages are counted over all rounds.
struct Driver {
    end: End,
    window: u64,
    /// Messages written and seen answered.
    written: u64,
    seen: u64,
    /// How many there are once the round is over, and whether they must be answered by then.
    goal: u64,
    to_be_answered: bool,
}

impl Driver {
    fn call(drive: &Drive, name: &str, bytes: u64) -> Result<Driver> {
        let mut control = UnixStream::connect_addr(&address(name)?).map_err(io("connect"))?;
        prepare(&control)?;
        let hello = Hello { messages: drive.messages(bytes), rotate: drive.rotate };
        let (own, theirs, len) = layout(&hello);
        let options = RegionOptions { name: "echo".into(), lock: Locking::None, prefault: true, ..Default::default() };
        let (region, _) = Region::allocate(len, &options)?;
        let bell = || {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            EventFd::from_flags(flags).map(OwnedFd::from).map_err(|error| io("eventfd")(error.into()))
        };
        let (own_bell, their_bell) = (bell()?, bell()?);
        send_files(&control, &[region.as_fd(), their_bell.as_fd(), own_bell.as_fd()])?;
        control.write_all(&hello.encode()).map_err(io("send"))?;
        let (way, their_way) = (hello.messages.there(), hello.messages.back());
        let (memory, source) = (SharedMapping::new(&region)?, pattern(way.total, DRIVER_PERIOD));
        let target_copies = landing_copies(&hello);
        let end = End {
            memory,
            own,
            theirs,
            way,
            their_way,
            source_copies: 1,
            target_copies,
            own_bell,
            their_bell,
            control,
            source,
        };
        let window = drive.window(&hello.messages);
        Ok(Driver { end, window, written: 0, seen: 0, goal: 0, to_be_answered: true })
    }

    fn may_write(&self) -> bool {
        self.written < self.goal.min(self.seen + self.window)
    }

    /// Hangs up, and hears whether both sides have what they were sent.
    fn finish(&mut self) -> Result<()> {
        self.end.control.shutdown(std::net::Shutdown::Write).map_err(io("shutdown"))?;
        let right = self.end.is_right(1, PEER_PERIOD);
        if !right || self.end.control.read(&mut [0]).map_err(io("recv"))? == 0 {
            return Err(failed("has other bytes than it was sent"));
        }
        Ok(())
    }
}

impl Line for Driver {
    fn is_done(&self) -> bool {
        if self.to_be_answered { self.seen == self.goal } else { self.written == self.goal }
    }

    fn advance(&mut self) -> Result<bool> {
        let writes = self.may_write();
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

/// A driver of peers.
pub(super) fn drive(drive: &Drive) -> Result<Measured> {
    let lines = drive.peers.iter().map(|(name, bytes)| Driver::call(drive, name, *bytes));
    let mut lines = lines.collect::<Result<Vec<Driver>>>()?;
    let mut waiting = Waiting::new(drive.wait);
    let load = Load { round: drive.load(), end: 0 };
    let round = |lines: &mut Vec<Driver>| {
        for line in lines.iter_mut() {
            line.goal += line.end.way.count;
            line.to_be_answered = drive.flow != Flow::There;
        }
        complete(lines, &mut waiting)
    };
    let end = |lines: &mut Vec<Driver>| {
        lines.iter_mut().for_each(|line| line.to_be_answered = true);
        complete(lines, &mut Waiting::new(drive.wait))
    };
    let measured = Measured::take_until(&mut lines, load, drive.pace, round, end)?;
    lines.iter_mut().try_for_each(Driver::finish)?;
    Ok(measured)
}
