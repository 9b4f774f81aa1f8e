//! Gradients out, parameters in, and the end of a clock.
//!
//! Invariant: a caller's buffer is touched only during the call that it is given to.

use std::{
    ffi::{c_int, c_void},
    os::fd::AsRawFd,
    time::Duration,
};

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{
    handle::{Entry, WorkerHandle, with},
    status::{Answer, Fault, Status, guard, place, slice, slice_mut},
};
use crate::types::Dtype;

/// What a pushed gradient brings back.
#[derive(Clone, Copy)]
enum Back {
    Nothing,
    Parameters,
}

impl Entry {
    /// The format of a tensor that has this many elements.
    pub(super) fn dtype(&self, tensor: usize, elements: usize) -> Answer<Dtype> {
        match self.tensors.get(tensor) {
            Some((dtype, len)) if *len == elements => Ok(*dtype),
            Some((_, len)) => {
                Err(Fault::invalid(format!("tensor {tensor} has {len} elements, and {elements} were given")))
            }
            None => Err(Fault::invalid(format!(
                "there is no tensor {tensor}: this worker declared {}, numbered from 0",
                self.tensors.len()
            ))),
        }
    }

    /// Pushes a gradient.
    ///
    /// # Safety
    ///
    /// `gradient` is null or points to `elements` values of the tensor's format.
    unsafe fn give(&mut self, tensor: usize, gradient: *const c_void, elements: usize, back: Back) -> Answer {
        let dtype = self.dtype(tensor, elements)?;
        let Entry { worker, scratch, .. } = self;
        let values = match dtype {
            // SAFETY: the caller of this function answers for it, here and in the other arms.
            Dtype::F32 => unsafe { slice(gradient.cast::<f32>(), elements, "the gradient") }?,
            Dtype::Bf16 => {
                // SAFETY: as above; any 16 bits are a bf16.
                let values = unsafe { slice(gradient.cast::<bf16>(), elements, "the gradient") }?;
                values.convert_to_f32_slice(&mut scratch[..elements]);
                &scratch[..elements]
            }
            Dtype::F16 => {
                // SAFETY: as above; any 16 bits are an f16.
                let values = unsafe { slice(gradient.cast::<f16>(), elements, "the gradient") }?;
                values.convert_to_f32_slice(&mut scratch[..elements]);
                &scratch[..elements]
            }
        };
        match back {
            Back::Nothing => worker.push(tensor, values)?,
            Back::Parameters => worker.push_pull(tensor, values)?,
        }
        Ok(())
    }

    /// Pushes a gradient for which parameters come back.
    ///
    /// # Safety
    ///
    /// As `give`.
    pub(super) unsafe fn give_back(&mut self, tensor: usize, gradient: *const c_void, elements: usize) -> Answer {
        // SAFETY: the caller of this function answers for it.
        unsafe { self.give(tensor, gradient, elements, Back::Parameters) }
    }

    /// Copies parameters out.
    ///
    /// # Safety
    ///
    /// `out` is null or room for `elements` values of the tensor's format that nobody else uses.
    pub(super) unsafe fn copy(&mut self, tensor: usize, out: *mut c_void, elements: usize) -> Answer {
        let dtype = self.dtype(tensor, elements)?;
        let Entry { worker, scratch, .. } = self;
        match dtype {
            Dtype::F32 => {
                // SAFETY: the caller of this function answers for it, here and in the other arms.
                worker.parameters(tensor, unsafe { slice_mut(out.cast::<f32>(), elements, "out") }?)?;
            }
            Dtype::Bf16 => {
                // SAFETY: as above.
                let out = unsafe { slice_mut(out.cast::<bf16>(), elements, "out") }?;
                worker.parameters(tensor, &mut scratch[..elements])?;
                out.convert_from_f32_slice(&scratch[..elements]);
            }
            Dtype::F16 => {
                // SAFETY: as above.
                let out = unsafe { slice_mut(out.cast::<f16>(), elements, "out") }?;
                worker.parameters(tensor, &mut scratch[..elements])?;
                out.convert_from_f32_slice(&scratch[..elements]);
            }
        }
        Ok(())
    }
}

