//! What a training program holds: push gradients, pull parameters, wait.
//!
//! Invariant: every wait has a deadline, and its error names the server, the chunk and the clock that it waited for.

mod asking;
mod ending;
mod in_place;
mod joining;
mod observed;
mod pulling;

use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

pub use in_place::FlatView;

use observed::Observed;

use super::{
    ClientConfig, Command, Engine, Event,
    buffers::{Buffers, ChunkBuffer, TensorBuffer},
    progress::{Pace, Progress, Shift, connect_time},
};
use crate::{
    Error, Result,
    layout::{Layout, TensorSpec},
    mem::{DeviceMemory, Owner},
    session::{JobConfig, Member, Paths, Report, fabrics},
    types::{Clock, PeerId, Role, ShardId},
};

/// What a worker is made of once its paths have begun.
type SetUp = (Arc<Layout>, Vec<PeerId>, Buffers, Progress, Observed);

/// How often a worker tells the launcher how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// A worker of a job.
///
/// A clock is one step: [`push_pull`](Worker::push_pull) (or [`push`](Worker::push)) the gradient of each tensor in whatever
/// order backward produces them, then [`wait`](Worker::wait). Tensors are numbered as they were declared.
#[derive(Debug)]
pub struct Worker {
    member: Member,
    layout: Arc<Layout>,
    lanes: Vec<PeerId>,
    buffers: Buffers,
    progress: Progress,
    clock: Clock,
    /// Whether this clock's pushes want parameters back; decided by its first push.
    wants_reply: Option<bool>,
    /// The clock is over for us: everything has been pushed.
    closed: bool,
    events: VecDeque<Event>,
    attached: bool,
    finished: bool,
    /// Of one that comes while the job runs: it knows its first clock.
    begins: bool,
    /// The first clock at which it is of the job no more, once it has been told to leave.
    leaves_at: Option<Clock>,
    owner: Owner,
    /// The factor on the loss.
    loss_scale: f32,
    reported: Instant,
    observed: Observed,
    /// A checkpoint that has been asked for.
    asked: Option<asking::Asked>,
}

impl Worker {
    /// Takes this process' place in the job that its environment names (`gradwire run` sets it), and waits for the first
    /// parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by the launcher; [`Error::LayoutConflict`] if another worker declared a tensor differently.
    pub fn join(tensors: Vec<TensorSpec>) -> Result<Worker> {
        Worker::with_member(Member::from_environment()?, tensors)
    }

    /// The same with a seat that has been taken already.
    pub fn with_member(member: Member, tensors: Vec<TensorSpec>) -> Result<Worker> {
        Worker::place(member, tensors, None)
    }

    fn place(mut member: Member, tensors: Vec<TensorSpec>, device: Option<DeviceMemory>) -> Result<Worker> {
        let reporter = member.reporter();
        let joined = Worker::set_up(&mut member, tensors, device);
        match joined {
            Ok((layout, lanes, buffers, progress, observed)) => {
                let mut worker = Worker {
                    clock: member.config().start_clock,
                    loss_scale: member.config().loss_scale.first(),
                    member,
                    layout,
                    lanes,
                    buffers,
                    progress,
                    wants_reply: None,
                    closed: false,
                    events: VecDeque::new(),
                    attached: false,
                    finished: false,
                    begins: false,
                    leaves_at: None,
                    owner: Owner::here(),
                    reported: Instant::now(),
                    observed,
                    asked: None,
                };
                worker.first_parameters()?;
                worker.observed.begins(worker.clock);
                Ok(worker)
            }
            Err(error) => {
                let _ = reporter.report(Report::failure(&error));
                Err(error)
            }
        }
    }

