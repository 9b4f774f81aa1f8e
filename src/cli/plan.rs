//! `gradwire plan`: what a job would take, before anybody starts it; and the measurements that its predictions stand on.
//!
//! Invariant: a prediction says where its costs come from, and `--check` prints it beside what was measured for the same job.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::bench::costs;
use crate::{
    Error, Result,
    session::{JobConfig, gather, memory_available},
    tools::{
        bench::parse_sizes,
        plan::{Cluster, Costs, Question, plan, scaling, text},
    },
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire plan --params 70e9 --workers 64 --servers 8 --dtype bf16 --link-gbps 400 --host-memory 1024G
  gradwire plan --params 7B --workers 16 --servers 4 --shards-per-server 8 --backward-ms 900 --json
  gradwire plan --params 7B --scale --dtype bf16           8 to 1,024 workers, 1 to 128 servers, 100 to 400 Gb/s
  gradwire plan --measure --transport shm > costs.json     what things cost on this machine
  gradwire plan --params 7B --workers 16 --servers 4 --costs costs.json
  gradwire plan --check --transport shm                    predictions beside measurements, on this machine

Memory is that which servers and workers allocate; a job whose ranks do not fit into a host is refused by the same sums when it
starts. Time comes from a model in closed form: every resource (a worker's thread, a shard's thread, a server's memory, either link)
is busy for so long a step, and the step takes as long as the busiest. docs/performance.md says what the model leaves out.

Without --costs the costs are assumptions, and the output says so.")]
pub(super) struct PlanArguments {
    /// Parameters of the model: 70e9, 7B, 350M.
    #[arg(long, value_name = "N", required_unless_present_any = ["measure", "check"])]
    params: Option<String>,
    /// Number of workers.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    workers: u16,
    /// Number of servers.
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    servers: u16,
    /// Shards (pinned threads) of each server.
    #[arg(long, value_name = "N", default_value_t = 1)]
    shards_per_server: u16,
    /// Gradients and parameters on the wire: f32, bf16, or f16 (parameters then travel as bf16).
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// sgd, adam, adamw or adagrad.
    #[arg(long, value_name = "KIND", default_value = "adamw")]
    optimizer: String,
    /// bsp, ssp:N or asp.
    #[arg(long, default_value = "bsp")]
    consistency: String,
    /// Bytes of a chunk, counted in f32.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    chunk: String,
    /// Budget for landing memory, of one server.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    landing: String,
    /// Copies of every shard, the working one included: 1 or 2.
    #[arg(long, value_name = "N", default_value_t = 1)]
    replicas: u16,
    /// Servers on one host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    servers_per_host: u16,
    /// Workers on one host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers_per_host: u16,
    /// Memory that a host has to give [default: what this one has].
    #[arg(long, value_name = "SIZE")]
    host_memory: Option<String>,
    /// A host's link, in each direction.
    #[arg(long, value_name = "GBPS", default_value_t = 100.0)]
    link_gbps: f64,
    /// Milliseconds of a step's backward pass, behind which pushes hide.
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    backward_ms: f64,
    /// The fabric: verbs, tcp, shm or soft [default: verbs; with --measure and --check tcp].
    #[arg(long)]
    transport: Option<String>,
    /// Costs as --measure prints them.
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// Any setting of the job, by its key.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Print a table of steps for 8 to 1,024 workers and 1 to 128 servers instead.
    #[arg(long, conflicts_with_all = ["measure", "check", "json"])]
    scale: bool,
    /// Measure this machine's costs over the fabric instead, and print them as JSON.
    #[arg(long, conflicts_with = "check")]
    measure: bool,
    /// Measure this machine's costs, predict some jobs with them, and run these.
    #[arg(long)]
    check: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Plans, or measures what plans stand on.
pub(super) fn run(arguments: &PlanArguments) -> Result<ExitCode> {
    if arguments.measure || arguments.check {
        let transport = arguments.transport.as_deref().unwrap_or("tcp");
        let costs = costs::measure(transport)?;
        match arguments.check {
            true => costs::check(&costs, arguments.json)?,
            false => println!("{}", serde_json::to_string_pretty(&costs).expect("numbers under text keys")),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let question = arguments.question()?;
    if arguments.scale {
        println!("{}", scaling(&question)?);
        return Ok(ExitCode::SUCCESS);
    }
    let plan = plan(&question)?;
    match arguments.json {
        true => println!("{}", serde_json::to_string(&plan).expect("numbers under text keys")),
        false => println!("{}", text(&plan)),
    }
    Ok(if plan.fits == Some(false) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl PlanArguments {
    fn question(&self) -> Result<Question> {
        let transport = self.transport.as_deref().unwrap_or("verbs");
        if !["verbs", "tcp", "shm", "soft"].contains(&transport) {
            return Err(Error::Config(format!("--transport {transport}: there are verbs, tcp, shm and soft")));
        }
        let costs = match &self.costs {
            Some(path) => read_costs(path)?,
            None => Costs::assumed(transport),
        };
        let positive = |option: &str, number: f64| match number.is_finite() && number > 0.0 {
            true => Ok(number),
            false => Err(Error::Config(format!("--{option} {number}: give a number above 0"))),
        };
        let host_memory = match &self.host_memory {
            Some(text) => Some(size("--host-memory", text)?),
            None => memory_available(),
        };
        let link = positive("link-gbps", self.link_gbps)? / 8.0 * 1e9;
        Ok(Question {
            config: self.config(transport)?,
            parameters: parameters(self.params.as_deref().unwrap_or_default())?,
            servers_per_host: self.servers_per_host,
            workers_per_host: self.workers_per_host,
            host_memory,
            costs,
            cluster: Cluster {
                link_bytes_per_s: (transport != "shm").then_some(link),
                servers_per_link: self.servers_per_host,
                workers_per_link: self.workers_per_host,
                cores: None,
            },
            backward_s: if self.backward_ms == 0.0 { 0.0 } else { positive("backward-ms", self.backward_ms)? / 1e3 },
        })
    }

    fn config(&self, transport: &str) -> Result<JobConfig> {
        let parameter_dtype = if self.dtype == "f16" { "bf16" } else { &self.dtype };
        let flags = [
            ("workers", self.workers.to_string()),
            ("servers", self.servers.to_string()),
            ("shards_per_server", self.shards_per_server.to_string()),
            ("replicas", self.replicas.to_string()),
            ("gradient_dtype", self.dtype.clone()),
            ("parameter_dtype", parameter_dtype.into()),
            ("consistency", self.consistency.clone()),
            ("optimizer.kind", self.optimizer.clone()),
            ("chunk_bytes", size("--chunk", &self.chunk)?.to_string()),
            ("landing_bytes", size("--landing", &self.landing)?.to_string()),
            ("transports", transport.into()),
        ];
        let mut pairs: Vec<(String, String)> = flags.map(|(key, value)| (key.to_string(), value)).into();
        for setting in &self.settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Error::Config(format!("--set takes KEY=VALUE, and `{setting}` has no `=`")))?;
            pairs.push((key.trim().into(), value.trim().into()));
        }
        gather(std::iter::empty(), None, &pairs)
    }
}

fn size(option: &str, text: &str) -> Result<u64> {
    match parse_sizes(&[text.to_string()])?[..] {
        [size] => Ok(size),
        _ => Err(Error::Config(format!("{option} {text} is a range; give one size"))),
    }
}

/// A number of parameters: 70e9, 7B, 350M, 12345.
fn parameters(text: &str) -> Result<u64> {
    let wrong = || Error::Config(format!("--params {text}: write a number, such as 70e9, 7B or 350M"));
    let digits = text.trim_end_matches(|c: char| "KMBT".contains(c));
    let factor = match &text[digits.len()..] {
        "" => 1.0,
        "K" => 1e3,
        "M" => 1e6,
        "B" => 1e9,
        "T" => 1e12,
        _ => return Err(wrong()),
    };
    let number = digits.parse::<f64>().map_err(|_| wrong())? * factor;
    // A checkpoint's manifest holds 4 million chunks; beyond 2^53 a float is no count any more.
    if number.is_finite() && (1.0..=9e15).contains(&number) { Ok(number.round() as u64) } else { Err(wrong()) }
}

fn read_costs(path: &PathBuf) -> Result<Costs> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::Config(format!("--costs {}: {error}; `gradwire plan --measure` prints what is wanted", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_have_short_names() {
        for (text, number) in [("70e9", 70_000_000_000), ("7B", 7_000_000_000), ("1.5M", 1_500_000), ("12345", 12_345)]
        {
            assert_eq!(parameters(text).unwrap(), number);
        }
        for wrong in ["", "0", "-1", "7G", "x", "1e400", "B"] {
            assert!(parameters(wrong).is_err(), "{wrong}");
        }
    }
}
