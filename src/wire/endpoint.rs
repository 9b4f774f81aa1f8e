//! Socket addresses as an endpoint carries them: `IP:PORT`, or several of them with commas between, the preferred one first.
//!
//! Invariant: `parse_addresses(format_addresses(list)) == list`; names are not resolved here or below, since that would block.

use std::net::SocketAddr;

use crate::{Error, Result};

/// An endpoint lists at most so many addresses: a host's few networks, in both families.
pub const ADDRESSES_MAX: usize = 8;

/// Reads `IP:PORT[,IP:PORT…]`. IPv6 addresses stand in brackets.
pub fn parse_addresses(text: &str) -> Result<Vec<SocketAddr>> {
    let parts = text.split(',').take(ADDRESSES_MAX + 1);
    let addresses: Result<Vec<SocketAddr>, _> = parts.map(|part| part.trim().parse()).collect();
    match addresses {
        Ok(addresses) if addresses.len() <= ADDRESSES_MAX && addresses.iter().all(|a| a.port() != 0) => Ok(addresses),
        _ => Err(Error::Config(format!(
            "`{}` is not an endpoint of tcp: up to {ADDRESSES_MAX} times IP:PORT (IPv6 in brackets), with commas between",
            text.chars().take(200).collect::<String>().escape_debug()
        ))),
    }
}

/// The inverse of [`parse_addresses`].
pub fn format_addresses(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
}

/// An address and the number of the path that it was offered for: `ADDRESS#N`, without `#N` for the first (0). Empty stays empty.
pub fn with_incarnation(address: String, incarnation: u32) -> String {
    if incarnation == 0 || address.is_empty() { address } else { format!("{address}#{incarnation}") }
}

/// The inverse of [`with_incarnation`].
pub fn split_incarnation(text: &str) -> Result<(&str, u32)> {
    let Some((address, number)) = text.split_once('#') else { return Ok((text, 0)) };
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    match number.parse() {
        Ok(number) if is_plain && !address.is_empty() => Ok((address, number)),
        _ => Err(Error::Config(format!(
            "`{}` is not an endpoint: what follows # must be the number of a path, from 1",
            text.chars().take(200).collect::<String>().escape_debug()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for text in ["127.0.0.1:1", "[::1]:65535", "10.0.0.1:80,[fe80::1%2]:80,192.168.1.1:80"] {
            assert_eq!(format_addresses(&parse_addresses(text).unwrap()), text);
        }
    }

    #[test]
    fn incarnations_round_trip() {
        for (address, number) in [("127.0.0.1:1", 0), ("127.0.0.1:1", 1), ("[::1]:9,[::2]:9", u32::MAX), ("", 0)] {
            let text = with_incarnation(address.into(), number);
            assert_eq!(split_incarnation(&text).unwrap(), (address, number));
        }
        for text in ["a#", "a#0", "a#01", "a#-1", "a#+1", "a#1#2", "#1", "a#4294967296"] {
            assert!(split_incarnation(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let many = ["127.0.0.1:1"; ADDRESSES_MAX + 1].join(",");
        for text in ["", "localhost:1", "127.0.0.1", "127.0.0.1:0", "::1:1", "127.0.0.1:1,", &many, "1.2.3.4:99999"] {
            assert!(parse_addresses(text).is_err(), "{text}");
        }
    }
}
