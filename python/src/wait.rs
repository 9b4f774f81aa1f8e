//! Waits that other Python threads do not notice and that Ctrl-C ends.
//!
//! Invariant: a wait never holds the interpreter's lock, and looks for signals at least every second.

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use gradwire::Error;
use pyo3::prelude::*;

use crate::error::{exception, raised};

/// How long a signal may wait for us.
pub const SLICE: Duration = Duration::from_millis(100);

/// A deadline in seconds, as Python gives it.
pub fn seconds(py: Python<'_>, timeout: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout)
        .map_err(|why| exception(py, "ConfigError", &format!("timeout is {timeout}: {why}")))
}

/// Waits in slices of this length until `work` has ended otherwise than by its deadline, or `timeout` has passed.
pub fn in_slices<T: Send>(
    py: Python<'_>,
    (timeout, longest): (Duration, Duration),
    mut work: impl FnMut(Duration) -> gradwire::Result<T> + Send,
) -> PyResult<T> {
    let since = Instant::now();
    loop {
        let left = timeout.saturating_sub(since.elapsed());
        let slice = left.min(longest);
        match py.detach(|| work(slice)) {
            Ok(value) => return Ok(value),
            Err(Error::Deadline { from, awaited, chunk, clock, .. }) if slice == left => {
                let whole = Error::Deadline { from, awaited, chunk, clock, waited: timeout };
                return Err(raised(py, &whole));
            }
            Err(Error::Deadline { .. }) => py.check_signals()?,
            Err(error) => return Err(raised(py, &error)),
        }
    }
}

/// Does what cannot be done in slices on a thread of its own. A signal ends the wait for it, and it is dropped when it is done.
pub fn on_a_thread<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> gradwire::Result<T> + Send + 'static,
) -> PyResult<T> {
    let (done, mut outcome) = channel();
    let thread = std::thread::Builder::new().name("gradwire-call".into());
    let spawned = thread.spawn(move || {
        let _ = done.send(work()); // fails only if nobody waits any more
    });
    spawned.map_err(|error| raised(py, &Error::os("pthread_create", "a thread that may wait", error)))?;
    loop {
        let (back, received) = py.detach(move || {
            let received = outcome.recv_timeout(SLICE);
            (outcome, received)
        });
        outcome = back;
        match received {
            Ok(result) => return result.map_err(|error| raised(py, &error)),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(exception(
                    py,
                    "Error",
                    "a bug in gradwire: its thread panicked, and said why on standard error",
                ));
            }
        }
    }
}
