//! The file with a job's first parameters (`init_from`), written by the worker whose model they are.
//!
//! Invariant: the file is whole from the moment it has its name, and says which job it was written for.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use gradwire::Error;
use pyo3::{buffer::PyBuffer, prelude::*};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

use crate::error::{exception, raised};

/// The key under which a file of ours names its job.
const JOB: &str = "gradwire-job";

/// Limit on a header that is read only for that name.
const HEADER_BYTES_MAX: u64 = 100 << 20;

/// Writes tensors (name, "f32", "bf16" or "f16", shape, bytes) to a safetensors file.
#[pyfunction]
pub fn write_initial_file(
    py: Python<'_>,
    path: PathBuf,
    job: String,
    tensors: Vec<(String, String, Vec<usize>, PyBuffer<u8>)>,
) -> PyResult<()> {
    let wrong =
        |name: &str, why: &dyn std::fmt::Display| exception(py, "ConfigError", &format!("tensor `{name}`: {why}"));
    let mut views = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, buffer) in &tensors {
        let dtype = match dtype.as_str() {
            "f32" => Dtype::F32,
            "bf16" => Dtype::BF16,
            "f16" => Dtype::F16,
            other => return Err(wrong(name, &format!("its format is {other}; f32, bf16 and f16 are written"))),
        };
        if !buffer.is_c_contiguous() {
            return Err(wrong(name, &"its bytes do not lie in one piece"));
        }
        // SAFETY: the buffer is one piece of this many bytes, which stay as long as `tensors` does; any byte is a u8. The
        // interpreter's lock is held until the file is written, so no Python code changes them meanwhile.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
        views.push((name, TensorView::new(dtype, shape.clone(), bytes).map_err(|why| wrong(name, &why))?));
    }
    let metadata = HashMap::from([(JOB.to_owned(), job)]);
    let unfinished = path.with_extension("writing");
    let failed = |source| raised(py, &Error::file("write", &path, source));
    serialize_to_file(views, Some(metadata), &unfinished).map_err(|why| failed(std::io::Error::other(why)))?;
    std::fs::rename(&unfinished, &path).map_err(failed)
}

/// For which job `write_initial_file` has written this file; "" if another program has, `None` if there is no file.
#[pyfunction]
pub fn initial_file_job(py: Python<'_>, path: PathBuf) -> PyResult<Option<String>> {
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut start = [0; 8];
        file.read_exact(&mut start)?;
        let length = u64::from_le_bytes(start).min(HEADER_BYTES_MAX);
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = match read(&path) {
        Ok(header) => header,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(Some(String::new())),
        Err(error) => return Err(raised(py, &Error::file("read", &path, error))),
    };
    let header: serde_json::Value = serde_json::from_slice(&header).unwrap_or_default();
    Ok(Some(header["__metadata__"][JOB].as_str().unwrap_or_default().to_owned()))
}
