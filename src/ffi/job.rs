//! A worker's part in its job: joining, leaving, where it stands.
//!
//! Invariant: an answer is written to the caller's memory only if the call gives GW_OK.

use std::{collections::BTreeMap, ffi::c_char};

use super::{
    handle::{Entry, WorkerHandle, keep, take, with},
    process::start_log,
    status::{Answer, Fault, Status, guard, place, slice, text},
    tensor::TensorDescription,
};
use crate::{cuda::Context, session::Member, types::Dtype, worker::Worker};

/// Takes this process' place in the job that its environment names (`gradwire run` sets it), declares the tensors, which
/// are numbered from 0 in this order, and waits for the first parameters: until all workers are there, or the job's own
/// deadlines pass.
///
/// `tensors` is the address of `count` descriptions; they, their names and shapes are copied, and stay the caller's. On
/// GW_OK `worker` is a new handle, to be ended with gw_finish or gw_close. One process has one worker, unless its
/// environment leaves the rank open. Any thread; the library starts threads of its own, which need no signal.
///
/// # Safety
///
/// Each pointer is null or points to what is said of it; `worker` is nobody else's during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_connect(
    tensors: *const TensorDescription,
    count: usize,
    worker: *mut WorkerHandle,
) -> Status {
    // SAFETY: the caller answers for it.
    guard("gw_connect", || unsafe { connect(tensors, count, None, worker) })
}

/// As gw_connect, with the worker's gradients and parameters in the memory of GPU number `device` (as CUDA counts those
/// that this process sees), in its primary context, which CUDA's runtime uses too. Gradients leave from there, and
/// parameters land there, without passing through the host. gw_gradient_view and gw_parameter_view give device pointers;
/// whoever has written a gradient waits for its stream or event before gw_push_pull_in_place, which reads it at once.
/// Calls that take addresses in host memory copy to the device and back, and wait for that.
///
/// All servers must be reached over a fabric whose device reaches the GPU's memory (verbs); GW_INVALID names the one that
/// is not, or says that there is no such GPU.
///
/// # Safety
///
/// As gw_connect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_connect_on_gpu(
    tensors: *const TensorDescription,
    count: usize,
    device: u32,
    worker: *mut WorkerHandle,
) -> Status {
    // SAFETY: the caller answers for it.
    guard("gw_connect_on_gpu", || unsafe { connect(tensors, count, Some(device), worker) })
}

/// Joins, on a device if one is named.
///
/// # Safety
///
/// As gw_connect.
unsafe fn connect(
    tensors: *const TensorDescription,
    count: usize,
    device: Option<u32>,
    worker: *mut WorkerHandle,
) -> Answer {
    // SAFETY: the caller answers for it.
    let worker = unsafe { place(worker, "worker") }?;
    // SAFETY: likewise.
    let tensors = unsafe { slice(tensors, count, "tensors") }?;
    start_log();
    // SAFETY: likewise.
    let specs = tensors.iter().enumerate().map(|(index, tensor)| unsafe { tensor.to_spec(index) });
    let specs: Vec<_> = specs.collect::<Answer<_>>()?;
    let sizes = specs.iter().map(|(spec, dtype)| (*dtype, spec.elements().unwrap_or(0) as usize));
    let sizes: Vec<(Dtype, usize)> = sizes.collect();
    let specs = specs.into_iter().map(|(spec, _)| spec).collect();
    let joined = match device {
        // The device first: a seat that is taken and left has failed.
        Some(ordinal) => {
            let context = Context::open(ordinal)?;
            Worker::on_gpu(Member::from_environment()?, specs, &context)?
        }
        None => Worker::join(specs)?,
    };
    let longest = sizes.iter().filter(|(dtype, _)| *dtype != Dtype::F32).map(|(_, len)| *len).max();
    let scratch = vec![0.0; longest.unwrap_or(0)];
    *worker = keep(Entry { worker: joined, device, tensors: sizes, scratch, registered: BTreeMap::new() })?;
    Ok(())
}

/// This worker has done its part: ends the clock if something has been pushed in it, waits (at most the job's `wait_ms`)
/// until every server knows, and leaves the job in order. The handle is closed, whatever the status.
#[unsafe(no_mangle)]
pub extern "C" fn gw_finish(worker: WorkerHandle) -> Status {
    guard("gw_finish", || Ok(take(worker)?.worker.finish()?))
}

