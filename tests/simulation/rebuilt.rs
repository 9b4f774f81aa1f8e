//! Paths that break while a job runs and are rebuilt, under seeds: nothing is lost, nothing counts twice, and under BSP the
//! parameters are those of the undisturbed job, bit for bit.
//!
//! Invariant: a seed in which nothing broke proves nothing and is not counted.

use gradwire::{
    consistency::Consistency,
    layout::Init,
    optim::{LiveChange, LossScaleConfig, LossScaleMode, OptimizerConfig, OptimizerKind, Reduction},
    world::{Chaos, Outcome, WorldOptions, run},
};

use super::{bits::Bits, check_undisturbed, options, seeds};

/// What breaks under this seed: payloads are damaged in every third.
fn chaos(seed: u64) -> Chaos {
    Chaos::Rebuilding { corrupt: if seed.is_multiple_of(3) { 4 + seed % 30 } else { 0 } }
}

/// A loss scale that moves every few steps.
pub const MOVING: LossScaleConfig = LossScaleConfig {
    mode: LossScaleMode::Dynamic,
    initial: 1024.0,
    growth_factor: 4.0,
    backoff_factor: 0.5,
    growth_interval: 2,
};

pub fn trained(options: &WorldOptions) -> Outcome {
    let mut bits = Bits::new(options.seed, if options.skip_nonfinite { 150 } else { 0 });
    let outcome =
        run(options, &mut bits).unwrap_or_else(|wrong| panic!("seed {}: {wrong}\n{options:#?}", options.seed));
    assert!(outcome.failure.is_none(), "seed {}: {:?}\n{options:#?}", options.seed, outcome.failure);
    outcome
}

fn parameters(outcome: &Outcome) -> Vec<u32> {
    let images = outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks);
    images.flat_map(|image| image.master.iter().map(|value| value.to_bits())).collect()
}

/// The ledger sees every lost, doubled and torn update, under every consistency, with workers that leave and checkpoints.
#[test]
fn no_update_is_lost_or_counts_twice_when_paths_are_rebuilt() {
    for seed in seeds(400) {
        let (uneven, hasty) = (seed.is_multiple_of(5), seed.is_multiple_of(7));
        check_undisturbed(&WorldOptions {
            chaos: chaos(seed),
            uneven,
            hasty,
            requests: uneven,
            ..options(seed + 200_000)
        });
    }
}

/// Under BSP the final parameters are the undisturbed run's, bit for bit: fused, in two steps, clipped, with steps that are skipped,
/// with a loss scale that moves, and with settings that change meanwhile.
#[test]
fn the_final_parameters_are_those_of_the_undisturbed_run() {
    let (mut broken, mut corrupted, mut changed) = (0, 0, 0);
    for seed in seeds(1000) {
        let base = options(seed + 300_000);
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let kind = seed % 5;
        optimizer.clip.global_norm = (kind == 2 || kind == 3).then_some(0.5);
        let change = LiveChange { learning_rate: Some(0.05), ..LiveChange::default() };
        let mut rebuilt = WorldOptions {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            optimizer,
            two_step: kind == 1,
            skip_nonfinite: kind > 2,
            loss_scale: if kind == 4 { MOVING } else { base.loss_scale },
            uneven: seed.is_multiple_of(6),
            hasty: seed.is_multiple_of(11),
            requests: seed.is_multiple_of(7),
            // Who pushes and does not wait cannot know the next loss scale: a job refuses that.
            separate_pull: base.separate_pull && kind != 4,
            change_live: seed.is_multiple_of(2).then_some(change),
            chaos: chaos(seed),
            ..base
        };
        for declaration in &mut rebuilt.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        let outcome = trained(&rebuilt);
        let change_from = outcome.changed.map(|clock| (clock, change));
        let calm = trained(&WorldOptions { chaos: Chaos::Calm, change_live: None, change_from, ..rebuilt });
        assert_eq!(parameters(&outcome), parameters(&calm), "seed {seed}: {:?}", outcome.paths);
        // What was damaged and not looked at had come on a path that was being fenced: it was thrown away.
        assert!(outcome.paths.corrupt <= outcome.corrupted, "seed {seed}");
        assert_eq!(calm.paths.rebuilt, 0);
        broken += u32::from(outcome.paths.rebuilt > 0);
        corrupted += u32::from(outcome.paths.corrupt > 0);
        changed += u32::from(outcome.changed.is_some() && outcome.paths.rebuilt > 0);
    }
    let told = format!(
        "paths were rebuilt under {broken} seeds, payloads damaged under {corrupted}, settings changed {changed}"
    );
    println!("{told}");
    assert!((broken > 20 && corrupted > 5 && changed > 5) || seeds(1000).len() < 200, "{told}");
}
