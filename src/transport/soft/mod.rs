//! The soft driver: RDMA's reliable connection in software, over UDP, with faults that can be injected. A test mode.
//!
//! What a NIC's queue pair does is done by `rc`, a pure state machine; this driver gives it packets, the time and memory. As with
//! verbs every peer has a queue pair of its own, whose number, first packet number and secret are in what that peer is offered
//! (the rendezvous that carries it is authenticated); a fence gives them up for ever. The secret goes into every packet's check: it
//! keeps strangers and late packets of an older path out of an honest network. It is not cryptography (see `rc`).
//!
//! Invariant: nothing of a packet is believed before its check is right; what is refused is counted and harms no path; `poll` and
//! `flush` never block, and do bounded work.
#![forbid(unsafe_code)]

mod address;
mod counters;
mod faults;
mod options;
mod path;
mod socket;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use address::SoftAddress;
pub use counters::SoftCounters;
use faults::{Datagram, Injector};
pub use options::{SoftFaults, SoftOptions};
use path::{Line, Path, Posted};
use socket::{BATCH, Socket};

use super::{
    Armed, Completion, Driver, Endpoint, MemoryRegion, QueueFull, RemoteSlot, Transport, Wakeup, WorkRequest,
    done::Done, region_table::RegionTable,
};
use crate::{
    Error, Result,
    mem::{Lease, Region},
    rc::{Immediate, Message, Packet, PacketError, Psn, QueuePair, Receiver, Secret, State, Target},
    types::PeerId,
    wire::random_bytes,
};

const FABRIC: &str = "soft";

/// Batches of datagrams that one poll receives: 1,024 datagrams, 4 MiB of payload.
const RECEIVE_BATCHES_MAX: usize = 32;

/// Ended connections that still answer "it is over" to a peer that did not hear it. Older ones leave the peer to its time-outs.
const GRAVES_MAX: usize = 64;

/// Buffers kept for the next packets: four batches of the default MTU are half a MiB.
const SPARE_MAX: usize = 4 * BATCH;

/// When a full socket is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// One-sided writes over soft-RDMA queue pairs, seen from one thread.
#[derive(Debug)]
pub struct SoftTransport {
    options: SoftOptions,
    socket: Socket,
    table: RegionTable,
    paths: BTreeMap<PeerId, Path>,
    by_qpn: HashMap<u32, PeerId>,
    graves: VecDeque<Line>,
    injector: Injector,
    outbox: VecDeque<Datagram>,
    /// The socket was full; until then nothing more is made.
    full_until: Option<Instant>,
    spare: Vec<Vec<u8>>,
    has_posts: bool,
    done: Done,
    /// Counts, without those of the queue pairs that are alive.
    counters: SoftCounters,
}

impl SoftTransport {
    /// A transport without paths, on a port of the kernel's choice.
    pub fn new(options: SoftOptions) -> Result<SoftTransport> {
        options.validate()?;
        let socket = Socket::bind(options.address)?;
        Ok(SoftTransport {
            injector: Injector::new(options.faults),
            options,
            socket,
            table: RegionTable::default(),
            paths: BTreeMap::new(),
            by_qpn: HashMap::new(),
            graves: VecDeque::new(),
            outbox: VecDeque::new(),
            full_until: None,
            spare: Vec::new(),
            has_posts: false,
            done: Done::default(),
            counters: SoftCounters::default(),
        })
    }

    /// What it has done and suffered since its birth.
    pub fn counters(&self) -> SoftCounters {
        let mut sum = self.counters;
        self.paths.values().for_each(|path| sum.add(path.line.qp.counters()));
        sum
    }

    /// The queue pair for a peer: the one that it was offered, or a fresh one.
    fn path(&mut self, peer: PeerId) -> Result<&mut Path> {
        if !self.paths.contains_key(&peer) {
            let random = u32::from_le_bytes(random_bytes()?);
            let qpn = loop {
                let qpn = u32::from_le_bytes(random_bytes()?) & Psn::MASK;
                let is_buried = self.graves.iter().any(|grave| grave.local.qpn == qpn);
                if qpn != 0 && !self.by_qpn.contains_key(&qpn) && !is_buried {
                    break qpn;
                }
            };
            let secret = Secret(random_bytes()?);
            let local = SoftAddress { socket: self.socket.address(), qpn, start: Psn::new(random), secret };
            let qp = QueuePair::new(self.options.queue_pair, local.start);
            self.by_qpn.insert(qpn, peer);
            self.paths.insert(peer, Path::new(peer, Line { qp, local, remote: None }));
        }
        Ok(self.paths.get_mut(&peer).expect("put there if it was not"))
    }

