//! The echo over TCP: a connection on loopback from every driver to every peer.
//!
//! A socket that sleeps does so inside `recv` or `send`, which is the cheapest way; one that looks first asks the kernel not to
//! wait. TCP_NODELAY, and the kernel's own buffer sizes; Reno, which on one host adds nothing.
//!
//! Invariant: where both directions carry bytes, a peer sends back the very bytes that it got; and it answers whole messages only.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags},
    sys::socket::{MsgFlags, recv, send, setsockopt, sockopt},
};

use super::{
    Drive, Flow, Form, Hello, failed, io,
    messages::Way,
    touched,
    waiting::{Line, WAIT_TIME, Wait, Waiting, complete},
};
use crate::{
    Result,
    tools::bench::{Load, Measured},
};

/// A blocking socket with a limit on how long it blocks.
pub(super) struct Socket(pub(super) TcpStream);

/// What a call that does not wait brought.
fn at_once(call: &'static str, result: nix::Result<usize>) -> Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(error) => Err(io(call)(error.into())),
    }
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Result<Socket> {
        let both = stream.set_read_timeout(Some(WAIT_TIME)).and_then(|()| stream.set_write_timeout(Some(WAIT_TIME)));
        both.and_then(|()| stream.set_nodelay(true)).map_err(io("setsockopt"))?;
        // As the transport does on one host.
        let congestion = setsockopt(&stream, sockopt::TcpCongestion, &"reno".into());
        congestion.map_err(|error| io("setsockopt")(error.into()))?;
        Ok(Socket(stream))
    }

    /// Calls a peer.
    pub(super) fn call(port: &str) -> Result<Socket> {
        let port = port.parse().map_err(|_| failed("has no port"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Socket::new(TcpStream::connect_timeout(&address, WAIT_TIME).map_err(io("connect"))?)
    }

    /// Some bytes, or none if the other end has hung up.
    fn read(&self, target: &mut [u8], waiting: &mut Waiting) -> Result<usize> {
        let fd = self.0.as_raw_fd();
        self.moved("recv", waiting, |flags| recv(fd, target, flags))
    }

    fn read_all(&self, target: &mut [u8], waiting: &mut Waiting) -> Result<()> {
        let mut have = 0;
        while have < target.len() {
            match self.read(&mut target[have..], waiting)? {
                0 => return Err(failed("hung up")),
                count => have += count,
            }
        }
        Ok(())
    }

    fn write_all(&self, source: &[u8], waiting: &mut Waiting) -> Result<()> {
        let (mut sent, fd) = (0, self.0.as_raw_fd());
        while sent < source.len() {
            sent += self.moved("send", waiting, |flags| send(fd, &source[sent..], flags | MsgFlags::MSG_NOSIGNAL))?;
        }
        Ok(())
    }

    /// Looks as long as the policy says, then sleeps in the call.
    fn moved(
        &self,
        call: &'static str,
        waiting: &mut Waiting,
        mut attempt: impl FnMut(MsgFlags) -> nix::Result<usize>,
    ) -> Result<usize> {
        while waiting.looks() {
            if let Some(count) = at_once(call, attempt(MsgFlags::MSG_DONTWAIT))? {
                waiting.busy();
                return Ok(count);
            }
            if !waiting.may_look_again() {
                break;
            }
        }
        loop {
            match attempt(MsgFlags::empty()) {
                Ok(count) => {
                    waiting.busy();
                    return Ok(count);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(failed("was waited for in vain")),
                Err(error) => return Err(io(call)(error.into())),
            }
        }
    }
}

/// A listener, and how a driver calls it.
pub(super) fn listen() -> Result<(TcpListener, String)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io("bind"))?;
    let port = listener.local_addr().map_err(io("getsockname"))?.port();
    Ok((listener, port.to_string()))
}

/// Most bytes that a peer takes at once beyond the message at hand, so that small messages are answered many at a time.
const BATCH_BYTES: u64 = 64 << 10;

/// One driver's messages, until it hangs up; then tells it whether the last round's bytes are here.
pub(super) fn answer(stream: TcpStream, wait: Wait) -> Result<()> {
    let (mut socket, mut waiting) = (Socket::new(stream)?, Waiting::new(wait));
    let messages = Hello::read(&socket.0)?.messages;
    let (there, back) = (messages.there(), messages.back());
    let mut memory = touched(there.total);
    let own = if messages.flow == Flow::Both { Vec::new() } else { touched(back.total) };
    let (mut received, mut answered) = (0, 0);
    loop {
        // The rest of the message at hand, and as many more as there may be.
        let message = there.at(there.complete(received) + 1);
        let target = &mut memory[there.range(received, message.max(received + BATCH_BYTES))];
        let count = socket.read(target, &mut waiting)?;
        if count == 0 {
            // A driver that was killed does not hear it.
            let _ = socket.0.write_all(&[u8::from(memory == touched(there.total))]);
            return Ok(());
        }
        received += count as u64;
        let (from, to) = (back.at(answered), back.at(there.complete(received)));
        if to > from {
            let source = if own.is_empty() { &memory } else { &own };
            socket.write_all(&source[back.range(from, to)], &mut waiting)?;
            answered = there.complete(received);
        }
    }
}

