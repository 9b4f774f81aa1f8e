//! The life of a job beneath its protocol: its settings, where its processes find each other and prove who they are, and who of
//! them is still alive.
//!
//! Invariant: every rank holds the same settings and the same view before the first gradient moves.
#![forbid(unsafe_code)]

mod changes;
mod checksums;
mod copies;
mod device;
mod elastic;
mod etcd;
pub(crate) mod fabrics;
mod footprint;
mod job;
mod liveness;
mod metrics;
mod observation;
mod paths;
mod placement;
mod rebuild;
mod recorder;
mod rendezvous;
mod scaling;
mod setting;
mod settings;
mod store;
mod tenure;
mod tenure_log;
mod timeline;
mod verdict;

pub use changes::{Change, Changes, NEVER};
pub use checksums::PayloadChecksums;
pub use device::{DeviceChoice, device_of};
pub use elastic::OnWorkerLoss;
pub use etcd::EtcdStore;
pub use footprint::{ShardMemory, ShardShape, memory_available};
pub use job::{CheckpointConfig, Fabric, JobConfig, PortRange, RANKS_MAX, check_name};
pub use liveness::{Liveness, LivenessEvent};
pub use metrics::{MetricsAddress, MetricsEndpoint, launcher_text};
pub use observation::Observation;
pub use paths::{PathCounts, PathOptions, Paths};
pub use placement::cores_from_environment;
pub use rebuild::{Proposal, life_now};
pub use recorder::{Recorder, Trace};
pub use rendezvous::{
    Address, CheckpointSink, Command, Commands, Control, Departure, Member, Notice, NoticeSink, Offer, Order,
    RankStatus, Rendezvous, RendezvousOptions, Report, Reporter, Scaling, ShardStatus, Status, VERSION, View,
    WorkerTurn, decode_lines, token_from_environment,
};
pub(crate) use rendezvous::{ControlAnswer, LineBuffer, control, control_with};
pub use scaling::{Step, moves_to, next_step};
pub use settings::{RANK_VARIABLES, gather};
pub use store::{StoreChoice, Swap, TenureStore};
pub use tenure::{Claim, Tenure, pair, shard_of};
pub use tenure_log::TenureLog;
pub use timeline::{ClockOffset, StepRange, TimelinePart};
pub use verdict::{Finding, Owed, Verdict, WAITS_MAX, Wait, judge};
