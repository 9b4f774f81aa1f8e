//! The one seam to every fabric: a reliable one-sided transport, seen from one thread.
//!
//! A *write* carries a note, and optionally a payload that lands in a slot which the receiver has armed. Completions give leases
//! back. Whoever lacks one-sided writes emulates them.
//!
//! Invariant: bytes of a leased range are never touched by safe code between `post`/`arm` and the completion that returns the
//! lease; nothing lands after `fence`.

mod done;
mod fabrics;
mod idle;
mod poller;
pub mod region_table;
pub mod shm;
pub mod sim;
pub mod soft;
pub mod tcp;
pub mod verbs;
mod waiter;

use std::{fmt, os::fd::BorrowedFd, time::Instant};

pub use fabrics::{Fabrics, Missing, PathChoice};
pub use idle::{Idle, SPIN_MAX};
pub use waiter::{Waiter, WakeHandle, Woken};

use crate::{
    Error, Result,
    mem::{Lease, Region, SharedLease},
    types::PeerId,
    wire::Note,
};

/// A registered region: the keys under which peers name it, one for each fabric that may carry their writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Fabric and key.
    keys: Vec<(&'static str, u32)>,
    /// Bytes from the region's start that peers may be allowed to write.
    pub len: u64,
    is_everywhere: bool,
}

impl MemoryRegion {
    /// A region as one fabric knows it.
    pub fn new(fabric: &'static str, rkey: u32, len: u64) -> MemoryRegion {
        MemoryRegion { keys: vec![(fabric, rkey)], len, is_everywhere: true }
    }

    /// Whether every fabric of the transport knows it: not so of a device's memory beside fabrics that reach the host's alone.
    pub fn is_everywhere(&self) -> bool {
        self.is_everywhere
    }

    /// The key under which peers on `fabric` name the region; 0, which no region has, if it is not registered there.
    pub fn rkey(&self, fabric: &str) -> u32 {
        self.keys.iter().find(|(name, _)| *name == fabric).map_or(0, |(_, rkey)| *rkey)
    }
}

/// A place that one peer may write to, once armed by its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RemoteSlot {
    /// The owner's key of the region.
    pub rkey: u32,
    /// Offset of the slot's first byte in the region.
    pub offset: u64,
    /// Bytes that fit.
    pub len: u32,
}

/// What a peer needs to reach us: an address on every fabric that we offer it, the one that we would rather use first.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Endpoint {
    /// At most one of a fabric.
    pub addresses: Vec<FabricAddress>,
}

/// Where one fabric finds us: opaque to all but the driver that made it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FabricAddress {
    /// The fabric's name ("tcp", "shm").
    pub fabric: String,
    /// Where, in that fabric's own words ("127.0.0.1:4711"); empty means "I shall call you".
    pub address: String,
}

impl Endpoint {
    /// An endpoint on one fabric.
    pub fn new(fabric: &str, address: impl Into<String>) -> Endpoint {
        Endpoint { addresses: vec![FabricAddress { fabric: fabric.into(), address: address.into() }] }
    }

    /// The address on a fabric, if it is offered.
    pub fn on(&self, fabric: &str) -> Option<&str> {
        self.addresses.iter().find(|offered| offered.fabric == fabric).map(|offered| offered.address.as_str())
    }

    /// The names of the fabrics, as errors give them.
    pub fn fabrics(&self) -> String {
        let names: Vec<&str> = self.addresses.iter().map(|offered| offered.fabric.as_str()).collect();
        names.join(",")
    }
}

/// A note, and what it says about a payload.
#[derive(Debug)]
pub struct WorkRequest {
    /// Chosen by the caller; comes back in the completion.
    pub id: u64,
    /// To whom.
    pub peer: PeerId,
    /// What the write means. `note.length` bytes of the payload are sent, from its first on.
    pub note: Note,
    /// The bytes and where they go; `None` for a note alone.
    pub payload: Option<(SharedLease, RemoteSlot)>,
}

impl WorkRequest {
    /// What is wrong with a request by itself: a mistake of the caller, which costs it the request and not the path.
    pub(crate) fn defect(&self) -> Option<Error> {
        let WorkRequest { peer, note, payload, .. } = self;
        let what = match payload {
            None if !note.kind.has_payload() => return None,
            None => format!("a {:?} note without payload was posted", note.kind),
            Some(_) if !note.kind.has_payload() => format!("a {:?} note with a payload was posted", note.kind),
            Some((source, _)) if source.len() < note.length as usize => {
                format!("a payload of {} bytes was posted under a note that says {}", source.len(), note.length)
            }
            Some((_, slot)) if note.length > slot.len => {
                format!("{} bytes were posted to a slot of {}", note.length, slot.len)
            }
            Some((_, slot)) if slot.rkey == 0 => "a payload was posted to the key 0, which no region has".into(),
            Some(_) => return None,
        };
        Some(Error::Config(format!("the request to {peer} cannot be sent: {what}")))
    }
}