    /// One datagram came.
    fn receive(&mut self, now: Instant, at: usize) {
        let bytes = self.socket.datagram(at);
        self.counters.received += 1;
        let qpn = Packet::destination(bytes).unwrap_or_default();
        let mut refuse = |error: PacketError| match error {
            PacketError::Check => self.counters.bad_check += 1,
            _ => self.counters.malformed += 1,
        };
        if let Some(path) = self.by_qpn.get(&qpn).and_then(|peer| self.paths.get_mut(peer)) {
            match Packet::decode(bytes, &path.line.local.secret) {
                Ok((packet, payload)) => {
                    let (qp, mut landing) = path.receiver(&mut self.table, &mut self.done);
                    qp.handle_packet(now, &packet, payload, &mut landing);
                    path.settle(&mut self.table, &mut self.done);
                }
                Err(error) => refuse(error),
            }
        } else if let Some(grave) = self.graves.iter_mut().find(|grave| grave.local.qpn == qpn) {
            match Packet::decode(bytes, &grave.local.secret) {
                Ok((packet, payload)) => {
                    self.counters.after_end += 1;
                    grave.qp.handle_packet(now, &packet, payload, &mut Nobody);
                }
                Err(error) => refuse(error),
            }
        } else {
            self.counters.unknown_queue_pair += 1;
        }
    }

    /// Time-outs, then everything that queue pairs have to send, then the socket.
    fn pump(&mut self, now: Instant) {
        self.send_outbox(now);
        let SoftTransport { paths, table, done, injector, outbox, spare, counters, graves, .. } = self;
        let is_full = self.full_until.is_some();
        for path in paths.values_mut() {
            path.line.qp.handle_timeout(now);
            while !is_full && let Some(transmit) = path.line.qp.poll_transmit(now) {
                let remote = path.line.remote.expect("who is not connected sends nothing");
                let mut bytes = spare.pop().unwrap_or_default();
                transmit.packet.encode(path.payload(transmit.payload), &remote.secret, &mut bytes);
                counters.sent += 1;
                if injector.is_fatal() {
                    path.line.qp.die();
                    break;
                }
                injector.pass(now, Datagram { to: remote.socket, bytes }, counters, outbox);
            }
            path.settle(table, done);
        }
        for grave in graves {
            while !is_full && let Some(transmit) = grave.qp.poll_transmit(now) {
                let remote = grave.remote.expect("who was never connected is not buried");
                let mut bytes = Vec::new();
                transmit.packet.encode(&[], &remote.secret, &mut bytes);
                counters.sent += 1;
                injector.pass(now, Datagram { to: remote.socket, bytes }, counters, outbox);
            }
        }
        injector.release(now, outbox);
        self.send_outbox(now);
    }

    fn send_outbox(&mut self, now: Instant) {
        self.full_until = None;
        while !self.outbox.is_empty() {
            let gone = match self.socket.send(&self.outbox) {
                Ok(0) => {
                    self.full_until = Some(now + FULL_PAUSE);
                    return;
                }
                Ok(count) => count,
                // The first of them cannot be sent, now or ever: to its queue pair it is lost.
                Err(_) => {
                    self.counters.send_errors += 1;
                    1
                }
            };
            for datagram in self.outbox.drain(..gone) {
                if self.spare.len() < SPARE_MAX {
                    self.spare.push(datagram.bytes);
                }
            }
        }
    }
}

impl Transport for SoftTransport {
    fn register(&mut self, region: &Region) -> Result<MemoryRegion> {
        region.host_only(FABRIC)?;
        Ok(MemoryRegion::new(FABRIC, self.table.register(region)?, region.len() as u64))
    }