    fn set_up(member: &mut Member, tensors: Vec<TensorSpec>, device: Option<DeviceMemory>) -> Result<SetUp> {
        let rank = member.rank();
        if rank.role != Role::Worker {
            return Err(Error::Config(format!("this process is {rank}: only a worker pushes and pulls")));
        }
        let names: Vec<String> = tensors.iter().map(|spec| spec.name.clone()).collect();
        let view = member.declare(tensors)?;
        let config = member.config().clone();
        let layout = Arc::new(config.layout(&view.declarations)?);
        let dtypes = (config.gradient_dtype, config.parameter_dtype);
        let buffers = Buffers::new(&layout, rank.index, &names, dtypes, device)?;
        let shards = (0..config.shard_count() as u16).map(ShardId);
        let lanes: Vec<PeerId> = shards.map(|shard| config.first_tenure(shard).primary).collect();
        let client = ClientConfig {
            worker: rank.index,
            lanes: lanes.clone(),
            consistency: config.consistency,
            epoch: 0,
            gradient_dtype: config.gradient_dtype,
            parameter_dtype: config.parameter_dtype,
            has_copies: config.has_tenures(),
        };
        let (observed, recorder) = Observed::start(member)?;
        observed.memory(&config, &layout, rank.index);
        let mut paths = Paths::new(fabrics::open(member, 0, false)?, joining::path_options(member));
        paths.record(recorder);
        let mut engine = Engine::new(client, layout.clone(), paths, &buffers.parameters, &buffers.gradients)?;
        let me = PeerId::worker(rank.index);
        // Of whoever comes again nobody waits for offers: it builds its paths one by one.
        let first = lanes.iter().filter(|_| !member.comes_again());
        let offers = first.map(|lane| Ok((me, *lane, engine.paths().offer(*lane)?))).collect::<Result<_>>()?;
        let deadline = Instant::now() + connect_time(&config);
        for (lane, _, endpoint) in member.exchange(offers)? {
            engine.connect(lane, &endpoint, deadline)?;
        }
        if member.comes_again() {
            engine.rejoin(Instant::now());
        }
        engine.paths().note_fallbacks();
        let choices = engine.paths().transport().choices().cloned().collect();
        member.reporter().report(Report::Paths(choices))?;
        let pace = Pace { warn: config.warn(), again: config.heartbeat() };
        let links = (member.commands()?, member.reporter());
        let progress = Progress::start(engine, links, pace)?;
        Ok((layout, lanes, buffers, progress, observed))
    }

    /// This worker's number, from 0.
    pub fn rank(&self) -> usize {
        self.member.rank().index.into()
    }

    /// How many workers the job began with.
    pub fn workers(&self) -> usize {
        self.config().workers.into()
    }

    /// The clock that the next push belongs to; not 0 in a job that was resumed.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The job's settings.
    pub fn config(&self) -> &JobConfig {
        self.member.config()
    }

    /// What the loss of this clock, and so every gradient that is pushed in it, is to be multiplied by: servers divide by it. 1 unless
    /// the job's setting `loss_scale` says otherwise; after [`wait`](Worker::wait) it may have changed.
    pub fn loss_scale(&self) -> f32 {
        self.loss_scale
    }

