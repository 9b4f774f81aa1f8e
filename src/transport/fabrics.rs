//! Several fabrics as one transport: at most one driver of each kind, and for every peer the best one that both ends offer.
//!
//! The choice needs no message of its own. Each end has both endpoints, what it offered and what it was offered, and goes through
//! the same list: that of the end with the smaller name. The first fabric that both name and whose driver finds the two
//! addresses within reach of each other carries the path.
//!
//! Invariant: both ends of a path choose the same fabric; a peer is on one fabric from `connect` to `fence`.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
};
use serde::{Deserialize, Serialize};

use super::{Armed, Completion, Driver, Endpoint, MemoryRegion, QueueFull, RemoteSlot, Transport, Wakeup, WorkRequest};
use crate::{
    Error, Result,
    mem::{Lease, Region},
    observe::count_sent,
    types::PeerId,
};

/// Which fabric carries a path, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathChoice {
    /// The other end.
    pub peer: PeerId,
    /// The fabric's name.
    pub fabric: String,
    /// Why this one, and why none that would have been better.
    pub reason: String,
    /// The better fabrics of the job that one of the ends cannot have, and why, if there are any; that two hosts share no memory is
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<String>,
}

/// A fabric that its job allows and that this rank does without.
#[derive(Clone, Debug)]
pub struct Missing {
    /// Its name.
    pub fabric: &'static str,
    /// Why it cannot be had.
    pub why: String,
    /// How many of the rank's drivers the job prefers to it.
    pub better: usize,
}

/// The fabric whose refusal means no more than that the ends are apart.
const ONE_HOST: &str = "shm";

/// A transport that routes by peer.
#[derive(Debug)]
pub struct Fabrics {
    me: PeerId,
    /// In the order of preference.
    drivers: Vec<Box<dyn Driver>>,
    missing: Vec<Missing>,
    routes: BTreeMap<PeerId, Route>,
    /// Requests to peers without a path: they fail.
    failed: Vec<Completion>,
    /// Ready when a driver is; `None` where there is one driver only.
    epoll: Option<Epoll>,
    /// The descriptor of each driver that is in there.
    watched: Vec<Option<RawFd>>,
}

#[derive(Debug)]
struct Route {
    driver: usize,
    choice: PathChoice,
}

impl Fabrics {
    /// A transport over `drivers`, the most preferred one first; `missing` is what the job allows and cannot be had here.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if the kernel gives no epoll descriptor.
    ///
    /// # Panics
    ///
    /// If there is no driver.
    pub fn new(me: PeerId, drivers: Vec<Box<dyn Driver>>, missing: Vec<Missing>) -> Result<Fabrics> {
        assert!(!drivers.is_empty(), "a transport needs a driver");
        let epoll = match drivers.len() {
            1 => None,
            _ => Some(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(refused)?),
        };
        let watched = vec![None; drivers.len()];
        Ok(Fabrics { me, drivers, missing, routes: BTreeMap::new(), failed: Vec::new(), epoll, watched })
    }

    /// The paths, and which fabric carries each.
    pub fn choices(&self) -> impl Iterator<Item = &PathChoice> {
        self.routes.values().map(|route| &route.choice)
    }

    fn of(&mut self, peer: PeerId) -> Option<&mut dyn Driver> {
        let route = self.routes.get(&peer)?;
        Some(&mut *self.drivers[route.driver])
    }

    fn choose(&self, peer: PeerId, own: &Endpoint, remote: &Endpoint) -> Result<Route> {
        let order = if self.me < peer { own } else { remote };
        let mut why_not = Vec::new();
        for fabric in order.addresses.iter().map(|offered| offered.fabric.as_str()) {
            let (Some(ours), Some(theirs)) = (own.on(fabric), remote.on(fabric)) else {
                let who = if own.on(fabric).is_none() { self.me } else { peer };
                why_not.push(format!("no {fabric}: {who} does not offer it"));
                continue;
            };
            let driver = self.drivers.iter().position(|driver| driver.fabric(peer) == fabric);
            let driver = driver.expect("what we offer has a driver");
            match self.drivers[driver].judge(ours, theirs) {
                Ok(why) => {
                    let reason = [why].into_iter().chain(why_not).collect::<Vec<_>>().join("; ");
                    let missed = self.missed(peer, driver, own, remote);
                    return Ok(Route { driver, choice: PathChoice { peer, fabric: fabric.into(), reason, missed } });
                }
                Err(why) => why_not.push(format!("no {fabric}: {why}")),
            }
        }
        Err(Error::Config(format!(
            "{} and {peer} have no fabric in common ({} here, {} there; {}): allow one that both have with --transport",
            self.me,
            own.fabrics(),
            remote.fabrics(),
            why_not.join("; ")
        )))
    }
}

