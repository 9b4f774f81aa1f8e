//! What a verbs transport is told at its birth, and what of that the environment may say.
//!
//! Invariant: `retry_count` is at most 6: some devices, and the kernel's soft-RDMA among them, take 7 as for ever.
#![forbid(unsafe_code)]

use crate::{Error, Result, wire::handshake::Identity};

/// The most tries that every device counts.
pub const RETRY_COUNT_MAX: u8 = 6;

/// How to make a [`super::VerbsTransport`].
#[derive(Clone, Debug)]
pub struct VerbsOptions {
    /// Our own name. Job and token are proved by the rendezvous that carries the addresses.
    pub identity: Identity,
    /// The device to use (`GRADWIRE_HCA`: `mlx5_0`, or `mlx5_0:2` with its port); otherwise the nearest that works.
    pub hca: Option<String>,
    /// The port of the device, counted from 1.
    pub port: Option<u8>,
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
}

impl VerbsOptions {
    /// Any device; a peer that does not answer is dead after 7 tries of 134 ms; up to 4,096 requests queued to a peer, 512 of
    /// them at work in the device, and 256 notes of it not looked at (16 KiB).
    pub fn new(identity: Identity) -> VerbsOptions {
        VerbsOptions {
            identity,
            hca: None,
            port: None,
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
        }
    }

    /// Takes `GRADWIRE_HCA`, `GRADWIRE_GID_INDEX`, `GRADWIRE_TRAFFIC_CLASS`, `GRADWIRE_SERVICE_LEVEL` and
    /// `GRADWIRE_PKEY_INDEX` from `lookup` where nothing was said before.
    pub fn with_environment(mut self, lookup: impl Fn(&str) -> Option<String>) -> Result<VerbsOptions> {
        let said = |name: &str| lookup(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty());
        if let (None, Some(text)) = (&self.hca, said("GRADWIRE_HCA")) {
            let (device, port) = text.split_once(':').map_or((text.as_str(), None), |(name, port)| (name, Some(port)));
            self.hca = Some(device.to_string());
            if let (None, Some(port)) = (self.port, port) {
                self.port = Some(number("GRADWIRE_HCA", &text, port, 255)? as u8);
            }
        }
        if let (None, Some(text)) = (self.gid_index, said("GRADWIRE_GID_INDEX")) {
            self.gid_index = Some(number("GRADWIRE_GID_INDEX", &text, &text, 255)? as u8);
        }
        if let (0, Some(text)) = (self.traffic_class, said("GRADWIRE_TRAFFIC_CLASS")) {
            self.traffic_class = number("GRADWIRE_TRAFFIC_CLASS", &text, &text, 255)? as u8;
        }
        if let (0, Some(text)) = (self.service_level, said("GRADWIRE_SERVICE_LEVEL")) {
            self.service_level = number("GRADWIRE_SERVICE_LEVEL", &text, &text, 15)? as u8;
        }
        if let (0, Some(text)) = (self.pkey_index, said("GRADWIRE_PKEY_INDEX")) {
            self.pkey_index = number("GRADWIRE_PKEY_INDEX", &text, &text, 65535)? as u16;
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
        if !self.ring_entries.is_power_of_two() || self.ring_entries > 4096 || self.ring_entries < 4 {
            return refuse(format!("a ring of {} notes; it must be a power of 2 from 4 to 4096", self.ring_entries));
        }
        if self.send_depth < 16 {
            return refuse(format!("a send queue of {} requests; it must be at least 16", self.send_depth));
        }
        Ok(())
    }
}

fn number(name: &str, text: &str, digits: &str, max: u32) -> Result<u32> {
    match digits.trim().parse::<u32>() {
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

    #[test]
    fn the_environment_fills_what_nobody_said() {
        let environment = |name: &str| match name {
            "GRADWIRE_HCA" => Some("mlx5_3:2".to_string()),
            "GRADWIRE_GID_INDEX" => Some("3".to_string()),
            "GRADWIRE_TRAFFIC_CLASS" => Some("106".to_string()),
            "GRADWIRE_SERVICE_LEVEL" => Some(" ".to_string()),
            _ => None,
        };
        let filled = options().with_environment(environment).unwrap();
        assert_eq!((filled.hca.as_deref(), filled.port, filled.gid_index), (Some("mlx5_3"), Some(2), Some(3)));
        assert_eq!((filled.traffic_class, filled.service_level, filled.pkey_index), (106, 0, 0));
        let said = VerbsOptions { hca: Some("rxe0".into()), gid_index: Some(1), ..options() };
        let kept = said.with_environment(environment).unwrap();
        assert_eq!((kept.hca.as_deref(), kept.port, kept.gid_index), (Some("rxe0"), None, Some(1)));
    }

    #[test]
    fn what_no_device_can_do_is_refused_by_name() {
        for (name, text) in [("GRADWIRE_HCA", "a:b"), ("GRADWIRE_GID_INDEX", "256"), ("GRADWIRE_SERVICE_LEVEL", "16")] {
            let error = options().with_environment(|asked| (asked == name).then(|| text.to_string())).unwrap_err();
            assert!(error.to_string().contains(name) && error.to_string().contains(text), "{error}");
        }
        options().validate().unwrap();
        assert!(VerbsOptions { retry_count: 7, ..options() }.validate().unwrap_err().to_string().contains("for ever"));
        for wrong in [0, 2, 100, 8192] {
            assert!(VerbsOptions { ring_entries: wrong, ..options() }.validate().is_err(), "{wrong}");
        }
        assert!(VerbsOptions { ack_timeout: 0, ..options() }.validate().is_err());
    }
}
