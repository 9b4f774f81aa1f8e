//! A server process: joins the layout, builds a lane for each of its shards, and waits for all of them.
//!
//! Invariant: every rank computes the same layout from the same view; the first lane that fails ends the process.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use super::{
    DecisionConfig, DecisionRules, EventLoop, InitialValues, Memory, MemoryOptions, MirrorConfig, OnDevice, Replica,
    Seeded, ShardConfig, Standby, StandbyOptions,
    hosting::Lanes,
    lane::{CommandWakeup, Ended, Lane},
    resume,
};
use crate::{
    Error, Result,
    checkpoint::InitialParameters,
    cuda::{Context, DeviceInfo, driver_version},
    layout::{Layout, TensorSpec},
    mem::{RegionOptions, Topology},
    observe::Usage,
    session::{
        Command, JobConfig, Member, Observation, Offer, PathOptions, Paths, Recorder, Report, ShardShape, Tenure,
        cores_from_environment, device_of, life_now, memory_available,
    },
    transport::{Fabrics, Waiter, WakeHandle},
    types::{Clock, PeerId, Rank, ShardId},
};

/// What all lanes of a process share.
pub(super) struct Plan {
    pub layout: Arc<Layout>,
    pub workers: u16,
    pub checkpoint_dir: Option<PathBuf>,
    pub start_clock: Clock,
    pub connect_time: Duration,
    /// Who serves a shard may change.
    pub has_tenures: bool,
    /// How long a wait may be before it is reported, and how often it is reported then.
    pub warn: Duration,
    pub heartbeat: Duration,
    /// The GPUs to compute on; none for the processor.
    devices: Vec<DeviceInfo>,
    pub config: JobConfig,
}

impl Plan {
    /// What the shards decide about each step, if anything.
    pub fn decision(&self) -> Option<DecisionConfig> {
        let lanes = (0..self.config.shard_count() as u16).map(|shard| self.config.first_tenure(ShardId(shard)).primary);
        let rules = DecisionRules {
            norm_limit: self.config.optimizer.clip.global_norm,
            skip_nonfinite: self.config.skip_nonfinite,
            loss_scale: self.config.loss_scale,
        };
        self.config.decides().then(|| DecisionConfig { rules, lanes: lanes.collect() })
    }
}

/// The parameters of a safetensors file, and the tensors' own rules for those that it lacks.
struct FromFile {
    file: InitialParameters,
    names: std::collections::HashSet<String>,
    otherwise: Seeded,
}

impl InitialValues for FromFile {
    fn fill(&self, tensor: &TensorSpec, start: u64, out: &mut [f32]) -> Result<()> {
        if !self.names.contains(&tensor.name) {
            return self.otherwise.fill(tensor, start, out);
        }
        self.file.fill(&tensor.name, &tensor.shape, start..start + out.len() as u64, out)
    }
}

