//! Sockets: listening, calling, sending many ranges at once, and which address an interface has. All of them never block.
//!
//! Invariant: every socket made here is non-blocking and closed on exec, and no send raises SIGPIPE in the host process.
#![forbid(unsafe_code)]

use std::{
    io::{self, IoSlice},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    ops::RangeInclusive,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, listen, sendmsg,
        setsockopt, socket, sockopt,
    },
};

use crate::{Error, Result, wire::ADDRESSES_MAX};

/// Listens on `ip` at the first free port of `ports`, or at any free port.
pub(super) fn listen_on(ip: IpAddr, ports: Option<&RangeInclusive<u16>>) -> Result<TcpListener> {
    let ports = ports.cloned().unwrap_or(0..=0);
    let mut taken = None;
    for port in ports.clone() {
        let address = SocketAddr::new(ip, port);
        let subject = || format!("the listening address {address}");
        let fd = open(address).map_err(|e| Error::os("socket", subject(), e))?;
        // A port whose last connections still wait for their end may be listened on again; one that is listened on may not.
        setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(|e| Error::os("setsockopt(SO_REUSEADDR)", subject(), e))?;
        // As long a queue as the system allows: a job's ranks all call at once, and a caller that finds no room waits for seconds.
        let bound =
            bind(fd.as_raw_fd(), &SockaddrStorage::from(address)).and_then(|()| listen(&fd, Backlog::MAXALLOWABLE));
        match bound {
            Ok(()) => return Ok(TcpListener::from(fd)),
            Err(Errno::EADDRINUSE | Errno::EACCES) => taken = bound.err(),
            Err(e) => return Err(Error::os("bind", subject(), e)),
        }
    }
    let subject = format!("every port of {ip} from {} to {} (--ports, GRADWIRE_PORTS)", ports.start(), ports.end());
    Err(Error::os("bind", subject, taken.unwrap_or(Errno::EADDRNOTAVAIL)))
}

/// Begins to call `address`. Whether that succeeds is known when the socket becomes readable.
pub(super) fn call(address: SocketAddr) -> io::Result<TcpStream> {
    let fd = open(address)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let stream = TcpStream::from(fd);
    // A call to a port of this host where nobody listens can reach itself, when the kernel happens to pick that very port for it.
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(here), Ok(there)) if here == there => Err(io::ErrorKind::ConnectionRefused.into()),
        _ => Ok(stream),
    }
}

