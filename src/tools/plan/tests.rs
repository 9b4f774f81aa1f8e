//! The planner's sums by hand, and what must hold of its model whatever the costs.
//!
//! Invariant: a figure is checked against arithmetic that shares no code with the planner.

use super::*;
use crate::{
    consistency::Consistency,
    optim::{OptimizerConfig, OptimizerKind},
    types::Dtype,
};

fn question() -> Question {
    Question {
        config: JobConfig {
            chunk_bytes: 1 << 20,
            workers: 64,
            servers: 8,
            gradient_dtype: Dtype::Bf16,
            parameter_dtype: Dtype::Bf16,
            optimizer: OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3),
            ..JobConfig::default()
        },
        parameters: 70_000_000_000,
        servers_per_host: 1,
        workers_per_host: 1,
        host_memory: None,
        costs: Costs::assumed("verbs"),
        cluster: Cluster { link_bytes_per_s: Some(50e9), servers_per_link: 1, workers_per_link: 1, cores: None },
        backward_s: 0.0,
    }
}

/// 70e9 parameters: 267,029 chunks of 262,144, so 33,379 on the largest of 8 shards.
#[test]
fn memory_is_the_sum_that_the_design_names() {
    let plan = plan(&question()).unwrap();
    let elements = 33_379u64 * 262_144;
    assert_eq!((plan.chunks, plan.shard.chunks, plan.shard.elements), (267_029, 33_379, elements));
    // 12 bytes a parameter of state, two bf16 copies for replies, and the budget of 1 GiB in slots of 512 KiB for 64 workers.
    assert_eq!(plan.shard_memory.master + plan.shard_memory.state, 12 * elements);
    assert_eq!(plan.shard_memory.replies, 4 * elements);
    assert_eq!((plan.slots, plan.shard_memory.landing), (32, 1 << 30));
    assert_eq!(plan.server_bytes, 16 * elements + (1 << 30));
    assert_eq!(plan.worker_bytes, 4 * 70_000_000_000);
    assert_eq!((plan.queue_pairs_server_host, plan.queue_pairs_worker_host, plan.queue_pairs), (64, 8, 1024));
    let mut twice = Question { servers_per_host: 2, ..question() };
    twice.config.replicas = 2;
    let twice = super::plan(&twice).unwrap();
    // Sums of their own, and eight slots in f32 each way for each copy; the budget of landing memory is the server's.
    let copy = 20 * elements + (1 << 29) + (16 << 20);
    assert_eq!((twice.server_bytes, twice.server_host_bytes), (2 * copy, 4 * copy));
    assert_eq!((twice.queue_pairs_server_host, twice.queue_pairs), (2 * 2 * 65, 8 * 2 * 129));
}

#[test]
fn what_fits_is_told_from_what_does_not() {
    let need = plan(&question()).unwrap();
    let most = need.server_host_bytes.max(need.worker_host_bytes);
    for (room, fits) in [(most, true), (most - 1, false)] {
        let plan = plan(&Question { host_memory: Some(room), ..question() }).unwrap();
        assert_eq!(plan.fits, Some(fits));
        assert_eq!(text(&plan).contains("NO: a host has"), !fits);
    }
    let mut tight = question();
    tight.config.landing_bytes = (64 << 20) - 1;
    let refused = plan(&tight).unwrap_err().to_string();
    assert!(refused.contains("2 slots x 64 workers x 524288 bytes a chunk = 67108864"), "{refused}");
    assert!(plan(&Question { parameters: 0, ..question() }).is_err());
}

/// With processors that cost nothing the busiest link decides: 64 workers' gradients into one of 8 servers.
#[test]
fn the_link_is_the_bottleneck_where_nothing_else_costs() {
    let mut question = question();
    question.costs = Costs {
        worker_message_s: 0.0,
        server_message_s: 0.0,
        worker_byte_s: 0.0,
        server_byte_s: 0.0,
        step_bytes_per_s: 1e30,
        host_step_bytes_per_s: 1e30,
        round_s: 0.0,
        ..question.costs
    };
    let of_server = 64.0 * 33_379.0 * 262_144.0 * 2.0 / 50e9;
    let step = plan(&question).unwrap().step;
    assert_eq!(step.bottleneck, "server link");
    assert!((step.step_s / of_server - 1.0).abs() < 1e-9, "{step:?}");
    // As many servers as workers: both links carry the model once.
    question.config.servers = 64;
    assert!((plan(&question).unwrap().step.step_s / (70e9 * 2.0 / 50e9) - 1.0).abs() < 1e-3);
    // A slow optimizer takes over, and a long backward pass hides everything.
    question.costs.step_bytes_per_s = 1e9;
    assert_eq!(plan(&question).unwrap().step.bottleneck, "server thread");
    // A step sums 64 gradients of 2 bytes, changes three arrays, and writes 2 bytes; under asp each gradient is a step of its own.
    let elements = (267_029f64 / 64.0).ceil() * 262_144.0;
    let busy = |question: &Question| plan(question).unwrap().step.stages[0].busy_s * 1e9 / elements;
    assert!((busy(&question) - (64.0 * 2.0 + 24.0 + 2.0)).abs() < 1e-6);
    question.config.consistency = Consistency::Asp;
    assert!((busy(&question) - 64.0 * (2.0 + 24.0 + 2.0)).abs() < 1e-6);
    question.backward_s = 1e5;
    let step = plan(&question).unwrap().step;
    assert_eq!(step.bottleneck, "backward pass");
    assert!(step.step_s >= 1e5 && step.step_s < 1.001e5, "{step:?}");
}

#[test]
fn more_work_is_never_faster_and_more_help_never_slower() {
    let step = |change: &dyn Fn(&mut Question)| {
        let mut question = question();
        question.config.landing_bytes = 1 << 40;
        change(&mut question);
        plan(&question).unwrap().step.step_s
    };
    for transport in ["verbs", "tcp", "shm", "soft"] {
        for consistency in [Consistency::Bsp, Consistency::Asp] {
            let with = |workers: u16, servers: u16, gbps: f64| {
                step(&|question| {
                    question.costs = Costs::assumed(transport);
                    question.config.consistency = consistency;
                    (question.config.workers, question.config.servers) = (workers, servers);
                    question.cluster.link_bytes_per_s = Some(gbps / 8.0 * 1e9);
                })
            };
            for workers in [8, 64, 512] {
                assert!(with(workers, 8, 100.0) <= with(2 * workers, 8, 100.0), "{transport} {workers}");
                assert!(with(workers, 8, 100.0) >= with(workers, 16, 100.0), "{transport} {workers}");
                assert!(with(workers, 8, 100.0) >= with(workers, 8, 400.0), "{transport} {workers}");
            }
        }
    }
    let table = scaling(&question()).unwrap();
    // Three links, eight rows each; of a budget of 1 GiB a server 1,024 workers have room for 2 slots of 512 KiB.
    assert_eq!(table.lines().filter(|line| line.trim_start().starts_with("1024 ")).count(), 3, "{table}");
    assert!(!table.contains("no room") && table.contains("server link"), "{table}");
}
