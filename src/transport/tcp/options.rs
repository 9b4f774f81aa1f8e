//! What a tcp transport is told at its birth, and what of that the environment may say.
//!
//! Invariant: without a word from anybody a transport listens on the loopback address only.
#![forbid(unsafe_code)]

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use super::{Io, socket};
use crate::{Error, Result, wire::handshake::Identity};

/// How to make a [`super::TcpTransport`].
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Job, token, epoch and our own name: what both ends of a connection prove to each other.
    pub identity: Identity,
    /// Whether peers may call us. If not, we call them.
    pub listen: bool,
    /// The address to listen on; without one the interface's, without that the loopback address. The unspecified address means
    /// every interface.
    pub address: Option<IpAddr>,
    /// The network interface to listen on (`GRADWIRE_IFNAME`).
    pub interface: Option<String>,
    /// The ports to choose from (`GRADWIRE_PORTS`); without them the kernel chooses.
    pub ports: Option<RangeInclusive<u16>>,
    /// The address that peers are told to call, where that is not the one we listen on (behind a translation of addresses).
    pub advertise: Option<IpAddr>,
    /// Requests that may be queued to one peer before `post` answers `QueueFull`.
    pub queue_limit: usize,
    /// How the kernel moves the bytes (`GRADWIRE_TCP_IO`: epoll or uring).
    pub io: Io,
}

impl TcpOptions {
    /// Listens on the loopback address at any port; up to 4,096 requests queued to a peer (a header of 64 bytes and its
    /// bookkeeping each: half a MiB).
    pub fn new(identity: Identity) -> TcpOptions {
        TcpOptions {
            identity,
            listen: true,
            address: None,
            interface: None,
            ports: None,
            advertise: None,
            queue_limit: 4096,
            io: Io::default(),
        }
    }

    /// Takes `GRADWIRE_IFNAME` and `GRADWIRE_PORTS` (`4000-4100`) from `lookup` where nothing was said before, and `GRADWIRE_TCP_IO`.
    pub fn with_environment(mut self, lookup: impl Fn(&str) -> Option<String>) -> Result<TcpOptions> {
        if self.interface.is_none() && self.address.is_none() {
            self.interface = lookup("GRADWIRE_IFNAME").filter(|name| !name.is_empty());
        }
        if let (None, Some(text)) = (&self.ports, lookup("GRADWIRE_PORTS").filter(|ports| !ports.is_empty())) {
            self.ports = Some(parse_ports(&text)?);
        }
        if let Some(text) = lookup("GRADWIRE_TCP_IO").filter(|io| !io.is_empty()) {
            self.io = Io::parse(&text)?;
        }
        Ok(self)
    }

    pub(super) fn listening_ip(&self) -> Result<IpAddr> {
        match (self.address, &self.interface) {
            (Some(address), _) => Ok(address),
            (None, Some(name)) => socket::interface_address(name),
            (None, None) => Ok(Ipv4Addr::LOCALHOST.into()),
        }
    }
}

/// Reads `FIRST-LAST`, or one port.
fn parse_ports(text: &str) -> Result<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
        (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(first..=last),
        _ => {
            Err(Error::Config(format!("GRADWIRE_PORTS is `{text}`; it must be a port or FIRST-LAST, as in 4000-4100")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{types::PeerId, wire::JobToken};

    fn options() -> TcpOptions {
        let token = JobToken::random().unwrap();
        TcpOptions::new(Identity { job: 1, token, me: PeerId::worker(0), epoch: 0 })
    }

    #[test]
    fn the_environment_fills_what_nobody_said() {
        let environment = |name: &str| match name {
            "GRADWIRE_IFNAME" => Some("lo".to_string()),
            "GRADWIRE_PORTS" => Some("4000-4100".to_string()),
            "GRADWIRE_TCP_IO" => Some("uring".to_string()),
            _ => None,
        };
        let filled = options().with_environment(environment).unwrap();
        assert_eq!(filled.io, Io::Uring);
        assert_eq!((filled.interface.as_deref(), filled.ports.clone()), (Some("lo"), Some(4000..=4100)));
        assert!(filled.listening_ip().unwrap().is_loopback());
        let address = Some(Ipv4Addr::UNSPECIFIED.into());
        let said = TcpOptions { ports: Some(1..=2), address, ..options() };
        let kept = said.with_environment(environment).unwrap();
        assert_eq!((kept.interface, kept.ports), (None, Some(1..=2)));
        assert_eq!(options().with_environment(|_| None).unwrap().io, Io::Epoll);
        assert!(options().listening_ip().unwrap().is_loopback());
    }

    #[test]
    fn a_wrong_range_of_ports_is_an_error_that_shows_it() {
        for text in ["x", "0", "5-4", "1-70000", "1-", "-"] {
            let error = options().with_environment(|name| (name == "GRADWIRE_PORTS").then(|| text.to_string()));
            assert!(error.unwrap_err().to_string().contains(&format!("`{text}`")));
        }
        assert_eq!(parse_ports("4711").unwrap(), 4711..=4711);
    }
}