/// Starts a tensor's step: its gradient of this clock goes to the servers, and the new parameters are on their way back
/// until gw_wait or gw_test says that they are here. Tensors may be given in any order, each once a clock.
///
/// `gradient` is the address of `elements` values of the tensor's dtype in host memory, as many as the tensor has. They are
/// copied before the call returns: the buffer stays the caller's, and may be changed at once. Never waits for the network.
///
/// # Safety
///
/// `gradient` is null or points to that many values, which nobody changes during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_push_pull(
    worker: WorkerHandle,
    tensor: usize,
    gradient: *const c_void,
    elements: usize,
) -> Status {
    guard("gw_push_pull", || {
        // SAFETY: the caller answers for it.
        with(worker, |entry| unsafe { entry.give(tensor, gradient, elements, Back::Parameters) })
    })
}

/// The same for a gradient that brings nothing back: gw_wait then waits only until it has left, and gw_pull fetches
/// parameters. All pushes of a clock are of one kind.
///
/// # Safety
///
/// As gw_push_pull.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_push(
    worker: WorkerHandle,
    tensor: usize,
    gradient: *const c_void,
    elements: usize,
) -> Status {
    guard("gw_push", || {
        // SAFETY: the caller answers for it.
        with(worker, |entry| unsafe { entry.give(tensor, gradient, elements, Back::Nothing) })
    })
}

/// Brings all parameters up to `min_version` or later, waiting at most `timeout_ms` milliseconds for the servers to have
/// it, and a few seconds more for the way. On GW_TIMEOUT what there was has been brought all the same. Not between
/// gw_push_pull and the end of its clock.
#[unsafe(no_mangle)]
pub extern "C" fn gw_pull(worker: WorkerHandle, min_version: u64, timeout_ms: u32) -> Status {
    let time = Duration::from_millis(timeout_ms.into());
    guard("gw_pull", || with(worker, |entry| Ok(entry.worker.pull(min_version, time)?)))
}

/// Ends the clock and waits, at most `timeout_ms` milliseconds, until the new parameters are here (after gw_push_pull) or
/// the gradients have left (after gw_push). Tensors that were not pushed have no gradient in this clock. On GW_TIMEOUT
/// the text names what was waited for, and it may be called again; after GW_OK the next clock has begun.
#[unsafe(no_mangle)]
pub extern "C" fn gw_wait(worker: WorkerHandle, timeout_ms: u32) -> Status {
    let time = Duration::from_millis(timeout_ms.into());
    guard("gw_wait", || with(worker, |entry| Ok(entry.worker.wait_for(time)?)))
}

/// Ends the clock as gw_wait does, but without waiting: `done` says whether everything is here already. While it is false
/// nothing may be pushed, and this or gw_wait is to be called again; once it is true the next clock has begun.
///
/// # Safety
///
/// `done` is null or room for a bool that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_test(worker: WorkerHandle, done: *mut bool) -> Status {
    guard("gw_test", || {
        // SAFETY: the caller answers for it.
        let done = unsafe { place(done, "done") }?;
        *done = with(worker, |entry| Ok(entry.worker.test()?))?;
        Ok(())
    })
}

/// A descriptor for poll or epoll (POLLIN), readable when gw_test is worth calling: call gw_test; while it says false,
/// poll and call it again. It is the worker's and is closed with it: neither read nor close it.
///
/// # Safety
///
/// `fd` is null or room for an int that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_completion_fd(worker: WorkerHandle, fd: *mut c_int) -> Status {
    guard("gw_completion_fd", || {
        // SAFETY: the caller answers for it.
        let fd = unsafe { place(fd, "fd") }?;
        *fd = with(worker, |entry| Ok(entry.worker.completion_fd()?.as_raw_fd()))?;
        Ok(())
    })
}

/// Copies a tensor's parameters into `out`, room for `elements` values of the tensor's dtype, as many as the tensor has.
/// Not between gw_push_pull and the end of its clock: they are on their way then. The buffer stays the caller's.
///
/// # Safety
///
/// `out` is null or room for that many values, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_parameters(
    worker: WorkerHandle,
    tensor: usize,
    out: *mut c_void,
    elements: usize,
) -> Status {
    guard("gw_parameters", || {
        // SAFETY: the caller answers for it.
        with(worker, |entry| unsafe { entry.copy(tensor, out, elements) })
    })
}