/// Serves this rank's shards until the job ends.
///
/// # Errors
///
/// The first error of any lane; [`Error::Preempted`] if the job was told to stop and its checkpoint is complete.
pub fn run(mut member: Member) -> Result<()> {
    let config = member.config().clone();
    // A GPU that is not there is said before anybody waits for this rank.
    let devices = config.device.devices(member.rank())?;
    let view = member.view()?;
    let layout = Arc::new(config.layout(&view.declarations)?);
    // The launcher has looked at its own host; this host may be another one.
    if let Some(available) = memory_available() {
        config.check_memory(&layout, std::iter::once(member.rank()), available)?;
    }
    let plan = Arc::new(Plan {
        layout,
        workers: config.workers,
        checkpoint_dir: config.checkpoint.dir.clone(),
        start_clock: config.start_clock,
        connect_time: config.deadline().max(Duration::from_secs(30)),
        has_tenures: config.has_tenures(),
        warn: config.warn(),
        heartbeat: config.heartbeat(),
        devices,
        config,
    });
    let cores = cores_from_environment()?;
    let mut observation = Observation::start(&member)?;
    observe_memory(&plan, member.rank(), &observation)?;
    let mut lanes = Lanes::new(plan.clone(), cores)?;
    let is_first = !member.comes_again();
    // Where shards move, a server that comes later begins with none.
    let own = if plan.config.moves_shards() && !is_first { Vec::new() } else { plan.config.first_lanes(member.rank()) };
    let mut begun = Vec::new();
    for PeerId { lane, .. } in own {
        let begins = if is_first { Begins::First } else { Begins::Again };
        begun.push((lane, lanes.begin(&member, lane, begins, observation.recorder(lane).1)?));
    }
    let mut offers = Vec::new();
    for _ in &begun {
        match lanes.next()? {
            Step::Offers(own) => offers.extend(own),
            Step::Ended(_, outcome) => return outcome.map(drop),
        }
    }
    let incoming = member.exchange(offers)?;
    let set_up = Usage::now();
    for (lane, lane_out) in &begun {
        let own = incoming.iter().filter(|(_, to, _)| to.lane == *lane).cloned().collect();
        // A lane that has ended already says so below.
        let _ = lane_out.send(own);
    }
    if plan.config.moves_shards() {
        lanes.host(&member)?
    } else {
        lanes.wait(&member)?
    }
    observation.send_timeline(&member)?;
    let used = serde_json::to_value(Usage::now().since(set_up)).expect("numbers under text keys");
    member.reporter().report(Report::Finished { summary: used })
}

/// How a lane begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begins {
    /// With the job.
    First,
    /// As a backup that has nothing, as soon as another lane serves.
    Again,
    /// As a backup that has nothing, under this tenure.
    Under(Tenure),
}

/// What a lane's thread tells the process.
pub(super) enum Step {
    /// It is ready to be connected; these are its endpoints.
    Offers(Vec<Offer>),
    /// This lane has ended.
    Ended(u16, Result<Ended>),
}

/// Says that a lane has ended, also when its thread panics.
struct Guard {
    setup: Sender<Step>,
    wake: WakeHandle,
    lane: u16,
    outcome: Option<Result<Ended>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let panicked = || Err(Error::JobFailed("a shard's thread panicked".into()));
        let _ = self.setup.send(Step::Ended(self.lane, self.outcome.take().unwrap_or_else(panicked)));
        self.wake.wake();
    }
}

pub(super) struct LaneThread {
    pub plan: Arc<Plan>,
    pub me: PeerId,
    pub core: Option<usize>,
    pub transport: Fabrics,
    pub reporter: crate::session::Reporter,
    pub commands: CommandWakeup,
    pub setup: Sender<Step>,
    pub wake: WakeHandle,
    pub recorder: Option<Box<Recorder>>,
    pub begins: Begins,
}

impl LaneThread {
    pub fn shard(&self) -> ShardId {
        self.plan.config.shard_of(self.me)
    }

    /// Whether the job begins with this lane.
    fn is_first(&self) -> bool {
        matches!(self.begins, Begins::First)
    }

    /// The tenure under which this lane begins: a lane that begins again hears of one that another serves. Who serves the other
    /// shards goes into `decision`, as far as it is heard on the way.
    fn tenure(&mut self, decision: Option<&mut DecisionConfig>) -> Result<Tenure> {
        let mut lanes = decision.map(|decision| &mut decision.lanes);
        let shard = self.shard();
        match self.begins {
            Begins::First => return Ok(self.plan.config.first_tenure(shard)),
            Begins::Under(tenure) => return Ok(tenure),
            Begins::Again => {}
        }
        let deadline = Instant::now() + self.plan.connect_time;
        let waiter = Waiter::new()?;
        loop {
            match self.commands.0.poll()? {
                Some(Command::Tenure { shard: of, tenure }) if of == shard && tenure.primary != self.me => {
                    return Ok(tenure);
                }
                Some(Command::Tenure { shard: of, tenure }) if of != shard => {
                    if let Some(known) = lanes.as_mut().and_then(|lanes| lanes.get_mut(usize::from(of.0))) {
                        *known = tenure.primary;
                    }
                }
                Some(Command::JobFailed { text }) => return Err(Error::JobFailed(text)),
                Some(Command::Stop { reason, .. }) => return Err(Error::JobFailed(reason)),
                Some(_) => {}
                None if Instant::now() >= deadline => {
                    let (from, awaited, waited) = ("the launcher".into(), "who serves a shard", self.plan.connect_time);
                    return Err(Error::Deadline { from, awaited, chunk: None, clock: None, waited });
                }
                None => drop(waiter.wait(&mut [&mut self.commands], Some(deadline))?),
            }
        }
    }

