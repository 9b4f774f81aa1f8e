//! The simulator's world: a whole job in one thread, over the simulated fabric, under a seed.
//!
//! It builds the same `EventLoop` and `Engine` that the binary runs, decides who runs when and what breaks, and plays the part of
//! the training programs. What is right is for the [`Program`] to judge: it sees every parameter that a worker receives.
//!
//! Invariant: no protocol code here; nothing is decided by anything but the seed.
#![forbid(unsafe_code)]

mod build;
mod changes;
mod relay;
mod time;
mod trainer;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use build::{build_server, region};

use crate::{
    Error, Result,
    consistency::Consistency,
    layout::{Layout, LayoutOptions, TensorSpec},
    mem::{HugePages, Locking, RegionOptions},
    optim::{LiveChange, LossScaleConfig, OptimizerConfig, Reduction},
    server::{
        DecisionConfig, DecisionRules, EventLoop, Memory, MemoryOptions, Progress, Seeded, ShardConfig, Snapshot,
    },
    session::{PathCounts, PathOptions, Paths, PayloadChecksums, Proposal},
    transport::{
        Endpoint,
        sim::{SimNetwork, SimOptions, SimRandom, SimTransport},
    },
    types::{ChunkId, Clock, Dtype, PeerId, ShardId, Version},
};
use changes::Changing;
use trainer::Trainer;

/// Where a training program is.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Which worker.
    pub worker: u16,
    /// Its clock: the one that the gradient is for, or whose reply the parameters are (start clock - 1, wrapped, at the start).
    pub clock: Clock,
    /// Which chunk.
    pub chunk: ChunkId,
    /// The parameters' version.
    pub version: Version,
    /// What the gradient is to be multiplied by.
    pub loss_scale: f32,
}

/// What the workers of a world compute, and what they check.
pub trait Program {
    /// Fills in the gradient of a chunk; false if this worker has none at this clock.
    fn gradient(&mut self, at: At, parameters: &[f32], gradient: &mut [f32]) -> bool;

    /// Looks at parameters that have arrived.
    fn received(&mut self, at: At, parameters: &[f32]) -> Result<(), String>;
}

/// What goes wrong in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chaos {
    /// Delays only.
    Calm,
    /// Paths stand still for up to this long now and then.
    Partitions(Duration),
    /// One path breaks, and nobody rebuilds it.
    BrokenPath,
    /// Paths break again and again, at one end or at both, and are rebuilt; now and then one stands still, and where `corrupt` says so
    /// payloads are damaged.
    Rebuilding {
        /// One payload in so many arrives with a wrong bit; 0: none.
        corrupt: u64,
    },
    /// One process dies and its paths break.
    Death,
    /// One process stops running; its paths stay up.
    Stop,
}

/// A job to be simulated.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Servers of one shard each.
    pub servers: u16,
    /// By worker: its tensors.
    pub declarations: Vec<Vec<TensorSpec>>,
    /// Elements of a chunk.
    pub chunk_elements: u32,
    /// Window positions.
    pub slots: u32,
    /// What an update is and who waits for whom.
    pub consistency: Consistency,
    /// Sum or mean.
    pub reduction: Reduction,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Reduce and apply in two steps.
    pub two_step: bool,
    /// A step with a gradient that is not finite is skipped.
    pub skip_nonfinite: bool,
    /// By what gradients come multiplied.
    pub loss_scale: LossScaleConfig,
    /// Clocks that every worker trains.
    pub clocks: Clock,
    /// Workers train fewer clocks than that, each as many as the seed says: some leave while others go on.
    pub uneven: bool,
    /// Workers do not wait for their last pushes: they finish while these are under way.
    pub hasty: bool,
    /// Checkpoints are asked for at random moments, of each shard at another.
    pub requests: bool,
    /// Push and pull apart, instead of asking for the reply with the push.
    pub separate_pull: bool,
    /// A change that holds from a clock on, known to every shard from the start.
    pub change_from: Option<(Clock, LiveChange)>,
    /// A change that somebody makes at a random moment.
    pub change_live: Option<LiveChange>,
    /// A snapshot every so many clocks.
    pub checkpoint_every: Option<u64>,
    /// What goes wrong.
    pub chaos: Chaos,
    /// Longest delay of a message.
    pub delay_max: Duration,
}

impl WorldOptions {
    /// Clocks that a worker trains.
    pub fn clocks_of(&self, worker: u16) -> Clock {
        let fewer = || 1 + SimRandom::new(self.seed ^ (u64::from(worker) + 1) << 32).below(self.clocks);
        if self.uneven { fewer() } else { self.clocks }
    }
}

