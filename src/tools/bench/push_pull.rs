//! What a worker of a push-pull benchmark does: it pushes one tensor and waits for the new parameters, round after round.
//!
//! The gradient lies in the worker's registered memory before the first round, as a backward pass would leave it there; a round
//! sends those bytes and receives as many into the parameters' memory. Nothing is copied out in between.
//!
//! Invariant: every worker of a job does the same number of rounds, since under `bsp` nobody gets anywhere alone.

use super::{Measured, Pace};
use crate::{Error, Result, layout::TensorSpec, session::Member, worker::Worker};

/// The name of the benchmark's tensor.
const TENSOR: &str = "bench";

/// Takes part in the benchmark's job that the environment names: pushes and pulls `bytes` a round, and reports what it measured
/// as the summary of its work.
///
/// # Errors
///
/// As [`Worker::join`] and [`Worker::wait`]; [`Error::Config`] for a size that is not a whole number of elements.
pub fn work(bytes: u64, rounds: u64) -> Result<Measured> {
    let member = Member::from_environment()?;
    let config = member.config();
    if config.gradient_dtype.size() != config.parameter_dtype.size() {
        let (gradient, parameter) = (config.gradient_dtype, config.parameter_dtype);
        return Err(Error::Config(format!(
            "gradients in {gradient} and parameters in {parameter} have not the same number of bytes"
        )));
    }
    let size = config.gradient_dtype.size() as u64;
    if bytes == 0 || !bytes.is_multiple_of(size) {
        return Err(Error::Config(format!("{bytes} bytes are no whole number of elements of {size} bytes")));
    }
    let elements = bytes / size;
    let mut worker = Worker::with_member(member, vec![TensorSpec::new(TENSOR, [elements])])?;
    // Small and never zero: steps stay finite, and no optimizer takes a short cut.
    let gradient: Vec<f32> = (0..elements).map(|i| ((i % 251) as f32 - 125.5) * 1e-6).collect();
    worker.push_pull(0, &gradient)?;
    worker.wait()?;
    let measured = Measured::take(bytes, Pace::Rounds(rounds), || {
        worker.push_pull_all()?;
        worker.wait()
    })?;
    let summary = serde_json::to_value(measured).expect("numbers under text keys");
    worker.finish_with(summary)?;
    Ok(measured)
}
