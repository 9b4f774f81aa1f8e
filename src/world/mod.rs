//! The simulator's world: a whole job in one thread, over the simulated fabric, under a seed.
//!
//! It builds the same `EventLoop` and `Engine` that the binary runs, decides who runs when and what breaks, and plays the part of
//! the training programs. What is right is for the [`Program`] to judge: it sees every parameter that a worker receives.
//!
//! Invariant: no protocol code here; nothing is decided by anything but the seed.
#![forbid(unsafe_code)]

mod build;
mod changes;
mod chaos;
mod checkpoints;
mod copies;
mod elastic;
mod moves;
mod relay;
mod time;
mod trainer;
mod watch;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use build::{Copy, Node, build_nodes, region};
pub use copies::{CopyCounts, SUSPICION};
pub use elastic::ElasticOptions;

use crate::{
    Error, Result,
    consistency::Consistency,
    layout::{Layout, LayoutOptions, TensorSpec},
    mem::{HugePages, Locking, RegionOptions},
    optim::{LiveChange, LossScaleConfig, OptimizerConfig, Reduction},
    server::{
        DecisionConfig, DecisionRules, EventLoop, LanePart, Memory, MemoryOptions, Progress, Replica, Seeded,
        ShardConfig, Snapshot,
    },
    session::{Change, JobConfig, PathCounts, PathOptions, Paths, PayloadChecksums, Proposal, Tenure, pair},
    transport::{
        Endpoint,
        sim::{SimNetwork, SimOptions, SimRandom, SimTransport},
    },
    types::{ChunkId, Clock, Dtype, PeerId, ShardId, Version},
};
use changes::Changing;
use copies::Copies;
use elastic::Elastic;
use moves::Moves;
use trainer::Trainer;
use watch::Watch;

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
    /// Servers die and are started again, stop for a while, and lose each other, one at a time and each time all shards have both
    /// copies; paths break and are rebuilt. For a job with copies.
    Copies,
    /// While shards move, servers that hold none die or stop, lanes lose each other, and paths break and are rebuilt.
    Moves,
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
    /// The first worker's program sets the learning rate now and then.
    pub sets_rates: bool,
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
    /// Every shard has two copies.
    pub copies: bool,
    /// The store gives no answer now and then, and may have done what was asked all the same.
    pub store_fails: bool,
    /// Servers join and leave at random moments, and shards move between them; `servers` is the most that there are.
    pub moves: bool,
    /// Who leaves and comes again.
    pub elastic: ElasticOptions,
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
        PathOptions { epoch: 0, heartbeat: HEARTBEAT, deadline: DEADLINE, rebuild, checksums, life: 0 }
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
        let lanes = (0..self.servers).map(|shard| self.first_tenure(shard).primary).collect();
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
    /// By shard: the state at the end, unless somebody failed.
    pub finals: Vec<Snapshot>,
    /// By shard: what was stored on the way.
    pub snapshots: Vec<Vec<Snapshot>>,
    /// The clock from which on the change of `change_live` holds; `None` if the job had ended before.
    pub changed: Option<Clock>,
    /// All changes that were made, with their clocks, in order.
    pub changes: Vec<(Clock, Change)>,
    /// Contributions of workers that were lost, without which steps were taken: worker, chunk, clock.
    pub lacked: Vec<(u16, ChunkId, Clock)>,
    /// Workers that were lost, and whose processes went on or were about to.
    pub ghosts: u64,
    /// Simulated time.
    pub elapsed: Duration,
    /// Payloads that the network damaged.
    pub corrupted: u64,
    /// What all ends together say of their paths: each end of a rebuilt path counts it.
    pub paths: PathCounts,
    /// What happened to the copies of shards.
    pub copies: CopyCounts,
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
    /// The lanes: those of the servers' own shards, then those that hold second copies.
    servers: Vec<Node>,
    copies: Copies,
    watch: Watch,
    moves: Moves,
    trainers: Vec<Trainer>,
    round: u64,
    snapshots: Vec<Vec<Snapshot>>,
    /// Nodes that do not run any more.
    halted: Vec<PeerId>,
    /// Nodes that do not run for a while.
    asleep: Vec<(PeerId, Instant)>,
    victims: Option<(PeerId, PeerId)>,
    chaos_at: Option<u64>,
    /// Requests for checkpoints on their way: the round in which a server hears of one, the server, the clock.
    orders: Vec<(u64, usize, Clock)>,
    changing: Changing,
    elastic: Elastic,
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
    world.hear_lanes();
    let shards = 0..if failure.is_none() { usize::from(options.servers) } else { 0 };
    let finals: Result<_> = shards.filter_map(|shard| Some(world.server(shard)?.snapshot(options.clocks))).collect();
    let finals = finals.map_err(|error| error.to_string())?;
    let paths = world.path_counts();
    Ok(Outcome {
        failure,
        victims: world.victims,
        finals,
        snapshots: world.snapshots,
        changed: world.changing.settings_from(),
        changes: world.changing.settled,
        lacked: world.elastic.lacked,
        ghosts: world.elastic.ghosts,
        elapsed: world.now - world.start,
        corrupted: world.network.corrupted(),
        paths,
        copies: world.copies.counts,
    })
}

