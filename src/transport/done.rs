//! What a driver will tell at its next poll, and what a fence takes out of that.
//!
//! Completions lie in the form in which they are handed out, so that a poll moves all of them at once: whom those are about that do
//! not say it is written beside them, for a fence to know.
//!
//! Invariant: a peer is written down for each `Sent` and `Failed`, in their order; after [`Done::forget`] nothing is left of a peer but `Failed` and `Released`, and
//! no lease is lost.
#![forbid(unsafe_code)]

use std::mem;

use super::Completion;
use crate::{Error, mem::Lease, types::PeerId};

/// What is to be told at the next poll, and whom it is about.
#[derive(Debug, Default)]
pub(super) struct Done {
    about: Vec<PeerId>,
    told: Vec<Completion>,
}

impl Done {
    /// Inlined wherever it is called, for there it is known which completion it is, and the whole is a few stores.
    #[inline(always)]
    pub(super) fn push(&mut self, (about, told): (PeerId, Completion)) {
        if matches!(told, Completion::Sent { .. } | Completion::Failed { .. }) {
            self.about.push(about);
        }
        self.told.push(told);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// Hands out everything, in order.
    #[inline]
    pub(super) fn tell(&mut self, completions: &mut Vec<Completion>) {
        self.about.clear();
        match completions.is_empty() {
            true => mem::swap(&mut self.told, completions),
            false => completions.append(&mut self.told),
        }
    }

    /// After a fence only `Failed` may follow: a `Sent` that nobody has heard of yet becomes one, so that its source comes back.
    /// The slots of what had arrived are added to `slots`.
    pub(super) fn forget(&mut self, peer: PeerId, slots: &mut Vec<Lease>) {
        let mut written = mem::take(&mut self.about).into_iter();
        for mut completion in mem::take(&mut self.told) {
            let about = match &completion {
                Completion::Sent { .. } | Completion::Failed { .. } => written.next().expect("written beside it"),
                Completion::Arrived { from, .. } => *from,
                Completion::Connected { peer }
                | Completion::Released { peer, .. }
                | Completion::Broken { peer, .. } => *peer,
            };
            if about == peer {
                match &mut completion {
                    Completion::Sent { id, source } => {
                        let error = Error::Broken { peer, reason: "we ended it".into() };
                        completion = Completion::Failed { id: *id, source: source.take(), error };
                    }
                    Completion::Failed { .. } | Completion::Released { .. } => {}
                    Completion::Arrived { lease, .. } => {
                        slots.extend(lease.take());
                        continue;
                    }
                    Completion::Connected { .. } | Completion::Broken { .. } => continue,
                }
            }
            self.push((about, completion));
        }
    }
}
