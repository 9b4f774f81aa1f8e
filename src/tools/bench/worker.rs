//! What a worker of a benchmark's job does, round after round, and what it reports.
//!
//! The gradient lies in the worker's registered memory before the first round, as a backward pass would leave it there, except in
//! an end-to-end step, which hands every layer's gradient over as a training program does.
//!
//! Invariant: every worker of a job does the same number of rounds, since under `bsp` nobody gets anywhere alone.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Load, Measured, Pace};
use crate::{Error, Result, layout::TensorSpec, observe::Usage, session::Member, worker::Worker};

/// What a round is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Round {
    /// Push the gradient and wait for the new parameters.
    PushPull,
    /// Push the gradient and wait until it has left. What ends the measurement is a round of push-pull, whose answer says that
    /// everything before it has been applied.
    Push,
    /// Ask for the parameters and wait for them. Nothing is pushed.
    Pull,
    /// A training step: the gradient of one layer after the other, the last layer first, evenly over the time of the backward
    /// pass, during which this process does nothing else (an accelerator computes); then wait for all parameters.
    Step {
        /// Tensors of the model.
        layers: u32,
        /// Time of the backward pass.
        backward: Duration,
    },
}

/// What a worker reports when it is done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerReport {
    /// The rounds.
    pub measured: Measured,
    /// What the process used in its whole life.
    pub used: Usage,
}

/// Takes part in the benchmark's job that the environment names, with a model of `bytes` in the wire's format, and reports what it
/// measured as the summary of its work.
///
/// # Errors
///
/// As [`Worker::join`] and [`Worker::wait`]; [`Error::Config`] for a size that is not a whole number of elements.
pub fn work(round: Round, bytes: u64, rounds: u64) -> Result<()> {
    let member = Member::from_environment()?;
    let config = member.config();
    if config.gradient_dtype.size() != config.parameter_dtype.size() {
        let (gradient, parameter) = (config.gradient_dtype, config.parameter_dtype);
        return Err(Error::Config(format!(
            "gradients in {gradient} and parameters in {parameter} have not the same number of bytes"
        )));
    }
    let size = config.gradient_dtype.size() as u64;
    let layers = match round {
        Round::Step { layers, .. } => u64::from(layers.max(1)),
        _ => 1,
    };
    if bytes == 0 || !bytes.is_multiple_of(size * layers) {
        return Err(Error::Config(format!(
            "{bytes} bytes are no whole number of elements of {size} bytes in {layers} layers"
        )));
    }
    let elements = bytes / size / layers;
    let tensors = (0..layers).map(|layer| TensorSpec::new(format!("layer.{layer}"), [elements])).collect();
    let mut worker = Worker::with_member(member, tensors)?;
    // Small and never zero: steps stay finite, and no optimizer takes a short cut.
    let gradient: Vec<f32> = (0..elements).map(|i| ((i % 251) as f32 - 125.5) * 1e-6).collect();
    for layer in 0..layers as usize {
        worker.push_pull(layer, &gradient)?;
    }
    worker.wait()?;
    let pace = Pace::Rounds(rounds);
    let measured = match round {
        Round::PushPull => {
            let load = Load { round: 2 * bytes, end: 0 };
            Measured::take_until(&mut worker, load, pace, push_pull, |_| Ok(()))?
        }
        Round::Push => {
            let push = |worker: &mut Worker| {
                worker.push_all()?;
                worker.wait()
            };
            let load = Load { round: bytes, end: 2 * bytes };
            Measured::take_until(&mut worker, load, pace, push, push_pull)?
        }
        Round::Pull => {
            let time = Duration::from_millis(worker.config().wait_ms);
            Measured::take(bytes, pace, || worker.pull(worker.version(), time))?
        }
        Round::Step { backward, .. } => {
            Measured::take(2 * bytes, pace, || step(&mut worker, layers as usize, backward, &gradient))?
        }
    };
    let report = WorkerReport { measured, used: Usage::now() };
    worker.finish_with(serde_json::to_value(report).expect("numbers under text keys"))
}

fn push_pull(worker: &mut Worker) -> Result<()> {
    worker.push_pull_all()?;
    worker.wait()
}

fn step(worker: &mut Worker, layers: usize, backward: Duration, gradient: &[f32]) -> Result<()> {
    let start = Instant::now();
    for done in 1..=layers {
        let ready = start + backward.mul_f64(done as f64 / layers as f64);
        while let Some(left) = ready.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            std::thread::park_timeout(left);
        }
        worker.push_pull(layers - done, gradient)?;
    }
    worker.wait()
}
