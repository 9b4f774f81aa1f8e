//! What a job is: the settings that the launcher fixes at the start and hands to every rank when it joins.
//!
//! Invariant: every rank of a job holds the same `JobConfig`, and it has passed `validate` before it left the launcher.
#![forbid(unsafe_code)]

use std::{path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{DeviceChoice, MetricsAddress, OnWorkerLoss, PathOptions, PayloadChecksums, StepRange, StoreChoice};
use crate::{
    Error, Result,
    consistency::Consistency,
    layout::{Layout, LayoutOptions, TensorSpec},
    optim::{LossScaleConfig, OptimizerConfig, OptimizerKind, Reduction},
    transport::soft::SoftFaults,
    types::{Clock, Dtype, Rank},
};

/// Most servers or workers of one job: ranks travel as 16 bits, and this leaves room for sums of them.
pub const RANKS_MAX: u16 = 4096;

/// When checkpoints are written, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The directory; without one no checkpoint is ever written.
    pub dir: Option<PathBuf>,
    /// One every so many clocks.
    pub every: Option<Clock>,
    /// One when the last worker has finished.
    pub at_end: bool,
    /// How many complete ones are kept; older ones are removed after a newer one is complete.
    pub keep: u32,
    /// Whether chunks that have not changed since the one before are linked to instead of written again.
    pub incremental: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { dir: None, every: None, at_end: true, keep: 2, incremental: false }
    }
}

/// The fabrics that a job may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fabric {
    /// Memory that two processes of one host share.
    Shm,
    /// RDMA: InfiniBand or RoCE.
    Verbs,
    /// Sockets.
    Tcp,
    /// A soft-RDMA queue pair over UDP: for tests.
    Soft,
}

impl Fabric {
    /// The name under which endpoints carry it.
    pub const fn name(self) -> &'static str {
        match self {
            Fabric::Shm => "shm",
            Fabric::Verbs => "verbs",
            Fabric::Tcp => "tcp",
            Fabric::Soft => "soft",
        }
    }
}

/// An inclusive range of ports to listen on; its text is `first-last`, or one number for one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<PortRange> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(PortRange { first, last }),
            _ => Err(Error::Config(format!("`{text}` is no port range: write `first-last`, such as 20000-20100"))),
        }
    }
}

impl TryFrom<String> for PortRange {
    type Error = Error;

    fn try_from(text: String) -> Result<PortRange> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> String {
        format!("{}-{}", range.first, range.last)
    }
}

