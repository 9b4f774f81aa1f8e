//! How a server of the simulated world comes to be.
//!
//! Invariant: it is made of the parts that a real one is made of.

use super::*;

pub(super) fn build_server(
    options: &WorldOptions,
    layout: &Arc<Layout>,
    network: &SimNetwork,
    server: u16,
) -> Result<EventLoop<SimTransport>> {
    let me = PeerId::server(server, 0);
    let config = ShardConfig {
        me,
        shard: ShardId(server),
        workers: options.declarations.len() as u16,
        consistency: options.consistency,
        slots: options.slots,
        two_step: options.two_step || options.decides(),
        decision: options.decision(),
        loss_scale: options.loss_scale,
        live: Default::default(),
        epoch: 0,
        start_clock: 0,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        checkpoint_every: options.checkpoint_every,
    };
    let region = region(me.to_string());
    let memory = MemoryOptions {
        optimizer: options.optimizer.clone(),
        reduction: options.reduction,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        two_step: options.two_step || options.decides(),
        measures: options.decides(),
        region: region.clone(),
    };
    let memory = Memory::new(memory, layout.clone(), ShardId(server), &Seeded(options.seed), None)?;
    let paths = Paths::new(network.transport(me), options.path_options());
    let mut server = EventLoop::new(config, layout.clone(), memory, paths, &region, None)?;
    if let Some((clock, change)) = options.change_from {
        server.change_from(clock, change)?;
    }
    Ok(server)
}

/// Small regions that ask the machine for nothing special.
pub(super) fn region(name: String) -> RegionOptions {
    RegionOptions { name, huge_pages: HugePages::Never, lock: Locking::None, ..RegionOptions::default() }
}
