//! A caller made of a bare socket and the handshake's codec, so that a test can say whatever it likes.
//!
//! Invariant: it reads and writes exactly the bytes of the protocol, nothing behind the test's back.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use gradwire::{
    types::PeerId,
    wire::{
        FrameHeader, Note, NoteKind,
        handshake::{Calling, HandshakeError, Identity, Refusal, Told},
    },
};

pub fn dial(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// One try to become `identity.me`'s connection to `wanted`, path number `path` between the two. `alter` may change the hello.
pub fn call(
    address: SocketAddr,
    identity: &Identity,
    (wanted, path): (PeerId, u32),
    alter: impl FnOnce(&mut [u8; 104]),
) -> std::io::Result<Result<TcpStream, HandshakeError>> {
    let mut stream = dial(address);
    let mut calling = Calling::begin(wanted, path, [5; 32]);
    let mut alter = Some(alter);
    loop {
        let count = stream.read(calling.space())?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        match calling.received(count, identity) {
            Ok(Told::More) => {}
            Ok(Told::Answer(mut hello)) => {
                if let Some(alter) = alter.take() {
                    alter(&mut hello);
                }
                stream.write_all(&hello)?;
            }
            Ok(Told::Accepted) => return Ok(Ok(stream)),
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// Tries until the listener expects us.
pub fn call_until_accepted(address: SocketAddr, identity: &Identity, to: (PeerId, u32)) -> TcpStream {
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        match call(address, identity, to, |_| ()) {
            Ok(Ok(stream)) => return stream,
            Ok(Err(HandshakeError::Refused(why))) if why.is_passing() => {}
            // The last connection is not over yet on the listener's side.
            Ok(Err(HandshakeError::Refused(Refusal::Duplicate | Refusal::Stale))) => {}
            Ok(Err(error)) => panic!("{error}"),
            Err(_) => {}
        }
        assert!(Instant::now() < limit, "not accepted in time");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether the other side ends the connection, and not by waiting.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    let mut rest = [0; 256];
    loop {
        match stream.read(&mut rest) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// A note alone, as it travels.
pub fn note_bytes(clock: u64) -> [u8; FrameHeader::SIZE] {
    FrameHeader { target: None, note: Note { clock, ..Note::new(NoteKind::Absent) } }.encode()
}
