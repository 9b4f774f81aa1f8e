//! gradwire's errors as Python's: a class for each thing that a program may want to do about it.
//!
//! Invariant: the text of an exception is gradwire's own.

use gradwire::Error;
use pyo3::{prelude::*, types::PyType};

/// The exception of this class of `gradwire.errors`.
pub fn exception(py: Python<'_>, class: &str, text: &str) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let class = py.import("gradwire.errors")?.getattr(class)?.cast_into::<PyType>()?;
        Ok(PyErr::from_value(class.call1((text,))?))
    };
    make().unwrap_or_else(|failed| failed)
}

/// An error of gradwire's.
pub fn raised(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Config(_) | Error::LayoutConflict { .. } => "ConfigError",
        Error::Os { .. } | Error::File { .. } | Error::Memlock { .. } | Error::Gpu { .. } => "SystemFailure",
        Error::Deadline { .. } => "DeadlineError",
        Error::Refused { .. } => "RefusedError",
        Error::Preempted { .. } => "Preempted",
        Error::Left { .. } => "Left",
        Error::Broken { .. } | Error::Protocol { .. } | Error::Checkpoint { .. } | Error::JobFailed(_) => "JobFailed",
    };
    exception(py, class, &error.to_string())
}
