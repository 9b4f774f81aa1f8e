//! The echo over TCP: a connection on loopback from every driver to every peer.
//!
//! A socket that sleeps does so inside `recv` or `send`, which is the cheapest way; one that looks first asks the kernel not to
//! wait. TCP_NODELAY, and the kernel's own buffer sizes.
//!
//! Invariant: a peer sends back the very bytes that it got.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags},
    sys::socket::{MsgFlags, recv, send},
};

use super::{
    Form, Hello, failed, io, touched,
    waiting::{Line, WAIT_TIME, Wait, Waiting, complete},
};
use crate::{
    Result,
    tools::bench::{Measured, Pace},
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

/// One driver's bytes, until it hangs up.
pub(super) fn send_back(stream: TcpStream, wait: Wait) -> Result<()> {
    let (socket, mut waiting) = (Socket::new(stream)?, Waiting::new(wait));
    let hello = Hello::read(&socket.0)?;
    let mut memory = touched(hello.bytes);
    loop {
        for part in memory.chunks_mut(hello.piece.min(hello.bytes) as usize) {
            let first = socket.read(part, &mut waiting)?;
            if first == 0 {
                return Ok(());
            }
            socket.read_all(&mut part[first..], &mut waiting)?;
            socket.write_all(part, &mut waiting)?;
        }
    }
}

/// A driver's end of one connection.
struct Connection {
    socket: Socket,
    source: Vec<u8>,
    target: Vec<u8>,
    sent: usize,
    received: usize,
}

/// A driver of peers: address and bytes of each.
pub(super) fn drive(peers: &[(String, u64)], piece: u64, form: Form, wait: Wait, pace: Pace) -> Result<Measured> {
    let mut lines = Vec::new();
    for (port, bytes) in peers {
        let mut socket = Socket::call(port)?;
        let piece = if form == Form::Whole { *bytes } else { piece };
        socket.0.write_all(&Hello { bytes: *bytes, piece }.encode()).map_err(io("send"))?;
        let (source, mut target) = (touched(*bytes), touched(*bytes));
        target.fill(0);
        lines.push(Connection { socket, source, target, sent: 0, received: 0 });
    }
    let total = peers.iter().map(|(_, bytes)| bytes).sum();
    let mut waiting = Waiting::new(wait);
    let measured = match (lines.as_mut_slice(), form) {
        ([line], Form::Whole) => Measured::take(total, pace, || {
            line.socket.write_all(&line.source, &mut waiting)?;
            line.socket.read_all(&mut line.target, &mut waiting)
        })?,
        (lines, _) => Measured::take(total, pace, || {
            lines.iter_mut().for_each(|line| (line.sent, line.received) = (0, 0));
            complete(lines, &mut waiting)
        })?,
    };
    match lines.iter().all(|line| line.source == line.target) {
        true => Ok(measured),
        false => Err(failed("sent back other bytes than it got")),
    }
}

impl Line for Connection {
    fn is_done(&self) -> bool {
        self.received == self.target.len()
    }

    fn advance(&mut self) -> Result<bool> {
        let fd = self.socket.0.as_raw_fd();
        let (received, sent) = (self.received, self.sent);
        if self.received < self.sent {
            let count = at_once("recv", recv(fd, &mut self.target[received..], MsgFlags::MSG_DONTWAIT))?;
            if count == Some(0) {
                return Err(failed("hung up"));
            }
            self.received += count.unwrap_or(0);
        }
        if self.sent < self.source.len() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            self.sent += at_once("send", send(fd, &self.source[sent..], flags))?.unwrap_or(0);
        }
        Ok((self.received, self.sent) != (received, sent))
    }

    fn wants<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let flags = match self.sent == self.source.len() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        fds.push(PollFd::new(self.socket.0.as_fd(), flags));
    }
}
