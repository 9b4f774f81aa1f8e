//! What a verbs transport is told at its birth, and what of that the environment may say.
//!
//! Invariant: `retry_count` is at most 6: some devices, and the kernel's soft-RDMA among them, take 7 as for ever.
#![forbid(unsafe_code)]

use std::{fmt, str::FromStr};

use super::RAILS_MAX;
use crate::{Error, Result, wire::handshake::Identity};

/// The most tries that every device counts.
pub const RETRY_COUNT_MAX: u8 = 6;

/// The most notes that a ring has room for.
pub(super) const RING_ENTRIES_MAX: u16 = 4096;

/// A device by its name, or one of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortName {
    /// As in /sys/class/infiniband.
    pub device: String,
    /// Counted from 1; any that is up if `None`.
    pub port: Option<u8>,
}

impl FromStr for PortName {
    type Err = ();

    /// Reads `mlx5_0` or `mlx5_0:2`.
    fn from_str(text: &str) -> Result<PortName, ()> {
        let (device, port) = text.trim().split_once(':').map_or((text, None), |(device, port)| (device, Some(port)));
        let port = port.map(|digits| digits.trim().parse().map_err(drop)).transpose()?;
        match device.trim() {
            "" => Err(()),
            device => Ok(PortName { device: device.into(), port }),
        }
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            None => f.write_str(&self.device),
            Some(port) => write!(f, "{}:{port}", self.device),
        }
    }
}

/// How to make a [`super::VerbsTransport`].
#[derive(Clone, Debug)]
pub struct VerbsOptions {
    /// Our own name. Job and token are proved by the rendezvous that carries the addresses.
    pub identity: Identity,
    /// The ports to use as rails, in this order, up to 4 (`GRADWIRE_HCA`: `mlx5_0`, or `mlx5_0:2` with its port, or several with
    /// commas between); if there is none, the nearest that works. Rail i of one end meets rail i of the other.
    pub hca: Vec<PortName>,
    /// How many ports to use that are equally near, on one NUMA node and of one kind of link, where `hca` names none
    /// (`GRADWIRE_RAILS`): 1 to 4, otherwise 1.
    pub rails: Option<u8>,
    /// The place of our address in the port's table (`GRADWIRE_GID_INDEX`); otherwise RoCE v2 over IPv4 where there is one.
    pub gid_index: Option<u8>,
    /// The NUMA node near which the device should be.
    pub numa_node: Option<u32>,
    /// DSCP (upper six bits) and ECN of our packets (`GRADWIRE_TRAFFIC_CLASS`).
    pub traffic_class: u8,
    /// Service level, or priority (`GRADWIRE_SERVICE_LEVEL`).
    pub service_level: u8,
    /// The place of the partition key in the port's table (`GRADWIRE_PKEY_INDEX`).
    pub pkey_index: u16,
    /// Time to an acknowledgement before the device tries again: 4.096 us times 2 to the power of this, and on some devices up
    /// to four times that.
    pub ack_timeout: u8,
    /// Tries after the first until the peer counts as dead; at most [`RETRY_COUNT_MAX`].
    pub retry_count: u8,
    /// Requests that may be queued to one peer before `post` answers `QueueFull`.
    pub queue_limit: usize,
    /// Requests that a queue pair's send queue holds: two for a write with payload, one for a note alone.
    pub send_depth: u32,
    /// Notes that a peer may have sent us and we have not looked at; a power of 2, at most 4,096.
    pub ring_entries: u16,
    /// Requests up to one that completes, beside the last of a list with a payload: fewer completions are less work, more give
    /// sources and places in the queue back earlier. `None`, and at most: a quarter of the send queue.
    pub signal_every: Option<u32>,
}

impl VerbsOptions {
    /// Any device; a peer that does not answer is dead after 7 tries of 134 ms; up to 4,096 requests queued to a peer, 512 of
    /// them at work in the device, and 256 notes of it not looked at (16 KiB).
    pub fn new(identity: Identity) -> VerbsOptions {
        VerbsOptions {
            identity,
            hca: Vec::new(),
            rails: None,
            gid_index: None,
            numa_node: None,
            traffic_class: 0,
            service_level: 0,
            pkey_index: 0,
            ack_timeout: 15,
            retry_count: RETRY_COUNT_MAX,
            queue_limit: 4096,
            send_depth: 512,
            ring_entries: 256,
            signal_every: None,
        }
    }

    /// Takes `GRADWIRE_HCA`, `GRADWIRE_RAILS`, `GRADWIRE_GID_INDEX`, `GRADWIRE_TRAFFIC_CLASS`, `GRADWIRE_SERVICE_LEVEL` and
    /// `GRADWIRE_PKEY_INDEX` from `lookup` where nothing was said before.
    pub fn with_environment(mut self, lookup: impl Fn(&str) -> Option<String>) -> Result<VerbsOptions> {
        let said = |name: &str| lookup(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty());
        // Who names ports has said how many.
        let is_named = !self.hca.is_empty();
        if !is_named && let Some(text) = said("GRADWIRE_HCA") {
            self.hca = text.split(',').map(str::parse).collect::<Result<_, ()>>().map_err(|()| {
                let form = "it must name a device, or a port as in mlx5_0:1, or several with commas between";
                Error::Config(format!("GRADWIRE_HCA is `{text}`; {form}"))
            })?;
        }
        if !is_named && let (None, Some(text)) = (self.rails, said("GRADWIRE_RAILS")) {
            self.rails = Some(number("GRADWIRE_RAILS", &text, RAILS_MAX as u32)? as u8);
        }
        if let (None, Some(text)) = (self.gid_index, said("GRADWIRE_GID_INDEX")) {
            self.gid_index = Some(number("GRADWIRE_GID_INDEX", &text, 255)? as u8);
        }
        if let (0, Some(text)) = (self.traffic_class, said("GRADWIRE_TRAFFIC_CLASS")) {
            self.traffic_class = number("GRADWIRE_TRAFFIC_CLASS", &text, 255)? as u8;
        }
        if let (0, Some(text)) = (self.service_level, said("GRADWIRE_SERVICE_LEVEL")) {
            self.service_level = number("GRADWIRE_SERVICE_LEVEL", &text, 15)? as u8;
        }
        if let (0, Some(text)) = (self.pkey_index, said("GRADWIRE_PKEY_INDEX")) {
            self.pkey_index = number("GRADWIRE_PKEY_INDEX", &text, 65535)? as u16;
        }
        Ok(self)
    }

