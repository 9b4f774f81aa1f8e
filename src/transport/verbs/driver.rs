//! The transport's trait on verbs.
//!
//! Invariant: after `fence` the peer's queue pair is destroyed before anything of it is given back, and nothing is told of that
//! peer but `Failed`.
#![forbid(unsafe_code)]

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use super::{
    FABRIC, Path, Port, ROUNDS_MAX, VerbsTransport,
    memory::Registration,
    offer::{Keys, Offer},
    path::Stage,
    rail::Payload,
};
use crate::{
    Error, Result,
    mem::{Lease, Region, RegionId, SharedLease},
    transport::{
        Armed, Completion, Driver, Endpoint, MemoryRegion, QueueFull, RemoteSlot, Transport, Wakeup, WorkRequest,
    },
    types::PeerId,
};

impl Transport for VerbsTransport {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        if self.registrations_of(region.id()).is_none() {
            let on = |port: &Port| Registration::new(&port.device, region);
            let registrations = self.ports.iter().map(on).collect::<Result<Vec<_>>>()?;
            if registrations.iter().any(|registration| registration.rkey() == 0) {
                return Err(Error::Config(format!("a device gave {} the key 0, which means none", region.id())));
            }
            self.table.register_as(region, registrations[0].rkey())?;
            self.regions.push((region.id(), registrations));
        }
        let registrations = self.registrations_of(region.id()).expect("registered by now");
        Ok(MemoryRegion::new(FABRIC, registrations[0].rkey(), region.len() as u64))
    }

    fn fabric(&self, _peer: PeerId) -> &'static str {
        FABRIC
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let index = match self.index_of(peer) {
            Some(index) => index,
            None => self.prepare(peer)?,
        };
        match &self.paths[index] {
            Some(path) if path.stage != Stage::Dead => Ok(Endpoint::new(FABRIC, self.offer_of(path).to_string())),
            _ => Err(Error::Config(format!("the path to {peer} is broken; fence it first"))),
        }
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        let Some(address) = remote.on(FABRIC) else {
            return Err(Error::Config(format!("{peer} offers `{}`, this is {FABRIC}", remote.fabrics())));
        };
        let remote = Offer::parse(address).map_err(|why| Error::Config(format!("{peer}: {why}")))?;
        let index = match self.index_of(peer) {
            Some(index) => index,
            None => self.prepare(peer)?,
        };
        let own =
            self.paths[index].as_ref().map(|path| self.offer_of(path)).expect("a path that has an index is there");
        let meeting = own.meet(&remote).map_err(|why| {
            self.doubts.forget(peer);
            Error::Config(format!("{peer} cannot be reached over verbs: {why}"))
        })?;
        if own.rails.iter().chain(&remote.rails).any(Option::is_none) {
            tracing::warn!("the path to {peer} goes over {}", meeting.reason);
        }
        let calls = self.options.identity.me > peer;
        let path = self.paths[index].as_mut().expect("looked at above");
        path.connect(&remote, &meeting, calls, deadline)?;
        self.next_tick = self.next_tick.min(deadline);
        self.mark(index);
        self.send();
        Ok(())
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.table.arm(peer, slot)
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        let mut slots = Vec::new();
        if let Some(index) = self.forget(peer)
            && let Some(mut path) = self.paths[index].take()
        {
            path.end();
            self.done.forget(peer, &mut slots);
            path.fail("we ended it", &mut self.done);
            self.dirty.retain(|dirty| *dirty != index);
        }
        slots.append(&mut self.table.fence(peer));
        slots
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        let peer = request.peer;
        // Looked up once: a note's latency is made of such things.
        let found = self.index_of(peer).and_then(|index| Some((index, self.paths[index].as_ref()?)));
        let Some((index, path)) = found.filter(|(_, path)| path.stage != Stage::Prepared) else {
            return self.refuse(request, Error::Broken { peer, reason: "there is none: connect comes first".into() });
        };
        if path.stage == Stage::Dead {
            return self.refuse(request, Error::Broken { peer, reason: "it ended before".into() });
        }
        if path.outstanding() >= self.options.queue_limit {
            return Err(QueueFull(request));
        }
        if let Some(defect) = request.defect() {
            return self.refuse(request, defect);
        }
        let WorkRequest { id, note, payload, .. } = request;
        let located = payload.map(|payload| self.locate(path, payload, note.length)).transpose();
        match located {
            Ok(payload) => {
                self.paths[index].as_mut().expect("looked up above").push(id, note, payload);
                self.mark(index);
            }
            Err((error, source)) => self.done.push((peer, Completion::Failed { id, source, error })),
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.send();
        Ok(())
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        self.polled = now;
        self.collect(now, ROUNDS_MAX)?;
        self.tick(now);
        self.done.tell(completions);
        Ok(())
    }
}

