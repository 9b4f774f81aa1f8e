//! What a soft transport is told at its birth: its address, its queue pairs' limits, and the faults to inject.
//!
//! Invariant: what was not checked by `validate` is not used; without a word from anybody nothing is injected and the loopback
//! address is bound.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, rc::Config};

/// Payload bytes in a packet: from the least MTU of InfiniBand to what still fits into the loopback's.
const MTU: std::ops::RangeInclusive<u32> = 256..=MTU_MAX;
pub(super) const MTU_MAX: u32 = 8192;

/// Packets in flight: far below the 2^23 that sequence numbers could tell apart.
const WINDOW_MAX: u32 = 4096;

/// A delay is for finding mistakes of order and patience, not for waiting.
const DELAY_US_MAX: u64 = 1_000_000;

/// How to make a [`super::SoftTransport`].
#[derive(Clone, Debug)]
pub struct SoftOptions {
    /// The address to bind and to be told to peers; the kernel chooses the port.
    pub address: IpAddr,
    /// MTU, window, retries and times of every queue pair.
    pub queue_pair: Config,
    /// Requests that may be queued to one peer before `post` answers `QueueFull`.
    pub queue_limit: usize,
    /// Writes that one peer may complete between two polls; beyond that it is told "receiver not ready".
    pub receive_depth: usize,
    /// What goes wrong on purpose, below the queue pairs, with what this end sends.
    pub faults: SoftFaults,
}

impl Default for SoftOptions {
    /// The loopback address; up to 4,096 requests queued to a peer; 1,024 arrivals a peer and poll; no faults.
    fn default() -> SoftOptions {
        SoftOptions {
            address: Ipv4Addr::LOCALHOST.into(),
            queue_pair: Config::default(),
            queue_limit: 4096,
            receive_depth: 1024,
            faults: SoftFaults::default(),
        }
    }
}

impl SoftOptions {
    /// What is wrong with them, in the words of whoever wrote them.
    pub fn validate(&self) -> Result<()> {
        let Config { mtu, window, .. } = self.queue_pair;
        if !MTU.contains(&mtu) {
            return Err(refuse("mtu", mtu, &format!("between {} and {} bytes", MTU.start(), MTU.end())));
        }
        if !(1..=WINDOW_MAX).contains(&window) {
            return Err(refuse("window", window, &format!("between 1 and {WINDOW_MAX} packets")));
        }
        if self.address.is_unspecified() {
            return Err(refuse("address", self.address, "one that peers can send to"));
        }
        if self.queue_limit == 0 || self.receive_depth == 0 {
            return Err(refuse("queue_limit or receive_depth", 0, "at least 1"));
        }
        self.faults.validate()
    }
}

/// What goes wrong on purpose. Chances are between 0 and 1, for each packet sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SoftFaults {
    /// The packet disappears.
    pub loss: f64,
    /// The packet is sent twice.
    pub duplicate: f64,
    /// The packet is overtaken by those of the next two milliseconds.
    pub reorder: f64,
    /// One of the packet's bits is flipped.
    pub corrupt: f64,
    /// Every packet is held back for a random time of at most so many microseconds; they overtake each other.
    pub delay_us: u64,
    /// The queue pair that sends this transport's packet of this number dies, without a word to its peer.
    pub die_after: Option<u64>,
    /// The same seed does the same to the same sequence of packets.
    pub seed: u64,
}

impl SoftFaults {
    /// What is wrong with them.
    pub fn validate(&self) -> Result<()> {
        let SoftFaults { loss, duplicate, reorder, corrupt, delay_us, die_after, .. } = *self;
        for (name, chance) in [("loss", loss), ("duplicate", duplicate), ("reorder", reorder), ("corrupt", corrupt)] {
            if !(0.0..=1.0).contains(&chance) {
                return Err(refuse(name, chance, "a chance between 0 and 1, as in 0.05"));
            }
        }
        if delay_us > DELAY_US_MAX {
            return Err(refuse("delay_us", delay_us, &format!("at most {DELAY_US_MAX} microseconds")));
        }
        if die_after == Some(0) {
            return Err(refuse("die_after", 0, "the number of a packet, counted from 1"));
        }
        Ok(())
    }

    /// Whether a packet may need to be held back or changed at all.
    pub(super) fn is_calm(&self) -> bool {
        self.loss == 0.0 && self.duplicate == 0.0 && self.reorder == 0.0 && self.corrupt == 0.0 && self.delay_us == 0
    }
}

fn refuse(name: &str, value: impl std::fmt::Display, wanted: &str) -> Error {
    Error::Config(format!("soft transport: {name} is {value}; it must be {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_options_are_refused_by_name_and_value() {
        let faults = |faults| SoftOptions { faults, ..SoftOptions::default() };
        let mtu = |mtu| SoftOptions { queue_pair: Config { mtu, ..Config::default() }, ..SoftOptions::default() };
        let wrong = [
            (faults(SoftFaults { loss: 1.5, ..SoftFaults::default() }), "loss is 1.5"),
            (faults(SoftFaults { reorder: -0.1, ..SoftFaults::default() }), "reorder is -0.1"),
            (faults(SoftFaults { corrupt: f64::NAN, ..SoftFaults::default() }), "corrupt is NaN"),
            (faults(SoftFaults { delay_us: 2_000_000, ..SoftFaults::default() }), "delay_us is 2000000"),
            (faults(SoftFaults { die_after: Some(0), ..SoftFaults::default() }), "die_after is 0"),
            (mtu(0), "mtu is 0"),
            (mtu(9000), "mtu is 9000"),
            (SoftOptions { address: Ipv4Addr::UNSPECIFIED.into(), ..SoftOptions::default() }, "address is 0.0.0.0"),
            (SoftOptions { queue_limit: 0, ..SoftOptions::default() }, "queue_limit"),
        ];
        for (options, text) in wrong {
            let error = options.validate().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        SoftOptions::default().validate().unwrap();
    }

    #[test]
    fn faults_are_read_by_name_and_a_wrong_name_is_refused() {
        let faults: SoftFaults = toml::from_str("loss = 0.05\ndie_after = 7").unwrap();
        assert_eq!(faults, SoftFaults { loss: 0.05, die_after: Some(7), ..SoftFaults::default() });
        assert!(toml::from_str::<SoftFaults>("lost = 0.05").unwrap_err().to_string().contains("lost"));
    }
}
