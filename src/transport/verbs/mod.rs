//! The verbs driver: one-sided writes by RDMA, over InfiniBand or RoCE, through libibverbs found at run time.
//!
//! A write's payload goes straight from its region into the peer's slot; its header follows, on the same queue pair, into the
//! peer's note ring, with a completion there (docs/wire.md). The device keeps the order, so when the note is here the payload
//! is. What the receiver cannot do is refuse a payload before it lands: a peer holds the keys of our regions until it is fenced,
//! and one that writes where no slot is armed for it is found out by its note and loses its path.
//!
//! The parts: `choice` and `address` are pure, `device`, `completion`, `memory`, `device_memory` and `queue_pair` own libibverbs' objects, one a
//! file, `chain` builds lists of requests, `path` is one peer's protocol, this file keeps the paths, and `driver` is the trait.
//!
//! Paths begin by a hello each way: the end with the larger name calls until the other answers, for a queue pair whose peer is
//! not there yet gives up after a second or so. A path on which nothing was acknowledged for half a second is probed with an
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
mod driver;
#[cfg(test)]
mod fake;
mod memory;
mod options;
mod path;
mod queue_pair;
mod words;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use address::Address;
use chain::Chain;
pub use choice::numa_node_of;
use completion::{BATCH, CompletionQueue};
use device::{Device, Event};
use memory::{NoteRing, Registration};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
pub use options::{RETRY_COUNT_MAX, VerbsOptions};
use path::{Path, Sending, Stage, WORDS_MAX};
use queue_pair::Builder;

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

/// One-sided writes over RDMA, seen from one thread.
#[derive(Debug)]
pub struct VerbsTransport {
    // Dropped in this order: pairs before what they reach.
    paths: Vec<Option<Path>>,
    queues: Vec<Arc<CompletionQueue>>,
    regions: HashMap<RegionId, Registration>,
    table: RegionTable,
    options: VerbsOptions,
    epoll: Epoll,
    device: Arc<Device>,
    index_of: HashMap<PeerId, usize>,
    dirty: Vec<usize>,
    done: Done,
    chain: Chain,
    /// Counts pairs and restarts: the upper half of `wr_id`.
    lives: u32,
    registrations: u64,
    next_tick: Instant,
}

impl VerbsTransport {
    /// A transport without paths, on the device that the options choose.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is no RDMA on this machine (no libibverbs, no device, no port that is up) or none as wished;
    /// [`Error::Os`] if the device cannot be opened.
    pub fn new(options: VerbsOptions) -> Result<VerbsTransport> {
        options.validate()?;
        let device = Device::open(&options)?;
        let longest = options.send_depth.max(u32::from(options.ring_entries) + WORDS_MAX);
        if longest > device.limits.queue_requests {
            return Err(Error::Config(format!(
                "verbs: queues of {longest} requests are wanted, and RDMA device {} has {} at most",
                device.place.device, device.limits.queue_requests
            )));
        }
        let refused = |e| Error::os("epoll", "the verbs transport", e);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(refused)?;
        for fd in [device.channel_fd(), device.async_fd()] {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(refused)?;
        }
        let chain = Chain::new(options.send_depth as usize);
        Ok(VerbsTransport {
            paths: Vec::new(),
            queues: Vec::new(),
            regions: HashMap::new(),
            table: RegionTable::default(),
            options,
            epoll,
            device,
            index_of: HashMap::new(),
            dirty: Vec::new(),
            done: Vec::new(),
            chain,
            lives: 0,
            registrations: 0,
            next_tick: Instant::now(),
        })
    }

    /// How many times memory was registered: it stands still while data flow.
    pub fn registrations(&self) -> u64 {
        self.registrations
    }

    /// The device, port and address that carry the paths, for logs.
    pub fn place(&self) -> String {
        let place = &self.device.place;
        let mtu = Address::mtu_bytes(self.device.limits.mtu);
        format!("{}:{} as {} ({}, MTU {mtu})", place.device, place.port, place.gid, place.link)
    }

    /// Receives that a path has posted.
    fn receives(&self) -> u32 {
        u32::from(self.options.ring_entries) + WORDS_MAX
    }

    /// A path for `peer`, prepared and not connected.
    fn prepare(&mut self, peer: PeerId) -> Result<usize> {
        let queue = self.seat()?;
        let receives = self.receives();
        let builder = Builder { device: &self.device, queue: &queue, options: &self.options, receives };
        let prepared = builder.build()?;
        let ring = NoteRing::new(&self.device, self.options.ring_entries)?;
        self.registrations += 1;
        let index = self.paths.iter().position(Option::is_none).unwrap_or(self.paths.len());
        let wr_id = self.next_wr_id(index);
        prepared.receive(receives, wr_id)?;
        if index == self.paths.len() {
            self.paths.push(None);
        }
        let (qpn, psn) = prepared.number_and_psn();
        let offered = Address {
            link: self.device.place.link,
            gid: self.device.place.gid,
            lid: self.device.limits.lid,
            qpn,
            psn,
            mtu: self.device.limits.mtu,
            ring_rkey: ring.rkey(),
            ring_entries: ring.entries(),
        };
        self.paths[index] = Some(Path::new(peer, offered, wr_id, prepared, ring, Instant::now()));
        self.index_of.insert(peer, index);
        Ok(index)
    }

