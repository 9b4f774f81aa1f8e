//! The echo over UDP: datagrams of one size, many a system call, and never more under way than the sockets' buffers hold.
//!
//! A peer sends every datagram back at once. Nothing promises their order, so each begins with its number and none is looked at
//! until the end. Both sockets are connected; a TCP connection beside them tells the ports, and when the other process is gone.
//!
//! Invariant: a round is over when as many datagrams are back as were sent; what is under way fits into either socket's buffer,
//! so that none is dropped where the two are alone with each other.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags},
    sys::socket::{
        ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, getsockopt, recvmmsg, sendmmsg, setsockopt, sockopt,
    },
};

use super::{
    Hello, failed, io,
    tcp::Socket,
    touched,
    waiting::{Line, Wait, Waiting, complete, readable},
};
use crate::{
    Error, Result,
    tools::bench::{Measured, Pace},
};

/// Datagrams of one system call.
const BATCH: usize = 32;

/// Most datagrams under way: more than two batches in each direction bring nothing and fall out of the caches.
const WINDOW_MAX: usize = 4 * BATCH;

/// Room that a socket asks for; the system grants less where `net.core.rmem_max` is less.
const BUFFER_BYTES: usize = 4 << 20;

/// Bytes of a datagram's number.
const NUMBER: usize = 8;

/// A datagram has a multiple of so many bytes, so that the last one of a round has room for its number.
pub const DATAGRAM_GRAIN: u64 = 64;

/// Most bytes of a datagram.
pub const DATAGRAM_MAX: u64 = 65_472;

/// A connected socket and what its system calls need.
struct Datagrams {
    socket: UdpSocket,
    sending: MultiHeaders<SockaddrStorage>,
    receiving: MultiHeaders<SockaddrStorage>,
}