/// Takes the next caller from the listener's queue; `None` if nobody is there.
pub(super) fn accept(listener: &TcpListener) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(true)?;
                return Ok(Some((stream, from)));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            // A caller that has gone again is no concern of ours.
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends `ranges` as far as there is room; `None` if there is none.
pub(super) fn send(stream: &TcpStream, ranges: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    loop {
        match sendmsg::<SockaddrStorage>(stream.as_raw_fd(), ranges, &[], MsgFlags::MSG_NOSIGNAL, None) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Prepares an open connection for messages.
///
/// Coalescing is done by flush; the kernel must not hold small writes back for more. And a peer on this host has no network before it whose
/// congestion would have to be found out: where the system's choice is BBR, its pacing costs up to half of the rate of plain sockets there
/// (docs/performance.md). Reno, which every kernel has and lets everybody use, does nothing as long as nothing is lost.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A connection that was reset meanwhile has no peer: whoever reads it learns why.
    let is_within = stream.local_addr().and_then(|local| Ok(local.ip() == stream.peer_addr()?.ip()));
    if is_within.unwrap_or(false)
        && let Err(error) = setsockopt(stream, sockopt::TcpCongestion, &"reno".into())
    {
        tracing::debug!(%error, "the system's congestion control stays");
    }
    Ok(())
}

/// Ends a connection for good, even if a child process holds a copy of the socket.
pub(super) fn end(stream: &TcpStream) {
    // It fails only if the connection has ended already.
    let _ = stream.shutdown(Shutdown::Both);
}

/// The address of a network interface by which others reach us: IPv4 before IPv6, link-local ones not at all (they mean nothing
/// on another host).
pub(super) fn interface_address(name: &str) -> Result<IpAddr> {
    let mut known = Vec::new();
    let mut found: Option<IpAddr> = None;
    for entry in getifaddrs().map_err(|e| Error::os("getifaddrs", name, e))? {
        if entry.interface_name == name && entry.flags.contains(InterfaceFlags::IFF_UP) {
            let address = entry.address.as_ref().and_then(ip_of).filter(is_reachable);
            found = match (found, address) {
                (Some(IpAddr::V6(_)) | None, Some(IpAddr::V4(v4))) => Some(v4.into()),
                (None, address) => address,
                (found, _) => found,
            };
        }
        if !known.contains(&entry.interface_name) {
            known.push(entry.interface_name);
        }
    }
    found.ok_or_else(|| {
        let what = if known.iter().any(|known| known == name) { "has no usable address" } else { "does not exist" };
        Error::Config(format!("network interface `{name}` (GRADWIRE_IFNAME) {what}; there are: {}", known.join(", ")))
    })
}

/// What peers are told to call, given the address that we are bound to.
pub(super) fn reachable(bound: SocketAddr, advertise: Option<IpAddr>) -> Result<Vec<SocketAddr>> {
    let mut ips = match advertise {
        Some(ip) => vec![ip],
        None if bound.ip().is_unspecified() => reachable_addresses(bound.ip())?,
        None => vec![bound.ip()],
    };
    ips.truncate(ADDRESSES_MAX);
    Ok(ips.into_iter().map(|ip| SocketAddr::new(ip, bound.port())).collect())
}

/// The addresses by which others reach a listener that is bound to all addresses: those of all interfaces that are up, or the
/// loopback address if there is no other.
fn reachable_addresses(family: IpAddr) -> Result<Vec<IpAddr>> {
    let mut all = Vec::new();
    for entry in getifaddrs().map_err(|e| Error::os("getifaddrs", "all interfaces", e))? {
        if entry.flags.contains(InterfaceFlags::IFF_UP) {
            all.extend(entry.address.as_ref().and_then(ip_of).filter(is_reachable));
        }
    }
    // A socket on the unspecified IPv6 address takes IPv4 calls as well.
    all.retain(|ip: &IpAddr| family.is_ipv6() || ip.is_ipv4());
    if all.iter().any(|ip| !ip.is_loopback()) {
        all.retain(|ip| !ip.is_loopback());
    }
    all.sort_by_key(IpAddr::is_ipv6);
    all.dedup();
    Ok(all)
}

fn open(address: SocketAddr) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

fn is_reachable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use nix::sys::socket::getsockopt;

    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn a_port_that_is_listened_on_is_passed_over() {
        let first = listen_on(LOCAL, None).unwrap();
        let port = first.local_addr().unwrap().port();
        let error = listen_on(LOCAL, Some(&(port..=port))).unwrap_err().to_string();
        assert!(error.contains("GRADWIRE_PORTS") && error.contains(&port.to_string()), "{error}");
        if let Ok(second) = listen_on(LOCAL, Some(&(port..=port.saturating_add(20)))) {
            assert!(second.local_addr().unwrap().port() > port);
        }
    }

    #[test]
    fn an_interface_has_an_address_or_its_error_says_which_there_are() {
        assert!(interface_address("lo").unwrap().is_loopback());
        let error = interface_address("nosuch9").unwrap_err().to_string();
        assert!(error.contains("`nosuch9`") && error.contains("lo"), "{error}");
    }

    #[test]
    fn a_connection_within_a_host_has_reno_and_another_what_the_system_chose() {
        let allowed = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
        let Some(other) = allowed.split_whitespace().find(|name| *name != "reno") else {
            println!("NOT RUN: this system has no congestion control but Reno");
            return;
        };
        // The second one's own address is another, as if its peer were on another host.
        for (there, expected) in [(Ipv4Addr::LOCALHOST, "reno"), (Ipv4Addr::new(127, 0, 0, 2), other)] {
            let listener = TcpListener::bind((there, 0)).unwrap();
            let fd = open((LOCAL, 0).into()).unwrap();
            bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(LOCAL, 0))).unwrap();
            setsockopt(&fd, sockopt::TcpCongestion, &other.into()).unwrap();
            let called = connect(fd.as_raw_fd(), &SockaddrStorage::from(listener.local_addr().unwrap()));
            assert!(matches!(called, Ok(()) | Err(Errno::EINPROGRESS)), "{called:?}");
            let _peer = listener.accept().unwrap();
            let stream = TcpStream::from(fd);
            prepare(&stream).unwrap();
            assert_eq!(getsockopt(&stream, sockopt::TcpCongestion).unwrap(), expected, "to {there}");
        }
    }
}
