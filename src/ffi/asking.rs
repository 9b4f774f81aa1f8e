//! What a worker may ask of its job: settings, a checkpoint, how things stand.
//!
//! Invariant: an answer is written to the caller's memory only if the call gives GW_OK, and never beyond the room that was given.

use std::ffi::c_char;

use super::{
    handle::{WorkerHandle, with},
    status::{Fault, Status, guard, place, slice_mut, text},
};

/// Changes settings on all servers at one clock: `settings` is a text of KEY=VALUE with spaces between them, such as
/// "lr=0.01 weight-decay=0.1 clip-norm=1" (see `gradwire help set`). On GW_OK `clock` is the one from which on they hold; it may
/// be null. Waits for the servers, at most a minute, and for no worker.
///
/// # Safety
///
/// `settings` is null or a text that ends with a NUL; `clock` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_set(worker: WorkerHandle, settings: *const c_char, clock: *mut u64) -> Status {
    guard("gw_set", || {
        // SAFETY: the caller answers for it.
        let settings = unsafe { text(settings, "settings") }?;
        let from = with(worker, |entry| Ok(entry.worker.change_settings(settings.split_whitespace())?))?;
        if !clock.is_null() {
            // SAFETY: likewise.
            *unsafe { place(clock, "clock") }? = from;
        }
        Ok(())
    })
}

/// Asks for a checkpoint at the next clock that no server has passed, and goes on at once: it is complete some steps of all
/// workers later, which gw_checkpoint_test tells. One at a time.
#[unsafe(no_mangle)]
pub extern "C" fn gw_checkpoint(worker: WorkerHandle) -> Status {
    guard("gw_checkpoint", || with(worker, |entry| Ok(entry.worker.request_checkpoint()?)))
}

/// Whether the checkpoint that was asked for is complete; if it is, `clock` is its clock (it may be null), and the next one may be
/// asked for. GW_REFUSED, with the reason, if there is none to be had, as in a job without a checkpoint directory. Never waits.
///
/// # Safety
///
/// `done` and `clock` are null or room for what they are told, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_checkpoint_test(worker: WorkerHandle, done: *mut bool, clock: *mut u64) -> Status {
    guard("gw_checkpoint_test", || {
        // SAFETY: the caller answers for it.
        let done = unsafe { place(done, "done") }?;
        let written = with(worker, |entry| Ok(entry.worker.checkpoint_written()?))?;
        *done = written.is_some();
        if let (Some(written), false) = (written, clock.is_null()) {
            // SAFETY: likewise.
            *unsafe { place(clock, "clock") }? = written;
        }
        Ok(())
    })
}

/// How the job stands, as a JSON object that ends with a NUL: what `gradwire status --json` prints (ranks, their state, host, clock
/// and fabrics, the last checkpoint, steps that were not finite). `length` is how many bytes it takes with its NUL; where `room`
/// is less, only that is written, and the status is GW_INVALID. `out` may be null if `room` is 0. Waits for the launcher, at most 10
/// seconds.
///
/// # Safety
///
/// `out` is null or room for `room` bytes, `length` null or room for a number, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_job_status(
    worker: WorkerHandle,
    out: *mut c_char,
    room: usize,
    length: *mut usize,
) -> Status {
    guard("gw_job_status", || {
        // SAFETY: the caller answers for it.
        let length = unsafe { place(length, "length") }?;
        let status = with(worker, |entry| Ok(entry.worker.job_status()?))?;
        let mut bytes = serde_json::to_vec(&status).expect("a status has text keys");
        bytes.push(0);
        *length = bytes.len();
        if room < bytes.len() {
            return Err(Fault::invalid(format!(
                "the status takes {} bytes, and there is room for {room}",
                bytes.len()
            )));
        }
        // SAFETY: likewise; a byte is a byte.
        unsafe { slice_mut(out.cast::<u8>(), bytes.len(), "out") }?.copy_from_slice(&bytes);
        Ok(())
    })
}