impl Datagrams {
    fn bind() -> Result<(UdpSocket, u16)> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io("bind"))?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES).map_err(|error| io("setsockopt")(error.into()))?;
        let port = socket.local_addr().map_err(io("getsockname"))?.port();
        Ok((socket, port))
    }

    fn connect(socket: UdpSocket, port: u16) -> Result<Datagrams> {
        socket.connect((Ipv4Addr::LOCALHOST, port)).map_err(io("connect"))?;
        let headers = || MultiHeaders::preallocate(BATCH, None);
        Ok(Datagrams { socket, sending: headers(), receiving: headers() })
    }

    /// How many datagrams of `bytes` fit into the socket's buffer. The kernel counts the memory that a datagram takes: a power
    /// of two with its headers, and its descriptor (8,456 bytes for 4,096, as tried). Half of the room is kept free, since the
    /// kernel gives back the room of what was read only by and by.
    fn window(&self, bytes: u64) -> Result<usize> {
        let room = getsockopt(&self.socket, sockopt::RcvBuf).map_err(|error| io("getsockopt")(error.into()))?;
        let cost = (bytes as usize + 512).next_power_of_two() + 512;
        Ok((room / 2 / cost).clamp(1, WINDOW_MAX))
    }

    /// Sends at most a batch; how many went.
    fn send<'a>(&'a mut self, datagrams: impl Iterator<Item = &'a [u8]>) -> Result<usize> {
        const NOWHERE: [Option<SockaddrStorage>; BATCH] = [None; BATCH];
        let slices: Vec<[IoSlice<'a>; 1]> = datagrams.take(BATCH).map(|bytes| [IoSlice::new(bytes)]).collect();
        if slices.is_empty() {
            return Ok(0);
        }
        let none: [ControlMessage<'a>; 0] = [];
        let fd = self.socket.as_raw_fd();
        // The slices are read during the call only, but must be borrowed as long as the results, which only count here.
        let sent = sendmmsg(fd, &mut self.sending, &slices, &NOWHERE[..slices.len()], none, MsgFlags::MSG_DONTWAIT);
        match sent {
            Ok(results) => Ok(results.count()),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(0),
            Err(error) => Err(gone("sendmmsg", error)),
        }
    }

    /// Receives at most a batch into `places` of equal length; lengths are added to `lens`, their number comes back.
    fn receive(&mut self, memory: &mut [u8], place: usize, lens: &mut Vec<usize>) -> Result<usize> {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> =
            memory.chunks_mut(place).take(BATCH).map(|bytes| [IoSliceMut::new(bytes)]).collect();
        let fd = self.socket.as_raw_fd();
        match recvmmsg(fd, &mut self.receiving, &mut slices, MsgFlags::MSG_DONTWAIT, None) {
            Ok(results) => {
                let before = lens.len();
                lens.extend(results.map(|message| message.bytes));
                Ok(lens.len() - before)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(error) => Err(gone("recvmmsg", error)),
        }
    }
}

fn gone(call: &'static str, error: Errno) -> Error {
    match error {
        Errno::ECONNREFUSED => failed("hung up"),
        error => io(call)(error.into()),
    }
}

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
pub(super) fn send_back(stream: TcpStream, wait: Wait) -> Result<()> {
    let mut control = Socket::new(stream)?.0;
    let hello = Hello::read(&control)?;
    let mut port = [0; 2];
    control.read_exact(&mut port).map_err(io("recv"))?;
    let (socket, own_port) = Datagrams::bind()?;
    let datagrams = Datagrams::connect(socket, u16::from_le_bytes(port))?;
    control.write_all(&own_port.to_le_bytes()).map_err(io("send"))?;
    let place = hello.piece as usize;
    let (memory, lens) = (touched(hello.piece * BATCH as u64), Vec::with_capacity(BATCH));
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
    fn call(port: &str, bytes: u64, datagram: u64) -> Result<Driver> {
        let mut control = Socket::call(port)?.0;
        let (socket, own_port) = Datagrams::bind()?;
        let hello = [&Hello { bytes, piece: datagram }.encode()[..], &own_port.to_le_bytes()].concat();
        control.write_all(&hello).map_err(io("send"))?;
        let mut port = [0; 2];
        control.read_exact(&mut port).map_err(io("recv"))?;
        let datagrams = Datagrams::connect(socket, u16::from_le_bytes(port))?;
        let window = datagrams.window(datagram)?;
        let (mut source, place) = (touched(bytes), datagram as usize);
        for (number, bytes) in source.chunks_mut(place).enumerate() {
            bytes[..NUMBER].copy_from_slice(&(number as u64).to_le_bytes());
        }
        let places = source.len().div_ceil(place);
        let target = touched((places * place) as u64);
        Ok(Driver { datagrams, control, source, target, place, lens: Vec::with_capacity(places), sent: 0, window })
    }

    fn places(&self) -> usize {
        self.source.len().div_ceil(self.place)
    }

    /// Whether the last round's datagrams are all there, each once.
    fn is_right(&self) -> bool {
        let mut there: Vec<&[u8]> =
            self.target.chunks(self.place).zip(&self.lens).map(|(bytes, len)| &bytes[..*len]).collect();
        there.sort_by_key(|bytes| bytes.first_chunk::<NUMBER>().map(|number| u64::from_le_bytes(*number)));
        there.into_iter().eq(self.source.chunks(self.place))
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

/// A driver of peers: port and bytes of each.
pub(super) fn drive(peers: &[(String, u64)], datagram: u64, wait: Wait, pace: Pace) -> Result<Measured> {
    let lines = peers.iter().map(|(port, bytes)| Driver::call(port, *bytes, datagram));
    let mut lines = lines.collect::<Result<Vec<Driver>>>()?;
    let total = peers.iter().map(|(_, bytes)| bytes).sum();
    let mut waiting = Waiting::new(wait);
    let measured = Measured::take(total, pace, || {
        for line in &mut lines {
            line.sent = 0;
            line.lens.clear();
        }
        complete(&mut lines, &mut waiting)
    })?;
    match lines.iter().all(Driver::is_right) {
        true => Ok(measured),
        false => Err(failed("sent back other datagrams than it got")),
    }
}
