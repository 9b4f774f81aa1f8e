//! Handles: numbers under which this process keeps its workers.
//!
//! A handle is the process' id (upper half) and a serial number (lower half). The id is looked at before any lock, since
//! a child may have been forked while another thread held one.
//!
//! Invariant: a worker is used by one thread at a time, and a number never names a second worker.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicU32, Ordering},
    },
};

use super::status::{Answer, Fault, Status};
use crate::{types::Dtype, worker::Worker};

/// A worker of this process, as gw_connect gives it; 0 is none. A number, to be copied at will: every copy is the same
/// worker. One thread at a time may call with it; a call beside another one's answers GW_BUSY.
pub type WorkerHandle = u64;

/// A worker and what its caller has said of its tensors.
pub(super) struct Entry {
    pub worker: Worker,
    /// The GPU that its memory lies on.
    pub device: Option<u32>,
    /// By tensor: the caller's number format, and how many elements.
    pub tensors: Vec<(Dtype, usize)>,
    /// Where values of other formats become f32, as long as the longest tensor of such a format.
    pub scratch: Vec<f32>,
    /// By tensor: where the caller keeps its values.
    pub registered: BTreeMap<usize, Registered>,
}

/// Addresses of the caller's, null where there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registered {
    pub gradient: *const c_void,
    pub parameters: *mut c_void,
    pub elements: usize,
}

impl Entry {
    /// What is registered of a tensor.
    pub fn registered(&self, tensor: usize) -> Answer<Registered> {
        let none = || Fault::invalid(format!("nothing is registered of tensor {tensor}: gw_register does that"));
        self.registered.get(&tensor).copied().ok_or_else(none)
    }
}

// SAFETY: the addresses are only numbers here; whoever uses them holds the worker's lock, and who registered them has promised that
// they are good in any thread that calls with this worker.
unsafe impl Send for Registered {}

/// `None` once it is closed.
type Slot = Arc<Mutex<Option<Entry>>>;

static SLOTS: Mutex<BTreeMap<WorkerHandle, Slot>> = Mutex::new(BTreeMap::new());
static OPENED: AtomicU32 = AtomicU32::new(0);

fn slots() -> MutexGuard<'static, BTreeMap<WorkerHandle, Slot>> {
    SLOTS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Keeps a worker.
pub(super) fn keep(entry: Entry) -> Answer<WorkerHandle> {
    let serial = OPENED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| last.checked_add(1));
    let serial = serial.map_err(|_| Fault::new(Status::GwSystem, "this process has opened 2^32 workers"))?;
    let handle = (WorkerHandle::from(std::process::id()) << 32) | WorkerHandle::from(serial + 1);
    slots().insert(handle, Arc::new(Mutex::new(Some(entry))));
    Ok(handle)
}

fn find(handle: WorkerHandle) -> Answer<Slot> {
    if handle == 0 {
        return Err(Fault::invalid("the worker is 0, which is none: gw_connect gives one"));
    }
    let (opened_by, here) = (handle >> 32, WorkerHandle::from(std::process::id()));
    if opened_by != here {
        let text = format!(
            "the worker was opened by process {opened_by} and this is process {here}: a forked child cannot use it, and \
             nothing was done"
        );
        return Err(Fault::new(Status::GwForked, text));
    }
    slots().get(&handle).cloned().ok_or_else(closed)
}

fn closed() -> Fault {
    Fault::new(Status::GwClosed, "the worker has been closed already, or was never opened")
}

fn busy() -> Fault {
    Fault::new(Status::GwBusy, "another thread is in a call with this worker: one at a time")
}

/// Works with a worker.
pub(super) fn with<T>(handle: WorkerHandle, work: impl FnOnce(&mut Entry) -> Answer<T>) -> Answer<T> {
    let slot = find(handle)?;
    let mut entry = match slot.try_lock() {
        Ok(entry) => entry,
        Err(TryLockError::WouldBlock) => return Err(busy()),
        Err(TryLockError::Poisoned(_)) => {
            let text = "an earlier call with this worker ended in a bug of gradwire: it can only be closed";
            return Err(Fault::new(Status::GwPanic, text));
        }
    };
    work(entry.as_mut().ok_or_else(closed)?)
}

/// Takes a worker out: its handle is closed.
pub(super) fn take(handle: WorkerHandle) -> Answer<Entry> {
    let slot = find(handle)?;
    let mut entry = match slot.try_lock() {
        Ok(entry) => entry,
        Err(TryLockError::WouldBlock) => return Err(busy()),
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
    };
    slots().remove(&handle);
    entry.take().ok_or_else(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_name_no_worker_of_this_process() {
        let ours = WorkerHandle::from(std::process::id()) << 32;
        let cases =
            [(0, Status::GwInvalid), (ours | 0xffff_ffff, Status::GwClosed), (ours ^ (1 << 32) | 1, Status::GwForked)];
        for (handle, status) in cases {
            assert_eq!(with(handle, |_| Ok(())).unwrap_err().status, status, "{handle:x}");
            assert_eq!(take(handle).err().unwrap().status, status, "{handle:x}");
        }
    }
}
