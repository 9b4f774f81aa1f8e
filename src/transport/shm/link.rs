//! What an open path is made of: the socket, both rings, the peer's regions; and what is said over the socket.
//!
//! Invariant: our own regions are on their way to the peer before any entry that could name them; a peer that sends what it should
//! not ends its own path, with a reason, and nothing else.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use super::{
    mapping::{Mapping, Ring},
    ring::{Consumer, Producer},
    socket::{self, Owner, Received},
};
use crate::{
    Result,
    mem::Region,
    transport::poller::{Kind, Poller, Token},
    types::PeerId,
    wire::ShareMessage,
};

/// Messages read from one socket in one go; the kernel tells the rest again.
const MESSAGES_MAX: usize = 64;

/// A peer registers few regions; more than any region table takes would be a way to fill our address space.
const REGIONS_MAX: usize = 256;

/// A message that waits for its turn, with what its descriptor is of.
#[derive(Debug)]
enum Outgoing {
    Ring(OwnedFd),
    Region(u32, Region),
}

/// An authenticated connection and what came over it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: OwnedFd,
    pub(super) token: Token,
    pub(super) owner: Owner,
    /// The watch over the owner's process; none for our own.
    pub(super) process_token: Option<Token>,
    /// When it ends unless the peer has shared its ring.
    pub(super) deadline: Instant,
    /// Whether it is told that the path is connected.
    pub(super) is_told: bool,
    /// Our ring, which the peer writes to.
    pub(super) inbound: Consumer<Ring>,
    /// The peer's ring, once it is here; taken out while it is written to.
    pub(super) outbound: Option<Producer<Ring>>,
    has_ring: bool,
    regions: Vec<(u32, Mapping)>,
    outbox: VecDeque<Outgoing>,
    waits_for_room: bool,
    /// The peer has said its last word.
    pub(super) at_end: bool,
}

impl Link {
    /// Begins a path over a connection that is watched under `token`: our ring and regions are on their way.
    pub(super) fn begin(
        (me, peer): (PeerId, PeerId),
        socket: OwnedFd,
        owner: Owner,
        token: Token,
        deadline: Instant,
        regions: &[(u32, Region)],
        poller: &mut Poller,
    ) -> Result<Link> {
        let (ring, file) = Ring::create(&format!("ring from {peer} to {me}"))?;
        let process_token = match &owner {
            Owner::Ourselves => None,
            Owner::Process { pidfd, .. } => Some(poller.add(pidfd, Kind::Process, token.index())?),
        };
        let mut outbox = VecDeque::from([Outgoing::Ring(file)]);
        outbox.extend(regions.iter().map(|(rkey, region)| Outgoing::Region(*rkey, region.clone())));
        Ok(Link {
            socket,
            token,
            owner,
            process_token,
            deadline,
            is_told: false,
            inbound: Consumer::new(ring),
            outbound: None,
            has_ring: false,
            regions: Vec::new(),
            outbox,
            waits_for_room: false,
            at_end: false,
        })
    }

    /// A region was registered.
    pub(super) fn share(&mut self, rkey: u32, region: &Region) {
        self.outbox.push_back(Outgoing::Region(rkey, region.clone()));
    }