/// Everything about a job that all its ranks must agree on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobConfig {
    /// The job's name, by which people find it.
    pub name: String,
    /// A random number, which tells two runs of one name apart; drawn by the launcher.
    pub instance: u64,
    /// How many servers.
    pub servers: u16,
    /// The most servers that the job may have at a time, where servers join and leave while it runs; 0: they stay.
    pub max_servers: u16,
    /// How many workers.
    pub workers: u16,
    /// Seats for workers, those that are empty at first included; 0: as many as workers.
    pub max_workers: u16,
    /// Shards (pinned threads) of each server.
    pub shards_per_server: u16,
    /// Copies of each shard, on different servers: 1, or 2 of which one serves and the other may take over.
    pub replicas: u16,
    /// What becomes of the job when a worker is lost.
    pub on_worker_loss: OnWorkerLoss,
    /// How long the other workers wait for one that computes before it counts as lost, in milliseconds; 0: for ever.
    pub straggler_deadline_ms: u64,
    /// How long the other lane of a shard with two copies may be silent before it counts as gone, in milliseconds.
    pub suspect_ms: u64,
    /// Where it is written down who serves each shard with two copies.
    pub store: StoreChoice,
    /// How far ahead of the others a worker may run, and what an update is.
    pub consistency: Consistency,
    /// How the gradients of one clock become one.
    pub reduction: Reduction,
    /// The optimizer that the servers run.
    pub optimizer: OptimizerConfig,
    /// Number format of gradients on the wire.
    pub gradient_dtype: Dtype,
    /// Number format of parameters on the wire (f32 or bf16).
    pub parameter_dtype: Dtype,
    /// Bytes of a chunk, counted in f32.
    pub chunk_bytes: u64,
    /// Budget for landed gradients, in bytes for each server.
    pub landing_bytes: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// Whether reduce and apply are two passes even where one would do.
    pub two_step: bool,
    /// Where servers keep their shards' state and compute.
    pub device: DeviceChoice,
    /// How long a step may take on a GPU before the device counts as hung, in milliseconds.
    pub gpu_ms: u64,
    /// Whether gradients land in a GPU's memory, and parameters leave from there, where the fabric's device reaches it.
    pub gpu_direct: bool,
    /// Whether a step for which any gradient is not finite is skipped, on all shards, instead of ending in parameters that are not
    /// finite either.
    pub skip_nonfinite: bool,
    /// By what workers multiply their loss, and servers divide their gradients.
    pub loss_scale: LossScaleConfig,
    /// When and where checkpoints are written.
    pub checkpoint: CheckpointConfig,
    /// A checkpoint to continue from, or a directory whose newest complete one is taken.
    pub resume: Option<PathBuf>,
    /// The first clock: 0, or that of the checkpoint. Set by the launcher.
    pub start_clock: Clock,
    /// A safetensors file with the first values of tensors, by name.
    pub init_from: Option<PathBuf>,
    /// How often a silent path carries a heartbeat, in milliseconds.
    pub heartbeat_ms: u64,
    /// How long a silent peer is waited for before the job ends, in milliseconds.
    pub deadline_ms: u64,
    /// How long a rank waits for another before the launcher asks all of them who waits for whom, and says so, in milliseconds; at
    /// least three heartbeats. The job goes on.
    pub warn_ms: u64,
    /// How long the two ends of a broken path may take to rebuild it before the job ends, in milliseconds; 0: a broken path ends the
    /// job.
    pub rebuild_ms: u64,
    /// Which payloads carry a checksum from the sender's memory to the receiver's.
    pub payload_checksums: PayloadChecksums,
    /// How long the launcher waits for every rank to join, in milliseconds.
    pub join_ms: u64,
    /// How long, from the first rank that is there, the others may take to declare, to offer or to reach a barrier, in
    /// milliseconds.
    pub setup_ms: u64,
    /// How long a worker waits for parameters before it gives up, naming what it waits for, in milliseconds. Long: the other
    /// workers may be computing.
    pub wait_ms: u64,
    /// The fabrics to use, best first.
    pub transports: Vec<Fabric>,
    /// What goes wrong on purpose on the fabric `soft`.
    pub soft: SoftFaults,
    /// The network interface to listen on; without one, loopback.
    pub interface: Option<String>,
    /// The ports to listen on; without a range the kernel chooses.
    pub ports: Option<PortRange>,
    /// Where every process answers with its metrics; without it none does.
    pub metrics: Option<MetricsAddress>,
    /// The steps of which a timeline is kept; without it none is.
    pub timeline: Option<StepRange>,
}

impl Default for JobConfig {
    fn default() -> Self {
        JobConfig {
            name: "job".into(),
            instance: 0,
            servers: 1,
            max_servers: 0,
            workers: 1,
            max_workers: 0,
            shards_per_server: 1,
            replicas: 1,
            on_worker_loss: OnWorkerLoss::default(),
            straggler_deadline_ms: 0,
            suspect_ms: 500,
            store: StoreChoice::default(),
            consistency: Consistency::default(),
            reduction: Reduction::default(),
            optimizer: OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3),
            gradient_dtype: Dtype::F32,
            parameter_dtype: Dtype::F32,
            chunk_bytes: 512 << 10,
            landing_bytes: 1 << 30,
            seed: 0,
            two_step: false,
            device: DeviceChoice::Cpu,
            gpu_ms: 30_000,
            gpu_direct: true,
            skip_nonfinite: false,
            loss_scale: LossScaleConfig::default(),
            checkpoint: CheckpointConfig::default(),
            resume: None,
            start_clock: 0,
            init_from: None,
            heartbeat_ms: 1000,
            deadline_ms: 10_000,
            warn_ms: 5_000,
            rebuild_ms: 10_000,
            payload_checksums: PayloadChecksums::default(),
            join_ms: 60_000,
            setup_ms: 600_000,
            wait_ms: 600_000,
            transports: vec![Fabric::Shm, Fabric::Verbs, Fabric::Tcp],
            soft: SoftFaults::default(),
            interface: None,
            ports: None,
            metrics: None,
            timeline: None,
        }
    }
}

