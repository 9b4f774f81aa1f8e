//! Completion queues: each serves a fixed number of queue pairs, so that none can overflow.
//!
//! Invariant: a queue has room for everything that its pairs can have at work at one time. A pair that was destroyed leaves its
//! completions behind; they are taken out before another pair takes its seat (`VerbsTransport::seat`).

use std::{
    fmt, io,
    ptr::{self, NonNull},
    sync::Arc,
};

use super::device::Device;
use crate::{
    Error, Result,
    sys::verbs::{self, IbvCq, IbvWc},
};

/// Queue pairs that share a completion queue, if the device's queues are long enough.
const SEATS_MAX: u32 = 16;

/// Completions taken in one call.
pub(super) const BATCH: usize = 32;

/// Room for them.
#[derive(Default)]
pub(super) struct Batch(pub(super) [IbvWc; BATCH]);

pub(super) struct CompletionQueue {
    device: Arc<Device>,
    raw: NonNull<IbvCq>,
    seats: usize,
}

// SAFETY: libibverbs' objects belong to the process and not to a thread, and its functions lock what they share.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above; our own fields are never written after `new`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue for as many pairs as fit, each of which may have `work` completions outstanding.
    pub(super) fn new(device: &Arc<Device>, work: u32) -> Result<Arc<CompletionQueue>> {
        let seats = (device.limits.completions / work).min(SEATS_MAX);
        if seats == 0 {
            return Err(Error::Config(format!(
                "RDMA device {} has completion queues of {}, and one path needs {work}: lower the depth of its queues",
                device.place.device, device.limits.completions
            )));
        }
        // SAFETY: context and channel are valid; nothing of ours is handed in; the result is checked.
        let raw = unsafe {
            (device.table().create_cq)(device.context(), (seats * work) as i32, ptr::null_mut(), device.channel(), 0)
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let subject = format!("{} completions on RDMA device {}", seats * work, device.place.device);
            Error::os("ibv_create_cq", subject, io::Error::last_os_error())
        })?;
        Ok(Arc::new(CompletionQueue { device: device.clone(), raw, seats: seats as usize }))
    }

    /// Whether another pair may be made on it. Every pair holds the queue, and the transport does.
    pub(super) fn has_seat(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) - 1 < self.seats
    }

    pub(super) fn raw(&self) -> *mut IbvCq {
        self.raw.as_ptr()
    }

    /// Takes up to a batch of completions.
    pub(super) fn poll(&self, Batch(completions): &mut Batch) -> Result<usize> {
        // SAFETY: the queue is valid, its context's functions are the provider's, and the array has as many places as we say.
        let count = unsafe { verbs::poll_cq(self.raw(), BATCH as i32, completions.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| {
            let subject = format!("a completion queue of RDMA device {}", self.device.place.device);
            Error::os("ibv_poll_cq", subject, io::Error::other(format!("it answered {count}")))
        })
    }

    /// Has the channel told of the next completion.
    pub(super) fn request_event(&self) -> Result<()> {
        // SAFETY: the queue is valid and its context's functions are the provider's.
        match unsafe { verbs::req_notify_cq(self.raw(), 0) } {
            0 => Ok(()),
            error => {
                let subject = format!("a completion queue of RDMA device {}", self.device.place.device);
                Err(Error::os("ibv_req_notify_cq", subject, io::Error::from_raw_os_error(error)))
            }
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // Else the destruction would wait for somebody to acknowledge them.
        self.device.drain_channel(usize::MAX);
        // SAFETY: destroyed once, when no pair holds it any more.
        let result = unsafe { (self.device.table().destroy_cq)(self.raw()) };
        if result != 0 {
            tracing::error!("ibv_destroy_cq failed: {}", io::Error::from_raw_os_error(result));
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Batch")
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("seats", &self.seats).finish_non_exhaustive()
    }
}