/// Leaves the job at once, wherever it stands, and gives back everything that belongs to the worker, its threads and its
/// descriptor too. A worker that leaves without gw_finish has failed, and the job ends with it; after a failure that is
/// the way to clean up. After gw_finish it answers GW_CLOSED, which does no harm.
#[unsafe(no_mangle)]
pub extern "C" fn gw_close(worker: WorkerHandle) -> Status {
    guard("gw_close", || take(worker).map(drop))
}

/// Writes one number about a worker to where the caller wants it.
///
/// # Safety
///
/// `out` is null or room for a number that nobody else uses during the call.
unsafe fn tell<T>(name: &str, worker: WorkerHandle, out: *mut T, what: impl FnOnce(&Worker) -> Answer<T>) -> Status {
    guard(name, || {
        // SAFETY: the caller of this function answers for it.
        let out = unsafe { place(out, "the place for the answer") }?;
        *out = with(worker, |entry| what(&entry.worker))?;
        Ok(())
    })
}

/// This worker's number, from 0.
///
/// # Safety
///
/// `rank` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_rank(worker: WorkerHandle, rank: *mut usize) -> Status {
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_rank", worker, rank, |worker| Ok(worker.rank())) }
}

/// How many workers the job began with.
///
/// # Safety
///
/// `workers` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_workers(worker: WorkerHandle, workers: *mut usize) -> Status {
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_workers", worker, workers, |worker| Ok(worker.workers())) }
}

/// The clock (step) that the next push belongs to; not 0 at first in a job that was resumed.
///
/// # Safety
///
/// `clock` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_clock(worker: WorkerHandle, clock: *mut u64) -> Status {
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_clock", worker, clock, |worker| Ok(worker.clock())) }
}

/// Whether this worker was told to leave (`gradwire remove-worker`) and has no clock before it: 1, it is to call gw_finish; else 0.
/// To be asked between two clocks; never waits. What it has pushed in earlier clocks counts.
///
/// # Safety
///
/// `leaves` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_should_leave(worker: WorkerHandle, leaves: *mut i32) -> Status {
    guard("gw_should_leave", || {
        // SAFETY: the caller answers for it.
        let out = unsafe { place(leaves, "the place for the answer") }?;
        *out = with(worker, |entry| Ok(i32::from(entry.worker.should_leave())))?;
        Ok(())
    })
}

/// The version of the parameters at hand: that of the oldest chunk. Under `bsp` it is the number of clocks applied.
///
/// # Safety
///
/// `version` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_parameter_version(worker: WorkerHandle, version: *mut u64) -> Status {
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_parameter_version", worker, version, |worker| Ok(worker.version())) }
}

/// The number of the tensor with this name. The name is only read.
///
/// # Safety
///
/// `name` is null or a text that ends with a NUL; `tensor` is null or room for a number that nobody else uses during the
/// call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_tensor_index(worker: WorkerHandle, name: *const c_char, tensor: *mut usize) -> Status {
    let find = |worker: &Worker| {
        // SAFETY: the caller answers for it.
        let name = unsafe { text(name, "the name") }?;
        worker.tensor(name).ok_or_else(|| Fault::invalid(format!("this worker has no tensor `{name}`")))
    };
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_tensor_index", worker, tensor, find) }
}

/// What the loss of this clock is to be multiplied by, since the servers divide gradients by it; 1 unless the job has
/// `--loss-scale`. Another number may hold after each gw_wait.
///
/// # Safety
///
/// `scale` is null or room for a number that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_loss_scale(worker: WorkerHandle, scale: *mut f32) -> Status {
    // SAFETY: the caller answers for it.
    unsafe { tell("gw_loss_scale", worker, scale, |worker| Ok(worker.loss_scale())) }
}

/// Changes the default group's learning rate on every server, from this clock on; the other groups keep their proportion
/// to it. Under `bsp` it takes effect at exactly that clock everywhere, if it is called before this worker's first push
/// of the clock.
#[unsafe(no_mangle)]
pub extern "C" fn gw_set_learning_rate(worker: WorkerHandle, rate: f64) -> Status {
    guard("gw_set_learning_rate", || with(worker, |entry| Ok(entry.worker.set_learning_rate(rate)?)))
}