impl JobConfig {
    /// Refuses what cannot work, saying which setting and what would.
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Config(text));
        check_name(&self.name)?;
        for (key, count) in [("servers", self.servers), ("workers", self.workers)] {
            if count == 0 || count > RANKS_MAX {
                return refuse(format!("`{key}` is {count}; it must be from 1 to {RANKS_MAX}"));
            }
        }
        if self.shards_per_server == 0 || self.shard_count() > u32::from(u16::MAX) {
            return refuse(format!(
                "`shards_per_server` is {}; it must be at least 1, and servers times shards at most {}",
                self.shards_per_server,
                u16::MAX
            ));
        }
        if self.parameter_dtype == Dtype::F16 {
            return refuse("`parameter_dtype` is f16; parameters travel as f32 or bf16".into());
        }
        // 64 floats are a cache line of every format; 64 MiB keeps a payload's length inside 32 bits with room to spare.
        if !self.chunk_bytes.is_multiple_of(256) || self.chunk_bytes == 0 || self.chunk_bytes > 64 << 20 {
            return refuse(format!(
                "`chunk_bytes` is {}; it must be a multiple of 256, from 256 to {}",
                self.chunk_bytes,
                64 << 20
            ));
        }
        let (chunk, workers) = (self.chunk_bytes, u64::from(self.seats()));
        if self.landing_bytes < 2 * chunk * workers {
            return refuse(format!(
                "`landing_bytes` is {}, too small for two slots for each worker: 2 x {workers} workers x {chunk} bytes a chunk = \
                 {}; raise it, or lower `chunk_bytes`",
                self.landing_bytes,
                2 * chunk * workers
            ));
        }
        self.validate_times()?;
        if self.checkpoint.every == Some(0) || self.checkpoint.keep == 0 {
            return refuse("`checkpoint.every` and `checkpoint.keep` must be at least 1".into());
        }
        if self.checkpoint.every.is_some() && self.checkpoint.dir.is_none() {
            return refuse(
                "`checkpoint.every` is set but `checkpoint.dir` is not: say where the checkpoints go".into(),
            );
        }
        if self.transports.is_empty() {
            return refuse("`transports` is empty; name fabrics, such as shm,tcp".into());
        }
        if self.decides() && !self.consistency.aggregates() {
            return refuse(format!(
                "`optimizer.clip.global_norm`, `skip_nonfinite` and a dynamic `loss_scale.mode` decide about the step that all workers' gradients make together, \
                 and under `consistency` {} there is none: every push is a step of its own; use bsp",
                self.consistency
            ));
        }
        self.validate_replicas()?;
        self.validate_room()?;
        self.validate_elastic()?;
        self.soft.validate()?;
        self.loss_scale.validate()?;
        self.optimizer.validate()
    }

    /// Whether something is decided about each step between the sum of the gradients and the update: they are two passes then.
    pub fn decides(&self) -> bool {
        self.skips_nonfinite() || self.optimizer.clip.global_norm.is_some()
    }

    /// Whether a step with a gradient that is not finite is skipped.
    pub fn skips_nonfinite(&self) -> bool {
        self.skip_nonfinite || self.loss_scale.is_dynamic()
    }

    fn validate_times(&self) -> Result<()> {
        for (key, value) in [
            ("heartbeat_ms", self.heartbeat_ms),
            ("warn_ms", self.warn_ms),
            ("join_ms", self.join_ms),
            ("setup_ms", self.setup_ms),
            ("gpu_ms", self.gpu_ms),
            ("suspect_ms", self.suspect_ms),
        ] {
            if value == 0 {
                return Err(Error::Config(format!("`{key}` is 0; it must be at least 1")));
            }
        }
        // Two heartbeats may be lost to a busy machine before a peer counts as silent.
        if self.deadline_ms < 3 * self.heartbeat_ms {
            return Err(Error::Config(format!(
                "`deadline_ms` is {}; it must be at least three times `heartbeat_ms`, which is {}",
                self.deadline_ms, self.heartbeat_ms
            )));
        }
        Ok(())
    }

    /// What decides the layout, beside the tensors.
    pub fn layout_options(&self) -> LayoutOptions {
        LayoutOptions { chunk_elements: (self.chunk_bytes / 4) as u32, shards: self.shard_count() as u16 }
    }

    /// The layout of what the workers have declared.
    ///
    /// # Errors
    ///
    /// [`Error::LayoutConflict`] where declarations disagree; [`Error::Config`] naming a tensor of a parameter group that the
    /// optimizer does not have.
    pub fn layout(&self, declarations: &[Vec<TensorSpec>]) -> Result<Layout> {
        let layout = Layout::build(declarations, self.layout_options())?;
        let groups = self.optimizer.group_count();
        match layout.tensors.iter().find(|tensor| usize::from(tensor.spec.group) >= groups) {
            None => Ok(layout),
            Some(tensor) => Err(Error::Config(format!(
                "tensor `{}` is of parameter group {}, and this job's optimizer has {groups}, counted from 0: add it to \
                 `optimizer.groups`",
                tensor.spec.name, tensor.spec.group
            ))),
        }
    }

    /// Seats for workers: those with which the job begins, and those that are empty at first.
    pub fn seats(&self) -> u16 {
        self.workers.max(self.max_workers)
    }

    /// Every rank with which the job begins, and every server that it has room for: servers first, each role by number.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.server_seats()).map(Rank::server).chain((0..self.workers).map(Rank::worker))
    }

    /// How often a silent path carries a heartbeat.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// How long a rank waits for another before the launcher says who waits for whom.
    pub fn warn(&self) -> Duration {
        Duration::from_millis(self.warn_ms.max(self.silent_ms()))
    }

    /// Silence after which a rank counts as silent in a verdict: two heartbeats may be lost to a busy machine.
    pub fn silent_ms(&self) -> u64 {
        3 * self.heartbeat_ms
    }

    /// How the job's paths live.
    pub fn path_options(&self) -> PathOptions {
        PathOptions {
            epoch: 0,
            heartbeat: self.heartbeat(),
            deadline: self.deadline(),
            rebuild: Duration::from_millis(self.rebuild_ms),
            checksums: self.payload_checksums,
            life: 0,
        }
    }

    /// How long a silent peer is waited for.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }
}

