//! The same bits: over tcp and in the simulator, fused and in two steps, with any number of servers and shards, from run to run.

use std::{collections::BTreeMap, time::Duration};

use gradwire::{
    Consistency, Dtype,
    launch::Job,
    layout::{Layout, TensorSpec},
    optim::Reduction,
    session::Fabric,
    transport::verbs::{VerbsOptions, VerbsTransport},
    types::{Clock, PeerId},
    wire::{JobToken, handshake::Identity},
    world::{self, Chaos, WorldOptions},
};

use crate::{
    jobs::{adamw, bits, digests, end, home, options, run, stored},
    program::{STEPS, Simulated, gradient, model, part_of_model},
};

/// What the simulator makes of the same job.
pub fn simulated(declarations: Vec<Vec<TensorSpec>>, two_step: bool) -> BTreeMap<String, Vec<u32>> {
    simulate(WorldOptions { two_step, ..world_options(declarations) }, gradient)
}

pub fn world_options(declarations: Vec<Vec<TensorSpec>>) -> WorldOptions {
    WorldOptions {
        seed: 7,
        servers: 2,
        declarations,
        chunk_elements: 256,
        slots: 3,
        consistency: Consistency::Bsp,
        reduction: Reduction::Mean,
        optimizer: adamw(),
        two_step: false,
        skip_nonfinite: false,
        loss_scale: Default::default(),
        clocks: STEPS,
        uneven: false,
        hasty: false,
        sets_rates: false,
        requests: false,
        copies: false,
        store_fails: false,
        moves: false,
        change_from: None,
        change_live: None,
        elastic: Default::default(),
        separate_pull: false,
        checkpoint_every: None,
        chaos: Chaos::Calm,
        delay_max: Duration::from_micros(300),
    }
}

pub fn simulate(options: WorldOptions, gradient: fn(u16, Clock, &str, u64) -> f32) -> BTreeMap<String, Vec<u32>> {
    let layout_options = gradwire::layout::LayoutOptions { chunk_elements: 256, shards: 2 };
    let layout = Layout::build(&options.declarations, layout_options).unwrap();
    let mut program = Simulated { layout: layout.clone(), gradient };
    let outcome = world::run(&options, &mut program).unwrap();
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    bits(&layout, |id| {
        let chunks = outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks);
        chunks.into_iter().find(|image| image.chunk == id).unwrap().master.clone()
    })
}

pub fn same(left: &BTreeMap<String, Vec<u32>>, right: &BTreeMap<String, Vec<u32>>, what: &str) {
    assert_eq!(left.len(), right.len());
    for (name, values) in left {
        let differ = values.iter().zip(&right[name]).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{what}: {differ} of {} elements of {name} differ", values.len());
    }
}

#[test]
fn tcp_and_the_simulator_agree_bit_for_bit_fused_and_in_two_steps() {
    let all = vec![model(); 2];
    let expected = simulated(all.clone(), false);
    same(&expected, &simulated(all.clone(), true), "simulated, two steps");
    for two_step in [false, true] {
        let home = home();
        let mut options = options(home.path(), "train");
        options.config.two_step = two_step;
        // Not a clock's worth of slots, so that the window matters.
        options.config.landing_bytes = 2 * 1024 * 3;
        let output = run(options);
        let digests = digests(&output);
        assert!(digests.len() == 2 && digests[0] == digests[1], "{output}");
        same(&expected, &stored(home.path(), &all), if two_step { "tcp, two steps" } else { "tcp" });
    }
}

