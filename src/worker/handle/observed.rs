//! What a worker's program does, as its own thread records it: when it gave which gradient, and how long it waited.
//!
//! Invariant: where nothing is observed no clock is read.

use std::{sync::Arc, time::Instant};

use crate::{
    Result,
    layout::Layout,
    observe::{LaneMeter, What},
    session::{JobConfig, Member, Observation, Recorder, Trace},
    types::{ChunkId, Clock, PeerId},
};

/// What the program's own thread records.
#[derive(Debug)]
pub(super) struct Observed {
    observation: Observation,
    meter: Option<Arc<LaneMeter>>,
    trace: Option<Trace>,
    /// Since when the program has waited for the end of the clock.
    waits_since: Option<Instant>,
}

impl Observed {
    /// Opens what the job's settings ask for; the recorder is the progress thread's.
    pub fn start(member: &Member) -> Result<(Observed, Option<Box<Recorder>>)> {
        let mut observation = Observation::start(member)?;
        let (meter, recorder) = observation.recorder(0);
        let trace = observation.trace(0);
        Ok((Observed { observation, meter, trace, waits_since: None }, recorder))
    }

    /// Tells what the worker's buffers take.
    pub fn memory(&self, config: &JobConfig, layout: &Layout, worker: u16) {
        let elements = crate::layout::WorkerView::new(layout, worker).elements;
        self.observation.add_memory("gradients", elements * config.gradient_dtype.size() as u64);
        self.observation.add_memory("parameters", elements * config.parameter_dtype.size() as u64);
    }

    /// The program has begun a clock.
    pub fn begins(&mut self, clock: Clock) {
        if let Some(meter) = &self.meter {
            meter.clock.set(clock);
        }
        self.mark(What::Began, ChunkId(0), clock);
    }

    /// The program has given a chunk's gradient.
    pub fn given(&self, chunk: ChunkId, clock: Clock) {
        self.mark(What::Given, chunk, clock);
    }

    /// The program waits for the end of a clock from now on.
    pub fn waits(&mut self) {
        self.waits_since = self.meter.as_ref().map(|_| Instant::now());
    }

    /// The program has all that it waited for.
    pub fn waited(&mut self, clock: Clock) {
        self.mark(What::Waited, ChunkId(0), clock);
        if let (Some(meter), Some(since)) = (&self.meter, self.waits_since.take()) {
            meter.program.add(since.elapsed());
        }
    }

    /// The worker has done its part.
    pub fn finish(&self, member: &Member) -> Result<()> {
        self.observation.send_timeline(member)
    }

    fn mark(&self, what: What, chunk: ChunkId, clock: Clock) {
        if let Some(trace) = &self.trace {
            trace.mark(what, chunk, clock, PeerId::worker(trace.me.rank.index));
        }
    }
}