impl WorldOptions {
    fn path_options(&self) -> PathOptions {
        let rebuild = if self.chaos == Chaos::BrokenPath { Duration::ZERO } else { DEADLINE };
        let corrupts = matches!(self.chaos, Chaos::Rebuilding { corrupt } if corrupt > 0);
        let checksums = if corrupts { PayloadChecksums::On } else { PayloadChecksums::Off };
        PathOptions { epoch: 0, heartbeat: HEARTBEAT, deadline: DEADLINE, rebuild, checksums }
    }

    fn decides(&self) -> bool {
        self.skip_nonfinite || self.loss_scale.is_dynamic() || self.optimizer.clip.global_norm.is_some()
    }

    fn decision(&self) -> Option<DecisionConfig> {
        let rules = DecisionRules {
            norm_limit: self.optimizer.clip.global_norm,
            skip_nonfinite: self.skip_nonfinite,
            loss_scale: self.loss_scale,
        };
        let lanes = (0..self.servers).map(|server| PeerId::server(server, 0)).collect();
        self.decides().then_some(DecisionConfig { rules, lanes })
    }
}

/// How a simulated job ended.
#[derive(Debug)]
pub struct Outcome {
    /// The first error, and who reported it.
    pub failure: Option<(PeerId, Error)>,
    /// The two ends of what was broken, if anything was; one end twice for a death.
    pub victims: Option<(PeerId, PeerId)>,
    /// By shard: the state at the end.
    pub finals: Vec<Snapshot>,
    /// By shard: what was stored on the way.
    pub snapshots: Vec<Vec<Snapshot>>,
    /// The clock from which on the change of `change_live` holds; `None` if the job had ended before.
    pub changed: Option<Clock>,
    /// Simulated time.
    pub elapsed: Duration,
    /// Payloads that the network damaged.
    pub corrupted: u64,
    /// What all ends together say of their paths: each end of a rebuilt path counts it.
    pub paths: PathCounts,
}

/// Heartbeats of a simulated job.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence after which a simulated peer is dead.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Nothing got on for this long: a deadlock.
const STALL: Duration = Duration::from_secs(60);

struct World<'a> {
    options: &'a WorldOptions,
    layout: Arc<Layout>,
    random: SimRandom,
    network: SimNetwork,
    start: Instant,
    now: Instant,
    servers: Vec<EventLoop<SimTransport>>,
    trainers: Vec<Trainer>,
    snapshots: Vec<Vec<Snapshot>>,
    /// Nodes that do not run any more.
    halted: Vec<PeerId>,
    /// Nodes that do not run for a while.
    asleep: Vec<(PeerId, Instant)>,
    victims: Option<(PeerId, PeerId)>,
    chaos_at: Option<u64>,
    /// Requests for checkpoints on their way: the round in which a server hears of one, the server, the clock.
    orders: Vec<(u64, usize, Clock)>,
    changing: Option<Changing>,
    /// Offers for paths that are to be rebuilt, on their way: when, to whom, what.
    relay: Vec<(Instant, PeerId, Proposal)>,
    progressed: Instant,
}

/// Runs a job to its end.
///
/// # Errors
///
/// What the program found wrong, or a deadlock, in words. A job that ends by an error of its own is an [`Outcome`].
pub fn run(options: &WorldOptions, program: &mut dyn Program) -> Result<Outcome, String> {
    let mut world = World::new(options).map_err(|error| error.to_string())?;
    let failure = world.run(program)?;
    let finals: Result<_> = world.servers.iter_mut().map(|server| server.snapshot(options.clocks)).collect();
    let finals = finals.map_err(|error| error.to_string())?;
    let paths = world.path_counts();
    Ok(Outcome {
        failure,
        victims: world.victims,
        finals,
        snapshots: world.snapshots,
        changed: world.changing.and_then(|changing| changing.clock),
        elapsed: world.now - world.start,
        corrupted: world.network.corrupted(),
        paths,
    })
}

