//! Which key means which registered region, and which slots are armed for whom: where a driver asks before a byte lands.
//!
//! Invariant: an armed slot belongs to exactly one peer, is given out at most once, and only for a write that starts at its first
//! byte and fits.
#![forbid(unsafe_code)]

use std::{collections::HashMap, fmt};

use super::RemoteSlot;
use crate::{
    Error, Result,
    mem::{Lease, Region},
    types::PeerId,
    wire::random_bytes,
};

/// A process registers few regions (landing memory, replies, a worker's tensors): they are searched one by one.
const REGIONS_MAX: usize = 256;

/// Slots that fit before the table grows for the first time.
const SLOTS_AT_START: usize = 1024;

/// Registered regions and armed slots of one transport.
#[derive(Debug)]
pub struct RegionTable {
    regions: Vec<(u32, Region)>,
    armed: HashMap<(u32, u64), (PeerId, Lease)>,
}

/// Why a write may not land.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotRefusal {
    /// No region has this key.
    UnknownKey,
    /// The range does not lie within the region.
    OutOfBounds,
    /// No slot is armed that begins there.
    NotArmed,
    /// The slot there is armed for another peer.
    AnotherPeers,
    /// The slot there is shorter than the write.
    TooShort {
        /// Bytes that fit.
        slot: u64,
        /// Bytes of the write.
        write: u64,
    },
}

impl fmt::Display for SlotRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SlotRefusal::UnknownKey => f.write_str("no region has the key that it names"),
            SlotRefusal::OutOfBounds => f.write_str("it does not lie within its region"),
            SlotRefusal::NotArmed => f.write_str("no slot is armed where it would land"),
            SlotRefusal::AnotherPeers => f.write_str("the slot where it would land is armed for another peer"),
            SlotRefusal::TooShort { slot, write } => {
                write!(f, "its {write} bytes do not fit into the slot of {slot} bytes")
            }
        }
    }
}

impl Default for RegionTable {
    fn default() -> RegionTable {
        RegionTable { regions: Vec::new(), armed: HashMap::with_capacity(SLOTS_AT_START) }
    }
}

impl RegionTable {
    /// Registers a region under a random key that is not 0; the same region twice gets the same key.
    pub fn register(&mut self, region: &Region) -> Result<u32> {
        let probe = self.regions.iter().find(|(_, known)| known.is_same(region));
        if let Some((rkey, _)) = probe {
            return Ok(*rkey);
        }
        if self.regions.len() == REGIONS_MAX {
            return Err(Error::Config(format!("a transport takes at most {REGIONS_MAX} regions")));
        }
        let rkey = self.fresh_rkey()?;
        self.regions.push((rkey, region.clone()));
        Ok(rkey)
    }

    /// Registers a region under the key that its device gave it.
    pub fn register_as(&mut self, region: &Region, rkey: u32) -> Result<()> {
        if self.regions.len() == REGIONS_MAX {
            return Err(Error::Config(format!("a transport takes at most {REGIONS_MAX} regions")));
        }
        assert!(
            rkey != 0 && self.regions.iter().all(|(known, _)| *known != rkey),
            "the key {rkey} was given out before"
        );
        self.regions.push((rkey, region.clone()));
        Ok(())
    }

