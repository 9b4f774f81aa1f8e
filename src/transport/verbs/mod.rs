//! The verbs driver: one-sided writes by RDMA, over InfiniBand or RoCE, through libibverbs found at run time.
//!
//! A write's payload goes straight from its region into the peer's slot; its header follows, on the same queue pair, into the
//! peer's note ring, with a completion there (docs/wire.md). The device keeps the order, so when the note is here the payload
//! is. What the receiver cannot do is refuse a payload before it lands: a peer holds the keys of our regions until it is fenced,
//! and one that writes where no slot is armed for it is found out by its note and loses its path.
//!
//! A transport has one to four *rails*, ports of devices that are used together. A path has a queue pair and a note ring on each
//! rail that both ends have; every write goes whole on one of them, and the layers above see one path, in order.
//!
//! The parts: `choice`, `address`, `offer`, `doubt` and `order` are pure, `device`, `thread_domain`, `completion`, `memory`, `device_memory`
//! and `queue_pair` own libibverbs' objects, one a file, `chain` builds lists of requests, `rail` and `path` are one peer's
//! protocol, this file keeps the paths, and `driver` is the trait.
//!
//! Rails begin by a hello each way: the end with the larger name calls until the other answers, for a queue pair whose peer is
//! not there yet gives up after a second or so. A rail on which nothing was acknowledged for half a second is probed with an
//! empty write, so a peer that has died, or has fenced the path, is noticed within the device's retries (7 of 134 ms) after
//! that; a peer that is stopped is not, since its device goes on acknowledging: heartbeats above notice that.
//!
//! No wake-up is lost: `arm_wakeup` first asks every completion queue for an event and then looks through all of them. What
//! completed before the look is found by it; what completes after it comes after the asking, and makes the channel readable.
//!
//! Invariant: an error on one path ends that path and no other; `poll` and `flush` never block; memory is registered in
//! `register` and `offer` only, and a slot or source goes back to its owner only when no queue pair can reach it any more.

mod address;
mod chain;
mod choice;
mod completion;
mod device;
mod device_memory;
mod doubt;
mod driver;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod fake_link;
mod memory;
mod offer;
mod options;
mod order;
mod path;
mod queue_pair;
mod rail;
#[cfg(test)]
mod tests;
mod thread_domain;
mod words;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use address::Address;
use chain::Chain;
pub use choice::numa_node_of;
use completion::{BATCH, Batch, CompletionQueue};
use device::{Device, Event};
use doubt::Doubts;
use memory::{NoteRing, Registration};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
pub use options::{PortName, RETRY_COUNT_MAX, VerbsOptions};
use path::{Path, Stage};
use queue_pair::Builder;
use rail::{Rail, Room, WORDS_MAX};

use super::{Completion, done::Done, region_table::RegionTable};
use crate::{
    Error, Result,
    mem::RegionId,
    sys::verbs::{self as v, IbvWc},
    types::PeerId,
};

const FABRIC: &str = "verbs";

/// How often deadlines, silent paths and the device's events are looked at.
const TICK: Duration = Duration::from_millis(250);

/// Completions taken from one queue in one poll: two full rings and send queues of the default size.
const ROUNDS_MAX: usize = 48;

/// The most rails of a transport.
pub const RAILS_MAX: usize = 4;

/// One-sided writes over RDMA, seen from one thread.
#[derive(Debug)]
pub struct VerbsTransport {
    // Dropped in this order: pairs before what they reach.
    paths: Vec<Option<Path>>,
    regions: Vec<(RegionId, Vec<Registration>)>,
    ports: Vec<Port>,
    table: RegionTable,
    options: VerbsOptions,
    room: Room,
    /// What waits for all channels, where there are several.
    epoll: Option<Epoll>,
    /// Where the path of each peer is, in the order of their bits.
    peers: Vec<(u64, usize)>,
    dirty: Vec<usize>,
    done: Done,
    doubts: Doubts,
    /// What one look at a queue brings: kept, for most looks bring nothing.
    batch: Batch,
    /// When `poll` was called last.
    polled: Instant,
    /// Counts pairs and restarts: the upper half of `wr_id`.
    lives: u32,
    next_tick: Instant,
}

/// A rail: a port, and what its paths share.
#[derive(Debug)]
struct Port {
    queues: Vec<Arc<CompletionQueue>>,
    /// Events that the queues were asked for and that were not seen, at most.
    asked: usize,
    device: Arc<Device>,
    chain: Chain,
    carried: Carried,
    /// When it was looked at last its port was down.
    is_down: bool,
}

/// What a rail has sent since the transport began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Device and port.
    pub port: String,
    /// Notes, with or without payload.
    pub notes: u64,
    /// Payload.
    pub bytes: u64,
}

