//! What a peer needs to reach one of our queue pairs: `IP:PORT/QPN/PSN/SECRET`, all but the first in hexadecimal digits.
//!
//! Invariant: `parse(text(address)) == address`; the secret is in the text for the peer and in no error.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use crate::{
    Error, Result,
    rc::{Psn, Secret},
};

/// A queue pair, from afar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SoftAddress {
    /// The socket behind which it is.
    pub(super) socket: SocketAddr,
    /// Its number.
    pub(super) qpn: u32,
    /// The number of the first packet that it sends.
    pub(super) start: Psn,
    /// What packets for it are sealed with.
    pub(super) secret: Secret,
}

impl SoftAddress {
    pub(super) fn text(&self) -> String {
        let SoftAddress { socket, qpn, start, secret } = self;
        let secret: String = secret.0.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{socket}/{qpn:06x}/{:06x}/{secret}", start.bits())
    }

    pub(super) fn parse(text: &str) -> Result<SoftAddress> {
        read(text).ok_or_else(|| {
            let place: String = text.split('/').next().unwrap_or_default().chars().take(60).collect();
            Error::Config(format!(
                "an endpoint of soft at `{}` cannot be read: IP:PORT/QPN/PSN/SECRET, with 6, 6 and 32 hexadecimal digits",
                place.escape_debug()
            ))
        })
    }
}

fn read(text: &str) -> Option<SoftAddress> {
    let mut parts = text.split('/');
    let socket: SocketAddr = parts.next()?.parse().ok().filter(|socket: &SocketAddr| socket.port() != 0)?;
    let qpn = hexadecimal(parts.next()?, 6)? as u32;
    let start = Psn::new(hexadecimal(parts.next()?, 6)? as u32);
    let secret = Secret(hexadecimal(parts.next()?, 32)?.to_be_bytes());
    parts.next().is_none().then_some(SoftAddress { socket, qpn, start, secret })
}

fn hexadecimal(text: &str, digits: usize) -> Option<u128> {
    let is_plain = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(text, 16).ok().filter(|_| is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_nothing_else_is_taken() {
        let good = "127.0.0.1:4711/00000f/abcdef/000102030405060708090a0b0c0d0e0f";
        assert_eq!(SoftAddress::parse(good).unwrap().text(), good);
        let v6 = good.replace("127.0.0.1", "[::1]");
        assert_eq!(SoftAddress::parse(&v6).unwrap().text(), v6);
        for wrong in [
            "",
            "127.0.0.1:4711",
            &good.replace("4711", "0"),
            &good.replace("/00000f", "/0000f"),
            &good.replace("/00000f", "/+0000f"),
            &format!("{good}/"),
            &good[..good.len() - 1],
        ] {
            let error = SoftAddress::parse(wrong).unwrap_err().to_string();
            assert!(!error.contains("0405"), "{error}");
        }
    }
}
