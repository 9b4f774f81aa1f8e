//! A shard's memory on a GPU: its computations as jobs of a [`Pipeline`].
//!
//! A step whose gradient is clipped by its norm takes two jobs, since the host computes the factor: sum and norm, then the update.
//!
//! Invariant: jobs end in the order in which they were begun, so `flight` is in that order too; nothing here waits.

use std::{collections::VecDeque, os::fd::BorrowedFd, time::Instant};

use super::{ChunkImage, Contribution, InitialValues, OnDevice, Plan, Task, Work};
use crate::{
    Result,
    mem::{Lease, Region},
    optim::{
        ChunkStep, StepArguments, clipped_scale,
        gpu::{ChunkPlan, Done, Gradient, Pipeline, PipelineOptions},
    },
    transport::{Armed, Wakeup},
};

pub(super) struct DeviceMemory {
    pipeline: Pipeline,
    is_direct: bool,
    flight: VecDeque<Flying>,
    images: Option<Images>,
}

/// A computation under way; its leases are in the pipeline's hands.
struct Flying {
    work: Work,
    /// Worker and weight of each contribution that the pipeline holds.
    contributors: Vec<(u16, u16)>,
    /// What the norm is measured for: the update that comes next.
    then: Option<StepArguments>,
}

/// A copy of the state under way.
struct Images {
    chunks: Vec<ChunkImage>,
    /// By chunk: whether its copy has been begun. On the device nothing changes a chunk that is being copied.
    begun: Vec<bool>,
    /// All chunks before this one have been begun.
    next: usize,
    flying: usize,
    done: usize,
}

impl DeviceMemory {
    pub(super) fn new(plan: &Plan, values: &dyn InitialValues, device: &OnDevice) -> Result<DeviceMemory> {
        let options = &plan.options;
        let slots = options.optimizer.kind.state_slots();
        let chunks: Vec<u32> = plan.chunks.iter().map(|chunk| plan.layout.chunk(chunk.id).len).collect();
        let pipeline = PipelineOptions {
            state_slots: slots,
            has_accumulator: options.two_step || ChunkStep::needs_accumulator(&options.optimizer),
            gradient_dtype: options.gradient_dtype,
            parameter_dtype: options.parameter_dtype,
            contributions_max: usize::from(device.workers),
            spans_max: plan.chunks.iter().map(|chunk| chunk.spans.len()).max().unwrap_or(0).max(1),
            patience: device.patience,
            region: options.region.clone(),
            chunks: chunks.clone(),
        };
        let mut pipeline = Pipeline::new(&device.context, pipeline)?;
        for (index, len) in chunks.into_iter().enumerate() {
            let zeros = vec![0.0f32; len as usize];
            let (mut master, mut first) = (zeros.clone(), zeros.clone());
            plan.initialise(index, values, &mut master)?;
            first.fill(options.optimizer.kind.state_start());
            pipeline.store(index, [&master, &first, &zeros])?;
        }
        Ok(DeviceMemory { pipeline, is_direct: device.direct, flight: VecDeque::new(), images: None })
    }

    pub(super) fn adopt(&mut self, region: &Region) -> Result<()> {
        self.pipeline.pin(region)
    }

    pub(super) fn shared(&self, bytes: usize) -> Result<Option<(Region, Lease)>> {
        self.is_direct.then(|| self.pipeline.shared(bytes)).transpose()
    }

    pub(super) fn read(&self, lease: &Lease, bytes: usize) -> Result<Vec<u8>> {
        self.pipeline.read(lease, bytes)
    }

    pub(super) fn restore(&mut self, index: usize, image: &ChunkImage) -> Result<()> {
        self.pipeline.store(index, [&image.master, &image.first, &image.second])
    }

    /// Has these images, which are all chunks', filled.
    pub(super) fn begin_images(&mut self, chunks: Vec<ChunkImage>) -> Result<()> {
        assert!(self.images.is_none(), "one copy of the state at a time");
        let begun = vec![false; chunks.len()];
        self.images = Some(Images { chunks, begun, next: 0, flying: 0, done: 0 });
        self.fetch_next()
    }

    pub(super) fn take_images(&mut self) -> Option<Vec<ChunkImage>> {
        let images = self.images.take_if(|images| images.done == images.chunks.len())?;
        Some(images.chunks)
    }

    pub(super) fn has_room(&self) -> bool {
        // A computation may have to be preceded by a copy of what it changes.
        self.pipeline.room() > usize::from(self.images.is_some())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.flight.is_empty() && self.images.is_none()
    }

