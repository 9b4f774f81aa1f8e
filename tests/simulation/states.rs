//! Jobs of which everything is compared that training goes by: parameters, the optimizer's state and its steps, bit for bit.
//!
//! Invariant: what differs is named, by chunk and by what of it.

use gradwire::{
    layout::Init,
    optim::{LiveChange, OptimizerConfig, OptimizerKind, Reduction},
    server::ChunkImage,
    world::WorldOptions,
};

/// A job with an optimizer that has state, of whose steps none is like another; under every other seed settings change on the way.
pub fn with_state(seed: u64, base: WorldOptions) -> WorldOptions {
    let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
    optimizer.weight_decay = 0.1;
    let change = LiveChange { learning_rate: Some(0.05), weight_decay: Some(0.2), ..LiveChange::default() };
    let change_from = seed.is_multiple_of(2).then_some((1 + seed % 9, change));
    let mut world = WorldOptions { reduction: Reduction::Mean, optimizer, change_from, ..base };
    for declaration in &mut world.declarations {
        declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
    }
    world
}

/// What differs between two states of the same chunks.
pub fn differing(one: &[ChunkImage], other: &[ChunkImage]) -> Vec<(u32, Vec<&'static str>)> {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let differ = |left: &ChunkImage, right: &ChunkImage| {
        let all = [
            (left.steps != right.steps, "steps"),
            (bits(&left.master) != bits(&right.master), "parameters"),
            (bits(&left.first) != bits(&right.first), "first state"),
            (bits(&left.second) != bits(&right.second), "second state"),
        ];
        all.into_iter().filter_map(|(wrong, what)| wrong.then_some(what)).collect::<Vec<_>>()
    };
    assert_eq!(one.len(), other.len());
    let chunks = one.iter().zip(other).map(|(left, right)| (left.chunk.0, differ(left, right)));
    chunks.filter(|(_, wrong)| !wrong.is_empty()).collect()
}
