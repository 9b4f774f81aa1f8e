//! The simulated fabric: a network of queues whose seed decides when what happens.
//!
//! Delay, reordering between paths, partitions, broken paths and deaths; never reordering or loss *within* a path, which a
//! reliable-connected fabric does not have either; and, if that is asked for, payloads that are damaged. Time is what [`SimNetwork::advance`] says it is. It holds no protocol code: it
//! moves bytes and notes.
//!
//! Invariant: what happens is a function of the seed and of the calls made; a payload is copied either when it is sent or when it
//! lands, as the seed decides, so that code which touches a leased range too early is caught.
#![forbid(unsafe_code)]

mod network;

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use super::{Completion, Endpoint, MemoryRegion, QueueFull, RemoteSlot, Transport, WorkRequest};
use crate::{
    Result,
    mem::{Lease, Region},
    types::PeerId,
    wire::{split_incarnation, with_incarnation},
};
use network::Network;

const FABRIC: &str = "sim";

/// A generator of small random numbers (SplitMix64): the same seed gives the same run on every machine.
#[derive(Clone, Debug)]
pub struct SimRandom(u64);

impl SimRandom {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> SimRandom {
        SimRandom(seed)
    }

    /// 64 random bits (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 4).
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// How rough the network is.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Longest delay of a message.
    pub delay_max: Duration,
    /// Requests that a path takes before `post` says `QueueFull`.
    pub queue_max: usize,
    /// Of what was under way when one end of a path ended, some still arrives at the other, for as long as that holds its own.
    pub lingers: bool,
    /// One offer in so many cannot be made, as where a port is down just then; 0: none.
    pub refuse_one_in: u64,
    /// One payload in so many arrives with a wrong bit; 0: none.
    pub corrupt_one_in: u64,
}

/// The network that all simulated transports of a run share.
#[derive(Clone, Debug)]
pub struct SimNetwork {
    inner: Rc<RefCell<Network>>,
}

impl SimNetwork {
    /// A network without nodes, at time `now`.
    pub fn new(seed: u64, options: SimOptions, now: Instant) -> SimNetwork {
        SimNetwork { inner: Rc::new(RefCell::new(Network::new(seed, options, now))) }
    }

    /// A new node.
    pub fn transport(&self, me: PeerId) -> SimTransport {
        self.inner.borrow_mut().add(me);
        SimTransport { me, network: self.inner.clone() }
    }

    /// Time passes up to `now`: messages that are due by then land.
    pub fn advance(&self, now: Instant) {
        self.inner.borrow_mut().advance(now);
    }

    /// When the next message is due, if one is under way on a path that is not cut.
    pub fn next_due(&self) -> Option<Instant> {
        self.inner.borrow().next_due()
    }

    /// Payloads that were damaged.
    pub fn corrupted(&self) -> u64 {
        self.inner.borrow().corrupted
    }

    /// One end finds its path broken; the other hears of it when that end fences it.
    pub fn break_end(&self, one: PeerId, other: PeerId) {
        self.inner.borrow_mut().break_end(one, other);
    }

    /// Breaks the path between two nodes: both ends are told, each after a delay of its own.
    pub fn break_path(&self, one: PeerId, other: PeerId) {
        self.inner.borrow_mut().break_path(one, other);
    }

    /// Messages between two nodes stand still until `until`; nobody is told.
    pub fn cut(&self, one: PeerId, other: PeerId, until: Instant) {
        self.inner.borrow_mut().cut(one, other, until);
    }

    /// Whether no node but `without` has completions that it has not polled.
    pub fn is_quiet(&self, without: &[PeerId]) -> bool {
        self.inner.borrow().is_quiet(without)
    }

    /// Requests and messages that are on their way between two nodes, in both directions.
    pub fn in_flight(&self, one: PeerId, other: PeerId) -> usize {
        self.inner.borrow().in_flight(one, other)
    }
}

/// One node's end of the network.
#[derive(Debug)]
pub struct SimTransport {
    me: PeerId,
    network: Rc<RefCell<Network>>,
}

impl Transport for SimTransport {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        region.host_only(FABRIC)?;
        let rkey = self.network.borrow_mut().register(self.me, region)?;
        Ok(MemoryRegion::new(FABRIC, rkey, region.len() as u64))
    }

    fn fabric(&self, _peer: PeerId) -> &'static str {
        FABRIC
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let incarnation = self.network.borrow_mut().offer(self.me, peer)?;
        Ok(Endpoint::new(FABRIC, with_incarnation(self.me.to_string(), incarnation)))
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        let (_, wanted) = split_incarnation(remote.on(FABRIC).unwrap_or_default())?;
        self.network.borrow_mut().connect(self.me, peer, wanted, deadline)
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.network.borrow_mut().arm(self.me, peer, slot)
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        self.network.borrow_mut().fence(self.me, peer)
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        self.network.borrow_mut().post(self.me, request)
    }

    fn flush(&mut self) -> Result<()> {
        self.network.borrow_mut().flush(self.me);
        Ok(())
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        self.network.borrow_mut().poll(self.me, now, completions);
        Ok(())
    }
}

impl Drop for SimTransport {
    /// The node disappears from the network, as a killed process does.
    fn drop(&mut self) {
        if let Ok(mut network) = self.network.try_borrow_mut() {
            network.vanish(self.me);
        }
    }
}
