//! A tensor's place in a worker's flat buffers as DLPack has it, for any array library: in host memory or on a GPU.
//!
//! The structures are those of DLPack 1.0 (dmlc/dlpack, `include/dlpack/dlpack.h`), in both the form with a version and the one before.
//!
//! Invariant: the memory stays mapped until whoever took the tensor has called its deleter; a capsule that nobody took calls it itself.

use std::ffi::{CStr, c_void};

use gradwire::{types::Dtype, worker::FlatView};
use pyo3::{exceptions::PyBufferError, ffi, prelude::*};

/// `DLDevice`: 1 is host memory, 2 is CUDA.
#[repr(C)]
#[derive(Clone, Copy, PartialEq)]
pub struct Device {
    kind: i32,
    id: i32,
}

/// `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
struct Plain {
    tensor: Tensor,
    manager: *mut c_void,
    deleter: unsafe extern "C" fn(*mut Plain),
}

/// `DLManagedTensorVersioned`; no flag says that it may be written to.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: unsafe extern "C" fn(*mut Versioned),
    flags: u64,
    tensor: Tensor,
}

const _: () = assert!(size_of::<Tensor>() == 48 && size_of::<Plain>() == 64 && size_of::<Versioned>() == 80);

/// One of the two, and what it points to: first, so that a pointer to it is one to this.
#[repr(C)]
struct Owned<M> {
    managed: M,
    shape: [i64; 1],
    strides: [i64; 1],
    _view: FlatView,
}

/// What the two forms differ in.
trait Managed: Sized {
    /// Of a capsule that nobody has taken.
    const NAME: &'static CStr;
    fn around(tensor: Tensor) -> Self;
    fn tensor(&mut self) -> &mut Tensor;
}

impl Managed for Plain {
    const NAME: &'static CStr = c"dltensor";
    fn around(tensor: Tensor) -> Plain {
        Plain { tensor, manager: std::ptr::null_mut(), deleter: delete }
    }
    fn tensor(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

impl Managed for Versioned {
    const NAME: &'static CStr = c"dltensor_versioned";
    fn around(tensor: Tensor) -> Versioned {
        Versioned { major: 1, minor: 0, manager: std::ptr::null_mut(), deleter: delete, flags: 0, tensor }
    }
    fn tensor(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

/// Where a view lies.
pub fn device_of(view: &FlatView) -> Device {
    match view.device() {
        None => Device { kind: 1, id: 0 },
        Some(ordinal) => Device { kind: 2, id: ordinal as i32 },
    }
}

impl Device {
    /// As `__dlpack_device__` says it.
    pub fn pair(self) -> (i32, i32) {
        (self.kind, self.id)
    }
}

/// What a consumer asks for: the newest version that it knows, a device, a copy.
pub struct Wanted {
    pub max_version: Option<(u32, u32)>,
    pub device: Option<(i32, i32)>,
    pub copy: Option<bool>,
}

/// A capsule with a flat tensor over the view's own memory.
///
/// # Errors
///
/// `BufferError` if a copy or another device is wanted.
pub fn capsule(py: Python<'_>, view: &FlatView, wanted: &Wanted) -> PyResult<Py<PyAny>> {
    if wanted.copy == Some(true) {
        return Err(PyBufferError::new_err("registered memory is given as it is: copy what you have taken"));
    }
    if wanted.device.is_some_and(|pair| pair != device_of(view).pair()) {
        return Err(PyBufferError::new_err("registered memory is given where it lies: move what you have taken"));
    }
    match wanted.max_version {
        Some((major, _)) if major >= 1 => wrap::<Versioned>(py, view),
        _ => wrap::<Plain>(py, view),
    }
}

fn wrap<M: Managed>(py: Python<'_>, view: &FlatView) -> PyResult<Py<PyAny>> {
    let data = match view.device_address() {
        Some(address) => std::ptr::without_provenance_mut(address as usize),
        None => view.pointer().as_ptr().cast::<c_void>(),
    };
    let (code, bits) = match view.dtype() {
        Dtype::F32 => (2, 32),
        Dtype::F16 => (2, 16),
        Dtype::Bf16 => (4, 16),
    };
    let (shape, strides) = (std::ptr::null_mut(), std::ptr::null_mut());
    let device = device_of(view);
    let tensor = Tensor { data, device, dimensions: 1, code, bits, lanes: 1, shape, strides, byte_offset: 0 };
    let elements = [view.elements() as i64];
    let owned = Owned { managed: M::around(tensor), shape: elements, strides: [1], _view: view.clone() };
    let owned = Box::into_raw(Box::new(owned));
    // SAFETY: just made, and nobody else's yet.
    let inner = unsafe { &mut *owned };
    (inner.managed.tensor().shape, inner.managed.tensor().strides) =
        (inner.shape.as_mut_ptr(), inner.strides.as_mut_ptr());
    // SAFETY: a pointer that is not null, a name that lasts, and a destructor that takes what has this name.
    let capsule = unsafe { ffi::PyCapsule_New(owned.cast(), M::NAME.as_ptr(), Some(free_unless_taken::<M>)) };
    if capsule.is_null() {
        // SAFETY: made above, and in no capsule.
        drop(unsafe { Box::from_raw(owned) });
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference.
    Ok(unsafe { Bound::from_owned_ptr(py, capsule) }.unbind())
}

/// # Safety
///
/// `managed` came out of [`wrap`], and is given back once.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: it is the first field of what `wrap` has boxed.
    drop(unsafe { Box::from_raw(managed.cast::<Owned<M>>()) });
}

/// # Safety
///
/// The interpreter calls it for a capsule of [`wrap`], once.
unsafe extern "C" fn free_unless_taken<M: Managed>(capsule: *mut ffi::PyObject) {
    // SAFETY: the capsule is live, and a consumer that takes what is in it renames it.
    if unsafe { ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) } == 1 {
        // SAFETY: as above; it has this name, so it holds what `wrap` put there.
        unsafe { delete::<M>(ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr()).cast()) };
    }
}
