//! The text by which a peer's queue pair is found: one rail of an [`super::offer::Offer`], and whether two of them can meet.
//!
//! Invariant: `Address::parse(address.to_string()) == address`; two ends that judge each other's addresses come to one answer.
#![forbid(unsafe_code)]

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use super::options::RING_ENTRIES_MAX;

/// How packets travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Link {
    /// InfiniBand, by local identifier.
    InfiniBand,
    /// RoCE version 1: on one Ethernet segment.
    RoceV1,
    /// RoCE version 2: in UDP.
    RoceV2,
}

impl Link {
    const ALL: [(Link, &str); 3] = [(Link::InfiniBand, "ib"), (Link::RoceV1, "roce1"), (Link::RoceV2, "roce2")];

    fn word(self) -> &'static str {
        Link::ALL.iter().find(|(link, _)| *link == self).expect("all are listed").1
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Link::InfiniBand => "InfiniBand",
            Link::RoceV1 => "RoCE v1",
            Link::RoceV2 => "RoCE v2",
        })
    }
}

/// A port's address in its fabric: 16 bytes, an IPv6 address in form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Gid(pub(super) [u8; 16]);

impl Gid {
    /// The IPv4 address, if it is one.
    pub(super) fn ipv4(self) -> Option<Ipv4Addr> {
        Ipv6Addr::from(self.0).to_ipv4_mapped()
    }

    /// Means something on one segment only.
    pub(super) fn is_link_local(self) -> bool {
        Ipv6Addr::from(self.0).is_unicast_link_local()
    }

    pub(super) fn is_zero(self) -> bool {
        // A table's unused places hold zeroes, or the prefix of link-local addresses alone.
        self.0[8..].iter().all(|byte| *byte == 0)
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ipv4() {
            Some(v4) => v4.fmt(f),
            None => Ipv6Addr::from(self.0).fmt(f),
        }
    }
}

/// One end of a rail of a path that is to be: its queue pair, and the note ring that belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) link: Link,
    pub(super) gid: Gid,
    /// Local identifier; 0 on Ethernet.
    pub(super) lid: u16,
    /// Queue pair number, 24 bits.
    pub(super) qpn: u32,
    /// The first packet number that it will send, 24 bits.
    pub(super) psn: u32,
    /// Path MTU in the fabric's code: 1 to 5 for 256 to 4,096 bytes.
    pub(super) mtu: u8,
    /// Key of the note ring, whose addresses begin at 0.
    pub(super) ring_rkey: u32,
    /// Entries of the note ring.
    pub(super) ring_entries: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { link, gid, lid, qpn, psn, mtu, ring_rkey, ring_entries } = self;
        let gid = u128::from_be_bytes(gid.0);
        write!(f, "{},{gid:032x},{lid},{qpn},{psn},{mtu},{ring_rkey},{ring_entries}", link.word())
    }
}

