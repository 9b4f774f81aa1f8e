//! Jobs whose servers agree on every step: the norm of the whole gradient is clipped, and a step that is not finite is skipped.
//!
//! Invariant: what is right is what the simulator makes of the same job.

use gradwire::{
    optim::{LossScaleConfig, LossScaleMode},
    session::Fabric,
    world::WorldOptions,
};

use crate::{
    bits::{same, simulate, simulated, world_options},
    jobs::{adamw, home, options, run, stored},
    program::{gradient, model, spoilt_gradient},
};
use gradwire::launch::Job;

const LIMIT: f32 = 3.0;

#[test]
fn the_norm_of_all_tensors_is_clipped_with_the_same_bits_for_any_servers_shards_and_fabrics() {
    let all = vec![model(); 2];
    let mut world = world_options(all.clone());
    world.optimizer.clip.global_norm = Some(LIMIT);
    let expected = simulate(world, gradient);
    assert_ne!(expected, simulated(all.clone(), false), "nothing was clipped");
    let both = vec![Fabric::Shm, Fabric::Tcp];
    for (servers, shards, fabrics) in
        [(1, 1, both.clone()), (2, 2, both), (3, 1, vec![Fabric::Tcp]), (1, 3, vec![Fabric::Soft])]
    {
        let home = home();
        let mut options = options(home.path(), "train");
        (options.config.servers, options.config.shards_per_server) = (servers, shards);
        options.config.transports = fabrics;
        options.config.optimizer = adamw();
        options.config.optimizer.clip.global_norm = Some(LIMIT);
        run(options);
        same(&expected, &stored(home.path(), &all), &format!("{servers} servers of {shards} shards"));
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_everywhere_and_told() {
    let all = vec![model(); 2];
    let world = WorldOptions { skip_nonfinite: true, ..world_options(all.clone()) };
    let expected = simulate(world, spoilt_gradient);
    let home = home();
    let mut options = options(home.path(), "spoilt");
    options.config.skip_nonfinite = true;
    options.config.shards_per_server = 2;
    let mut job = Job::start(options).unwrap();
    let outcome = crate::jobs::end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    let (count, told) = outcome.not_finite;
    let told = told.expect("a step was skipped");
    assert_eq!(count, 1, "{told}");
    for part in ["clock 10", "worker 1", "`layer3`", "skipped on all servers"] {
        assert!(told.contains(part), "{told}");
    }
    let found = stored(home.path(), &all);
    assert!(found.values().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
    same(&expected, &found, "one step skipped");
}

/// Without the setting a gradient that is not finite does what it does in PyTorch: it spoils what it touches.
#[test]
fn without_the_setting_nothing_is_skipped() {
    let home = home();
    run(options(home.path(), "spoilt"));
    let found = stored(home.path(), &vec![model(); 2]);
    assert!(f32::from_bits(found["layer3"][700]).is_nan());
}

/// A loss scale that goes up until sums of gradients overflow, by factors that are no powers of two.
pub fn scaling() -> LossScaleConfig {
    LossScaleConfig {
        mode: LossScaleMode::Dynamic,
        initial: 3e37,
        growth_factor: 3.0,
        backoff_factor: 0.3,
        growth_interval: 3,
    }
}

#[test]
fn a_dynamic_loss_scale_gives_the_same_bits_for_any_shards_and_fabrics_and_its_skips_are_counted() {
    let all = vec![model(); 2];
    let expected = simulate(WorldOptions { loss_scale: scaling(), ..world_options(all.clone()) }, spoilt_gradient);
    let mut skipped = Vec::new();
    for (servers, shards, fabric) in [(1, 1, Fabric::Shm), (2, 2, Fabric::Tcp)] {
        let home = home();
        let mut options = options(home.path(), "spoilt");
        (options.config.servers, options.config.shards_per_server) = (servers, shards);
        options.config.transports = vec![fabric];
        options.config.loss_scale = scaling();
        let mut job = Job::start(options).unwrap();
        let outcome = crate::jobs::end(&mut job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
        let (count, told) = outcome.not_finite;
        assert!(told.as_ref().is_some_and(|told| told.contains("skipped on all servers")), "{told:?}");
        skipped.push(count);
        same(&expected, &stored(home.path(), &all), &format!("{servers} servers of {shards} shards"));
    }
    assert!(skipped[0] > 2 && skipped[0] == skipped[1], "{skipped:?}");
    assert!(expected.values().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
}
