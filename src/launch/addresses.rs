//! At which addresses of this machine other hosts may find it.
//!
//! Invariant: the loopback address is given only where there is no other.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use crate::{Error, Result};

/// Addresses of this machine that others try.
const ADDRESSES_MAX: usize = 8;

/// Where others may find a port that listens there: on one interface only, if one is named.
pub(super) fn addresses(listening: SocketAddr, interface: Option<&str>) -> Result<Vec<SocketAddr>> {
    if !listening.ip().is_unspecified() {
        return Ok(vec![listening]);
    }
    let mut ips = own_ips(interface)?;
    if ips.is_empty() {
        ips.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    Ok(ips.into_iter().take(ADDRESSES_MAX).map(|ip| SocketAddr::new(ip, listening.port())).collect())
}

/// This machine's addresses that mean something elsewhere, IPv4 first; of one interface only, if one is named.
pub(super) fn own_ips(interface: Option<&str>) -> Result<Vec<IpAddr>> {
    let all = getifaddrs().map_err(|e| Error::os("getifaddrs", "all interfaces", e))?;
    let up = all.filter(|entry| entry.flags.contains(InterfaceFlags::IFF_UP));
    let wanted = up.filter(|entry| interface.is_none_or(|name| entry.interface_name == name));
    let ips = wanted.filter_map(|entry| {
        let address = entry.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let mut ips: Vec<IpAddr> = ips.filter(usable).collect();
    ips.sort_by_key(|ip| ip.is_ipv6());
    Ok(ips)
}
