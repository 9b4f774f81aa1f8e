//! What a driver will tell at its next poll, and what a fence takes out of that.
//!
//! Invariant: after [`forget`] nothing is left of a peer but `Failed` and `Released`, and no lease is lost.
#![forbid(unsafe_code)]

use super::Completion;
use crate::{Error, mem::Lease, types::PeerId};

/// What is to be told at the next poll, and whom it is about.
pub(super) type Done = Vec<(PeerId, Completion)>;

/// After a fence only `Failed` may follow: a `Sent` that nobody has heard of yet becomes one, so that its source comes back.
/// The slots of what had arrived are added to `slots`.
pub(super) fn forget(peer: PeerId, done: &mut Done, slots: &mut Vec<Lease>) {
    done.retain_mut(|(about, completion)| {
        if *about != peer {
            return true;
        }
        match completion {
            Completion::Sent { id, source } => {
                let error = Error::Broken { peer, reason: "we ended it".into() };
                *completion = Completion::Failed { id: *id, source: source.take(), error };
                true
            }
            Completion::Failed { .. } | Completion::Released { .. } => true,
            Completion::Arrived { lease, .. } => {
                slots.extend(lease.take());
                false
            }
            Completion::Connected { .. } | Completion::Broken { .. } => false,
        }
    });
}
