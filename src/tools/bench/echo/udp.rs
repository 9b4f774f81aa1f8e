//! The echo over UDP: datagrams of one size, many a system call, and never more under way than the sockets' buffers hold.
//!
//! A peer sends every datagram back at once; where bytes go one way only, a small datagram says from time to time how many have
//! come, or how many may come (`one_way`). Nothing promises their order, so each begins with its number and none is looked at
//! until the end. Both sockets are connected; a TCP connection beside them tells the ports, and when the other process is gone.
//!
//! Invariant: a round is over when as many datagrams are back as were sent; what is under way fits into either socket's buffer,
//! so that none is dropped where the two are alone with each other.

mod both_ways;
mod one_way;

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, getsockopt, recvmmsg, sendmmsg, setsockopt, sockopt,
    },
};

use super::{Drive, Flow, Hello, failed, io, messages::Messages, tcp::Socket, waiting::Wait};
use crate::{Error, Result, tools::bench::Measured};

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

/// One driver's datagrams, until it hangs up.
pub(super) fn answer(stream: TcpStream, wait: Wait) -> Result<()> {
    let mut control = Socket::new(stream)?.0;
    let messages = Hello::read(&control)?.messages;
    let mut port = [0; 2];
    control.read_exact(&mut port).map_err(io("recv"))?;
    let (socket, own_port) = Datagrams::bind()?;
    let datagrams = Datagrams::connect(socket, u16::from_le_bytes(port))?;
    control.write_all(&own_port.to_le_bytes()).map_err(io("send"))?;
    match messages.flow {
        Flow::Both | Flow::Line => both_ways::answer(datagrams, control, messages, wait),
        Flow::There => one_way::take(datagrams, control, messages, wait),
        Flow::Back => one_way::give(datagrams, control, messages, wait),
    }
}

/// A driver's connected socket, the connection beside it, and the messages of a round.
fn call(drive: &Drive, port: &str, bytes: u64) -> Result<(Datagrams, TcpStream, Messages)> {
    let mut control = Socket::call(port)?.0;
    let (socket, own_port) = Datagrams::bind()?;
    let messages = drive.messages(bytes);
    let hello = [&Hello { messages, rotate: drive.rotate }.encode()[..], &own_port.to_le_bytes()].concat();
    control.write_all(&hello).map_err(io("send"))?;
    let mut port = [0; 2];
    control.read_exact(&mut port).map_err(io("recv"))?;
    Ok((Datagrams::connect(socket, u16::from_le_bytes(port))?, control, messages))
}

/// A driver of peers.
pub(super) fn drive(drive: &Drive) -> Result<Measured> {
    match drive.flow {
        Flow::Both | Flow::Line => both_ways::drive(drive),
        Flow::There => one_way::push(drive),
        Flow::Back => one_way::pull(drive),
    }
}

/// The number at the beginning of a datagram.
fn number_of(datagram: &[u8]) -> u64 {
    datagram.first_chunk::<NUMBER>().map_or(0, |number| u64::from_le_bytes(*number))
}

/// Bytes of a round, each datagram of which begins with its number.
fn numbered(bytes: u64, place: usize) -> Vec<u8> {
    let mut source = super::touched(bytes);
    for (number, datagram) in source.chunks_mut(place).enumerate() {
        let number = (number as u64).to_le_bytes();
        let len = datagram.len().min(NUMBER);
        datagram[..len].copy_from_slice(&number[..len]);
    }
    source
}

/// Whether these places, of which the first bytes are what came, hold each datagram of `source` once.
fn is_right(places: &[u8], place: usize, lens: &[usize], source: &[u8]) -> bool {
    let mut there: Vec<&[u8]> = places.chunks(place).zip(lens).map(|(bytes, len)| &bytes[..*len]).collect();
    there.sort_by_key(|bytes| number_of(bytes));
    there.into_iter().eq(source.chunks(place))
}
