//! A tensor's place in a worker's flat buffers, for Python to look at through the buffer protocol.
//!
//! Invariant: the memory stays mapped as long as any view of it lives.

use std::ffi::c_int;

use gradwire::{types::Dtype, worker::FlatView};
use pyo3::{ffi, prelude::*};

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

    /// # Safety
    ///
    /// `view` is what the interpreter hands to the buffer protocol's slot.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let place = &slf.get().view;
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
