//! A worker and its seat in the job.
//!
//! Invariant: a worker is used by one thread at a time, and by the process that joined alone.

use std::{
    sync::{Mutex, MutexGuard, TryLockError},
    time::Duration,
};

use gradwire::{Init, TensorSpec, cuda::Context, session::Member};
use pyo3::{buffer::PyBuffer, prelude::*};

use crate::{
    buffer::Buffer,
    error::{exception, raised},
    wait::{SLICE, in_slices, on_a_thread, seconds},
};

/// A pull is asked again this often, so that a signal is minded; each time brings all parameters.
const PULL_SLICE: Duration = Duration::from_secs(1);

/// What is held until it ends: by one thread at a time, in one process.
struct Slot<T> {
    /// `None` once it has ended.
    held: Mutex<Option<T>>,
    process: u32,
    what: &'static str,
}

impl<T> Slot<T> {
    fn new(what: &'static str, value: T) -> Slot<T> {
        Slot { held: Mutex::new(Some(value)), process: std::process::id(), what }
    }

    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Option<T>>> {
        let here = std::process::id();
        if self.process != here {
            let text = format!(
                "the {} was opened by process {} and this is process {here}: a forked child cannot use it, and nothing was done",
                self.what, self.process
            );
            return Err(exception(py, "ForkedError", &text));
        }
        let held = match self.held.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let text = format!("another thread is in a call with this {}: one at a time", self.what);
                return Err(exception(py, "BusyError", &text));
            }
        };
        if held.is_none() {
            return Err(exception(py, "ClosedError", &format!("the {} has ended already", self.what)));
        }
        Ok(held)
    }

    fn take(&self, py: Python<'_>) -> PyResult<T> {
        Ok(self.lock(py)?.take().expect("`lock` has looked"))
    }

    fn with<R>(&self, py: Python<'_>, work: impl FnOnce(&mut T) -> gradwire::Result<R>) -> PyResult<R> {
        let mut held = self.lock(py)?;
        work(held.as_mut().expect("`lock` has looked")).map_err(|error| raised(py, &error))
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // The threads and paths of what a child has inherited are its parent's.
            let inherited = self.held.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
            std::mem::forget(inherited.take());
        }
    }
}

/// This process' place in the job that its environment names, before it has said which tensors it has.
#[pyclass(frozen, module = "gradwire._gradwire")]
pub struct Seat {
    slot: Slot<Member>,
    rank: usize,
    config: String,
}

#[pymethods]
impl Seat {
    /// Takes the place.
    #[staticmethod]
    fn take(py: Python<'_>) -> PyResult<Seat> {
        gradwire::ffi::start_log();
        let member = on_a_thread(py, Member::from_environment)?;
        let config = serde_json::to_string(member.config()).expect("a configuration has text keys");
        Ok(Seat { rank: member.rank().index.into(), slot: Slot::new("seat", member), config })
    }

    /// This worker's number, from 0.
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    /// The job's settings in JSON.
    #[getter]
    fn config(&self) -> &str {
        &self.config
    }

    /// Declares the tensors (name, shape, rule, the rule's number, group) and waits for the first parameters. `device`: the GPU that
    /// has gradients and parameters.
    #[pyo3(signature = (tensors, device=None))]
    fn join(
        &self,
        py: Python<'_>,
        tensors: Vec<(String, Vec<u64>, String, f32, u16)>,
        device: Option<u32>,
    ) -> PyResult<Worker> {
        let specs = tensors.into_iter().map(|(name, shape, rule, number, group)| {
            let init = match rule.as_str() {
                "zeros" => Init::Zeros,
                "constant" => Init::Constant(number),
                "normal" => Init::Normal(number),
                "xavier_uniform" => Init::XavierUniform,
                "kaiming_normal" => Init::KaimingNormal,
                other => {
                    let text = format!(
                        "tensor `{name}`: there is no init \"{other}\"; it is zeros, constant, normal, xavier_uniform or \
                         kaiming_normal"
                    );
                    return Err(exception(py, "ConfigError", &text));
                }
            };
            let lengths: Vec<usize> = shape.iter().map(|length| *length as usize).collect();
            init.check(&name, &lengths).map_err(|error| raised(py, &error))?;
            Ok(TensorSpec::new(name, shape).init(init).group(group))
        });
        let specs: Vec<TensorSpec> = specs.collect::<PyResult<_>>()?;
        let context = device.map(Context::open).transpose().map_err(|error| raised(py, &error))?;
        let member = self.slot.take(py)?;
        let worker = on_a_thread(py, move || match context {
            Some(context) => gradwire::Worker::on_gpu(member, specs, &context),
            None => gradwire::Worker::with_member(member, specs),
        })?;
        Ok(Worker { slot: Slot::new("worker", worker) })
    }
}