impl VerbsTransport {
    /// A transport without paths, on the ports that the options choose.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is no RDMA on this machine (no libibverbs, no device, no port that is up) or none as wished;
    /// [`Error::Os`] if a device cannot be opened.
    pub fn new(options: VerbsOptions) -> Result<VerbsTransport> {
        options.validate()?;
        let devices = Device::open(&options)?;
        VerbsTransport::over(options, devices)
    }

    /// A transport without paths, on these devices.
    fn over(options: VerbsOptions, devices: Vec<Arc<Device>>) -> Result<VerbsTransport> {
        let longest = options.send_depth.max(u32::from(options.ring_entries) + WORDS_MAX);
        for device in &devices {
            if longest > device.limits.queue_requests {
                return Err(Error::Config(format!(
                    "verbs: queues of {longest} requests are wanted, and RDMA device {} has {} at most",
                    device.place.device, device.limits.queue_requests
                )));
            }
        }
        let epoll = (devices.len() > 1).then(|| channels_of(&devices)).transpose()?;
        let room = Room {
            depth: options.send_depth,
            message_bytes: devices.iter().map(|device| device.limits.message_bytes).min().expect("there is a device"),
            signal_every: options.signal_every.unwrap_or(u32::MAX).min(options.send_depth / 4),
        };
        let port = |device: Arc<Device>| Port {
            queues: Vec::new(),
            asked: 0,
            chain: Chain::new(options.send_depth as usize, device.limits.message_bytes),
            carried: Carried { port: device.place.name(), ..Carried::default() },
            device,
            is_down: false,
        };
        Ok(VerbsTransport {
            paths: Vec::new(),
            regions: Vec::new(),
            ports: devices.into_iter().map(port).collect(),
            table: RegionTable::default(),
            options,
            room,
            epoll,
            peers: Vec::new(),
            dirty: Vec::new(),
            done: Done::default(),
            doubts: Doubts::default(),
            batch: Batch::default(),
            polled: Instant::now(),
            lives: 0,
            next_tick: Instant::now(),
        })
    }

    /// How many times memory was registered with a device, on all rails: it stands still while data flow.
    pub fn registrations(&self) -> u64 {
        self.ports.iter().map(|port| port.device.registrations()).sum()
    }

    /// The rails in their order, device, port and address, for logs.
    pub fn place(&self) -> String {
        let place = |Port { device, .. }: &Port| {
            let (place, mtu) = (&device.place, Address::mtu_bytes(device.limits.mtu));
            format!("{} as {} ({}, MTU {mtu})", place.name(), place.gid, place.link)
        };
        self.ports.iter().map(place).collect::<Vec<_>>().join(", ")
    }

    /// What each rail has sent, in their order.
    pub fn carried(&self) -> impl Iterator<Item = &Carried> {
        self.ports.iter().map(|port| &port.carried)
    }

    /// Receives that a rail of a path has posted.
    fn receives(&self) -> u32 {
        u32::from(self.options.ring_entries) + WORDS_MAX
    }

    /// A path for `peer`, prepared on all rails that are up and not in doubt, and not connected.
    fn prepare(&mut self, peer: PeerId) -> Result<usize> {
        // A pair that was destroyed may have left completions behind, in the room of the one that comes.
        self.collect(Instant::now(), usize::MAX)?;
        let index = self.paths.iter().position(Option::is_none).unwrap_or(self.paths.len());
        let (mut offered, mut rails) = (Vec::new(), Vec::new());
        let defects: Vec<Option<String>> = self.ports.iter_mut().map(Port::look).collect();
        if defects.iter().all(Option::is_some) {
            let port = |(port, why): (&Port, &Option<String>)| {
                format!("rail {}: {}", port.carried.port, why.as_deref().unwrap_or_default())
            };
            let rails: Vec<String> = self.ports.iter().zip(&defects).map(port).collect();
            return Err(Error::Config(format!("no rail to reach {peer} on: {}", rails.join("; "))));
        }
        let usable: Vec<bool> = defects.iter().map(Option::is_none).collect();
        let doubted = self.doubts.of(peer, &usable, Instant::now());
        for (number, is_usable) in usable.into_iter().enumerate() {
            let is_offered = is_usable && !doubted[number];
            if is_usable && !is_offered {
                let port = &self.ports[number].carried.port;
                tracing::warn!(
                    "rail {port}: nothing came through to {peer} on it; paths to it go without it for a while"
                );
            }
            let prepared = is_offered.then(|| self.prepare_rail(number, index)).transpose()?;
            let (address, rail) = prepared.unzip();
            offered.push(address);
            rails.extend(rail);
        }
        if index == self.paths.len() {
            self.paths.push(None);
        }
        self.paths[index] = Some(Path::new(peer, offered, rails));
        let place = self.place_of(peer).unwrap_err();
        self.peers.insert(place, (peer.to_bits(), index));
        Ok(index)
    }

