//! A caller's side of the first lines: connecting, proving to hold the token, and having the launcher prove it.
//!
//! Invariant: the token itself never leaves this process; every wait has a deadline.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use serde::de::DeserializeOwned;

use super::{
    Address, VERSION, auth,
    line::{LineBuffer, STRANGER_BYTES_MAX, decode, encode},
    message::{Admission, Answer, Challenge, Purpose},
};
use crate::{Error, Result, types::Role, wire::JobToken};

/// How long connecting and proving may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// A launcher whose machine is gone without a word is noticed after about 10 s of silence.
const KEEPALIVE_IDLE_S: u32 = 4;
const KEEPALIVE_INTERVAL_S: u32 = 2;
const KEEPALIVE_PROBES: u32 = 3;

/// The token that this process was given: in `GRADWIRE_TOKEN`, or in the file that `GRADWIRE_TOKEN_FILE` names.
pub fn token_from_environment() -> Result<JobToken> {
    if let Ok(text) = std::env::var("GRADWIRE_TOKEN") {
        return JobToken::from_hex(&text);
    }
    let Some(file) = std::env::var_os("GRADWIRE_TOKEN_FILE") else {
        return Err(Error::Config(
            "this process has no token of the job: set GRADWIRE_TOKEN_FILE to the file `token` in the job's directory, or \
             GRADWIRE_TOKEN to what stands in it"
                .into(),
        ));
    };
    read_token(Path::new(&file))
}

/// The token in a file.
pub(super) fn read_token(path: &Path) -> Result<JobToken> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file("read", path, e))?;
    JobToken::from_hex(&text)
}

/// The name of the clock that `CLOCK_MONOTONIC` is in this process: processes with the same one read the same clock.
pub(super) fn clock_name() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// What a caller wants to be.
pub(super) struct Caller {
    pub purpose: Purpose,
    pub role: Option<Role>,
    pub rank: Option<u16>,
}

/// A connection whose two ends have proved themselves, and the bytes that came after the proof.
pub(super) struct Connection {
    pub stream: TcpStream,
    pub buffer: LineBuffer,
}

impl Connection {
    /// Calls the launcher.
    pub fn open(address: &Address, token: &JobToken, caller: &Caller) -> Result<Connection> {
        let deadline = Instant::now() + CONNECT_TIME;
        let stream = connect(address, deadline)?;
        stream.set_nodelay(true).map_err(|e| Error::os("setsockopt", address.to_string(), e))?;
        keep_alive(&stream).map_err(|e| Error::os("setsockopt", address.to_string(), e))?;
        let mut connection = Connection { stream, buffer: LineBuffer::default() };
        connection.prove(address, token, caller, deadline)?;
        Ok(connection)
    }

    fn prove(&mut self, address: &Address, token: &JobToken, caller: &Caller, deadline: Instant) -> Result<()> {
        let refused = |why: String| Error::Refused { who: format!("the rendezvous at {address}"), why };
        let challenge: Challenge = self.line(address, deadline)?;
        if challenge.gradwire != "rendezvous" {
            return Err(refused("it is no rendezvous of gradwire's; check the port".into()));
        }
        if challenge.version != VERSION {
            return Err(refused(format!(
                "the launcher speaks version {} and this process {VERSION}; use the same gradwire on both sides",
                challenge.version
            )));
        }
        let mut answer = Answer {
            version: VERSION.into(),
            purpose: caller.purpose,
            role: caller.role,
            rank: caller.rank,
            nonce: auth::nonce()?,
            mac: String::new(),
            pid: std::process::id(),
            host: host_name(),
        };
        answer.mac = auth::caller_mac(token, &challenge.nonce, &answer);
        self.stream.write_all(&encode(&answer)).map_err(|e| Error::os("write", address.to_string(), e))?;
        match self.line(address, deadline)? {
            Admission::Accepted(mac) if auth::launcher_holds(token, &challenge.nonce, &answer.nonce, &mac) => Ok(()),
            Admission::Accepted(_) => Err(Error::Refused {
                who: "this process".into(),
                why: format!("who answers at {address} does not hold the job's token; check the address"),
            }),
            Admission::Refused(why) => Err(refused(why)),
        }
    }

    fn line<M: DeserializeOwned>(&mut self, address: &Address, deadline: Instant) -> Result<M> {
        let strange = |what: String| Error::Refused {
            who: "this process".into(),
            why: format!("{address} does not speak the rendezvous protocol ({what}); check the address"),
        };
        loop {
            if let Some(line) = self.buffer.next_line(STRANGER_BYTES_MAX).map_err(strange)? {
                return decode(&line).map_err(strange);
            }
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).map_err(|e| Error::os("setsockopt", address.to_string(), e))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(strange("it hung up".into())),
                Ok(n) => self.buffer.extend(&bytes[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(strange(format!("nothing came within {} s", CONNECT_TIME.as_secs())));
                }
                Err(e) => return Err(Error::os("read", address.to_string(), e)),
            }
        }
    }
}

fn connect(address: &Address, deadline: Instant) -> Result<TcpStream> {
    let mut last = None;
    for target in address.resolve()? {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&target, left) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = Some((target, e)),
        }
    }
    let (target, e) = last.expect("an address resolves to at least one target");
    Err(not_reached(target, e))
}

fn not_reached(target: SocketAddr, source: std::io::Error) -> Error {
    let hint = match source.kind() {
        ErrorKind::ConnectionRefused => " (nobody listens there: has the job ended?)",
        _ => "",
    };
    Error::os("connect", format!("the rendezvous at {target}{hint}"), source)
}

/// Lets the kernel notice a vanished machine on an otherwise silent connection.
pub(super) fn keep_alive(stream: &TcpStream) -> nix::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)
}

/// The name by which this host is known.
pub(super) fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unknown".into())
}
