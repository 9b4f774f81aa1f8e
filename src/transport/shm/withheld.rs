//! Slots that a fence could not give back: their writer was in the middle of a copy.
//!
//! Invariant: slots are released when, and only when, the writer's `copying` is clear, its process has ended, or its end of the
//! connection is closed. Each of these comes after the last byte, and a process that is stopped does none of them.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use super::{
    path::Remains,
    socket::{self, Owner},
};
use crate::{
    mem::Lease,
    transport::{
        Completion,
        done::Done,
        poller::{Kind, Poller, Token},
    },
    types::PeerId,
};

/// All that is withheld.
#[derive(Debug, Default)]
pub(super) struct Withheld(Vec<Option<Entry>>);

#[derive(Debug)]
struct Entry {
    peer: PeerId,
    remains: Remains,
    slots: Vec<Lease>,
    tokens: [Option<Token>; 2],
}

impl Withheld {
    /// Keeps the slots of a writer that may still be copying; gives them back at once if it is not, or cannot be watched.
    pub(super) fn keep(
        &mut self,
        peer: PeerId,
        remains: Remains,
        slots: Vec<Lease>,
        poller: &mut Poller,
    ) -> Vec<Lease> {
        if slots.is_empty() || !remains.inbound.is_copying() || remains.owner.has_ended() {
            return slots;
        }
        let index = self.0.iter().position(Option::is_none).unwrap_or(self.0.len());
        if index == self.0.len() {
            self.0.push(None);
        }
        let mut watch = |watched: &dyn AsFd| match poller.add(watched.as_fd(), Kind::Withheld, index) {
            Ok(token) => Some(token),
            Err(error) => {
                // The other watch or `copying` will tell.
                tracing::warn!(%error, %peer, "a writer that is fenced cannot be watched");
                None
            }
        };
        let process = match &remains.owner {
            Owner::Process { pidfd, .. } => watch(pidfd),
            Owner::Ourselves => None,
        };
        let tokens = [watch(&remains.socket), process];
        self.0[index] = Some(Entry { peer, remains, slots, tokens });
        Vec::new()
    }

    /// Releases what may be.
    pub(super) fn look(&mut self, poller: &Poller, done: &mut Done) {
        for index in 0..self.0.len() {
            if self.0[index].as_ref().is_some_and(|entry| !entry.remains.inbound.is_copying()) {
                self.release(index, poller, done);
            }
        }
    }

    /// Whether [`Withheld::look`] would release something.
    pub(super) fn has_work(&self) -> bool {
        self.0.iter().flatten().any(|entry| !entry.remains.inbound.is_copying())
    }

    /// A writer's process or connection has something to say: its end, or what nobody listens to any more.
    pub(super) fn on_ready(&mut self, token: Token, poller: &Poller, done: &mut Done) {
        let Some(Some(entry)) = self.0.get(token.index()) else { return };
        let [connection, process] = entry.tokens.map(|own| own == Some(token));
        let is_over = process || (connection && has_closed(entry));
        if is_over {
            self.release(token.index(), poller, done);
        }
    }

    fn release(&mut self, index: usize, poller: &Poller, done: &mut Done) {
        let Some(Entry { peer, remains, slots, .. }) = self.0[index].take() else { return };
        poller.remove(&remains.socket);
        if let Owner::Process { pidfd, .. } = &remains.owner {
            poller.remove(pidfd);
        }
        socket::end(&remains.socket);
        done.push((peer, Completion::Released { peer, slots }));
    }
}

fn has_closed(entry: &Entry) -> bool {
    // What it still said is read away, a little at a time; the rest makes the socket readable again.
    for _ in 0..16 {
        match socket::receive_bytes(&entry.remains.socket, &mut [0; 64]) {
            Ok(Some(0)) | Err(_) => return true,
            Ok(Some(_)) => {}
            Ok(None) => return false,
        }
    }
    false
}