    pub fn run(self, offers: &Receiver<Vec<Offer>>) {
        let (me, setup, begins) = (self.me, self.setup.clone(), self.begins);
        let mut guard = Guard { setup: setup.clone(), wake: self.wake.clone(), lane: me.lane, outcome: None };
        let serve = || -> Result<Ended> {
            // Fails only when the process is ending; then nobody sends offers either.
            let ready = |offers| drop(setup.send(Step::Offers(offers)));
            if self.is_first() {
                let mut lane = self.build()?;
                ready(lane.offers(me)?);
                let Ok(incoming) = offers.recv() else { return Ok(Ended::Done) };
                lane.connect(incoming)?;
                return lane.run();
            }
            ready(Vec::new());
            let Ok(_) = offers.recv() else { return Ok(Ended::Done) };
            match (self.build(), begins) {
                (Err(error), Begins::Under(_)) => Ok(Ended::Declines(error.to_string())),
                (built, _) => built?.run(),
            }
        };
        guard.outcome = Some(serve());
    }

    fn open(&self, info: &DeviceInfo) -> Result<OnDevice> {
        let config = &self.plan.config;
        let context = Context::open(info.ordinal)?;
        tracing::info!("shard {} computes on {info}, CUDA {}", self.shard().0, driver_version()?);
        Ok(OnDevice {
            context,
            workers: config.seats(),
            patience: Duration::from_millis(config.gpu_ms),
            direct: config.gpu_direct,
        })
    }

    /// Pins the thread, then allocates: memory lies beside whoever touches it.
    fn build(mut self) -> Result<Lane> {
        let (plan, shard) = (self.plan.clone(), self.shard());
        let mut decision = plan.decision();
        let tenure = self.tenure(decision.as_mut())?;
        let device = device_of(&plan.devices, shard);
        let topology = Topology::discover();
        let core = beside(&topology, self.core, device.and_then(|device| device.numa_node), self.me.lane);
        let node = core.and_then(|core| {
            let node = topology.cores.iter().find(|known| known.os_index == core)?.node;
            pin(core).then_some(node).flatten()
        });
        let device = device.map(|info| self.open(info)).transpose()?;
        let config = &plan.config;
        let region = RegionOptions { name: format!("shard-{}", shard.0), numa_node: node, ..RegionOptions::default() };
        let memory = MemoryOptions {
            optimizer: config.optimizer.clone(),
            reduction: config.reduction,
            gradient_dtype: config.gradient_dtype,
            parameter_dtype: config.parameter_dtype,
            two_step: config.accumulates(),
            measures: config.decides(),
            region: RegionOptions { prefault: true, ..region.clone() },
        };
        let mut memory = Memory::new(memory, plan.layout.clone(), shard, &*initial_values(config)?, device)?;
        // Whoever comes later gets the state from the primary.
        let resumed_at = if self.is_first() { resume::restore(&plan, shard, &mut memory)? } else { None };
        let versions = resumed_at.as_ref().map(|at| &at.versions[..]);
        resume::restore_rates(&plan, &mut memory)?;
        let options = PathOptions { life: if self.is_first() { 0 } else { life_now() }, ..config.path_options() };
        let (is_first, mirror) = (self.is_first(), self.mirror(&tenure));
        let mut paths = Paths::new(self.transport, options);
        paths.record(self.recorder);
        let shard_config = ShardConfig {
            me: self.me,
            shard,
            workers: config.seats(),
            consistency: config.consistency,
            slots: config.slots(&ShardShape::of(&plan.layout, shard))?,
            two_step: config.is_two_step(),
            decision,
            loss_scale: config.loss_scale,
            live: resume::live(config)?,
            epoch: 0,
            start_clock: config.start_clock,
            gradient_dtype: config.gradient_dtype,
            parameter_dtype: config.parameter_dtype,
            checkpoint_every: config.checkpoint.every,
            mirror,
            may_lose_workers: config.may_lose_workers(),
        };
        let layout = plan.layout.clone();
        let replica = if tenure.primary == self.me {
            let mut event_loop = EventLoop::new(shard_config, layout, memory, paths, &region, versions)?;
            if let Some(at) = &resumed_at {
                event_loop.resume_clocks(&at.clocks);
            }
            (config.workers..config.seats()).for_each(|worker| event_loop.leave_empty(worker));
            Replica::serving(self.me, tenure, event_loop)
        } else {
            let options = StandbyOptions { shard: shard_config, region, tenure, is_first, workers: config.workers };
            let mut standby = Standby::new(options, layout, memory, paths, versions)?;
            if !is_first {
                standby.join(Instant::now());
            }
            Replica::following(self.me, tenure, standby)
        };
        Ok(Lane::new(plan, (self.me, shard), replica, self.reporter, self.commands.0))
    }