    fn fabric(&self, _peer: PeerId) -> &'static str {
        FABRIC
    }

    fn offer(&mut self, peer: PeerId) -> Result<Endpoint> {
        let line = &self.path(peer)?.line;
        if line.qp.state() == State::Error {
            return Err(Error::Config(format!("the path to {peer} has ended; fence it before it is offered anew")));
        }
        Ok(Endpoint::new(FABRIC, line.local.text()))
    }

    fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        let Some(address) = remote.on(FABRIC) else {
            return Err(Error::Config(format!("{peer} offers `{}`, this is {FABRIC}", remote.fabrics())));
        };
        let remote = SoftAddress::parse(address)?;
        let line = &mut self.path(peer)?.line;
        if line.qp.state() != State::Init {
            return Err(Error::Config(format!("there is a path to {peer} already; fence it first")));
        }
        if line.local.socket.is_ipv4() != remote.socket.is_ipv4() {
            let (here, there) = (line.local.socket, remote.socket);
            return Err(Error::Config(format!("{peer} is at {there}, which cannot be reached from {here}")));
        }
        line.remote = Some(remote);
        line.qp.connect(Instant::now(), remote.qpn, remote.start, deadline);
        Ok(())
    }

    fn arm(&mut self, peer: PeerId, slot: Lease) -> Result<RemoteSlot> {
        self.table.arm(peer, slot)
    }

    fn fence(&mut self, peer: PeerId) -> Vec<Lease> {
        let mut slots = Vec::new();
        if let Some(mut path) = self.paths.remove(&peer) {
            self.by_qpn.remove(&path.line.local.qpn);
            path.line.qp.end();
            self.counters.add(path.line.qp.counters());
            self.done.forget(peer, &mut slots);
            path.abandon("we ended it", &mut self.table, &mut self.done);
            if path.line.remote.is_some() {
                self.graves.truncate(GRAVES_MAX - 1);
                self.graves.push_front(path.line);
                self.pump(Instant::now());
            }
        }
        slots.append(&mut self.table.fence(peer));
        slots
    }

    fn post(&mut self, request: WorkRequest) -> Result<(), QueueFull> {
        let peer = request.peer;
        let path = self.paths.get_mut(&peer);
        let defect = match path.as_ref().map(|path| path.line.qp.state()) {
            None | Some(State::Init) => {
                Some(Error::Broken { peer, reason: "there is none: connect comes first".into() })
            }
            Some(State::Error) => Some(Error::Broken { peer, reason: "it ended before".into() }),
            Some(State::Rtr | State::Rts) => request.defect(),
        };
        let path = match (path, defect) {
            (Some(path), None) if path.posted.len() >= self.options.queue_limit => return Err(QueueFull(request)),
            (Some(path), None) => path,
            (_, defect) => {
                let source = request.payload.map(|(source, _)| source);
                let error = defect.expect("without a path there is one");
                self.done.push((peer, Completion::Failed { id: request.id, source, error }));
                return Ok(());
            }
        };
        let WorkRequest { id, note, payload, .. } = request;
        let (source, slot) = payload.unzip();
        let target = slot.map(|slot| Target { rkey: slot.rkey, offset: slot.offset, length: note.length });
        path.line.qp.post(Message { target, immediate: note.encode() });
        path.posted.push_back(Posted { id, source });
        self.has_posts = true;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if std::mem::take(&mut self.has_posts) {
            self.pump(Instant::now());
        }
        Ok(())
    }

    fn poll(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Result<()> {
        self.paths.values_mut().for_each(|path| path.receives = self.options.receive_depth);
        for _ in 0..RECEIVE_BATCHES_MAX {
            let count = self.socket.receive()?;
            (0..count).for_each(|at| self.receive(now, at));
            self.pump(now);
            if count < BATCH {
                break;
            }
        }
        self.done.tell(completions);
        Ok(())
    }
}

impl Driver for SoftTransport {
    fn judge(&self, _own: &str, _remote: &str) -> Result<String, String> {
        Ok("chosen by name, for tests".into())
    }
}

impl Wakeup for SoftTransport {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        Ok(if self.done.is_empty() { Armed::Sleep } else { Armed::Ready })
    }

    fn next_deadline(&self) -> Option<Instant> {
        // While the socket is full there is no use in anything else.
        self.full_until.or_else(|| {
            let deadlines = self.paths.values().filter_map(|path| path.line.qp.next_deadline());
            deadlines.chain(self.injector.next_deadline()).min()
        })
    }
}

impl Drop for SoftTransport {
    /// Peers are told, as far as one packet each can tell them.
    fn drop(&mut self) {
        self.paths.values_mut().for_each(|path| path.line.qp.end());
        self.pump(Instant::now());
    }
}

/// Behind a connection that has ended: nothing comes through to it.
#[derive(Debug)]
struct Nobody;

impl Receiver for Nobody {
    fn is_ready(&self) -> bool {
        false
    }

    fn begin(&mut self, _target: &Target) -> Result<(), String> {
        Err("it has ended".into())
    }

    fn place(&mut self, _at: usize, _payload: &[u8]) {}

    fn complete(&mut self, _target: Option<&Target>, _immediate: &Immediate) -> Result<(), String> {
        Err("it has ended".into())
    }
}