    /// Opens a slot to one write by `peer`.
    pub fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        let defect = |what: &str| Error::Config(format!("a slot for {peer} cannot be armed: {what}"));
        let Some((rkey, _)) = self.regions.iter().find(|(_, region)| region.holds(&slot)) else {
            return Err(defect("its region is not registered with this transport"));
        };
        // Empty ranges are the only ones that could share their first offset with another.
        if slot.is_empty() {
            return Err(defect("it is empty"));
        }
        let len = u32::try_from(slot.len()).map_err(|_| defect("it is longer than 4 GiB - 1"))?;
        let remote = RemoteSlot { rkey: *rkey, offset: slot.offset() as u64, len };
        let before = self.armed.insert((remote.rkey, remote.offset), (peer, slot));
        assert!(before.is_none(), "two leases began at offset {} of one region", remote.offset);
        Ok(remote)
    }

    /// Hands out the slot into which `peer` writes `length` bytes at `offset`, and disarms it.
    pub fn take(&mut self, peer: PeerId, rkey: u32, offset: u64, length: u32) -> Result<Lease, SlotRefusal> {
        let Some((_, region)) = self.regions.iter().find(|(known, _)| *known == rkey) else {
            return Err(SlotRefusal::UnknownKey);
        };
        match offset.checked_add(length.into()) {
            Some(end) if end <= region.len() as u64 => {}
            _ => return Err(SlotRefusal::OutOfBounds),
        }
        let (owner, lease) = self.armed.get(&(rkey, offset)).ok_or(SlotRefusal::NotArmed)?;
        if *owner != peer {
            return Err(SlotRefusal::AnotherPeers);
        }
        if lease.len() < length as usize {
            return Err(SlotRefusal::TooShort { slot: lease.len() as u64, write: length.into() });
        }
        let (_, lease) = self.armed.remove(&(rkey, offset)).expect("looked up just now");
        Ok(lease)
    }

    /// Puts back a slot that a write had taken and did not fill: it is kept for [`RegionTable::fence`].
    pub fn put_back(&mut self, peer: PeerId, slot: Lease) {
        let (rkey, _) = self.regions.iter().find(|(_, region)| region.holds(&slot)).expect("it was armed in a region");
        let key = (*rkey, slot.offset() as u64);
        let before = self.armed.insert(key, (peer, slot));
        assert!(before.is_none(), "two leases began at offset {} of one region", key.1);
    }

    /// Gives back every slot that is armed for `peer`, by key and offset.
    pub fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        let mut slots: Vec<_> = self.armed.extract_if(|_, (owner, _)| *owner == peer).collect();
        slots.sort_unstable_by_key(|(key, _)| *key);
        slots.into_iter().map(|(_, (_, lease))| lease).collect()
    }

    fn fresh_rkey(&self) -> Result<u32> {
        loop {
            let rkey = u32::from_le_bytes(random_bytes()?);
            if rkey != 0 && self.regions.iter().all(|(known, _)| *known != rkey) {
                return Ok(rkey);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::RegionOptions;

    const A: PeerId = PeerId::worker(0);
    const B: PeerId = PeerId::worker(1);

    fn table() -> (RegionTable, u32, Vec<Lease>) {
        let mut table = RegionTable::default();
        let (region, lease) = Region::allocate(8192, &RegionOptions::default()).unwrap();
        let rkey = table.register(&region).unwrap();
        assert_eq!(table.register(&region).unwrap(), rkey);
        assert_ne!(rkey, 0);
        (table, rkey, lease.chunks(1024))
    }

    #[test]
    fn a_slot_is_given_to_its_peer_once() {
        let (mut table, rkey, mut leases) = table();
        let slot = table.arm(A, leases.remove(2)).unwrap();
        assert_eq!(slot, RemoteSlot { rkey, offset: 2048, len: 1024 });
        assert_eq!(table.take(B, slot.rkey, 2048, 8).unwrap_err(), SlotRefusal::AnotherPeers);
        assert_eq!(table.take(A, slot.rkey, 2048, 1024).unwrap().offset(), 2048);
        assert_eq!(table.take(A, slot.rkey, 2048, 1024).unwrap_err(), SlotRefusal::NotArmed);
    }

    #[test]
    fn only_a_write_that_begins_at_the_slot_and_fits_may_land() {
        let (mut table, rkey, mut leases) = table();
        let slot = table.arm(A, leases.remove(7)).unwrap();
        let mut refusal = |rkey, offset, length| table.take(A, rkey, offset, length).unwrap_err();
        assert_eq!(refusal(rkey ^ 1, 7168, 8), SlotRefusal::UnknownKey);
        assert_eq!(refusal(slot.rkey, 7169, 8), SlotRefusal::NotArmed);
        assert_eq!(refusal(slot.rkey, 7168, 1025), SlotRefusal::OutOfBounds);
        assert_eq!(refusal(slot.rkey, u64::MAX, 2), SlotRefusal::OutOfBounds);
        let slot = table.arm(A, leases.remove(0)).unwrap();
        let refusal = table.take(A, slot.rkey, slot.offset, 1025).unwrap_err();
        assert_eq!(refusal, SlotRefusal::TooShort { slot: 1024, write: 1025 });
    }

    #[test]
    fn a_fence_returns_the_slots_of_one_peer() {
        let (mut table, _, leases) = table();
        for (at, lease) in leases.into_iter().enumerate() {
            table.arm(if at % 2 == 0 { A } else { B }, lease).unwrap();
        }
        let memory = table.regions[0].0;
        let half_full = table.take(A, memory, 0, 100).unwrap();
        table.put_back(A, half_full);
        let offsets: Vec<_> = table.fence(A).iter().map(Lease::offset).collect();
        assert_eq!(offsets, [0, 2048, 4096, 6144]);
        assert_eq!(table.fence(A).len(), 0);
        assert_eq!(table.fence(B).len(), 4);
    }

    #[test]
    fn what_is_not_registered_cannot_be_armed() {
        let (mut table, _, leases) = table();
        let (_, foreign) = Region::allocate(64, &RegionOptions::default()).unwrap();
        assert!(table.arm(A, foreign).is_err());
        let (empty, _) = leases.into_iter().next().unwrap().split_at(0);
        assert!(table.arm(A, empty).is_err());
    }
}
