//! One caller at the launcher's port: how far it has come, what it has sent and what waits to be sent to it.
//!
//! Invariant: nothing here blocks.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use super::line::{LineBuffer, STRANGER_BYTES_MAX};
use crate::{session::PortRange, types::Rank};

/// Opens a port: one of `ports`, if other hosts are to call and none was chosen.
pub(super) fn listen(at: SocketAddr, ports: Option<PortRange>) -> std::io::Result<TcpListener> {
    let range = ports.filter(|_| at.port() == 0 && !at.ip().is_loopback());
    let mut tries = range.map_or(at.port()..=at.port(), |range| range.first..=range.last);
    let first = tries.next().unwrap_or_default();
    let again = |before: std::io::Result<TcpListener>, port| before.or_else(|_| TcpListener::bind((at.ip(), port)));
    tries.fold(TcpListener::bind((at.ip(), first)), again)
}

/// How far a caller has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// It was sent this nonce and has until then to prove itself.
    Stranger { nonce: String, until: Instant },
    /// It holds a seat.
    Seated(Rank),
    /// It may ask and order.
    Control,
    /// It was refused or has broken the protocol: what is queued still leaves, nothing more is read.
    Leaving { until: Instant },
}

/// One caller.
pub(super) struct Connection {
    pub stream: TcpStream,
    pub from: SocketAddr,
    pub stage: Stage,
    pub incoming: LineBuffer,
    pub outgoing: Vec<u8>,
}

impl Connection {
    /// Sends what the other side takes.
    pub fn flush(&mut self) -> std::io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Takes what the caller has sent beyond its refusal, within reason: closing with bytes unread would reset the connection
    /// and the refusal with it.
    pub fn hang_up(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let mut bytes = [0; STRANGER_BYTES_MAX];
        for _ in 0..16 {
            if !matches!(self.stream.read(&mut bytes), Ok(n) if n > 0) {
                break;
            }
        }
    }
}