    /// Where a peer stands in `peers`, or would.
    #[inline]
    fn place_of(&self, peer: PeerId) -> Result<usize, usize> {
        let bits = peer.to_bits();
        self.peers.binary_search_by(|(known, _)| known.cmp(&bits))
    }

    /// Where the path to a peer is.
    #[inline]
    fn index_of(&self, peer: PeerId) -> Option<usize> {
        self.place_of(peer).ok().map(|place| self.peers[place].1)
    }

    /// Where it was: the peer has none any more.
    fn forget(&mut self, peer: PeerId) -> Option<usize> {
        self.place_of(peer).ok().map(|place| self.peers.remove(place).1)
    }

    /// A queue pair and a note ring on one rail.
    fn prepare_rail(&mut self, number: usize, index: usize) -> Result<(Address, Rail)> {
        let (receives, wr_id) = (self.receives(), self.next_wr_id(index));
        let queue = self.ports[number].seat(self.options.send_depth + receives)?;
        let device = &self.ports[number].device;
        let prepared = Builder { device, queue: &queue, options: &self.options, receives }.build()?;
        let ring = NoteRing::new(device, self.options.ring_entries)?;
        prepared.receive(receives, wr_id)?;
        let (qpn, psn) = prepared.number_and_psn();
        let address = Address {
            link: device.place.link,
            gid: device.place.gid,
            lid: device.limits.lid,
            qpn,
            psn,
            mtu: device.limits.mtu,
            ring_rkey: ring.rkey(),
            ring_entries: ring.entries(),
        };
        Ok((address, Rail::new(number, device.place.name(), wr_id, prepared, ring, Instant::now())))
    }

    fn next_wr_id(&mut self, index: usize) -> u64 {
        self.lives = self.lives.wrapping_add(1);
        u64::from(self.lives) << 32 | index as u64
    }

    #[inline]
    fn mark(&mut self, index: usize) {
        if let Some(path) = &mut self.paths[index]
            && !std::mem::replace(&mut path.is_dirty, true)
        {
            self.dirty.push(index);
        }
    }

    /// Takes completions out of all queues, up to `rounds` batches of each, and acts on them; then sends what that made possible.
    fn collect(&mut self, now: Instant, rounds: usize) -> Result<()> {
        for port in 0..self.ports.len() {
            for at in 0..self.ports[port].queues.len() {
                let mut left = rounds;
                loop {
                    let count = self.ports[port].queues[at].poll(&mut self.batch)?;
                    for nth in 0..count {
                        let completion = self.batch.0[nth];
                        self.on_completion(&completion, now);
                    }
                    left -= 1;
                    if count < BATCH || left == 0 {
                        break;
                    }
                }
            }
        }
        // Most looks bring nothing.
        if !self.dirty.is_empty() {
            self.send();
        }
        Ok(())
    }

    fn on_completion(&mut self, completion: &IbvWc, now: Instant) {
        let index = completion.wr_id as u32 as usize;
        let Some(path) = self.paths.get_mut(index).and_then(Option::as_mut) else { return };
        // Else of a pair that is no more.
        let Some(rail) = path.rail_of(completion.wr_id) else { return };
        if completion.status != 0 {
            return self.on_failure(index, rail, completion, now);
        }
        let result = if completion.opcode == v::WC_RECV_RDMA_WITH_IMM {
            path.heard(rail, u32::from_be(completion.imm_data()), now, &mut self.table, &mut self.done)
        } else {
            path.retire(rail, now, &mut self.done);
            Ok(())
        };
        if path.owes() {
            self.mark(index);
        }
        if let Err(reason) = result {
            self.break_path(index, &reason);
        }
    }

    fn on_failure(&mut self, index: usize, rail: usize, completion: &IbvWc, now: Instant) {
        let Some(path) = &self.paths[index] else { return };
        // The peer is not there yet.
        let is_unheard = completion.status == v::WC_RETRY_EXC_ERR && path.is_calling(rail);
        if is_unheard && path.deadline().is_some_and(|deadline| now < deadline) {
            let (wr_id, receives) = (self.next_wr_id(index), self.receives());
            let path = self.paths[index].as_mut().expect("looked at above");
            let result = path.call_again(rail, wr_id, receives);
            self.mark(index);
            return result.unwrap_or_else(|reason| self.break_path(index, &reason));
        }
        let tries = u32::from(self.options.retry_count) + 1;
        let patience = Duration::from_nanos(4096 << self.options.ack_timeout) * tries;
        let reason = match is_unheard {
            true => path.silence(),
            false => path.blame(rail, words::status(completion.status, completion.vendor_err, patience)),
        };
        // Nothing was heard of a peer that is gone for as long as the device tried; of one that is there, a probe's answer was.
        if completion.status == v::WC_RETRY_EXC_ERR && path.hears_elsewhere(rail, now, patience * 7 / 8) {
            self.doubts.add(path.peer, path.number_of(rail), now);
        }
        // A completion tells of a consequence; the device may have told the cause.
        self.on_events();
        self.break_path(index, &reason);
    }

