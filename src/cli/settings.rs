//! The flags that are settings of a job, for every command that starts one.
//!
//! Invariant: every flag that is a setting goes through the same table as the file and the variables.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;

use crate::{
    Error, Result,
    session::{JobConfig, gather},
};

#[derive(Args)]
pub(super) struct SettingArguments {
    /// Number of servers.
    #[arg(short, long, value_name = "N")]
    servers: Option<String>,
    /// The most servers that the job may have at a time: it begins with those of -s, and `gradwire scale` adds some and takes some away
    /// while it runs. Without it the servers stay.
    #[arg(long, value_name = "N")]
    max_servers: Option<String>,
    /// Number of workers.
    #[arg(short = 'n', long, value_name = "N")]
    workers: Option<String>,
    /// Seats for workers, if others are to come while the job runs (gradwire add-worker) [default: as many as workers].
    #[arg(long, value_name = "N")]
    max_workers: Option<String>,
    /// The job's name [default: made up].
    #[arg(long)]
    name: Option<String>,
    /// A TOML file with settings.
    #[arg(long, value_name = "FILE", env = "GRADWIRE_CONFIG")]
    config: Option<PathBuf>,
    /// Any setting, by its key.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Shards (pinned threads) of each server.
    #[arg(long, value_name = "N")]
    shards_per_server: Option<String>,
    /// Copies of each shard, on different servers: 1, or 2, of which one serves and the other takes over when that is gone.
    #[arg(long, value_name = "N")]
    replicas: Option<String>,
    /// When a worker is lost: fail (the job ends), continue (it goes on with the others), or restart (the lost one is also started
    /// again).
    #[arg(long, value_name = "fail|continue|restart")]
    on_worker_loss: Option<String>,
    /// How long the other workers wait for one that computes before it counts as lost, in milliseconds; 0: for ever. Needs
    /// --on-worker-loss continue or restart.
    #[arg(long, value_name = "MS")]
    straggler_deadline: Option<String>,
    /// How far ahead of the slowest a worker may run: bsp, ssp:N or asp.
    #[arg(long)]
    consistency: Option<String>,
    /// sgd, adam, adamw or adagrad.
    #[arg(long, value_name = "KIND")]
    optimizer: Option<String>,
    /// Learning rate before the schedule.
    #[arg(long, visible_alias = "lr", value_name = "RATE")]
    learning_rate: Option<String>,
    /// Scale each step's whole gradient, of all tensors, down to this Euclidean norm if it is longer.
    #[arg(long, value_name = "NORM")]
    clip_norm: Option<String>,
    /// Skip a step, on all servers, for which any gradient is not finite.
    #[arg(long)]
    skip_nonfinite: bool,
    /// By what workers multiply their loss, and servers divide gradients: off, a number, or dynamic, which skips steps that are not
    /// finite and changes as torch's GradScaler does.
    #[arg(long, value_name = "MODE")]
    loss_scale: Option<String>,
    /// How gradients become one: mean or sum.
    #[arg(long)]
    reduction: Option<String>,
    /// Gradients on the wire: f32, bf16 or f16.
    #[arg(long, value_name = "DTYPE")]
    gradient_dtype: Option<String>,
    /// Parameters on the wire: f32 or bf16.
    #[arg(long, value_name = "DTYPE")]
    parameter_dtype: Option<String>,
    /// Where servers compute: cpu, gpu (all of each server's machine, a shard each in turn), gpu:0,1 or auto.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Seed of everything random.
    #[arg(long)]
    seed: Option<String>,
    /// Where checkpoints go.
    #[arg(long, value_name = "DIR")]
    checkpoint_dir: Option<String>,
    /// A checkpoint every so many clocks.
    #[arg(long, value_name = "CLOCKS")]
    checkpoint_every: Option<String>,
    /// Continue from the last checkpoint in this directory.
    #[arg(long, value_name = "DIR")]
    resume: Option<String>,
    /// The fabrics that may be used, best first, such as shm,tcp.
    #[arg(long, visible_alias = "transports", value_name = "NAMES")]
    transport: Option<String>,
    /// Soft-RDMA test mode (--transport soft): the share of packets that are lost, such as 0.05.
    #[arg(long, value_name = "CHANCE")]
    soft_loss: Option<String>,
    /// The share of packets that are sent twice.
    #[arg(long, value_name = "CHANCE")]
    soft_duplicate: Option<String>,
    /// The share of packets that later ones overtake.
    #[arg(long, value_name = "CHANCE")]
    soft_reorder: Option<String>,
    /// The share of packets in which a bit is flipped.
    #[arg(long, value_name = "CHANCE")]
    soft_corrupt: Option<String>,
    /// The longest delay of a packet, in microseconds.
    #[arg(long, value_name = "US")]
    soft_delay_us: Option<String>,
    /// The packet of each rank with whose sending its queue pair dies.
    #[arg(long, value_name = "N")]
    soft_die_after: Option<String>,
    /// Seed of these faults.
    #[arg(long, value_name = "SEED")]
    soft_seed: Option<String>,
    /// The network interface for data.
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// The ports for data, such as 20000-20100.
    #[arg(long, value_name = "FIRST-LAST")]
    ports: Option<String>,
    /// Have every process answer with its metrics, in the format of Prometheus, at this address [without one: 127.0.0.1, any port];
    /// `gradwire status` shows where.
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:0")]
    metrics: Option<String>,
    /// Write a timeline of the job, for Perfetto or chrome://tracing, when it ends.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// The steps that it shows, such as 100..110 [default: the last ones that there is room for].
    #[arg(long, value_name = "A..B", requires = "timeline")]
    timeline_steps: Option<String>,
}

