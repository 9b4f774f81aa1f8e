//! The store of tenures as the rendezvous uses it: on a thread of its own, since a disk or another host may take its time.
//!
//! Invariant: every swap that was begun is answered once, in the order of beginning.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use super::notify::Notify;
use crate::{
    Error, Result,
    session::{Swap, Tenure, TenureStore},
    types::{Epoch, PeerId, ShardId},
};

/// A change of a shard's tenure that has been asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Swapping {
    /// Whose claim it is; the launcher's own if nobody's.
    pub claimant: Option<PeerId>,
    pub shard: ShardId,
    pub expected: Epoch,
    pub next: Tenure,
}

/// The swaps under way.
pub(super) struct Swaps {
    /// Closed at the end.
    begun: Option<Sender<Swapping>>,
    ended: Receiver<(Swapping, Swap)>,
    thread: Option<JoinHandle<()>>,
}

impl Swaps {
    /// Starts the thread, if there is a store; it ends with the handle.
    pub fn start(store: Option<Box<dyn TenureStore>>, notify: Arc<Notify>) -> Result<Swaps> {
        let (begun, begun_in) = channel::<Swapping>();
        let (ended_out, ended) = channel();
        let Some(mut store) = store else { return Ok(Swaps { begun: None, ended, thread: None }) };
        let serve = move || {
            while let Ok(swap) = begun_in.recv() {
                let outcome = store.compare_and_swap(swap.shard, swap.expected, swap.next);
                // Fails only where nobody waits for it any more.
                let _ = ended_out.send((swap, outcome));
                notify.wake();
            }
        };
        let thread = std::thread::Builder::new().name("tenures".into()).spawn(serve);
        let thread = thread.map_err(|e| Error::os("pthread_create", "the store of tenures", e))?;
        Ok(Swaps { begun: Some(begun), ended, thread: Some(thread) })
    }

    /// Asks the store.
    pub fn begin(&self, swap: Swapping) {
        // Without a store nothing is ever answered: a job in which who serves may change has one.
        let _ = self.begun.as_ref().map(|begun| begun.send(swap));
    }

    /// What the store has answered next.
    pub fn poll(&self) -> Option<(Swapping, Swap)> {
        self.ended.try_recv().ok()
    }
}

impl Drop for Swaps {
    /// The store has things to put in order, such as keys that nobody will need any more.
    fn drop(&mut self) {
        drop(self.begun.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