impl Address {
    /// Reads what [`Address`] displays.
    pub(super) fn parse(text: &str) -> Result<Address, String> {
        let defect = |what: &str| format!("of a rail, {what}");
        let fields: Vec<&str> = text.split(',').take(9).collect();
        let [link, gid, lid, qpn, psn, mtu, ring_rkey, ring_entries] = fields[..] else {
            return Err(defect("there must be eight fields"));
        };
        let link = Link::ALL.iter().find(|(_, word)| *word == link).ok_or_else(|| defect("the link is unknown"))?.0;
        if gid.len() != 32 || !gid.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(defect("the GID is not 32 hexadecimal digits"));
        }
        let gid = Gid(u128::from_str_radix(gid, 16).map_err(|_| defect("the GID"))?.to_be_bytes());
        let number = |field: &str, max: u32, what: &str| match field.parse::<u32>() {
            Ok(value) if value <= max && !field.starts_with('+') => Ok(value),
            _ => Err(defect(what)),
        };
        let address = Address {
            link,
            gid,
            lid: number(lid, 0xffff, "the local identifier")? as u16,
            qpn: number(qpn, 0xff_ffff, "the queue pair number")?,
            psn: number(psn, 0xff_ffff, "the packet number")?,
            mtu: number(mtu, 5, "the MTU")? as u8,
            ring_rkey: number(ring_rkey, u32::MAX, "the ring's key")?,
            ring_entries: number(ring_entries, RING_ENTRIES_MAX.into(), "the ring's entries")? as u16,
        };
        if address.mtu == 0 || address.ring_entries < 4 || !address.ring_entries.is_power_of_two() {
            return Err(defect("the MTU or the ring cannot be"));
        }
        Ok(address)
    }

    /// Whether two ends reach each other, and why or why not. The same answer at both.
    pub(super) fn judge(&self, remote: &Address) -> Result<String, String> {
        if self.link != remote.link {
            let (mut a, mut b) = (self.link.to_string(), remote.link.to_string());
            if a > b {
                std::mem::swap(&mut a, &mut b);
            }
            return Err(format!("one end is on {a}, the other on {b}"));
        }
        let family = |address: &Address| address.gid.ipv4().is_some();
        match self.link {
            Link::InfiniBand if self.gid.0[..8] != remote.gid.0[..8] && (self.lid == 0 || remote.lid == 0) => {
                Err("the ends are on different InfiniBand subnets".into())
            }
            Link::RoceV1 | Link::RoceV2 if family(self) != family(remote) => {
                Err("one end has an IPv4 address, the other IPv6 only: choose alike with GRADWIRE_GID_INDEX".into())
            }
            link => Ok(format!("{link} from {} to {}", self.gid, remote.gid)),
        }
    }

    /// The path MTU that both ends can do, in bytes.
    pub(super) fn mtu_bytes(code: u8) -> u32 {
        128 << code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(gid: &str) -> Address {
        let gid = Gid(gid.parse::<Ipv6Addr>().unwrap().octets());
        Address { link: Link::RoceV2, gid, lid: 0, qpn: 17, psn: 0xff_ffff, mtu: 5, ring_rkey: 77, ring_entries: 256 }
    }

    #[test]
    fn round_trip() {
        for link in [Link::InfiniBand, Link::RoceV1, Link::RoceV2] {
            let address = Address { link, lid: 65535, ring_rkey: u32::MAX, ..address("::ffff:10.9.0.1") };
            assert_eq!(Address::parse(&address.to_string()).unwrap(), address);
        }
        assert_eq!(address("::ffff:10.9.0.1").gid.to_string(), "10.9.0.1");
        assert_eq!(Address::mtu_bytes(5), 4096);
    }

    #[test]
    fn what_is_no_address_is_refused_in_words() {
        let good = address("::ffff:10.9.0.1").to_string();
        let spoilt = |at: usize, text: &str| {
            let mut fields: Vec<&str> = good.split(',').collect();
            fields[at] = text;
            fields.join(",")
        };
        let wrong = [
            (0, "wifi"),
            (1, "12"),
            (1, "+0000000000000000000000000000001"),
            (2, "65536"),
            (3, "16777216"),
            (4, "-1"),
            (5, "0"),
            (5, "6"),
            (6, ""),
            (7, "255"),
            (7, "8192"),
            (7, "0"),
        ];
        for (at, text) in wrong {
            let error = Address::parse(&spoilt(at, text)).expect_err(text);
            assert!(error.starts_with("of a rail, the "), "{error}");
        }
        for text in ["", "1", &format!("{good},1"), &",".repeat(100_000)] {
            assert!(Address::parse(text).is_err());
        }
    }

    #[test]
    fn both_ends_judge_alike() {
        let v4 = address("::ffff:10.9.0.1");
        let other = address("::ffff:10.9.0.2");
        let v6 = address("fd00::1");
        let roce1 = Address { link: Link::RoceV1, ..other };
        let here = Address { link: Link::InfiniBand, lid: 3, ..address("fe80::1") };
        let there = Address { lid: 0, ..Address { link: Link::InfiniBand, ..address("fe80:0:0:1::1") } };
        for (a, b, meet) in
            [(v4, other, true), (v4, v6, false), (v4, roce1, false), (v6, v6, true), (here, there, false)]
        {
            assert_eq!(a.judge(&b).is_ok(), meet, "{a} {b}");
            assert_eq!(a.judge(&b).is_ok(), b.judge(&a).is_ok());
        }
        assert_eq!(v4.judge(&other).unwrap(), "RoCE v2 from 10.9.0.1 to 10.9.0.2");
    }
}
