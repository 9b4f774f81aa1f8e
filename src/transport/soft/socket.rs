//! The one socket: bound, never blocking, and many datagrams in one call either way.
//!
//! Invariant: a buffer holds the largest packet that a peer may send; what is longer is cut by the kernel, and then its check
//! does not match.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt},
};

use super::{faults::Datagram, options::MTU_MAX};
use crate::{Error, Result, observe::count_copied, rc::HEADER_BYTES_MAX};

/// Datagrams in one call.
pub(super) const BATCH: usize = 32;

const DATAGRAM_BYTES_MAX: usize = MTU_MAX as usize + HEADER_BYTES_MAX;

/// What the kernel is asked to hold for us: 16 peers with full windows of 64 packets of 4 KiB. It may give less.
const KERNEL_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Socket {
    socket: UdpSocket,
    address: SocketAddr,
    buffers: Vec<u8>,
    lengths: [usize; BATCH],
}

impl Socket {
    pub(super) fn bind(ip: IpAddr) -> Result<Socket> {
        let subject = || format!("the soft transport at {ip}");
        let socket = UdpSocket::bind((ip, 0)).map_err(|e| Error::os("bind", subject(), e))?;
        socket.set_nonblocking(true).map_err(|e| Error::os("fcntl", subject(), e))?;
        // Best effort: with less, more packets are lost when many peers send at once, and are sent again.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &KERNEL_BYTES);
        let _ = setsockopt(&socket, sockopt::SndBuf, &KERNEL_BYTES);
        let address = socket.local_addr().map_err(|e| Error::os("getsockname", subject(), e))?;
        Ok(Socket { socket, address, buffers: vec![0; BATCH * DATAGRAM_BYTES_MAX], lengths: [0; BATCH] })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives what is there, up to a batch; returns how many datagrams there are for [`Socket::datagram`].
    pub(super) fn receive(&mut self) -> Result<usize> {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> =
            self.buffers.chunks_mut(DATAGRAM_BYTES_MAX).map(|buffer| [IoSliceMut::new(buffer)]).collect();
        // Made anew for each call: it holds pointers, and a transport must be able to move to another thread.
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
        let flags = MsgFlags::MSG_DONTWAIT;
        match recvmmsg(self.socket.as_raw_fd(), &mut headers, slices.iter_mut(), flags, None) {
            Ok(messages) => {
                let mut count = 0;
                for message in messages {
                    self.lengths[count] = message.bytes;
                    count_copied(message.bytes);
                    count += 1;
                }
                Ok(count)
            }
            // A peer's closed port is reported to the next call of anybody; it is that peer's path that will notice.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => Ok(0),
            Err(e) => Err(Error::os("recvmmsg", "the soft transport", e)),
        }
    }

    /// One of the datagrams of the last [`Socket::receive`].
    pub(super) fn datagram(&self, at: usize) -> &[u8] {
        &self.buffers[at * DATAGRAM_BYTES_MAX..][..self.lengths[at]]
    }

    /// Sends the first datagrams, up to a batch. Returns how many are gone; 0 if there is no room now.
    pub(super) fn send(&self, datagrams: &VecDeque<Datagram>) -> Result<usize, Errno> {
        let count = datagrams.len().min(BATCH);
        let slices: Vec<[IoSlice<'_>; 1]> =
            datagrams.iter().take(count).map(|datagram| [IoSlice::new(&datagram.bytes)]).collect();
        let addresses: Vec<Option<SockaddrStorage>> =
            datagrams.iter().take(count).map(|datagram| Some(SockaddrStorage::from(datagram.to))).collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(count, None);
        let none: [ControlMessage<'_>; 0] = [];
        match sendmmsg(self.socket.as_raw_fd(), &mut headers, slices.iter(), addresses, none, MsgFlags::MSG_DONTWAIT) {
            Ok(sent) => {
                let gone = sent.count();
                // Once from the payload into the datagram, once into the kernel.
                count_copied(2 * datagrams.iter().take(gone).map(|datagram| datagram.bytes.len()).sum::<usize>());
                Ok(gone)
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(0),
            Err(e) => Err(e),
        }
    }
}
