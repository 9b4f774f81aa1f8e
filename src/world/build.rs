//! How the servers of the simulated world come to be.
//!
//! Invariant: they are made of the parts that real ones are made of.

use super::*;
use crate::{
    server::{ChunkImage, MirrorConfig, Standby, StandbyOptions},
    session::Tenure,
};

/// A server's lane.
pub(super) struct Node {
    pub me: PeerId,
    pub shard: usize,
    /// `None` while its process is gone.
    pub replica: Option<Replica<SimTransport>>,
    /// What its disk is busy with: so many turns to go, and the memory that it holds.
    pub storing: Option<(u64, Vec<ChunkImage>)>,
}

/// A lane that is to follow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub me: PeerId,
    pub shard: ShardId,
    pub tenure: Tenure,
    pub is_first: bool,
    pub life: u64,
}

/// All lanes of a world as it begins.
pub(super) fn build_nodes(options: &WorldOptions, layout: &Arc<Layout>, network: &SimNetwork) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for shard in 0..options.servers {
        let tenure = options.first_tenure(shard);
        let me = tenure.primary;
        let server = build_server(options, layout, network, shard)?;
        nodes.push(Node {
            me,
            shard: shard.into(),
            replica: Some(Replica::serving(me, tenure, server)),
            storing: None,
        });
    }
    for shard in (0..options.servers).filter(|_| options.copies) {
        let tenure = options.first_tenure(shard);
        let me = tenure.other.expect("every shard has two copies");
        let copy = Copy { me, shard: ShardId(shard), tenure, is_first: true, life: 0 };
        let standby = build_standby(options, layout, network, &copy)?;
        nodes.push(Node {
            me,
            shard: shard.into(),
            replica: Some(Replica::following(me, tenure, standby)),
            storing: None,
        });
    }
    let servers = (0..options.servers).filter(|_| options.moves);
    for (server, shard) in servers.flat_map(|server| (0..options.servers).map(move |shard| (server, shard))) {
        let me = JobConfig::seat(ShardId(shard), server);
        if !nodes.iter().any(|node| node.me == me) {
            nodes.push(Node { me, shard: shard.into(), replica: None, storing: None });
        }
    }
    Ok(nodes)
}

fn shard_config(options: &WorldOptions, me: PeerId, shard: ShardId, tenure: &Tenure) -> ShardConfig {
    let mirror = MirrorConfig {
        peer: tenure.other.filter(|_| tenure.primary == me),
        is_paired: tenure.is_paired,
        moves: options.moves,
        suspicion: SUSPICION,
        parts: 1 + options.optimizer.kind.state_slots(),
        slots: 1 + options.seed as u32 % 4,
    };
    ShardConfig {
        me,
        shard,
        workers: options.declarations.len() as u16,
        consistency: options.consistency,
        slots: options.slots,
        two_step: options.two_step || options.decides() || options.copies,
        decision: options.decision(),
        loss_scale: options.loss_scale,
        live: Default::default(),
        epoch: 0,
        start_clock: 0,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        checkpoint_every: options.checkpoint_every,
        mirror: options.has_tenures().then_some(mirror),
        may_lose_workers: options.elastic.losses > 0,
    }
}

fn memory(options: &WorldOptions, layout: &Arc<Layout>, shard: ShardId, name: &str) -> Result<Memory> {
    let memory = MemoryOptions {
        optimizer: options.optimizer.clone(),
        reduction: options.reduction,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        two_step: options.two_step || options.decides() || options.has_tenures(),
        measures: options.decides(),
        region: region(name.into()),
    };
    Memory::new(memory, layout.clone(), shard, &Seeded(options.seed), None)
}

fn build_server(
    options: &WorldOptions,
    layout: &Arc<Layout>,
    network: &SimNetwork,
    server: u16,
) -> Result<EventLoop<SimTransport>> {
    let (tenure, shard) = (options.first_tenure(server), ShardId(server));
    let me = tenure.primary;
    let name = me.to_string();
    let paths = Paths::new(network.transport(me), options.path_options());
    let memory = memory(options, layout, shard, &name)?;
    let config = shard_config(options, me, shard, &tenure);
    let mut server = EventLoop::new(config, layout.clone(), memory, paths, &region(name), None)?;
    if let Some((clock, change)) = options.change_from {
        server.change_from(clock, change)?;
    }
    for (worker, from, until) in &options.elastic.told {
        server.set_absence(*worker, *from, *until);
    }
    Ok(server)
}

pub(super) fn build_standby(
    options: &WorldOptions,
    layout: &Arc<Layout>,
    network: &SimNetwork,
    copy: &Copy,
) -> Result<Standby<SimTransport>> {
    let Copy { me, shard, tenure, is_first, life } = *copy;
    let name = me.to_string();
    let paths = Paths::new(network.transport(me), PathOptions { life, ..options.path_options() });
    let memory = memory(options, layout, shard, &name)?;
    let shard = shard_config(options, me, shard, &tenure);
    let workers = shard.workers - options.elastic.empty;
    let standby = StandbyOptions { shard, region: region(name), tenure, is_first, workers };
    let mut standby = Standby::new(standby, layout.clone(), memory, paths, None)?;
    if let Some((clock, change)) = options.change_from.filter(|_| is_first) {
        standby.change_from(clock, change)?;
    }
    Ok(standby)
}

/// Small regions that ask the machine for nothing special.
pub(super) fn region(name: String) -> RegionOptions {
    RegionOptions { name, huge_pages: HugePages::Never, lock: Locking::None, ..RegionOptions::default() }
}
