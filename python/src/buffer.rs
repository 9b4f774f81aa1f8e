//! A tensor's place in a worker's flat buffers, for Python to look at through the buffer protocol and DLPack.
//!
//! Invariant: the memory stays mapped as long as any view of it lives.

use std::ffi::c_int;

use gradwire::{types::Dtype, worker::FlatView};
use pyo3::{exceptions::PyBufferError, ffi, prelude::*};

use crate::dlpack::{Wanted, capsule, device_of};

/// Bytes of one tensor in the memory that the fabrics have registered: writable, and in one piece.
#[pyclass(frozen, module = "gradwire._gradwire")]
pub struct Buffer {
    view: FlatView,
}

impl From<FlatView> for Buffer {
    fn from(view: FlatView) -> Buffer {
        Buffer { view }
    }
}

#[pymethods]
impl Buffer {
    /// The number format of the elements: "f32", "bf16" or "f16".
    #[getter]
    fn dtype(&self) -> &'static str {
        match self.view.dtype() {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }

    /// How many elements.
    #[getter]
    fn elements(&self) -> usize {
        self.view.elements()
    }

    /// The GPU that has the bytes; None for host memory.
    #[getter]
    fn device(&self) -> Option<u32> {
        self.view.device()
    }

    /// DLPack's kind and number of the device that has the bytes.
    fn __dlpack_device__(&self) -> (i32, i32) {
        device_of(&self.view).pair()
    }

    /// A DLPack capsule over the bytes themselves. Nothing is under way on any stream: what has landed has landed.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let _ = stream;
        capsule(py, &self.view, &Wanted { max_version, device: dl_device, copy })
    }

    /// # Safety
    ///
    /// `view` is what the interpreter hands to the buffer protocol's slot.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let place = &slf.get().view;
        if place.device().is_some() {
            return Err(PyBufferError::new_err("the bytes lie on a GPU: take them with DLPack"));
        }
        let (start, bytes) = (place.pointer().as_ptr().cast(), place.bytes() as ffi::Py_ssize_t);
        // SAFETY: `view` is the interpreter's, as it promises of this slot. The bytes are mapped as long as `slf` lives, to which
        // the call adds a reference that the view keeps. Who may use them when is what `FlatView::pointer` and the package's
        // documentation ask of the program.
        match unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, bytes, 0, flags) } {
            0 => Ok(()),
            _ => Err(PyErr::fetch(slf.py())),
        }
    }
}
