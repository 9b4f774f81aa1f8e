//! Plans for people: one as a page, and how it changes with the number of workers and servers as a table.
//!
//! Invariant: nothing is worked out here; what is printed is in the plan.

use super::{Plan, Question, plan};
use crate::Result;

/// Bytes as people read them, to three figures.
fn bytes(bytes: u64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 1.0 => format!("{seconds:.2} s"),
        seconds if seconds >= 1e-3 => format!("{:.2} ms", seconds * 1e3),
        seconds => format!("{:.1} us", seconds * 1e6),
    }
}

/// A plan as a page.
pub fn text(plan: &Plan) -> String {
    let memory = &plan.shard_memory;
    let also = |what: &str, of: u64| if of > 0 { format!(", {what} {}", bytes(of)) } else { String::new() };
    let mut lines = vec![
        format!("model      {} parameters in {} chunks on {} shards", plan.parameters, plan.chunks, plan.shards),
        format!(
            "shard      {}: master {}, optimizer state {}, sums {}, replies {}, landing {}{}{}",
            bytes(memory.total()),
            bytes(memory.master),
            bytes(memory.state),
            bytes(memory.accumulator),
            bytes(memory.replies),
            bytes(memory.landing),
            also("from its other copy", memory.replica),
            also("for checkpoints", memory.snapshot)
        ),
        format!(
            "landing    {} slots for each worker on each shard, of a budget of {} a server",
            plan.slots,
            bytes(plan.landing_budget)
        ),
        format!("server     {} a process, {} a host", bytes(plan.server_bytes), bytes(plan.server_host_bytes)),
        format!("worker     {} a process, {} a host", bytes(plan.worker_bytes), bytes(plan.worker_host_bytes)),
    ];
    lines.push(match (plan.host_memory, plan.fits) {
        (Some(room), Some(true)) => format!("fits       yes, into {} a host", bytes(room)),
        (Some(room), _) => format!("fits       NO: a host has {}", bytes(room)),
        (None, _) => "fits       not known: give --host-memory".into(),
    });
    lines.push(format!(
        "queue pairs {} on a host of servers, {} on a host of workers, {} in all",
        plan.queue_pairs_server_host, plan.queue_pairs_worker_host, plan.queue_pairs
    ));
    let step = &plan.step;
    lines.push(format!(
        "step       {} (an exchange alone {}); it waits for: {}",
        time(step.step_s),
        time(step.exchange_s),
        step.bottleneck
    ));
    for stage in &step.stages {
        lines.push(format!("           {:<18} busy for {}", stage.name, time(stage.busy_s)));
    }
    lines.push(format!("costs      {}", step.costs));
    lines.join("\n")
}

/// Steps of the same model for 8 to 1,024 workers and 1 to 128 servers over links of 100, 200 and 400 Gb/s.
///
/// # Errors
///
/// As [`plan`], for settings that are wrong whatever the size; a size that has no room for its landing slots says so in its cell.
pub fn scaling(question: &Question) -> Result<String> {
    let servers = [1, 2, 4, 8, 16, 32, 64, 128];
    let mut lines = Vec::new();
    for gbps in [100.0, 200.0, 400.0] {
        lines.push(format!("links of {gbps} Gb/s"));
        let head: Vec<String> = servers.iter().map(|servers| format!("{:>24}", format!("{servers} servers"))).collect();
        lines.push(format!("{:>7} {}", "workers", head.join(" ")));
        for workers in [8, 16, 32, 64, 128, 256, 512, 1024] {
            let cell = |servers: u16| {
                let mut question = question.clone();
                (question.config.workers, question.config.servers) = (workers, servers);
                question.cluster.link_bytes_per_s = Some(gbps / 8.0 * 1e9);
                match plan(&question) {
                    Ok(plan) => format!("{:>24}", format!("{} {}", time(plan.step.step_s), plan.step.bottleneck)),
                    Err(_) => format!("{:>24}", "no room for 2 slots"),
                }
            };
            let cells: Vec<String> = servers.iter().map(|servers| cell(*servers)).collect();
            lines.push(format!("{workers:>7} {}", cells.join(" ")));
        }
        lines.push(String::new());
    }
    lines.push(format!("costs: {}", question.costs.source));
    Ok(lines.join("\n"))
}