    pub(super) fn start(&mut self, plan: &Plan, mut work: Work) -> Result<()> {
        let index = plan.index(work.chunk);
        if work.task.changes_state() {
            self.fetch(index)?;
        }
        let mut contributors = Vec::new();
        let mut landed = Vec::new();
        for Contribution { worker, weight, lease } in work.contributions.drain(..) {
            contributors.push((worker, weight));
            landed.push(lease);
        }
        let arguments = plan.arguments(&work);
        let measures = plan.options.optimizer.clip.per_chunk_norm.is_some();
        let mut then = None;
        match (work.task, arguments) {
            (Task::Step, Some(_)) if measures => {
                then = arguments;
                self.pipeline.reduce(index, landed, true)?;
            }
            (Task::Apply, Some(_)) if measures => {
                then = arguments;
                self.pipeline.measure(index)?;
            }
            (Task::Step, Some(arguments)) => {
                let wire = work.wire.take();
                self.update(plan, index, arguments, arguments.scale, Gradient::Landed(landed), wire)?;
            }
            (Task::Apply, Some(arguments)) => {
                let wire = work.wire.take();
                self.update(plan, index, arguments, arguments.scale, Gradient::Accumulator, wire)?;
            }
            (Task::Reduce, _) => self.pipeline.reduce(index, landed, plan.options.measures)?,
            _ => self.pipeline.encode(index, work.wire.take().expect("an encode has somewhere to go"))?,
        }
        self.flight.push_back(Flying { work, contributors, then });
        Ok(())
    }

    fn update(
        &mut self,
        plan: &Plan,
        index: usize,
        arguments: StepArguments,
        scale: f32,
        gradient: Gradient,
        wire: Option<Lease>,
    ) -> Result<()> {
        let spans = &plan.chunks[index].spans;
        let plan = ChunkPlan { spans, config: &plan.options.optimizer, rates: &plan.rates, arguments, scale };
        self.pipeline.update(index, &plan, gradient, wire)
    }

    /// A computation that has ended. A job that is only the first half of one is followed by the second.
    pub(super) fn advance(&mut self, plan: &Plan) -> Result<Option<Work>> {
        while let Some(done) = self.pipeline.poll()? {
            if done.arrays.is_some() {
                self.fetched(done)?;
                continue;
            }
            let mut flying = self.flight.pop_front().expect("a job that is done was begun");
            let landed = done.contributions.into_iter().zip(flying.contributors.drain(..));
            let landed = landed.map(|(lease, (worker, weight))| Contribution { worker, weight, lease });
            flying.work.contributions.extend(landed);
            let Some(arguments) = flying.then.take() else {
                flying.work.wire = done.wire;
                flying.work.squared_norm = done.squared_norm;
                return Ok(Some(flying.work));
            };
            let limit = plan.options.optimizer.clip.per_chunk_norm.expect("measured for a limit");
            let scale = clipped_scale(limit, &arguments, done.squared_norm.expect("measured"));
            let wire = flying.work.wire.take();
            self.update(plan, done.chunk, arguments, scale, Gradient::Accumulator, wire)?;
            self.flight.push_back(flying);
        }
        self.fetch_next()?;
        Ok(None)
    }

    fn fetched(&mut self, done: Done) -> Result<()> {
        let images = self.images.as_mut().expect("only a copy of the state fetches");
        let image = &mut images.chunks[done.chunk];
        [image.master, image.first, image.second] = done.arrays.expect("looked at before");
        images.done += 1;
        images.flying -= 1;
        Ok(())
    }

    /// Begins to copy a chunk, if it is to be copied and has not been.
    fn fetch(&mut self, index: usize) -> Result<()> {
        let Some(images) = &mut self.images else { return Ok(()) };
        if !std::mem::replace(&mut images.begun[index], true) {
            images.flying += 1;
            self.pipeline.fetch(index)?;
        }
        Ok(())
    }

    /// Begins to copy the next chunk, one at a time: computations come first.
    fn fetch_next(&mut self) -> Result<()> {
        let Some(images) = &mut self.images else { return Ok(()) };
        while images.begun.get(images.next) == Some(&true) {
            images.next += 1;
        }
        let next = images.next;
        let may = images.flying == 0 && next < images.begun.len() && self.pipeline.has_room();
        if may { self.fetch(next) } else { Ok(()) }
    }
}

impl Wakeup for DeviceMemory {
    fn fd(&self) -> BorrowedFd<'_> {
        self.pipeline.fd()
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        Ok(if self.pipeline.arm()? { Armed::Ready } else { Armed::Sleep })
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.pipeline.next_deadline()
    }
}