impl Fabrics {
    /// Why none of the fabrics that the job prefers to that of `driver` carries the path to `peer`.
    fn missed(&self, peer: PeerId, driver: usize, own: &Endpoint, remote: &Endpoint) -> Option<String> {
        let ours = self.missing.iter().filter(|missing| missing.better <= driver);
        let mut why: Vec<String> = ours.map(|missing| format!("no {} here: {}", missing.fabric, missing.why)).collect();
        for better in &self.drivers[..driver] {
            let fabric = better.fabric(peer);
            match (own.on(fabric), remote.on(fabric)) {
                (Some(_), None) => why.push(format!("no {fabric}: {peer} does not offer it")),
                (Some(ours), Some(theirs)) if fabric != ONE_HOST => {
                    why.extend(better.judge(ours, theirs).err().map(|why| format!("no {fabric}: {why}")));
                }
                _ => {}
            }
        }
        (!why.is_empty()).then(|| why.join("; "))
    }
}

fn refused(errno: Errno) -> Error {
    Error::os("epoll", "the fabrics' descriptors", errno)
}

impl Transport for Fabrics {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        let mut keys = Vec::with_capacity(self.drivers.len());
        let mut refusals = Vec::new();
        for driver in &mut self.drivers {
            match driver.register(region) {
                Ok(registered) => keys.extend(registered.keys),
                // Few fabrics reach a device's memory.
                Err(Error::Config(why)) if region.device_range().is_some() => refusals.push(why),
                Err(error) => return Err(error),
            }
        }
        match keys.is_empty() {
            true => Err(Error::Config(refusals.join("; "))),
            false => Ok(MemoryRegion { keys, len: region.len() as u64, is_everywhere: refusals.is_empty() }),
        }
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let mut addresses = Vec::with_capacity(self.drivers.len());
        for driver in &mut self.drivers {
            addresses.extend(driver.offer(peer)?.addresses);
        }
        Ok(Endpoint { addresses })
    }

    fn fabric(&self, peer: PeerId) -> &'static str {
        let driver = self.routes.get(&peer).map_or(0, |route| route.driver);
        self.drivers[driver].fabric(peer)
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        if self.routes.contains_key(&peer) {
            return Err(Error::Config(format!("there is a path to {peer} already; fence it first")));
        }
        let own = self.offer(peer)?;
        let route = self.choose(peer, &own, remote)?;
        self.drivers[route.driver].connect(peer, remote, deadline)?;
        tracing::info!("{} reaches {peer} over {}: {}", self.me, route.choice.fabric, route.choice.reason);
        // The others need not keep ready what they have offered: a queue pair, a ring.
        for (at, driver) in self.drivers.iter_mut().enumerate() {
            if at != route.driver {
                driver.fence(peer);
            }
        }
        self.routes.insert(peer, route);
        Ok(())
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        match self.of(peer) {
            Some(driver) => driver.arm(peer, slot),
            None => {
                Err(Error::Config(format!("a slot for {peer} cannot be armed: there is no path; connect comes first")))
            }
        }
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        self.routes.remove(&peer);
        // All of them: what was offered and not chosen is worth nothing any more either.
        self.drivers.iter_mut().flat_map(|driver| driver.fence(peer)).collect()
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        let peer = request.peer;
        if let Some(driver) = self.of(peer) {
            let bytes = request.payload.as_ref().map_or(0, |_| request.note.length as usize);
            let fabric = driver.fabric(peer);
            driver.post(request)?;
            count_sent(fabric, bytes);
            return Ok(());
        }
        let error = Error::Broken { peer, reason: "there is none: connect comes first".into() };
        let source = request.payload.map(|(source, _)| source);
        self.failed.push(Completion::Failed { id: request.id, source, error });
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.drivers.iter_mut().try_for_each(|driver| driver.flush())
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        completions.append(&mut self.failed);
        self.drivers.iter_mut().try_for_each(|driver| driver.poll(now, completions))
    }
}

impl Wakeup for Fabrics {
    fn fd(&self) -> BorrowedFd<'_> {
        match &self.epoll {
            Some(epoll) => epoll.0.as_fd(),
            None => self.drivers[0].fd(),
        }
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        let mut armed = if self.failed.is_empty() { Armed::Sleep } else { Armed::Ready };
        for (at, driver) in self.drivers.iter_mut().enumerate() {
            // Every one of them, so that none sleeps unarmed when the next call finds it so.
            if driver.arm_wakeup()? == Armed::Ready {
                armed = Armed::Ready;
            }
            // Armed drivers have the descriptor that they will sleep on: tcp's ring comes to be on the thread that uses it.
            let fd = driver.fd();
            if let Some(epoll) = &self.epoll
                && self.watched[at] != Some(fd.as_raw_fd())
            {
                epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, at as u64)).map_err(refused)?;
                self.watched[at] = Some(fd.as_raw_fd());
            }
        }
        Ok(armed)
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.drivers.iter().filter_map(|driver| driver.next_deadline()).min()
    }
}
