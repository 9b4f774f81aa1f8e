//! The worker of the jobs with which servers on a GPU are held against servers on the processor.
//!
//! Invariant: its gradients are a function of worker, clock and element alone.

use crate::{
    Result,
    layout::{Init, TensorSpec},
    session::Member,
    transport::sim::SimRandom,
    types::Clock,
    worker::Worker,
};

/// Elements of the job's tensors: odd, some smaller and some larger than a chunk.
pub const TENSORS: [u64; 4] = [3, 2000, 385, 1000];

/// Takes part in the job that the environment names, for `steps` steps.
///
/// # Errors
///
/// As [`Worker::join`] and [`Worker::wait`].
pub fn work(steps: Clock) -> Result<()> {
    let member = Member::from_environment()?;
    let spec = |(index, elements): (usize, &u64)| {
        TensorSpec::new(format!("tensor{index}"), [*elements]).init(Init::Normal(0.1))
    };
    let mut worker = Worker::with_member(member, TENSORS.iter().enumerate().map(spec).collect())?;
    while worker.clock() < steps {
        for (index, elements) in TENSORS.iter().enumerate().rev() {
            let seed = (worker.rank() as u64) << 40 | worker.clock() << 8 | index as u64;
            let mut random = SimRandom::new(seed);
            let gradient: Vec<f32> = (0..*elements).map(|_| (random.bits() % 2001) as f32 / 1000.0 - 1.0).collect();
            worker.push_pull(index, &gradient)?;
        }
        worker.wait()?;
    }
    worker.finish()
}