    /// What the devices tell by themselves.
    fn on_events(&mut self) {
        for port in 0..self.ports.len() {
            let mut is_gone = false;
            while !is_gone && let Some(event) = self.ports[port].device.event() {
                is_gone = matches!(event, Event::Gone(_));
                let (of_pair, reason) = match event {
                    Event::Other => continue,
                    Event::Pair(handle, reason) => (Some(handle), reason),
                    Event::All(reason) | Event::Gone(reason) => (None, reason),
                };
                let mut has_ended_any = false;
                for index in 0..self.paths.len() {
                    let Some(path) = self.paths[index].as_ref().filter(|path| path.is_joined()) else { continue };
                    let rail = of_pair.map_or_else(|| path.rail_on(port), |handle| path.rail_of_pair(handle));
                    if let Some(rail) = rail {
                        let reason = path.blame(rail, &reason);
                        self.break_path(index, &reason);
                        has_ended_any = true;
                    }
                }
                // The paths may have ended of it before it came: it is told all the same.
                if of_pair.is_none() && !has_ended_any {
                    tracing::warn!("rail {}: {reason}", self.ports[port].carried.port);
                }
            }
        }
    }

    fn break_path(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        if path.stage == Stage::Dead {
            return;
        }
        path.end();
        path.fail(reason, &mut self.done);
        let error = Error::Broken { peer: path.peer, reason: reason.to_string() };
        self.done.push((path.peer, Completion::Broken { peer: path.peer, error }));
    }

    /// Sends for every path that has something to send, or receives to post.
    #[inline]
    fn send(&mut self) {
        for at in 0..self.dirty.len() {
            let index = self.dirty[at];
            let Some(path) = &mut self.paths[index] else { continue };
            path.is_dirty = false;
            if let Err(reason) = path.send(&mut self.ports, self.room, &mut self.done) {
                self.break_path(index, &reason);
            }
        }
        self.dirty.clear();
    }

    /// What time alone brings about.
    fn tick(&mut self, now: Instant) {
        if now < self.next_tick {
            return;
        }
        let is_due = |path: &&Path| path.deadline().is_some_and(|deadline| now >= deadline);
        for index in 0..self.paths.len() {
            let Some(path) = self.paths[index].as_ref().filter(is_due) else { continue };
            path.silent().for_each(|rail| self.doubts.add(path.peer, rail, now));
            let reason = path.silence();
            self.break_path(index, &reason);
        }
        self.on_events();
        for index in 0..self.paths.len() {
            if self.paths[index].as_mut().is_some_and(|path| path.probe(now)) {
                self.mark(index);
            }
        }
        self.send();
        let deadlines = self.paths.iter().flatten().filter_map(Path::deadline);
        self.next_tick = deadlines.fold(now + TICK, Instant::min);
    }
}

fn channels_of(devices: &[Arc<Device>]) -> Result<Epoll> {
    let refused = |e| Error::os("epoll", "the verbs transport", e);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(refused)?;
    for device in devices {
        epoll.add(device.channel_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(refused)?;
    }
    Ok(epoll)
}

impl Port {
    /// Why nothing can go over it now, if nothing can; whoever reads the log is told when that changes.
    fn look(&mut self) -> Option<String> {
        let defect = self.device.defect();
        if std::mem::replace(&mut self.is_down, defect.is_some()) != defect.is_some() {
            let name = &self.carried.port;
            match &defect {
                Some(why) => tracing::warn!("rail {name}: {why}; paths that are built now go without it"),
                None => tracing::warn!("rail {name} is up again: paths that are built now go over it too"),
            }
        }
        defect
    }

    /// A completion queue with room for one more pair, which may have `work` completions outstanding.
    fn seat(&mut self, work: u32) -> Result<Arc<CompletionQueue>> {
        if let Some(queue) = self.queues.iter().find(|queue| queue.has_seat()) {
            return Ok(queue.clone());
        }
        let queue = CompletionQueue::new(&self.device, work)?;
        self.queues.push(queue.clone());
        Ok(queue)
    }
}