    /// What there is for another lane of the shard, if there may be one.
    fn mirror(&self, tenure: &Tenure) -> Option<MirrorConfig> {
        let config = &self.plan.config;
        config.has_tenures().then(|| MirrorConfig {
            peer: tenure.other.filter(|_| tenure.primary == self.me),
            is_paired: tenure.is_paired,
            moves: config.moves_shards(),
            suspicion: config.suspicion(),
            parts: 1 + config.optimizer.kind.state_slots(),
            slots: config.replica_slots(),
        })
    }
}

/// Tells what the shards take of memory with which this rank begins.
fn observe_memory(plan: &Plan, rank: Rank, observation: &Observation) -> Result<()> {
    for lane in plan.config.first_lanes(rank) {
        let memory = plan.config.shard_memory(&ShardShape::of(&plan.layout, plan.config.shard_of(lane)))?;
        let kinds = [
            ("master", memory.master),
            ("state", memory.state),
            ("accumulator", memory.accumulator),
            ("replies", memory.replies),
            ("landing", memory.landing),
            ("replica", memory.replica),
            ("snapshot", memory.snapshot),
        ];
        for (kind, bytes) in kinds {
            observation.add_memory(kind, bytes);
        }
    }
    Ok(())
}

/// The core for a lane: the one that was dealt to it, unless that is not on its GPU's node and another one is.
fn beside(topology: &Topology, dealt: Option<usize>, node: Option<u32>, lane: u16) -> Option<usize> {
    let near: Vec<usize> =
        topology.cores.iter().filter(|core| node.is_some() && core.node == node).map(|core| core.os_index).collect();
    match dealt {
        Some(core) if near.is_empty() || near.contains(&core) => Some(core),
        None if near.is_empty() => None,
        _ => Some(near[usize::from(lane) % near.len()]),
    }
}

/// Binds this thread to a core; `false`, said once, where that is forbidden.
fn pin(core: usize) -> bool {
    let mut set = CpuSet::new();
    let pinned = set.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!("cannot bind a shard's thread to core {core}: {error}");
    }
    pinned.is_ok()
}

fn initial_values(config: &JobConfig) -> Result<Box<dyn InitialValues>> {
    let otherwise = Seeded(config.seed);
    Ok(match &config.init_from {
        Some(path) => {
            let file = InitialParameters::open(path)?;
            let names = file.names().into_iter().collect();
            Box::new(FromFile { file, names, otherwise })
        }
        None => Box::new(otherwise),
    })
}