impl<'a> World<'a> {
    fn new(options: &'a WorldOptions) -> Result<World<'a>> {
        let mut random = SimRandom::new(options.seed);
        let start = Instant::now();
        let queue_max = 1 + random.below(12) as usize;
        let (lingers, refuse_one_in, corrupt_one_in) = match options.chaos {
            Chaos::Rebuilding { corrupt } => (true, 8, corrupt),
            _ => (false, 0, 0),
        };
        let sim = SimOptions { delay_max: options.delay_max, queue_max, lingers, refuse_one_in, corrupt_one_in };
        let network = SimNetwork::new(random.bits(), sim, start);
        let layout_options = LayoutOptions { chunk_elements: options.chunk_elements, shards: options.servers };
        let layout = Arc::new(Layout::build(&options.declarations, layout_options)?);
        let workers = options.declarations.len() as u16;
        let servers = (0..options.servers).map(|server| build_server(options, &layout, &network, server));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let trainers = (0..workers).map(|worker| Trainer::new(options, &layout, &network, worker));
        let trainers = trainers.collect::<Result<Vec<_>>>()?;
        let chaos_at = match options.chaos {
            Chaos::Calm => None,
            Chaos::Partitions(_) | Chaos::Rebuilding { .. } => Some(1 + random.below(50)),
            _ => Some(1 + random.below(400)),
        };
        let snapshots = vec![Vec::new(); servers.len()];
        let changing = options.change_live.map(|change| Changing::new(change, servers.len(), &mut random));
        let mut world = World {
            options,
            layout,
            random,
            network,
            start,
            now: start,
            servers,
            trainers,
            snapshots,
            halted: Vec::new(),
            asleep: Vec::new(),
            victims: None,
            chaos_at,
            orders: Vec::new(),
            changing,
            relay: Vec::new(),
            progressed: start,
        };
        world.connect()?;
        Ok(world)
    }

    fn connect(&mut self) -> Result<()> {
        let deadline = self.now + DEADLINE;
        let nowhere = Endpoint::default();
        for server in 0..self.servers.len() {
            for worker in 0..self.trainers.len() {
                let (lane, peer) = (PeerId::server(server as u16, 0), PeerId::worker(worker as u16));
                self.servers[server].connect(peer, &nowhere, deadline)?;
                self.trainers[worker].engine.connect(lane, &nowhere, deadline)?;
            }
            for lane in self.lanes_of(server) {
                self.servers[server].connect(lane, &nowhere, deadline)?;
            }
        }
        Ok(())
    }

    /// Turns until every worker has finished and every server is done, or somebody fails.
    fn run(&mut self, program: &mut dyn Program) -> Result<Option<(PeerId, Error)>, String> {
        for round in 0u64.. {
            self.network.advance(self.now);
            self.wreak(round);
            self.request(round);
            self.change(round)?;
            self.pass_on();
            self.doze();
            let mut busy = false;
            let nodes = self.servers.len() + self.trainers.len();
            let first = self.random.below(nodes as u64) as usize;
            for offset in 0..nodes {
                if self.random.once_in(4) {
                    continue; // it is slow this time
                }
                match self.turn((first + offset) % nodes, program)? {
                    Ok(more) => busy |= more,
                    Err(failure) => return Ok(Some(failure)),
                }
            }
            if self.is_done() {
                return Ok(None);
            }
            if self.now - self.progressed > STALL {
                return Err(format!("deadlock: nothing got on for {} s; {}", STALL.as_secs(), self.waits()));
            }
            self.take_offers();
            self.pass_time(busy);
        }
        unreachable!("the loop ends by a return")
    }

    /// Whether nothing is left to be done; whoever does not run any more will not do it.
    fn is_done(&self) -> bool {
        let halted = |peer: PeerId| self.halted.contains(&peer);
        let mut workers = self.trainers.iter().enumerate();
        let mut servers = self.servers.iter().enumerate();
        workers.all(|(worker, trainer)| trainer.is_finished() || halted(PeerId::worker(worker as u16)))
            && servers.all(|(server, shard)| shard.is_done() || halted(PeerId::server(server as u16, 0)))
    }

    /// One node's turn: whether it has more to do, or how it failed.
    fn turn(&mut self, node: usize, program: &mut dyn Program) -> Result<Result<bool, (PeerId, Error)>, String> {
        let now = self.now;
        if self.rests(self.nodes()[node]) {
            return Ok(Ok(false));
        }
        if let Some(server) = self.servers.get_mut(node) {
            let me = PeerId::server(node as u16, 0);
            let turned = server.turn(now);
            while let Some(snapshot) = server.take_snapshot() {
                self.snapshots[node].push(snapshot);
            }
            return Ok(turned.map(|progress| progress == Progress::Busy).map_err(|error| (me, error)));
        }
        let worker = node - self.servers.len();
        let me = PeerId::worker(worker as u16);
        let trainer = &mut self.trainers[worker];
        match trainer.turn(now, &mut self.random, program) {
            Ok(got_on) => {
                if got_on? {
                    self.progressed = now;
                }
                Ok(Ok(false))
            }
            Err(error) => Ok(Err((me, error))),
        }
    }

    /// Breaks what is to be broken.
    fn wreak(&mut self, round: u64) {
        if self.chaos_at.is_none_or(|at| round < at) {
            return;
        }
        let lane = PeerId::server(self.random.below(self.servers.len() as u64) as u16, 0);
        let mut worker = PeerId::worker(self.random.below(self.trainers.len() as u64) as u16);
        let lanes = self.lanes_of(lane.rank.index.into());
        if !lanes.is_empty() && self.random.once_in(2) {
            worker = lanes[self.random.below(lanes.len() as u64) as usize]; // the path between two servers, this time
        }
        let victim = if self.random.once_in(2) { lane } else { worker };
        self.chaos_at = None;
        match self.options.chaos {
            Chaos::Calm => {}
            Chaos::Partitions(longest) => {
                let length = Duration::from_micros(self.random.below(longest.as_micros() as u64 + 1));
                self.network.cut(lane, worker, self.now + length);
                self.chaos_at = Some(round + 1 + self.random.below(200));
            }
            // An injection that hits nothing in flight proves nothing: wait for a moment when there is something.
            _ if self.network.in_flight(lane, worker) == 0 => self.chaos_at = Some(round + 1),
            Chaos::Rebuilding { .. } => {
                match self.random.below(8) {
                    0 => self.network.cut(lane, worker, self.now + Duration::from_micros(self.random.below(3_000_000))),
                    1..5 => self.network.break_path(lane, worker),
                    _ => {
                        let other = if victim == lane { worker } else { lane };
                        self.network.break_end(victim, other);
                    }
                }
                self.chaos_at = Some(round + 1 + self.random.below(1500));
            }
            Chaos::BrokenPath => {
                self.network.break_path(lane, worker);
                self.victims = Some((lane, worker));
            }
            Chaos::Death => {
                self.halted.push(victim);
                for peer in self.peers_of(victim) {
                    self.network.break_path(victim, peer);
                }
                self.victims = Some((victim, victim));
            }
            Chaos::Stop => {
                self.halted.push(victim);
                self.victims = Some((victim, victim));
            }
        }
    }

    /// Plays the launcher's part in checkpoints on demand: asks every shard, each a little later than the one before, and asks
    /// again further ahead when one had passed the clock.
    fn request(&mut self, round: u64) {
        if self.options.requests && self.orders.is_empty() && self.random.once_in(200) {
            let reached = self.servers.iter().map(|server| server.shard().clock_max()).max().unwrap_or(0);
            let ahead = self.random.below(3);
            self.order(round, reached + ahead);
        }
        let due = |order: &mut (u64, usize, Clock)| order.0 <= round;
        for (_, server, clock) in self.orders.extract_if(.., due).collect::<Vec<_>>() {
            if let Err(reached) = self.servers[server].request_checkpoint(clock, false) {
                self.orders.clear();
                self.order(round, reached.max(clock) + 1);
            }
        }
    }

    fn order(&mut self, round: u64, clock: Clock) {
        for server in 0..self.servers.len() {
            self.orders.push((round + 1 + self.random.below(50), server, clock));
        }
    }

    /// The lanes to which a server has paths.
    fn lanes_of(&self, server: usize) -> Vec<PeerId> {
        let decision = self.options.decision();
        decision.map_or_else(Vec::new, |decision| decision.peers(&self.layout, ShardId(server as u16)))
    }

    fn peers_of(&self, node: PeerId) -> Vec<PeerId> {
        if self.is_server(node) {
            let workers = (0..self.trainers.len()).map(|worker| PeerId::worker(worker as u16));
            workers.chain(self.lanes_of(node.rank.index.into())).collect()
        } else {
            (0..self.servers.len()).map(|server| PeerId::server(server as u16, 0)).collect()
        }
    }

    fn is_server(&self, node: PeerId) -> bool {
        node.rank.role == crate::types::Role::Server
    }

    fn waits(&self) -> String {
        let waits = self.trainers.iter().filter_map(|trainer| trainer.engine.awaited());
        let waits: Vec<String> = waits.map(|awaited| format!("{awaited:?}")).collect();
        waits.join("; ")
    }
}