    /// The number of the tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<usize> {
        self.buffers.tensors.iter().position(|tensor| tensor.name == name)
    }

    /// Copies a tensor's parameters into `out`, which has as many elements as the tensor.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if `out` has another length, or while the parameters are on their way.
    pub fn parameters(&self, tensor: usize, out: &mut [f32]) -> Result<()> {
        self.check_tensor(tensor, out.len())?;
        self.buffers.read(tensor, out)
    }

    /// Pushes a tensor's gradient of this clock; [`wait`](Worker::wait) brings the new parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the gradient has another length than the tensor or was given already; [`Error::JobFailed`] if the job
    /// has ended.
    pub fn push_pull(&mut self, tensor: usize, gradient: &[f32]) -> Result<()> {
        self.give(tensor, gradient, true)
    }

    /// Pushes a tensor's gradient of this clock and wants nothing back: [`wait`](Worker::wait) does not wait for parameters.
    /// All pushes of a clock are of one kind.
    ///
    /// # Errors
    ///
    /// As [`push_pull`](Worker::push_pull).
    pub fn push(&mut self, tensor: usize, gradient: &[f32]) -> Result<()> {
        self.give(tensor, gradient, false)
    }

    /// Ends the clock: tensors that were not pushed are absent. Waits for the new parameters (after `push_pull`), or until the
    /// gradients have left (after `push`). A clock without any push ends as one of `push_pull`.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`] after the job's `wait_ms`, naming what was awaited; it may be called again. [`Error::Preempted`] if the
    /// job was told to stop and has written its checkpoint; [`Error::Left`] if this worker was told to leave and this clock is not its
    /// any more; [`Error::JobFailed`] if it has failed.
    pub fn wait(&mut self) -> Result<()> {
        self.wait_for(self.wait_time())
    }

    /// [`wait`](Worker::wait) with a deadline of its own.
    pub fn wait_for(&mut self, time: Duration) -> Result<()> {
        self.is_ours()?;
        if !self.closed {
            let wants_reply = self.wants_reply.unwrap_or(true);
            self.decide_reply(wants_reply)?;
            self.close_clock(wants_reply)?;
            self.closed = true;
            self.progress.set_waiting(true);
            self.observed.waits();
        }
        self.until(time, Buffers::all_home)?;
        self.progress.set_waiting(false);
        self.buffers.begin_clock();
        self.wants_reply = None;
        self.closed = false;
        self.observed.waited(self.clock);
        self.clock += 1;
        self.observed.begins(self.clock);
        self.report_progress();
        Ok(())
    }

    /// Ends the clock as [`wait`](Worker::wait) does, but without waiting: whether everything is there already. `false` means that it
    /// is to be asked again; after `true` the next clock has begun.
    ///
    /// # Errors
    ///
    /// As [`wait`](Worker::wait), but for the deadline.
    pub fn test(&mut self) -> Result<bool> {
        self.is_ours()?;
        self.progress.rest();
        match self.wait_for(Duration::ZERO) {
            Ok(()) => Ok(true),
            Err(Error::Deadline { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A descriptor for `poll` or `epoll`, which becomes readable when [`test`](Worker::test) is worth calling: call `test`, and
    /// while it says `false`, poll and call it again. It is the worker's: neither read nor close it.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] where the process has no descriptor left.
    pub fn completion_fd(&self) -> Result<BorrowedFd<'_>> {
        self.is_ours()?;
        self.progress.fd()
    }

    /// Changes the default group's learning rate on every server, from this clock on. Under `bsp` it takes effect at exactly
    /// that clock everywhere, if it is called before this worker's first push of the clock.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a rate that is negative or not finite, and where groups with rates of their own have no proportion to
    /// a default of 0.
    pub fn set_learning_rate(&mut self, rate: f64) -> Result<()> {
        self.is_ours()?;
        self.config().optimizer.learning_rates().set(rate, self.clock)?;
        self.progress.command([Command::SetLearningRate { rate, clock: self.clock }]);
        Ok(())
    }

    fn give(&mut self, tensor: usize, gradient: &[f32], wants_reply: bool) -> Result<()> {
        self.check_tensor(tensor, gradient.len())?;
        self.begin_push(tensor, wants_reply)?;
        self.buffers.write(tensor, gradient)?;
        self.push_written(tensor, wants_reply);
        Ok(())
    }

    fn begin_push(&mut self, tensor: usize, wants_reply: bool) -> Result<()> {
        self.decide_reply(wants_reply)?;
        if self.buffers.tensors[tensor].written {
            let name = &self.buffers.tensors[tensor].name;
            return Err(Error::Config(format!("the gradient of `{name}` was pushed twice in clock {}", self.clock)));
        }
        Ok(())
    }

    /// Pushes the chunks that are complete now that this tensor's gradient is in its place.
    fn push_written(&mut self, tensor: usize, wants_reply: bool) {
        self.buffers.mark_written(tensor);
        self.push_ready(wants_reply);
    }

    fn decide_reply(&mut self, wants_reply: bool) -> Result<()> {
        self.is_ours()?;
        self.is_of_the_job()?;
        if self.closed {
            return Err(Error::Config("the clock is over: call wait() again before pushing".into()));
        }
        if !wants_reply && self.config().loss_scale.is_dynamic() {
            return Err(Error::Config(
                "push wants nothing back, and the next clock's loss scale comes with the parameters: use push_pull"
                    .into(),
            ));
        }
        if self.wants_reply.is_none() && !self.buffers.parameters_home() {
            return Err(Error::Config("what an earlier pull asked for is still on its way: pull again first".into()));
        }
        if *self.wants_reply.get_or_insert(wants_reply) != wants_reply {
            return Err(Error::Config("push and push_pull cannot be mixed within a clock".into()));
        }
        Ok(())
    }

    /// Tensors that were not pushed: zeros beside others in their chunk, absence where a chunk has nothing at all.
    fn close_clock(&mut self, wants_reply: bool) -> Result<()> {
        self.buffers.fill_gaps()?;
        let clock = self.clock;
        let observed = &mut self.observed;
        let left = self.buffers.chunks.iter_mut().filter(|chunk| !chunk.pushed);
        self.progress.command(left.map(|chunk| {
            chunk.pushed = true;
            let reply = if wants_reply { chunk.parameters.take() } else { None };
            observed.given(chunk.id, clock);
            let gradient = if chunk.written == 0 { None } else { chunk.gradient.take() };
            Command::Push { chunk: chunk.id, clock, gradient, reply }
        }));
        Ok(())
    }

    fn push_ready(&mut self, wants_reply: bool) {
        let clock = self.clock;
        let observed = &mut self.observed;
        let (ready, chunks) = self.buffers.take_ready();
        self.progress.command(ready.map(|index| {
            let chunk = &mut chunks[index];
            chunk.pushed = true;
            observed.given(chunk.id, clock);
            let reply = if wants_reply { chunk.parameters.take() } else { None };
            Command::Push { chunk: chunk.id, clock, gradient: chunk.gradient.take(), reply }
        }));
    }

    fn until(&mut self, time: Duration, home: fn(&Buffers) -> bool) -> Result<()> {
        let deadline = Instant::now() + time;
        let shift = self.progress.shift();
        while !home(&self.buffers) {
            self.take_events(&shift, deadline)?;
            self.is_of_the_job()?;
            if !home(&self.buffers) && Instant::now() >= deadline {
                return Err(self.deadline_error(time));
            }
        }
        self.buffers.device.as_ref().map_or(Ok(()), DeviceMemory::settle)
    }

    fn deadline_error(&self, waited: Duration) -> Error {
        let away = |chunk: &&ChunkBuffer| chunk.parameters.is_none();
        let (chunk, awaited) = match self.buffers.chunks.iter().find(away) {
            Some(chunk) => (Some(chunk.id), "parameters"),
            None => {
                let unsent = self.buffers.chunks.iter().find(|chunk| chunk.gradient.is_none());
                (unsent.map(|chunk| chunk.id), "room for a gradient")
            }
        };
        let from = chunk.map_or_else(|| "the servers".into(), |chunk| self.owner(chunk).to_string());
        Error::Deadline { from, awaited, chunk, clock: Some(self.clock), waited }
    }

    fn take_events(&mut self, shift: &Shift, deadline: Instant) -> Result<()> {
        self.progress.events(shift, deadline, &mut self.events)?;
        for event in self.events.drain(..) {
            match event {
                Event::Attached => self.attached = true,
                Event::GradientSent { chunk, lease } => self.buffers.own(chunk).gradient = Some(lease),
                Event::Parameters { chunk, version, lease } => {
                    let chunk = self.buffers.own(chunk);
                    chunk.version = version;
                    chunk.parameters = Some(lease);
                }
                Event::LossScale(scale) => self.loss_scale = scale,
                Event::Finished => self.finished = true,
                Event::Begins(clock) => (self.clock, self.begins) = (clock, true),
                Event::Leaves(clock) => self.leaves_at = Some(clock),
            }
        }
        Ok(())
    }

    fn report_progress(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.reported) >= PROGRESS_EVERY {
            self.reported = now;
            // If the launcher is gone, the progress thread says so at the next wait.
            let _ = self.member.reporter().report(Report::Progress { clock: self.clock });
            let _ = self.member.reporter().report(Report::sent());
        }
    }

    fn check_tensor(&self, tensor: usize, len: usize) -> Result<()> {
        let known = self.known(tensor)?;
        if known.len == len {
            return Ok(());
        }
        Err(Error::Config(format!("`{}` has {} elements, and {len} were given", known.name, known.len)))
    }

    /// Refuses a copy of this worker that `fork` has made: its threads, its paths and its place in the job are the parent's.
    fn is_ours(&self) -> Result<()> {
        if self.owner.is_here() {
            return Ok(());
        }
        Err(Error::Config(format!(
            "this worker belongs to process {}, and fork() has copied it into this one, where it can do nothing: use it there, or \
             start processes instead of forking (in Python: multiprocessing's `spawn`)",
            self.owner.process()
        )))
    }

    fn known(&self, tensor: usize) -> Result<&TensorBuffer> {
        self.is_ours()?;
        let count = self.buffers.tensors.len();
        let none = || Error::Config(format!("there is no tensor {tensor}: this worker declared {count}"));
        self.buffers.tensors.get(tensor).ok_or_else(none)
    }

    fn owner(&self, chunk: crate::types::ChunkId) -> PeerId {
        self.lanes[usize::from(self.layout.chunk(chunk).shard.0)]
    }

    fn wait_time(&self) -> Duration {
        Duration::from_millis(self.config().wait_ms)
    }
}
