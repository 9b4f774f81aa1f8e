//! Gradients and parameters without a copy, and buffers of the caller's that a worker knows.
//!
//! Invariant: an address that C gave is used only between gw_register and the worker's end, and only by calls that say so.

use std::ffi::c_void;

use super::{
    handle::{Entry, Registered, WorkerHandle, with},
    status::{Fault, Status, guard, place},
};
use crate::{types::Dtype, worker::FlatView};

/// A place in a worker's registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// The first element, aligned to 32 bytes: in host memory, or of a worker of gw_connect_on_gpu its address on the device.
    pub data: *mut c_void,
    /// How many elements.
    pub elements: usize,
    /// Their gw_dtype: that of the job, in which they travel.
    pub dtype: u32,
    /// The number of the GPU; -1 in host memory.
    pub device: i32,
}

fn view_of(entry: &Entry, view: &FlatView) -> View {
    let dtype = match view.dtype() {
        Dtype::F32 => 0,
        Dtype::Bf16 => 1,
        Dtype::F16 => 2,
    };
    let (data, device) = match (view.device_address(), entry.device) {
        (Some(address), Some(ordinal)) => (std::ptr::without_provenance_mut(address as usize), ordinal as i32),
        _ => (view.pointer().as_ptr().cast(), -1),
    };
    View { data, elements: view.elements(), dtype, device }
}

/// Where a tensor's gradient lies: write it there and push it with gw_push_pull_in_place, and nothing is copied. The memory is the
/// worker's and ends with it. Nothing may be written from the push until the clock has ended.
///
/// # Safety
///
/// `view` is null or room for a view that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_gradient_view(worker: WorkerHandle, tensor: usize, view: *mut View) -> Status {
    guard("gw_gradient_view", || {
        // SAFETY: the caller answers for it.
        let view = unsafe { place(view, "view") }?;
        *view = with(worker, |entry| Ok(view_of(entry, &entry.worker.gradient_view(tensor)?)))?;
        Ok(())
    })
}

/// Where a tensor's parameters land, to be read only, and not from the push until the clock has ended. The memory is the worker's
/// and ends with it.
///
/// # Safety
///
/// `view` is null or room for a view that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_parameter_view(worker: WorkerHandle, tensor: usize, view: *mut View) -> Status {
    guard("gw_parameter_view", || {
        // SAFETY: the caller answers for it.
        let view = unsafe { place(view, "view") }?;
        *view = with(worker, |entry| Ok(view_of(entry, &entry.worker.parameter_view(tensor)?)))?;
        Ok(())
    })
}

/// As gw_push_pull, with the gradient that was written to gw_gradient_view.
#[unsafe(no_mangle)]
pub extern "C" fn gw_push_pull_in_place(worker: WorkerHandle, tensor: usize) -> Status {
    guard("gw_push_pull_in_place", || with(worker, |entry| Ok(entry.worker.push_pull_in_place(tensor)?)))
}

/// As gw_push, with the gradient that was written to gw_gradient_view.
#[unsafe(no_mangle)]
pub extern "C" fn gw_push_in_place(worker: WorkerHandle, tensor: usize) -> Status {
    guard("gw_push_in_place", || with(worker, |entry| Ok(entry.worker.push_in_place(tensor)?)))
}

/// Tells the worker where the caller keeps a tensor's gradient and parameters, each `elements` values of the tensor's dtype in host
/// memory, as many as it has. gw_push_pull_registered then takes the gradient from there, and gw_parameters_registered puts
/// the parameters there, each with one copy: the fabrics need memory with a descriptor, which the caller's has not. Both
/// addresses are kept until the next gw_register of this tensor, or the worker's end; the memory must stay as long. Null for
/// one of them: it is not registered.
///
/// # Safety
///
/// `gradient` and `parameters` are null or point to that many values for as long as they are registered; nobody changes the first
/// during gw_push_pull_registered, and nobody else uses the second during gw_parameters_registered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_register(
    worker: WorkerHandle,
    tensor: usize,
    gradient: *const c_void,
    parameters: *mut c_void,
    elements: usize,
) -> Status {
    guard("gw_register", || {
        with(worker, |entry| {
            let dtype = entry.dtype(tensor, elements)?;
            let size = dtype.size();
            for (address, what) in [(gradient, "the gradient"), (parameters.cast_const(), "the parameters")] {
                if !(address as usize).is_multiple_of(size) {
                    return Err(Fault::invalid(format!("the address of {what} is no multiple of {size}")));
                }
            }
            entry.registered.insert(tensor, Registered { gradient, parameters, elements });
            Ok(())
        })
    })
}

/// As gw_push_pull, with the gradient at the address that was registered.
///
/// # Safety
///
/// As gw_register said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_push_pull_registered(worker: WorkerHandle, tensor: usize) -> Status {
    guard("gw_push_pull_registered", || {
        with(worker, |entry| {
            let Registered { gradient, elements, .. } = entry.registered(tensor)?;
            // SAFETY: whoever registered the address answers for it.
            unsafe { entry.give_back(tensor, gradient, elements) }
        })
    })
}

/// As gw_parameters, for every tensor whose parameters have a registered address.
///
/// # Safety
///
/// As gw_register said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_parameters_registered(worker: WorkerHandle) -> Status {
    guard("gw_parameters_registered", || {
        with(worker, |entry| {
            let all: Vec<(usize, Registered)> =
                entry.registered.iter().map(|(tensor, place)| (*tensor, *place)).collect();
            for (tensor, Registered { parameters, elements, .. }) in all {
                if !parameters.is_null() {
                    // SAFETY: whoever registered the address answers for it.
                    unsafe { entry.copy(tensor, parameters, elements) }?;
                }
            }
            Ok(())
        })
    })
}
