//! Two hosts: one listens, the other calls, and both hold the same token.
//!
//! The connection is that of the tcp fabric, so it is tested what a job uses, and a stranger is refused as by a job.
//!
//! Invariant: the listening end answers one caller that holds the token, and ends then or at its deadline.

use std::{
    net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    time::{Duration, Instant},
};

use nix::sys::socket::{getsockopt, sockopt};
use serde::Serialize;

use super::exchange::{End, Figures, LARGE_ANSWER};
use crate::{
    Error, Result,
    transport::{
        Endpoint, Transport,
        tcp::{TcpOptions, TcpTransport},
    },
    types::PeerId,
    wire::{ADDRESSES_MAX, JobToken, format_addresses, handshake::Identity, job_id},
};

/// The port where nothing else is said.
pub const PORT: u16 = 7313;

/// How long a host may take to answer a call.
const REACH_TIME: Duration = Duration::from_secs(5);

const LISTENING: PeerId = PeerId::server(0, 0);
const CALLING: PeerId = PeerId::worker(0);

fn identity(token: &JobToken, me: PeerId) -> Identity {
    Identity { job: job_id("doctor", "pair"), token: token.clone(), me, epoch: 0 }
}

/// The end that waits to be called.
#[derive(Debug)]
pub struct Listener {
    transport: TcpTransport,
}

impl Listener {
    /// Listens at `address`, whose port 0 leaves the choice to the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if the address cannot be had.
    pub fn open(address: SocketAddr, token: &JobToken) -> Result<Listener> {
        let ports = (address.port() != 0).then(|| address.port()..=address.port());
        let options = TcpOptions { address: Some(address.ip()), ports, ..TcpOptions::new(identity(token, LISTENING)) };
        Ok(Listener { transport: TcpTransport::new(options)? })
    }

    /// Where this host can be called: `IP:PORT`, several with commas between.
    pub fn addresses(&mut self) -> Result<String> {
        let offered = self.transport.offer(CALLING)?;
        Ok(offered.on("tcp").unwrap_or_default().to_string())
    }

    /// Answers one caller.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] if nobody who holds the token calls before `deadline`, or the caller goes away in the middle.
    pub fn answer(&mut self, deadline: Instant) -> Result<()> {
        let mut end = End::new(&mut self.transport, CALLING)?;
        end.connect(&Endpoint::new("tcp", ""), deadline)?;
        end.answer()
    }
}

/// What was found out about another host.
#[derive(Clone, Debug, Serialize)]
pub struct Reached {
    /// The address that answered.
    pub address: SocketAddr,
    /// The largest packet on the way there, as this host's kernel knows it; IPv4 only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Latency and rate.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Calls `gradwire doctor --listen` at `host` (`NAME`, `NAME:PORT`) and measures the way there.
///
/// # Errors
///
/// [`Error::JobFailed`] or [`Error::Broken`], with what to look at.
pub fn call(host: &str, token: &JobToken) -> Result<Reached> {
    let address = reach(&resolve(host)?)?;
    let mut transport = TcpTransport::new(TcpOptions { listen: false, ..TcpOptions::new(identity(token, CALLING)) })?;
    let mut end = End::new(&mut transport, LISTENING)?;
    end.connect(&Endpoint::new("tcp", format_addresses(&[address])), Instant::now() + REACH_TIME).map_err(|error| {
        Error::JobFailed(format!(
            "{address} is reached, but will not talk to us: {error}. Both ends need the same GRADWIRE_TOKEN, and `gradwire \
             doctor --listen` must still be waiting there"
        ))
    })?;
    let figures = end.measure().map_err(|error| explain(address, error))?;
    Ok(Reached { address, mtu: route_mtu(address), figures })
}

/// A path that carries small packets and swallows large ones has an MTU that somebody on the way does not keep to.
fn explain(address: SocketAddr, error: Error) -> Error {
    match &error {
        Error::Deadline { awaited, .. } if *awaited == LARGE_ANSWER => Error::JobFailed(format!(
            "{address} answered writes of 64 bytes and not those of 1 MiB: something on the way drops large packets. Compare \
             the MTU of both interfaces and of the switch (`ip link`), and try `ping -M do -s 8972 {}`",
            address.ip()
        )),
        _ => error,
    }
}

/// The addresses of `NAME`, `NAME:PORT`, `IP`, `IP:PORT` or `[IP]:PORT`.
fn resolve(host: &str) -> Result<Vec<SocketAddr>> {
    let with_port = host.to_socket_addrs().or_else(|_| (host, PORT).to_socket_addrs());
    let found = with_port.map_err(|error| {
        Error::Config(format!("`{host}` is no host that this one knows ({error}): give HOST, HOST:PORT or IP:PORT"))
    })?;
    Ok(found.take(ADDRESSES_MAX).collect())
}

/// The first address that lets itself be called.
fn reach(addresses: &[SocketAddr]) -> Result<SocketAddr> {
    let mut failures = Vec::new();
    for address in addresses {
        match TcpStream::connect_timeout(address, REACH_TIME) {
            Ok(_) => return Ok(*address),
            Err(error) => failures.push(format!("{address}: {error}; {}", advice(&error))),
        }
    }
    Err(Error::JobFailed(format!("no way there. {}", failures.join(". "))))
}

fn advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            "the host is there and nothing listens: start `gradwire doctor --listen` on it"
        }
        std::io::ErrorKind::TimedOut => {
            "no answer: a firewall that drops the call (open the port), or the wrong address"
        }
        _ => "look at addresses and routes: `ip address` there, `ip route get ADDRESS` here",
    }
}

fn route_mtu(address: SocketAddr) -> Option<u32> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok().filter(|_| address.is_ipv4())?;
    socket.connect(address).ok()?;
    u32::try_from(getsockopt(&socket, sockopt::IpMtu).ok()?).ok()
}