/// Where there is an RDMA device; elsewhere it says so, and is a failure where `GRADWIRE_TEST_RDMA` is set.
#[test]
fn verbs_gives_the_simulators_bits_and_nothing_goes_over_another_fabric() {
    let home = home();
    let all = vec![model(); 2];
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Verbs];
    options.config.landing_bytes = 2 * 1024 * 3;
    let identity = Identity { job: 1, token: JobToken::random().unwrap(), me: PeerId::worker(0), epoch: 0 };
    if let Err(absence) = VerbsTransport::new(VerbsOptions::new(identity)) {
        assert!(std::env::var_os("GRADWIRE_TEST_RDMA").is_none(), "GRADWIRE_TEST_RDMA is set: {absence}");
        println!("NOT RUN, the job over verbs is NOT tested here: {absence}");
        // The only fabric may not be replaced by another in silence.
        options.config.join_ms = 20_000;
        let mut job = Job::start(options).unwrap();
        let outcome = end(&mut job);
        assert_ne!(outcome.code, 0, "{}", job.output());
        let told = format!("{:?} {}", outcome.reason, job.output());
        assert!(told.contains("RDMA") || told.contains("libibverbs"), "{told}");
        return;
    }
    let output = run(options);
    let digests = digests(&output);
    assert!(digests.len() == 2 && digests[0] == digests[1], "{output}");
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "verbs");
}

#[test]
fn a_job_that_would_rather_have_verbs_says_why_it_has_not_and_goes_on() {
    let home = home();
    let all = vec![model(); 2];
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Verbs, Fabric::Tcp];
    let identity = Identity { job: 1, token: JobToken::random().unwrap(), me: PeerId::worker(0), epoch: 0 };
    let absence = VerbsTransport::new(VerbsOptions::new(identity)).err();
    let output = run(options);
    // Two servers and two workers have seen it; the job says it once.
    let told: Vec<&str> = output.lines().filter(|line| line.contains("gradwire doctor")).collect();
    assert_eq!(told.len(), usize::from(absence.is_some()), "{absence:?}: {output}");
    for (line, absence) in told.iter().zip(absence) {
        assert!(line.contains("over tcp only: no verbs here: ") && line.contains(&absence.to_string()), "{line}");
    }
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "verbs before tcp");
}

#[test]
fn servers_and_shards_do_not_change_a_bit() {
    let all = vec![model(); 2];
    let mut seen = Vec::new();
    for (servers, shards) in [(1, 1), (1, 3), (3, 1)] {
        let home = home();
        let mut options = options(home.path(), "train");
        options.config.servers = servers;
        options.config.shards_per_server = shards;
        run(options);
        seen.push(stored(home.path(), &all));
    }
    same(&seen[0], &seen[1], "one server, three shards");
    same(&seen[0], &seen[2], "three servers");
}

#[test]
fn workers_that_have_different_parts_of_the_model() {
    let declarations: Vec<_> = (0..2).map(part_of_model).collect();
    let home = home();
    run(options(home.path(), "part"));
    same(&simulated(declarations.clone(), false), &stored(home.path(), &declarations), "parts");
}

#[test]
fn absent_tensors_and_low_precision_are_the_same_from_run_to_run() {
    let mut seen = Vec::new();
    for servers in [1, 2] {
        let home = home();
        let mut options = options(home.path(), "sparse");
        options.config.servers = servers;
        options.config.gradient_dtype = Dtype::Bf16;
        options.config.parameter_dtype = Dtype::Bf16;
        let output = run(options);
        let digests = digests(&output);
        assert!(digests.len() == 2 && digests[0] == digests[1], "{output}");
        seen.push(stored(home.path(), &vec![model(); 2]));
    }
    same(&seen[0], &seen[1], "bf16");
}

#[test]
fn push_and_pull_apart_give_the_bits_of_push_pull() {
    let all = vec![model(); 2];
    let home = home();
    run(options(home.path(), "separate"));
    same(&simulated(all.clone(), false), &stored(home.path(), &all), "push, then pull");
}

#[test]
fn asking_in_between_gives_the_bits_of_waiting() {
    let [waited, polled] = ["train", "polled"].map(|part| digests(&run(options(home().path(), part))));
    assert!(waited.len() == 2 && waited == polled, "{waited:?} {polled:?}");
}

#[test]
fn a_live_learning_rate_takes_effect_at_one_clock_on_every_server() {
    let all = vec![model(); 2];
    let mut seen = Vec::new();
    for servers in [1, 3] {
        let home = home();
        let mut options = options(home.path(), "learning rate");
        options.config.servers = servers;
        run(options);
        seen.push(stored(home.path(), &all));
    }
    same(&seen[0], &seen[1], "three servers");
    assert_ne!(seen[0], simulated(all, false), "the rate was not changed at all");
}