/// A job's name is a directory's name and a word on the command line: letters, digits, `-`, `_` and `.`, at most 64.
pub fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with(['.', '-']) || !name.chars().all(fits) {
        return Err(Error::Config(format!(
            "`{name}` cannot name a job: use 1 to 64 letters, digits, `-`, `_` or `.`, beginning with a letter or digit"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid_and_travels() {
        let job = JobConfig { instance: u64::MAX - 1, seed: u64::MAX, ..JobConfig::default() };
        job.validate().unwrap();
        let text = serde_json::to_string(&job).unwrap();
        assert_eq!(serde_json::from_str::<JobConfig>(&text).unwrap(), job);
    }

    #[test]
    fn what_cannot_work_is_refused_by_its_key() {
        type Spoil = fn(&mut JobConfig);
        let cases: [(&str, Spoil); 23] = [
            ("workers", |j| j.workers = 0),
            ("max_workers", |j| (j.workers, j.max_workers) = (3, 2)),
            ("max_workers", |j| (j.max_workers, j.consistency) = (2, Consistency::Asp)),
            ("servers", |j| j.servers = RANKS_MAX + 1),
            ("shards_per_server", |j| j.shards_per_server = 0),
            ("parameter_dtype", |j| j.parameter_dtype = Dtype::F16),
            ("chunk_bytes", |j| j.chunk_bytes = 100),
            ("landing_bytes", |j| j.landing_bytes = 1 << 19),
            ("deadline_ms", |j| j.deadline_ms = j.heartbeat_ms),
            ("checkpoint.dir", |j| j.checkpoint.every = Some(5)),
            ("../x", |j| j.name = "../x".into()),
            ("on_worker_loss", |j| j.straggler_deadline_ms = 60_000),
            ("warn_ms", |j| (j.straggler_deadline_ms, j.on_worker_loss) = (100, OnWorkerLoss::Continue)),
            ("replicas", |j| j.replicas = 3),
            ("on_worker_loss", |j| (j.on_worker_loss, j.consistency) = (OnWorkerLoss::Continue, Consistency::Asp)),
            ("servers", |j| j.replicas = 2),
            ("bsp", |j| (j.replicas, j.servers, j.consistency) = (2, 2, Consistency::Asp)),
            ("device", |j| (j.replicas, j.servers, j.device) = (2, 2, DeviceChoice::Auto)),
            ("max_servers", |j| (j.max_servers, j.servers) = (2, 3)),
            ("max_servers", |j| (j.max_servers, j.servers, j.replicas) = (4, 2, 2)),
            ("max_servers", |j| (j.max_servers, j.consistency) = (2, Consistency::Asp)),
            ("bsp", |j| (j.skip_nonfinite, j.consistency) = (true, Consistency::Asp)),
            ("clip.global_norm", |j| j.optimizer.clip.global_norm = Some(0.0)),
        ];
        for (key, spoil) in cases {
            let mut job = JobConfig::default();
            spoil(&mut job);
            let text = job.validate().expect_err(key).to_string();
            assert!(text.contains(key), "{text} should name {key}");
        }
    }

    #[test]
    fn port_ranges() {
        assert_eq!("20000-20010".parse::<PortRange>().unwrap(), PortRange { first: 20000, last: 20010 });
        assert_eq!("80".parse::<PortRange>().unwrap(), PortRange { first: 80, last: 80 });
        for wrong in ["", "0-5", "9-8", "1-70000", "a-b"] {
            assert!(wrong.parse::<PortRange>().is_err(), "{wrong}");
        }
    }
}