impl VerbsTransport {
    /// What the peer of a path is told of us.
    fn offer_of(&self, path: &Path) -> Offer {
        // One rail's keys are the names of the regions, which notes carry.
        let told = self.regions.iter().filter(|_| self.ports.len() > 1);
        let keys = told.map(|(_, registrations)| keys_of(registrations, Registration::rkey)).collect();
        Offer { rails: path.offered.clone(), keys }
    }

    /// Tells of a request that cannot be sent.
    #[cold]
    fn refuse(&mut self, request: WorkRequest, error: Error) -> Result<(), QueueFull> {
        let WorkRequest { id, peer, payload, .. } = request;
        self.done.push((peer, Completion::Failed { id, source: payload.map(|(source, _)| source), error }));
        Ok(())
    }

    /// What a region is on each rail: there are few, which are searched one by one.
    fn registrations_of(&self, region: RegionId) -> Option<&[Registration]> {
        let known = self.regions.iter().find(|(known, _)| *known == region);
        known.map(|(_, registrations)| &registrations[..])
    }

    /// Finds the keys of a payload's memory.
    #[allow(clippy::type_complexity, reason = "a payload, with what the devices need or with why they cannot")]
    fn locate(
        &self,
        path: &Path,
        (source, slot): (SharedLease, RemoteSlot),
        length: u32,
    ) -> Result<(SharedLease, Payload), (Error, Option<SharedLease>)> {
        let refuse = |what: &str| Error::Config(format!("the request to {} cannot be sent: {what}", path.peer));
        let Some(registrations) = self.registrations_of(source.region_id()) else {
            return Err((refuse("its payload's region is not registered with this transport"), Some(source)));
        };
        let lkeys = keys_of(registrations, Registration::lkey);
        let room = self.room;
        let (rkeys, from, target) = (path.keys(slot.rkey), source.offset() as u64, slot.offset);
        let payload = Payload { lkeys, rkeys, source: from, target, length };
        if !payload.fits(room) {
            return Err((refuse("its payload is longer than the send queue can hold in messages"), Some(source)));
        }
        if !path.can_carry(&payload) {
            let what = "its slot's region was registered after the path was offered, and the first rail is not in use";
            return Err((refuse(what), Some(source)));
        }
        Ok((source, payload))
    }
}

/// A region's keys by rail.
fn keys_of(registrations: &[Registration], key: impl Fn(&Registration) -> u32) -> Keys {
    let mut keys = Keys::default();
    keys.iter_mut().zip(registrations).for_each(|(place, registration)| *place = key(registration));
    keys
}

impl Wakeup for VerbsTransport {
    fn fd(&self) -> BorrowedFd<'_> {
        // One channel is waited for by itself: a set of one would cost each sleep a detour. The device's own events wait for a tick.
        self.epoll.as_ref().map_or_else(|| self.ports[0].device.channel_fd(), |epoll| epoll.0.as_fd())
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        if self.done.is_empty() {
            // Asked first, looked at second: see the file above.
            for port in &mut self.ports {
                // Every system call between two sleeps adds to a note's latency. A queue tells of one event each time it is
                // asked, so there are no more to read than that.
                port.device.drain_channel(port.asked);
                port.queues.iter().try_for_each(|queue| queue.request_event())?;
                port.asked = port.queues.len();
            }
            self.collect(self.polled, ROUNDS_MAX)?;
        }
        Ok(if self.done.is_empty() { Armed::Sleep } else { Armed::Ready })
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.paths.iter().flatten().any(Path::is_joined).then_some(self.next_tick)
    }
}

impl Driver for VerbsTransport {
    fn judge(&self, own: &str, remote: &str) -> Result<String, String> {
        Offer::parse(own)?.meet(&Offer::parse(remote)?).map(|meeting| meeting.reason)
    }
}

impl Drop for VerbsTransport {
    fn drop(&mut self) {
        // Pairs before the slots and sources that they reach.
        self.paths.iter_mut().flatten().for_each(|path| path.end());
    }
}