impl SettingArguments {
    /// The job's settings from all sources.
    pub fn gather(&self) -> Result<JobConfig> {
        self.gather_with(None)
    }

    /// The same, where somebody else has said how many ranks there are: they are workers but for the servers.
    pub fn gather_with(&self, ranks: Option<u16>) -> Result<JobConfig> {
        // A made-up name is the weakest of all sources.
        let made_up = format!("job-{:06x}", u32::from_le_bytes(crate::wire::random_bytes()?) & 0xff_ffff);
        let environment = std::iter::once(("GRADWIRE_NAME".to_string(), made_up)).chain(own_environment());
        let mut pairs = self.pairs()?;
        if let (Some(ranks), None) = (ranks, &self.workers) {
            let servers = match &self.servers {
                None => 1,
                Some(text) => {
                    text.parse().map_err(|_| Error::Config(format!("-s {text}: that is no number of servers")))?
                }
            };
            let workers = ranks.checked_sub(servers).filter(|workers| *workers > 0).ok_or_else(|| {
                Error::Config(format!("{servers} servers of {ranks} processes leave no worker; start more"))
            })?;
            pairs.push(("servers".into(), servers.to_string()));
            pairs.push(("workers".into(), workers.to_string()));
        }
        gather(environment, self.config.as_deref(), &pairs)
    }

    fn pairs(&self) -> Result<Vec<(String, String)>> {
        let skips = self.skip_nonfinite.then(|| "true".to_string());
        let flags = [
            ("optimizer.clip.global_norm", &self.clip_norm),
            ("skip_nonfinite", &skips),
            ("loss_scale.mode", &self.loss_scale),
            ("servers", &self.servers),
            ("max_servers", &self.max_servers),
            ("workers", &self.workers),
            ("max_workers", &self.max_workers),
            ("name", &self.name),
            ("shards_per_server", &self.shards_per_server),
            ("replicas", &self.replicas),
            ("on_worker_loss", &self.on_worker_loss),
            ("straggler_deadline_ms", &self.straggler_deadline),
            ("consistency", &self.consistency),
            ("optimizer.kind", &self.optimizer),
            ("optimizer.learning_rate", &self.learning_rate),
            ("reduction", &self.reduction),
            ("gradient_dtype", &self.gradient_dtype),
            ("parameter_dtype", &self.parameter_dtype),
            ("device", &self.device),
            ("seed", &self.seed),
            ("checkpoint.dir", &self.checkpoint_dir),
            ("checkpoint.every", &self.checkpoint_every),
            ("resume", &self.resume),
            ("transports", &self.transport),
            ("soft.loss", &self.soft_loss),
            ("soft.duplicate", &self.soft_duplicate),
            ("soft.reorder", &self.soft_reorder),
            ("soft.corrupt", &self.soft_corrupt),
            ("soft.delay_us", &self.soft_delay_us),
            ("soft.die_after", &self.soft_die_after),
            ("soft.seed", &self.soft_seed),
            ("interface", &self.interface),
            ("ports", &self.ports),
            ("metrics", &self.metrics),
            ("timeline", &self.timeline_steps),
        ];
        let mut pairs: Vec<(String, String)> = Vec::new();
        for setting in &self.settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Error::Config(format!("--set takes KEY=VALUE, and `{setting}` has no `=`")))?;
            pairs.push((key.trim().into(), value.trim().into()));
        }
        let given = flags.into_iter().filter_map(|(key, value)| Some((key.to_string(), value.clone()?)));
        pairs.extend(given);
        Ok(pairs)
    }
}

/// The environment as far as it is text, without what a launcher around this one has set for its own ranks.
fn own_environment() -> impl Iterator<Item = (String, String)> {
    let nested = std::env::var_os("GRADWIRE_RENDEZVOUS").is_some();
    let inherited = move |name: &str| nested && matches!(name, "GRADWIRE_WORKERS" | "GRADWIRE_SERVERS");
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    all.filter(move |(name, _)| !inherited(name))
}