    /// A completion queue with room for one more pair.
    fn seat(&mut self) -> Result<Arc<CompletionQueue>> {
        // A pair that was destroyed may have left completions behind, in the room of the one that comes.
        self.collect(Instant::now(), usize::MAX)?;
        if let Some(queue) = self.queues.iter().find(|queue| queue.has_seat()) {
            return Ok(queue.clone());
        }
        let queue = CompletionQueue::new(&self.device, self.options.send_depth + self.receives())?;
        self.queues.push(queue.clone());
        Ok(queue)
    }

    fn next_wr_id(&mut self, index: usize) -> u64 {
        self.lives = self.lives.wrapping_add(1);
        u64::from(self.lives) << 32 | index as u64
    }

    fn path(&mut self, peer: PeerId) -> Option<(usize, &mut Path)> {
        let index = *self.index_of.get(&peer)?;
        Some((index, self.paths[index].as_mut()?))
    }

    fn mark(&mut self, index: usize) {
        if let Some(path) = &mut self.paths[index]
            && !std::mem::replace(&mut path.is_dirty, true)
        {
            self.dirty.push(index);
        }
    }

    /// Takes completions out of all queues, up to `rounds` batches of each, and acts on them; then sends what that made possible.
    fn collect(&mut self, now: Instant, rounds: usize) -> Result<()> {
        let mut batch = [IbvWc::default(); BATCH];
        for at in 0..self.queues.len() {
            for _ in 0..rounds {
                let count = self.queues[at].poll(&mut batch)?;
                batch[..count].iter().for_each(|completion| self.on_completion(completion, now));
                if count < BATCH {
                    break;
                }
            }
        }
        self.send();
        Ok(())
    }

    fn on_completion(&mut self, completion: &IbvWc, now: Instant) {
        let index = completion.wr_id as u32 as usize;
        let Some(path) = self.paths.get_mut(index).and_then(Option::as_mut) else { return };
        // Of a pair that is no more.
        if path.wr_id != completion.wr_id || matches!(path.stage, Stage::Dead) {
            return;
        }
        if completion.status != 0 {
            return self.on_failure(index, completion, now);
        }
        let result = if completion.opcode == v::WC_RECV_RDMA_WITH_IMM {
            path.heard(u32::from_be(completion.imm_data()), now, &mut self.table, &mut self.done)
        } else {
            path.retire(now, &mut self.done);
            Ok(())
        };
        self.mark(index);
        if let Err(reason) = result {
            self.break_path(index, &reason);
        }
    }

    fn on_failure(&mut self, index: usize, completion: &IbvWc, now: Instant) {
        let Some(path) = &self.paths[index] else { return };
        let is_unheard = matches!(&path.stage, Stage::Calling { deadline, .. } if now < *deadline);
        if is_unheard && completion.status == v::WC_RETRY_EXC_ERR {
            // The peer is not there yet.
            let (wr_id, receives) = (self.next_wr_id(index), self.receives());
            let path = self.paths[index].as_mut().expect("looked at above");
            let result = path.call_again(wr_id, receives);
            self.mark(index);
            return result.unwrap_or_else(|reason| self.break_path(index, &reason));
        }
        if completion.status == v::WC_WR_FLUSH_ERR {
            // A consequence; the device may have told the cause.
            self.on_events();
        }
        let tries = u32::from(self.options.retry_count) + 1;
        let patience = Duration::from_nanos(4096 << self.options.ack_timeout) * tries;
        self.break_path(index, &words::status(completion.status, completion.vendor_err, patience));
    }

    /// What the device tells by itself.
    fn on_events(&mut self) {
        while let Some(event) = self.device.event() {
            match event {
                Event::Other => {}
                Event::Pair(handle, reason) => {
                    let named = |path: &Option<Path>| path.as_ref().and_then(Path::handle) == Some(handle);
                    if let Some(index) = self.paths.iter().position(named) {
                        self.break_path(index, &reason);
                    }
                }
                Event::All(reason) => {
                    (0..self.paths.len()).for_each(|index| {
                        if self.paths[index].as_ref().is_some_and(|path| path.handle().is_some()) {
                            self.break_path(index, &reason);
                        }
                    });
                }
            }
        }
    }

    fn break_path(&mut self, index: usize, reason: &str) {
        let Some(path) = &mut self.paths[index] else { return };
        if matches!(path.stage, Stage::Dead) {
            return;
        }
        path.end();
        path.fail(reason, &mut self.done);
        let error = Error::Broken { peer: path.peer, reason: reason.to_string() };
        self.done.push((path.peer, Completion::Broken { peer: path.peer, error }));
    }

    /// Sends for every path that has something to send, or receives to post.
    fn send(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let Some(path) = &mut self.paths[index] else { continue };
            path.is_dirty = false;
            let mut sending = Sending {
                chain: &mut self.chain,
                depth: self.options.send_depth,
                message_bytes: self.device.limits.message_bytes,
            };
            if let Err(reason) = path.send(&mut sending) {
                self.break_path(index, &reason);
            }
        }
        // The list keeps its memory.
        self.dirty = dirty;
    }

    /// What time alone brings about.
    fn tick(&mut self, now: Instant) {
        let is_due = |path: &Path| path.deadline().is_some_and(|deadline| now >= deadline);
        for index in 0..self.paths.len() {
            if self.paths[index].as_ref().is_some_and(is_due) {
                self.break_path(index, "it did not answer our hello, or say its own, before the deadline");
            }
        }
        if now < self.next_tick {
            return;
        }
        self.next_tick = now + TICK;
        self.on_events();
        for index in 0..self.paths.len() {
            if self.paths[index].as_mut().is_some_and(|path| path.probe(now)) {
                self.mark(index);
            }
        }
        self.send();
    }
}