    /// Refuses what no device can do.
    pub(super) fn validate(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(format!("verbs: {what}")));
        if self.retry_count > RETRY_COUNT_MAX {
            return refuse(format!(
                "the retry count is {}; above {RETRY_COUNT_MAX} some devices try for ever",
                self.retry_count
            ));
        }
        if self.ack_timeout == 0 || self.ack_timeout > 31 {
            return refuse(format!("the timeout is {}; it must be from 1 to 31 (0 means for ever)", self.ack_timeout));
        }
        if self.hca.len() > RAILS_MAX || self.rails.is_some_and(|rails| !(1..=RAILS_MAX).contains(&rails.into())) {
            return refuse(format!(
                "a path has 1 to {RAILS_MAX} rails; {} are asked for",
                self.hca.len().max(usize::from(self.rails.unwrap_or(0)))
            ));
        }
        if !self.ring_entries.is_power_of_two() || self.ring_entries > RING_ENTRIES_MAX || self.ring_entries < 4 {
            let rings = format!("a power of 2 from 4 to {RING_ENTRIES_MAX}");
            return refuse(format!("a ring of {} notes; it must be {rings}", self.ring_entries));
        }
        if self.signal_every == Some(0) {
            return refuse("completions every 0 requests; it must be 1 or more".into());
        }
        if self.send_depth < 16 {
            return refuse(format!("a send queue of {} requests; it must be at least 16", self.send_depth));
        }
        Ok(())
    }
}

fn number(name: &str, text: &str, max: u32) -> Result<u32> {
    match text.parse::<u32>() {
        Ok(value) if value <= max => Ok(value),
        _ => Err(Error::Config(format!("{name} is `{text}`; it must hold a whole number from 0 to {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{types::PeerId, wire::JobToken};

    fn options() -> VerbsOptions {
        let token = JobToken::random().unwrap();
        VerbsOptions::new(Identity { job: 1, token, me: PeerId::worker(0), epoch: 0 })
    }

    fn names(options: &VerbsOptions) -> Vec<String> {
        options.hca.iter().map(PortName::to_string).collect()
    }

    #[test]
    fn the_environment_fills_what_nobody_said() {
        let environment = |name: &str| match name {
            "GRADWIRE_HCA" => Some("mlx5_3:2, mlx5_4".to_string()),
            "GRADWIRE_RAILS" => Some("2".to_string()),
            "GRADWIRE_GID_INDEX" => Some("3".to_string()),
            "GRADWIRE_TRAFFIC_CLASS" => Some("106".to_string()),
            "GRADWIRE_SERVICE_LEVEL" => Some(" ".to_string()),
            _ => None,
        };
        let filled = options().with_environment(environment).unwrap();
        assert_eq!(
            (names(&filled), filled.rails, filled.gid_index),
            (vec!["mlx5_3:2".into(), "mlx5_4".into()], Some(2), Some(3))
        );
        assert_eq!(filled.hca[0], PortName { device: "mlx5_3".into(), port: Some(2) });
        assert_eq!((filled.traffic_class, filled.service_level, filled.pkey_index), (106, 0, 0));
        let said = VerbsOptions { hca: vec!["rxe0".parse().unwrap()], gid_index: Some(1), ..options() };
        let kept = said.with_environment(environment).unwrap();
        assert_eq!((names(&kept), kept.rails, kept.gid_index), (vec!["rxe0".into()], None, Some(1)));
    }

    #[test]
    fn what_no_device_can_do_is_refused_by_name() {
        for (name, text) in [
            ("GRADWIRE_HCA", "a:b"),
            ("GRADWIRE_HCA", "a:256"),
            ("GRADWIRE_HCA", "a,,b"),
            ("GRADWIRE_HCA", ":1"),
            ("GRADWIRE_RAILS", "5"),
            ("GRADWIRE_GID_INDEX", "256"),
            ("GRADWIRE_SERVICE_LEVEL", "16"),
        ] {
            let error = options().with_environment(|asked| (asked == name).then(|| text.to_string())).unwrap_err();
            assert!(error.to_string().contains(name) && error.to_string().contains(text), "{error}");
        }
        let port: PortName = "a".parse().unwrap();
        for wrong in [
            VerbsOptions { hca: vec![port; 5], ..options() },
            VerbsOptions { rails: Some(5), ..options() },
            VerbsOptions { rails: Some(0), ..options() },
        ] {
            assert!(wrong.validate().unwrap_err().to_string().contains("1 to 4 rails"));
        }
        assert!(VerbsOptions { signal_every: Some(0), ..options() }.validate().is_err());
        options().validate().unwrap();
        assert!(VerbsOptions { retry_count: 7, ..options() }.validate().unwrap_err().to_string().contains("for ever"));
        for wrong in [0, 2, 100, 8192] {
            assert!(VerbsOptions { ring_entries: wrong, ..options() }.validate().is_err(), "{wrong}");
        }
        assert!(VerbsOptions { ack_timeout: 0, ..options() }.validate().is_err());
    }
}
