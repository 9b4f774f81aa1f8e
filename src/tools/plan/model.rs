//! How long a step takes, in closed form: every resource is busy for a while, the step takes as long as the busiest, and one chunk's
//! way through all of them is paid once on top.
//!
//! Invariant: adding workers never makes a predicted step shorter, adding servers or a faster link never makes it longer.

use serde::{Deserialize, Serialize};

use crate::{session::JobConfig, types::Dtype};

/// What things cost on a machine over a fabric: processor seconds, measured by `gradwire plan --measure`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// The fabric.
    pub transport: String,
    /// Where the figures come from.
    pub source: String,
    /// A worker's time for one chunk pushed and its reply, however small.
    pub worker_message_s: f64,
    /// A shard's time for the same.
    pub server_message_s: f64,
    /// A worker's time for a payload byte, in either direction.
    pub worker_byte_s: f64,
    /// A shard's time for a payload byte, in either direction.
    pub server_byte_s: f64,
    /// Bytes a second at which one thread steps: those that a step must move.
    pub step_bytes_per_s: f64,
    /// Bytes a second at which all threads of a host together step, at most.
    pub host_step_bytes_per_s: f64,
    /// Time of a round of next to nothing, with all its wake-ups.
    pub round_s: f64,
}

/// What stands between the processes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cluster {
    /// Bytes a second of a host's link in each direction; `None` where all processes are on one host.
    pub link_bytes_per_s: Option<f64>,
    /// Servers that share a link.
    pub servers_per_link: u16,
    /// Workers that share a link.
    pub workers_per_link: u16,
    /// Cores that all processes of the job share; `None` where every thread has its own.
    pub cores: Option<u16>,
}

/// A resource, and how long a step keeps it busy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Seconds.
    pub busy_s: f64,
}

/// The time of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// From the start of the backward pass until all parameters are there.
    pub step_s: f64,
    /// The same without a backward pass: a round of push-pull.
    pub exchange_s: f64,
    /// The busiest resource's name.
    pub bottleneck: &'static str,
    /// All resources, the busiest first.
    pub stages: Vec<Stage>,
    /// Where the costs come from.
    pub costs: String,
}

/// Bytes that a step of one parameter moves, if it sums so many gradients.
fn step_bytes(config: &JobConfig, gradients: f64) -> f64 {
    let state = 1.0 + config.optimizer.kind.state_slots() as f64;
    let copy = match config.parameter_dtype {
        Dtype::F32 => 0, // sent from where the parameters lie
        other => other.size(),
    };
    gradients * config.gradient_dtype.size() as f64 + 8.0 * state + copy as f64
}

/// Predicts a step of a model of so many parameters, all of which every worker pushes and pulls.
pub fn predict(config: &JobConfig, parameters: u64, costs: &Costs, cluster: &Cluster, backward_s: f64) -> Prediction {
    let elements = parameters as f64;
    let [gradient, parameter] = [config.gradient_dtype, config.parameter_dtype].map(|dtype| dtype.size() as f64);
    let chunk = ((config.chunk_bytes / 4) as f64).min(elements);
    let chunks = (elements / chunk).ceil();
    let (workers, servers) = (f64::from(config.workers), f64::from(config.servers));
    let shards_per_server = f64::from(config.shards_per_server);
    // Chunks are dealt whole, so the shard with the most of them counts.
    let shard_chunks = (chunks / (servers * shards_per_server)).ceil();
    let shard_elements = (shard_chunks * chunk).min(elements);
    let server_elements = (shard_elements * shards_per_server).min(elements);
    // One step of all gradients together, or one step of each.
    let (steps, gradients) = if config.consistency.aggregates() { (1.0, workers) } else { (workers, 1.0) };
    let step = |elements: f64| elements * steps * step_bytes(config, gradients);
    let payload = gradient + parameter;

    let worker = chunks * costs.worker_message_s + elements * payload * costs.worker_byte_s;
    let messages = shard_chunks * workers * costs.server_message_s;
    let bytes = shard_elements * workers * payload * costs.server_byte_s;
    let optimizer = step(shard_elements) / costs.step_bytes_per_s;
    let memory = step(server_elements) / costs.host_step_bytes_per_s;
    let mut stages = vec![
        Stage { name: "worker thread", busy_s: worker },
        Stage { name: "server thread", busy_s: messages + bytes + optimizer },
        Stage { name: "server memory", busy_s: memory },
    ];
    // Pushes and replies go in opposite directions, each at the link's full rate.
    let way = gradient.max(parameter);
    if let Some(rate) = cluster.link_bytes_per_s {
        let sharing = f64::from(cluster.workers_per_link).min(workers);
        stages.push(Stage { name: "worker link", busy_s: sharing * elements * way / rate });
        let sharing = f64::from(cluster.servers_per_link).min(servers);
        stages.push(Stage { name: "server link", busy_s: sharing * workers * server_elements * way / rate });
    }
    if let Some(cores) = cluster.cores {
        let of_servers = chunks * workers * costs.server_message_s
            + elements * workers * payload * costs.server_byte_s
            + step(elements) / costs.step_bytes_per_s;
        stages.push(Stage { name: "cores of the host", busy_s: (workers * worker + of_servers) / f64::from(cores) });
    }
    stages.sort_by(|a, b| b.busy_s.total_cmp(&a.busy_s));
    // A chunk's way: out, summed with the others and stepped, and back. It is paid once, since the next chunks follow behind it.
    let on_link = cluster.link_bytes_per_s.map_or(0.0, |rate| chunk * payload / rate);
    let last =
        on_link + chunk * payload * (costs.worker_byte_s + costs.server_byte_s) + step(chunk) / costs.step_bytes_per_s;
    let busiest = stages[0].busy_s;
    let exchange_s = costs.round_s + busiest.max(last);
    // The last chunk of the backward pass cannot hide behind it.
    let step_s = if backward_s > 0.0 { exchange_s.max(backward_s + costs.round_s + last) } else { exchange_s };
    let fixed = costs.round_s > busiest;
    let bottleneck = match () {
        () if backward_s > 0.0 && step_s > exchange_s => "backward pass",
        () if fixed => "wake-ups",
        () => stages[0].name,
    };
    Prediction { step_s, exchange_s, bottleneck, stages, costs: costs.source.clone() }
}

impl Costs {
    /// Figures to plan with where nothing was measured: a server of 2024 with one thread a shard. They are assumptions, not
    /// measurements, and say so.
    pub fn assumed(transport: &str) -> Costs {
        // Over RDMA no processor touches the payload; over sockets it is copied into and out of the kernel.
        let (message, byte, round) = match transport {
            "verbs" => (1.0e-6, 0.0, 10e-6),
            "shm" => (0.5e-6, 0.05e-9, 10e-6),
            "soft" => (3.0e-6, 0.6e-9, 30e-6),
            _ => (3.0e-6, 0.2e-9, 40e-6),
        };
        Costs {
            transport: transport.into(),
            source: "assumed, not measured: give --costs with what `gradwire plan --measure` prints on such a host"
                .into(),
            worker_message_s: message,
            server_message_s: message,
            worker_byte_s: byte,
            server_byte_s: byte,
            step_bytes_per_s: 15e9,
            host_step_bytes_per_s: 200e9,
            round_s: round,
        }
    }
}