impl<'a> World<'a> {
    fn new(options: &'a WorldOptions) -> Result<World<'a>> {
        let mut random = SimRandom::new(options.seed);
        let start = Instant::now();
        let queue_max = 1 + random.below(12) as usize;
        let (lingers, refuse_one_in, corrupt_one_in) = match options.chaos {
            Chaos::Rebuilding { corrupt } => (true, 8, corrupt),
            Chaos::Copies | Chaos::Moves => (true, 8, 0),
            _ => (false, 0, 0),
        };
        let sim = SimOptions { delay_max: options.delay_max, queue_max, lingers, refuse_one_in, corrupt_one_in };
        let network = SimNetwork::new(random.bits(), sim, start);
        let layout_options = LayoutOptions { chunk_elements: options.chunk_elements, shards: options.servers };
        let layout = Arc::new(Layout::build(&options.declarations, layout_options)?);
        let workers = options.declarations.len() as u16;
        let servers = build_nodes(options, &layout, &network)?;
        let trainers = (0..workers).map(|worker| Trainer::new(options, &layout, &network, worker));
        let trainers = trainers.collect::<Result<Vec<_>>>()?;
        let chaos_at = match options.chaos {
            Chaos::Calm => None,
            Chaos::Partitions(_) | Chaos::Rebuilding { .. } | Chaos::Copies | Chaos::Moves => {
                Some(1 + random.below(50))
            }
            _ => Some(1 + random.below(400)),
        };
        let shards = usize::from(options.servers);
        let snapshots = vec![Vec::new(); shards];
        let changing = Changing::new(options.change_live, shards, &mut random);
        let mut world = World {
            options,
            layout,
            random,
            network,
            start,
            now: start,
            servers,
            copies: Copies::new(options),
            watch: Watch::default(),
            moves: Moves::default(),
            trainers,
            round: 0,
            snapshots,
            halted: Vec::new(),
            asleep: Vec::new(),
            victims: None,
            chaos_at,
            orders: Vec::new(),
            changing,
            elastic: Elastic::default(),
            relay: Vec::new(),
            progressed: start,
        };
        world.connect()?;
        Ok(world)
    }

    fn connect(&mut self) -> Result<()> {
        let deadline = self.now + DEADLINE;
        let nowhere = Endpoint::default();
        for shard in 0..usize::from(self.options.servers) {
            let (lanes, me) = (self.lanes_of(shard), self.options.first_tenure(shard as u16).primary);
            let server = self.servers[shard].replica.as_mut().and_then(Replica::serves).expect("all serve at first");
            for worker in 0..self.trainers.len() {
                if self.options.elastic.is_empty(worker as u16, self.trainers.len()) {
                    server.leave_empty(worker as u16);
                    continue;
                }
                server.connect(PeerId::worker(worker as u16), &nowhere, deadline)?;
                self.trainers[worker].engine.connect(me, &nowhere, deadline)?;
            }
            for lane in lanes.into_iter().chain(server.shard().backup()) {
                server.connect(lane, &nowhere, deadline)?;
            }
        }
        for node in &mut self.servers {
            if let Some(LanePart::Following(standby)) = node.replica.as_mut().map(Replica::part) {
                standby.connect(&nowhere, deadline)?;
            }
        }
        Ok(())
    }

    /// Whoever serves a shard at this moment.
    fn served(&self) -> impl Iterator<Item = &EventLoop<SimTransport>> {
        self.servers.iter().filter_map(|node| node.replica.as_ref()?.served())
    }

    /// Who serves a shard, if anybody does at this moment; one that has not heard yet that another serves in its place does not.
    fn server(&mut self, shard: usize) -> Option<&mut EventLoop<SimTransport>> {
        let replicas =
            self.servers.iter_mut().filter(|node| node.shard == shard).filter_map(|node| node.replica.as_mut());
        let serving = replicas.filter(|replica| replica.served().is_some());
        serving.max_by_key(|replica| replica.tenure().epoch)?.serves()
    }

    /// Turns until every worker has finished and every server is done, or somebody fails.
    fn run(&mut self, program: &mut dyn Program) -> Result<Option<(PeerId, Error)>, String> {
        for round in 0u64.. {
            self.round = round;
            self.network.advance(self.now);
            self.wreak(round);
            self.request(round);
            self.change(round)?;
            self.tend_workers(round)?;
            self.pass_on();
            self.tend_copies()?;
            self.tend_moves()?;
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
            self.watch_copies()?;
            if self.is_done() {
                return self.watch_the_end().map(|()| None);
            }
            if self.now - self.progressed > STALL {
                let standing = if self.options.has_tenures() { self.standing() } else { String::new() };
                let waits = self.waits();
                return Err(format!("deadlock: nothing got on for {STALL:?}; {waits}; {standing}"));
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
        let is_served = |shard: usize| {
            let nodes = || self.servers.iter().filter(|node| node.shard == shard);
            let serving = nodes().filter_map(|node| node.replica.as_ref()).filter(|replica| replica.served().is_some());
            let last = serving.max_by_key(|replica| replica.tenure().epoch);
            let lets_go = |serving: &EventLoop<_>| serving.is_done() && !serving.shard().is_handing_over();
            last.and_then(Replica::served).is_some_and(lets_go)
                || nodes().any(|node| halted(node.me) && !self.options.has_tenures())
        };
        let gone = |worker: u16| match self.options.elastic.is_active() {
            true => self.is_lost(worker),
            false => halted(PeerId::worker(worker)),
        };
        // The launcher ends a job only when all have been told who is of it.
        self.members_are_settled()
            && workers.all(|(worker, trainer)| trainer.is_finished() || gone(worker as u16))
            && (0..usize::from(self.options.servers)).all(is_served)
    }

    /// One node's turn: whether it has more to do, or how it failed.
    fn turn(&mut self, index: usize, program: &mut dyn Program) -> Result<Result<bool, (PeerId, Error)>, String> {
        let now = self.now;
        if self.rests(self.nodes()[index]) {
            return Ok(Ok(false));
        }
        if let Some(node) = self.servers.get_mut(index) {
            let (me, Some(replica)) = (node.me, &mut node.replica) else { return Ok(Ok(false)) };
            let turned = replica.turn(now);
            checkpoints::store(node, self.options.seed, &mut self.snapshots);
            if node.replica.as_ref().is_some_and(Replica::is_useless) {
                self.begin_anew(index)?;
            }
            return Ok(turned.map(|progress| progress == Progress::Busy).map_err(|error| (me, error)));
        }
        let worker = index - self.servers.len();
        let me = PeerId::worker(worker as u16);
        let trainer = &mut self.trainers[worker];
        match trainer.turn(now, &mut self.random, program) {
            Ok(got_on) => {
                if got_on? {
                    self.progressed = now;
                }
                Ok(Ok(false))
            }
            Err(_) if self.fails_in_vain(me.rank.index) => Ok(Ok(false)),
            Err(error) => Ok(Err((me, error))),
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
            (0..self.options.servers).map(|shard| self.options.first_tenure(shard).primary).collect()
        }
    }

    fn is_server(&self, node: PeerId) -> bool {
        node.rank.role == crate::types::Role::Server
    }

    fn waits(&self) -> String {
        let waits = self.trainers.iter().filter_map(|trainer| trainer.engine.awaited());
        let waits = waits.map(|awaited| format!("{awaited:?}"));
        let lanes = self.served().flat_map(|server| server.shard().waits()).map(|lacking| format!("{lacking:?}"));
        waits.chain(lanes).collect::<Vec<_>>().join("; ")
    }
}