/// A driver's end of one connection. Bytes and messages are counted over all rounds.
struct Connection {
    socket: Socket,
    there: Way,
    back: Way,
    window: u64,
    source: Vec<u8>,
    target: Vec<u8>,
    sent: u64,
    received: u64,
    /// How many messages there are once the round is over, and whether they must be answered by then.
    goal: u64,
    to_be_answered: bool,
}

impl Connection {
    fn call(drive: &Drive, port: &str, bytes: u64) -> Result<Connection> {
        let mut socket = Socket::call(port)?;
        let messages = drive.messages(bytes);
        socket.0.write_all(&Hello { messages, rotate: drive.rotate }.encode()).map_err(io("send"))?;
        let (there, back) = (messages.there(), messages.back());
        let (source, mut target) = (touched(there.total), touched(back.total));
        target.fill(0);
        let to_be_answered = drive.flow != Flow::There;
        let window = drive.window(&messages);
        Ok(Connection { socket, there, back, window, source, target, sent: 0, received: 0, goal: 0, to_be_answered })
    }

    /// Up to which byte may be sent now.
    fn may_send(&self) -> u64 {
        self.there.at(self.goal.min(self.back.complete(self.received) + self.window))
    }

    /// Hangs up, and hears whether both ends have what they were sent.
    fn finish(&mut self) -> Result<()> {
        self.socket.0.shutdown(Shutdown::Write).map_err(io("shutdown"))?;
        let mut right = [0];
        self.socket.0.read_exact(&mut right).map_err(io("recv"))?;
        match right == [1] && self.target == touched(self.back.total) {
            true => Ok(()),
            false => Err(failed("got other bytes than were sent")),
        }
    }
}

/// A driver of peers.
pub(super) fn drive(drive: &Drive) -> Result<Measured> {
    let lines = drive.peers.iter().map(|(port, bytes)| Connection::call(drive, port, *bytes));
    let mut lines = lines.collect::<Result<Vec<Connection>>>()?;
    let mut waiting = Waiting::new(drive.wait);
    let load = Load { round: drive.load(), end: 0 };
    let measured = match (lines.as_mut_slice(), drive.form, drive.flow) {
        ([line], Form::Whole, Flow::Both | Flow::Back) => Measured::take(load.round, drive.pace, || {
            line.socket.write_all(&line.source, &mut waiting)?;
            line.socket.read_all(&mut line.target, &mut waiting)
        })?,
        (mut lines, _, flow) => {
            let round = |lines: &mut &mut [Connection]| {
                for line in lines.iter_mut() {
                    line.goal += line.there.count;
                    line.to_be_answered = flow != Flow::There;
                }
                complete(lines, &mut waiting)
            };
            let end = |lines: &mut &mut [Connection]| {
                lines.iter_mut().for_each(|line| line.to_be_answered = true);
                complete(lines, &mut Waiting::new(drive.wait))
            };
            Measured::take_until(&mut lines, load, drive.pace, round, end)?
        }
    };
    lines.iter_mut().try_for_each(Connection::finish)?;
    Ok(measured)
}

impl Line for Connection {
    fn is_done(&self) -> bool {
        match self.to_be_answered {
            true => self.received == self.back.at(self.goal),
            false => self.sent == self.there.at(self.goal),
        }
    }

    fn advance(&mut self) -> Result<bool> {
        let fd = self.socket.0.as_raw_fd();
        let before = (self.received, self.sent);
        let expected = self.back.at(self.there.complete(self.sent));
        if self.received < expected {
            let target = &mut self.target[self.back.range(self.received, expected)];
            let count = at_once("recv", recv(fd, target, MsgFlags::MSG_DONTWAIT))?;
            if count == Some(0) {
                return Err(failed("hung up"));
            }
            self.received += count.unwrap_or(0) as u64;
        }
        let end = self.may_send();
        if self.sent < end {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let source = &self.source[self.there.range(self.sent, end)];
            self.sent += at_once("send", send(fd, source, flags))?.unwrap_or(0) as u64;
        }
        Ok((self.received, self.sent) != before)
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let flags = match self.sent < self.may_send() {
            true => PollFlags::POLLIN | PollFlags::POLLOUT,
            false => PollFlags::POLLIN,
        };
        fds.push(PollFd::new(self.socket.0.as_fd(), flags));
    }
}