/// A worker of the job; tensors are numbered as they were declared.
#[pyclass(frozen, module = "gradwire._gradwire")]
pub struct Worker {
    slot: Slot<gradwire::Worker>,
}

#[pymethods]
impl Worker {
    /// The clock that the next push belongs to.
    #[getter]
    fn clock(&self, py: Python<'_>) -> PyResult<u64> {
        self.slot.with(py, |worker| Ok(worker.clock()))
    }

    /// Whether it was told to leave and has no clock before it.
    fn should_leave(&self, py: Python<'_>) -> PyResult<bool> {
        self.slot.with(py, |worker| Ok(worker.should_leave()))
    }

    /// What the loss of this clock is to be multiplied by, since the servers divide gradients by it; 1 unless the job has `loss_scale`.
    #[getter]
    fn loss_scale(&self, py: Python<'_>) -> PyResult<f32> {
        self.slot.with(py, |worker| Ok(worker.loss_scale()))
    }

    /// The version of the parameters at hand: that of the oldest chunk.
    #[getter]
    fn version(&self, py: Python<'_>) -> PyResult<u64> {
        self.slot.with(py, |worker| Ok(worker.version()))
    }

    /// Copies a gradient of f32 into registered memory and starts its push; `reply`: it brings parameters back.
    fn push(&self, py: Python<'_>, tensor: usize, gradient: PyBuffer<f32>, reply: bool) -> PyResult<()> {
        check_contiguous(py, &gradient)?;
        let count = gradient.item_count();
        // SAFETY: the buffer is one piece of `count` aligned f32, as `PyBuffer` and the line above have checked; the
        // interpreter's lock is held during the copy, so no Python code changes them meanwhile.
        let values = unsafe { std::slice::from_raw_parts(gradient.buf_ptr().cast::<f32>(), count) };
        self.slot.with(py, |worker| match reply {
            true => worker.push_pull(tensor, values),
            false => worker.push(tensor, values),
        })
    }

    /// Starts the push of what lies in the tensor's `gradient_buffer`.
    fn push_in_place(&self, py: Python<'_>, tensor: usize, reply: bool) -> PyResult<()> {
        self.slot.with(py, |worker| match reply {
            true => worker.push_pull_in_place(tensor),
            false => worker.push_in_place(tensor),
        })
    }

