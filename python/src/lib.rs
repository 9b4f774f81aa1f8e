//! The extension module of the Python package `gradwire`: a worker, its seat in the job, and its buffers, for the package's own
//! Python code, which is what programs import.
//!
//! Invariant: nothing of Python is touched without the interpreter's lock, and every wait gives it up and minds signals.

mod buffer;
mod dlpack;
mod error;
mod file;
mod wait;
mod worker;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _gradwire {
    #[pymodule_export]
    use super::buffer::Buffer;
    #[pymodule_export]
    use super::file::{initial_file_job, write_initial_file};
    #[pymodule_export]
    use super::worker::{Seat, Worker};
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