    /// Whether all of our regions are on their way, so that entries may name them.
    pub(super) fn has_shared(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn send_waiting(&mut self, poller: &Poller) -> Result<(), String> {
        while let Some(outgoing) = self.outbox.front() {
            let (message, file) = match outgoing {
                Outgoing::Ring(file) => (ShareMessage::Ring, file.as_fd()),
                Outgoing::Region(rkey, region) => {
                    (ShareMessage::Region { rkey: *rkey, len: region.len() as u64 }, region.as_fd())
                }
            };
            match socket::send_descriptor(&self.socket, &message.encode(), file) {
                Ok(true) => self.outbox.pop_front(),
                Ok(false) => break,
                // What the peer said before it went is still to be read; the end of it tells more than this error.
                Err(e) if is_end(&e) => break,
                Err(e) => return Err(format!("sharing our memory failed: {e}")),
            };
        }
        let waits_for_room = !self.outbox.is_empty();
        if waits_for_room != self.waits_for_room {
            self.waits_for_room = waits_for_room;
            poller.watch_writable(&self.socket, self.token, waits_for_room).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Wakes the peer.
    pub(super) fn wake(&self) -> Result<(), String> {
        match socket::send_bytes(&self.socket, &ShareMessage::Wake.encode()) {
            // Without room there is enough unread to keep the peer awake.
            Ok(_) => Ok(()),
            Err(e) if is_end(&e) => Ok(()),
            Err(e) => Err(format!("it cannot be woken: {e}")),
        }
    }

    /// Reads what the peer has said, up to a bound. The end is noted in `at_end`.
    pub(super) fn receive(&mut self) -> Result<(), String> {
        for _ in 0..MESSAGES_MAX {
            if self.at_end {
                return Ok(());
            }
            let mut bytes = [0; ShareMessage::SIZE];
            match socket::receive(&self.socket, &mut bytes) {
                Ok(None) => return Ok(()),
                Ok(Some(Received { len: 0, .. })) => self.at_end = true,
                Ok(Some(received)) => self.hear(&bytes, received)?,
                // A socket that was closed with something unread in it, as a killed process leaves it.
                Err(_) => self.at_end = true,
            }
        }
        Ok(())
    }

    fn hear(&mut self, bytes: &[u8], received: Received) -> Result<(), String> {
        let bytes = bytes.get(..received.len).ok_or("it sent a message that is too long")?;
        let message = ShareMessage::decode(bytes).map_err(|e| format!("it sent a message that cannot be read: {e}"))?;
        let (got, needed) = (received.descriptors.len(), message.descriptors());
        if received.cut && got < needed {
            return Err("a descriptor of it was lost: has this process too many open files (RLIMIT_NOFILE)?".into());
        }
        if received.cut || got != needed {
            return Err(format!("it sent {got} descriptors with a message that has {needed}"));
        }
        let Some(file) = received.descriptors.first() else { return Ok(()) };
        match message {
            ShareMessage::Ring if self.has_ring => return Err("it sent a second ring".into()),
            ShareMessage::Ring => {
                let ring = Ring::import(file).map_err(|why| format!("its ring cannot be used: {why}"))?;
                self.outbound = Some(Producer::new(ring));
                self.has_ring = true;
            }
            ShareMessage::Region { rkey, len } => {
                if self.regions.len() == REGIONS_MAX || self.region(rkey).is_some() {
                    return Err(format!("it sent region {rkey:#x} twice, or more than {REGIONS_MAX} regions"));
                }
                let mapping = Mapping::import(file, len).map_err(|why| format!("its region cannot be used: {why}"))?;
                self.regions.push((rkey, mapping));
            }
            ShareMessage::Wake => {}
        }
        Ok(())
    }

    fn region(&self, rkey: u32) -> Option<&Mapping> {
        self.regions.iter().find(|(known, _)| *known == rkey).map(|(_, mapping)| mapping)
    }

    /// The peer's region with this key, which may have been registered only just now.
    pub(super) fn find_region(&mut self, rkey: u32) -> Result<Option<&Mapping>, String> {
        // A bounded look each time: whatever else is in the socket is read on the way.
        let mut looks = REGIONS_MAX / MESSAGES_MAX;
        while self.region(rkey).is_none() && looks > 0 && !self.at_end {
            self.receive()?;
            looks -= 1;
        }
        Ok(self.region(rkey))
    }

    /// Why the peer's end is the end.
    pub(super) fn last_reason(&self) -> String {
        match (&self.owner, &self.outbound) {
            (_, Some(ring)) if ring.is_fenced() => "the peer ended it".into(),
            (Owner::Process { pid, .. }, _) if self.owner.has_ended() => format!("its process {pid} has ended"),
            (Owner::Process { pid, .. }, _) => {
                format!("its process {pid} closed the connection without a word: it has ended, or is about to")
            }
            (Owner::Ourselves, _) => "the peer closed the connection".into(),
        }
    }
}

/// Errors after which the connection is over, and reading is sure to find that out too.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