    /// Ends the clock and waits at most `timeout` seconds, the job's `wait_ms` if it is None.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let mut held = self.slot.lock(py)?;
        let worker = held.as_mut().expect("`lock` has looked");
        let timeout = self.timeout(py, worker, timeout)?;
        in_slices(py, (timeout, SLICE), |slice| worker.wait_for(slice))
    }

    /// Ends the clock without waiting: whether it is over.
    fn test(&self, py: Python<'_>) -> PyResult<bool> {
        self.slot.with(py, gradwire::Worker::test)
    }

    /// Brings all parameters up to a version, waiting at most `timeout` seconds for it.
    #[pyo3(signature = (min_version, timeout=None))]
    fn pull(&self, py: Python<'_>, min_version: u64, timeout: Option<f64>) -> PyResult<()> {
        let mut held = self.slot.lock(py)?;
        let worker = held.as_mut().expect("`lock` has looked");
        let timeout = self.timeout(py, worker, timeout)?;
        in_slices(py, (timeout, PULL_SLICE), |slice| worker.pull(min_version, slice))
    }

    /// Copies a tensor's parameters out.
    fn parameters(&self, py: Python<'_>, tensor: usize, out: PyBuffer<f32>) -> PyResult<()> {
        check_contiguous(py, &out)?;
        if out.readonly() {
            return Err(exception(py, "ConfigError", "`out` is read-only"));
        }
        let count = out.item_count();
        // SAFETY: as in `push`; and it may be written, as was just checked.
        let values = unsafe { std::slice::from_raw_parts_mut(out.buf_ptr().cast::<f32>(), count) };
        self.slot.with(py, |worker| worker.parameters(tensor, values))
    }

    /// Where a tensor's gradient lies.
    fn gradient_buffer(&self, py: Python<'_>, tensor: usize) -> PyResult<Buffer> {
        self.slot.with(py, |worker| Ok(worker.gradient_view(tensor)?.into()))
    }

    /// Where a tensor's parameters land.
    fn parameter_buffer(&self, py: Python<'_>, tensor: usize) -> PyResult<Buffer> {
        self.slot.with(py, |worker| Ok(worker.parameter_view(tensor)?.into()))
    }

    /// Changes the default group's learning rate from this clock on.
    fn set_learning_rate(&self, py: Python<'_>, rate: f64) -> PyResult<()> {
        self.slot.with(py, |worker| worker.set_learning_rate(rate))
    }

    /// Changes settings (`KEY=VALUE`) on all servers; the clock from which on they hold.
    fn change_settings(&self, py: Python<'_>, settings: Vec<String>) -> PyResult<u64> {
        let mut held = self.slot.lock(py)?;
        let worker = held.as_mut().expect("`lock` has looked");
        let outcome = py.detach(|| worker.change_settings(settings.iter().map(String::as_str)));
        outcome.map_err(|error| raised(py, &error))
    }

    /// Asks for a checkpoint, and goes on.
    fn request_checkpoint(&self, py: Python<'_>) -> PyResult<()> {
        self.slot.with(py, gradwire::Worker::request_checkpoint)
    }

    /// The clock of the checkpoint that was asked for, once it is complete.
    fn checkpoint_written(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.slot.with(py, gradwire::Worker::checkpoint_written)
    }

    /// How the job stands, in JSON.
    fn job_status(&self, py: Python<'_>) -> PyResult<String> {
        let mut held = self.slot.lock(py)?;
        let worker = held.as_mut().expect("`lock` has looked");
        let status = py.detach(move || worker.job_status()).map_err(|error| raised(py, &error))?;
        Ok(serde_json::to_string(&status).expect("a status has text keys"))
    }

    /// Leaves the job in order.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.slot.take(py)?;
        on_a_thread(py, || worker.finish())
    }

    /// Leaves the job at once; nothing if the worker has ended already.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.slot.take(py) {
            Ok(worker) => {
                py.detach(|| drop(worker));
                Ok(())
            }
            Err(error) if error.get_type(py).name()?.to_str()? == "ClosedError" => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Worker {
    fn timeout(&self, py: Python<'_>, worker: &gradwire::Worker, timeout: Option<f64>) -> PyResult<Duration> {
        timeout.map_or_else(|| Ok(Duration::from_millis(worker.config().wait_ms)), |timeout| seconds(py, timeout))
    }
}

fn check_contiguous(py: Python<'_>, buffer: &PyBuffer<f32>) -> PyResult<()> {
    if buffer.is_c_contiguous() {
        return Ok(());
    }
    Err(exception(
        py,
        "ConfigError",
        "the values do not lie in one piece, in C order: numpy.ascontiguousarray copies them so",
    ))
}