/// `post` had no room; here is the request again. Room comes with the next completions of that peer.
#[derive(Debug)]
pub struct QueueFull(pub WorkRequest);

/// What a driver has to tell.
#[derive(Debug)]
pub enum Completion {
    /// A `connect` succeeded.
    Connected {
        /// The other end.
        peer: PeerId,
    },
    /// A posted write no longer needs its source. It says nothing about the peer having seen it.
    Sent {
        /// The request's id.
        id: u64,
        /// The payload's bytes.
        source: Option<SharedLease>,
    },
    /// A peer's write is here, all of it.
    Arrived {
        /// Who wrote.
        from: PeerId,
        /// What it means.
        note: Note,
        /// The slot it landed in, disarmed now; `None` for a note alone.
        lease: Option<Lease>,
    },
    /// A posted write will not be completed; whether it landed is unknown.
    Failed {
        /// The request's id.
        id: u64,
        /// The payload's bytes.
        source: Option<SharedLease>,
        /// Why.
        error: Error,
    },
    /// Slots that [`Transport::fence`] had to withhold, because the peer could still have been writing: nothing lands in them
    /// any more. The one completion that may follow a fence besides `Failed`.
    Released {
        /// Whose slots they were.
        peer: PeerId,
        /// The slots.
        slots: Vec<Lease>,
    },
    /// The path to a peer is gone, or never came to be. Its `Failed` completions precede this; nothing of that peer follows.
    Broken {
        /// The other end.
        peer: PeerId,
        /// Why.
        error: Error,
    },
}

/// A reliable one-sided fabric, seen from one thread.
///
/// Per peer, writes arrive in the order in which they were posted, or the path breaks. A peer that writes where it may not, or
/// sends what cannot be decoded, has its path broken; the others are not disturbed. Where the writer places the bytes (shared
/// memory, RDMA) they may have landed in the region before that: a region is registered for peers that are trusted so far.
pub trait Transport {
    /// Makes a region known to the fabric; of several fabrics, device memory to those that reach it, one at least. For start, join
    /// and rebuild; never on the data path.
    fn register(&mut self, region: &Region) -> Result<MemoryRegion>;

    /// What *this* peer needs to reach us.
    fn offer(&mut self, peer: PeerId) -> Result<Endpoint>;

    /// The fabric that carries the path to `peer`, or would.
    fn fabric(&self, peer: PeerId) -> &'static str;

    /// Begins a path; ends as `Connected` or `Broken` before `deadline`. Both ends call it.
    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()>;

    /// Opens a slot (a range of a registered region) to one write by `peer`.
    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot>;

    /// Ends our side of the path. Armed leases come back; nothing lands in them after this, and no completion of that peer
    /// follows but the `Failed` ones of requests whose end was not told yet. After it `connect` may begin anew. Where a peer
    /// writes by itself and is in the middle of it (stopped, perhaps), its slots are withheld until that has ended or the peer is
    /// known to be dead, and come as `Released`.
    fn fence(&mut self, peer: PeerId) -> Vec<Lease>;

    /// Queues a write. Takes the payload's lease until the completion. A request that contradicts itself (a note whose kind or
    /// length does not go with the payload), or whose peer has no path, comes back as `Failed` and harms no path.
    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull>;

    /// Sends what was posted since the last flush.
    fn flush(&mut self) -> Result<()>;

    /// Collects what has happened. Never blocks.
    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()>;
}

/// Whether a driver may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// The fd will become readable when there is something to poll.
    Sleep,
    /// There is something to poll right now.
    Ready,
}

/// What a sleeping thread needs of a driver.
pub trait Wakeup {
    /// Becomes readable when `poll` has something to do. It stays the same from the first `arm_wakeup` on.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Asks for the fd to become readable at the next event.
    fn arm_wakeup(&mut self) -> Result<Armed>;

    /// When `poll` wants to be called even if nothing happens.
    fn next_deadline(&self) -> Option<Instant>;
}

/// A fabric that may be one of several in a job.
pub trait Driver: Transport + Wakeup + Send + fmt::Debug {
    /// Whether two ends can meet on this fabric, given what each has offered the other: why they can, or why they cannot. Both
    /// ends ask, each with its own address first, and must come to the same answer.
    fn judge(&self, own: &str, remote: &str) -> Result<String, String>;
}
