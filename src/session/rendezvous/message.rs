//! What launcher and ranks say to each other at the rendezvous, one JSON object a line.
//!
//! Invariant: every message has one side that says it and one that hears it; what a rank reports is never taken for what the
//! launcher orders.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Scaling, ShardStatus, WorkerTurn};
use crate::{
    Error,
    layout::TensorSpec,
    observe::sent_by_fabric,
    optim::LiveChange,
    session::{Change, Claim, JobConfig, PathCounts, Proposal, Tenure, TimelinePart, Verdict, Wait},
    transport::{Endpoint, PathChoice},
    types::{Clock, Epoch, PeerId, Rank, Role, ShardId},
};

/// What both sides must agree on: the protocol's number and the program's version, since settings travel by field name.
pub const VERSION: &str = concat!("1/", env!("CARGO_PKG_VERSION"));

/// The launcher's first line to anybody.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Challenge {
    /// Always "rendezvous": tells a caller that it reached the right kind of port.
    pub gradwire: String,
    pub version: String,
    /// Hexadecimal.
    pub nonce: String,
}

/// What a caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Purpose {
    /// To take a seat in the job.
    Join,
    /// To ask or to order something.
    Control,
}

/// The caller's first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Answer {
    pub version: String,
    pub purpose: Purpose,
    pub role: Option<Role>,
    pub rank: Option<u16>,
    /// Hexadecimal.
    pub nonce: String,
    /// Hexadecimal; empty from a caller without token.
    pub mac: String,
    pub pid: u32,
    pub host: String,
}

/// The launcher's second line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Admission {
    /// The caller is known; this is the launcher's own proof, in hexadecimal.
    Accepted(String),
    /// And why.
    Refused(String),
}

/// One end's way to be reached by another: `from` offers it to `to`.
pub type Offer = (PeerId, PeerId, Endpoint);

/// A rank's, or a control caller's, line to the launcher.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToLauncher {
    Declare(Vec<TensorSpec>),
    Offer(Vec<Offer>),
    Barrier(String),
    Report(Report),
    Control(Control),
    /// What time is it?
    AskTime,
}

/// The launcher's line to a rank or a control caller.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromLauncher {
    Welcome {
        rank: Rank,
        config: Box<JobConfig>,
        /// Another process has had this seat before.
        #[serde(default)]
        again: bool,
    },
    View(PackedView),
    Offers(Vec<Offer>),
    BarrierPassed(String),
    Command(Command),
    Refused(String),
    Status(Box<Status>),
    CheckpointWritten {
        clock: Clock,
    },
    Changed {
        clock: Clock,
    },
    Turned(WorkerTurn),
    /// How far the job is on its way to so many servers.
    Scaling(Scaling),
    /// The job has so many servers; so many shards have moved for that.
    Scaled {
        servers: u16,
        moved: u32,
    },
    /// The launcher's time, and which clock it reads.
    Time {
        at_ns: u64,
        clock: String,
    },
}

/// What a rank tells the launcher while the job runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// A worker has begun this clock, or a server has completed it.
    Progress {
        /// Which clock.
        clock: Clock,
    },
    /// Payload bytes that this process has sent, by fabric; told with its progress.
    Sent(BTreeMap<String, u64>),
    /// The fabrics that carry this worker's paths, one for each lane.
    Paths(Vec<PathChoice>),
    /// A shard's part of a checkpoint is on the disk.
    CheckpointWritten {
        /// Whose part.
        shard: ShardId,
        /// Of which clock.
        clock: Clock,
        /// What the manifest must hold about it.
        info: Value,
    },
    /// The clock of a requested checkpoint had passed when the request came: the launcher asks again for a later one.
    CheckpointLate {
        /// The clock that was asked for.
        clock: Clock,
        /// The clock that has been reached.
        reached: Clock,
    },
    /// A lane begins nothing of a clock and later ones until a change is settled.
    Prepared {
        /// The change.
        number: u64,
        /// The lane.
        lane: u16,
        /// The first clock that is held there.
        from: Clock,
    },
    /// A thread of this rank has fenced its end of a broken path, and offers itself for its next generation.
    Rebuild {
        /// Which thread: the lane of a server's shard, 0 of a worker.
        lane: u16,
        /// The offer.
        proposal: Proposal,
    },
    /// A lane wants the tenure of its shard changed.
    Claim {
        /// The lane.
        lane: u16,
        /// Which shard.
        shard: ShardId,
        /// The tenure that the lane knows.
        epoch: Epoch,
        /// What it wants.
        claim: Claim,
    },
    /// A shard that was given to this server cannot be held there.
    Declined {
        /// Which shard.
        shard: ShardId,
        /// Why.
        text: String,
    },
    /// What has happened to the paths of a thread since it began.
    PathCounts {
        /// Which thread.
        lane: u16,
        /// The counts.
        counts: PathCounts,
    },
    /// A gradient was not finite.
    NotFinite {
        /// At which clock.
        clock: Clock,
        /// Whose gradient; nobody's if each worker's is finite and their sum is not.
        worker: Option<u16>,
        /// In which tensor.
        tensor: String,
    },
    /// What a thread of this rank waits for, as it was asked or because it has waited for long; nothing if it waits for nobody.
    Waits {
        /// Which thread: the lane of a server's shard, 0 of a worker.
        lane: u16,
        /// At most [`crate::session::WAITS_MAX`].
        waits: Vec<Wait>,
    },
    /// A lane has lost its path to a worker of a job that goes on without it, and takes nothing more from it.
    WorkerLost {
        /// Which lane.
        lane: u16,
        /// Which worker.
        worker: u16,
        /// Why.
        text: String,
    },
    /// A lane took steps of a clock without what a lost worker had not given in whole.
    Lacked {
        /// Which worker.
        worker: u16,
        /// The clock.
        clock: Clock,
        /// Of how many chunks.
        chunks: u64,
    },
    /// A worker in the place of one that was lost has reached every lane, and waits for its first clock.
    Connected,
    /// Where this rank's metrics are read.
    MetricsAt {
        /// An address of its host.
        address: SocketAddr,
    },
    /// What a thread of this rank has done, and when.
    Timeline(TimelinePart),
    /// This rank cannot go on.
    Failed {
        /// Why, in the words of its error.
        text: String,
        /// Whether the cause lies with another rank (a broken path, silence): that rank's own report then comes first.
        elsewhere: bool,
    },
    /// This rank has done its part and will leave.
    Finished {
        /// Whatever it wants to say about it.
        summary: Value,
    },
}

impl Report {
    /// What this process has sent until now.
    pub fn sent() -> Report {
        let fabrics = sent_by_fabric().filter(|(_, bytes)| *bytes > 0);
        Report::Sent(fabrics.map(|(fabric, bytes)| (fabric.to_string(), bytes)).collect())
    }

    /// The report of an error that ends this rank.
    pub fn failure(error: &Error) -> Report {
        let elsewhere = matches!(error, Error::Broken { .. } | Error::Deadline { .. } | Error::JobFailed(_));
        Report::Failed { text: error.to_string(), elsewhere }
    }
}

/// What the launcher tells ranks while the job runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Write a checkpoint of this clock when it is complete, and go on.
    Checkpoint {
        /// The first clock not contained in it: the state after `clock` steps.
        clock: Clock,
    },
    /// End in order.
    Stop {
        /// Why.
        reason: String,
        /// Whether a checkpoint is to be written first.
        checkpoint: bool,
        /// Stop (and write) when this clock is complete; without one, now: no worker will push any more.
        clock: Option<Clock>,
    },
    /// The checkpoint with which the job ends early is complete: leave.
    Leave {
        /// Its clock.
        clock: Clock,
    },
    /// All workers have finished: end when everything has been applied.
    End {
        /// The clock that the furthest worker reached.
        clock: Clock,
        /// Whether the state is to be stored.
        checkpoint: bool,
    },
    /// Begin nothing of this clock and later ones, of the next that is possible if it has begun, and say which.
    Prepare {
        /// The change for which.
        number: u64,
        /// From which clock on.
        clock: Clock,
        /// What it is.
        change: Change,
    },
    /// Every lane has prepared: go on.
    Change {
        /// The change that was prepared.
        number: u64,
        /// From which clock on it holds, and what it is; nothing if it is given up.
        change: Option<(Clock, Change)>,
    },
    /// The other end of a path has fenced it, and offers itself for its next generation.
    Rebuild {
        /// Which of this rank's lanes is meant.
        lane: u16,
        /// The offer, as from the other end.
        proposal: Proposal,
    },
    /// A shard is served in this way from now on; also the answer to a claim that was refused.
    Tenure {
        /// Which shard.
        shard: ShardId,
        /// Who serves it.
        tenure: Tenure,
    },
    /// A server's process is gone; its shards' other lanes may take over, or go on alone.
    Gone {
        /// Which server.
        rank: Rank,
    },
    /// This server has no shard any more, and will be given none: it may go.
    Retire,
    /// Say what you wait for.
    TellWaits,
    /// Another part of the job failed: end at once.
    JobFailed {
        /// Who, and why.
        text: String,
    },
}

/// What is asked or ordered from outside, over the rendezvous port.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Who has joined, and how far they are.
    Status,
    /// Write a checkpoint; the answer comes when it is complete.
    Checkpoint,
    /// Change settings; the answer comes when the clock is known from which on they hold.
    Change(LiveChange),
    /// Have a worker leave; the answer comes when its clock is settled.
    RemoveWorker {
        /// Which.
        worker: u16,
        /// Not before this clock.
        at: Clock,
    },
    /// Have another worker take part; the answer comes when its clock is settled.
    AddWorker {
        /// In which seat; in any that is empty if nothing is said.
        worker: Option<u16>,
        /// Not before this clock.
        at: Clock,
    },
    /// Have so many servers; the answer comes when all shards are where they are to be, and news of each that has moved before that.
    Scale {
        /// How many.
        servers: u16,
    },
}

/// One rank, as the launcher sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Who.
    pub rank: Rank,
    /// "not joined", "joined", "declared", "running", "finished", "lost", "gone", "free" (a server's seat), "joining", or "leaving".
    pub state: String,
    /// Its machine; empty if it has not joined.
    pub host: String,
    /// Its process there; 0 if it has not joined.
    pub pid: u32,
    /// The last clock that it reported.
    pub clock: Option<Clock>,
    /// The fabrics of a worker's paths; empty for servers, which are their other ends.
    pub paths: Vec<PathChoice>,
    /// Its ends of paths that broke and were rebuilt, and payloads that reached it damaged.
    pub path_counts: PathCounts,
    /// Where its metrics are read, if they are.
    pub metrics: Option<SocketAddr>,
    /// Payload bytes that it has sent, by fabric, as it reported last.
    pub sent: BTreeMap<String, u64>,
    /// When that was, in milliseconds since the launcher began.
    pub reported_ms: u64,
}

impl Status {
    /// The shards that have two copies by right and one that may serve.
    pub fn shards_without_backup(&self) -> Vec<String> {
        let alone = self.shards.iter().filter(|shard| !shard.moves && !shard.has_backup());
        alone.map(|shard| shard.shard.0.to_string()).collect()
    }
}

/// The job, as the launcher sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The job's name.
    pub name: String,
    /// The number that tells two runs of one name apart.
    pub instance: u64,
    /// Every rank, servers first.
    pub ranks: Vec<RankStatus>,
    /// Every shard, where there are two copies of each or they may move; otherwise nothing.
    pub shards: Vec<ShardStatus>,
    /// Workers that were lost or left, and that came, in order.
    #[serde(default)]
    pub turns: Vec<WorkerTurn>,
    /// Steps of a chunk that lack what a lost worker had not given in whole.
    #[serde(default)]
    pub lacked: u64,
    /// The clock of the last complete checkpoint of this run.
    pub checkpoint: Option<Clock>,
    /// Clocks at which a gradient was not finite, where that is looked at; the steps that were skipped, where they are.
    pub not_finite: u64,
    /// Who keeps the job waiting, if somebody has been waited for longer than `warn_ms`.
    pub verdict: Option<Verdict>,
    /// Where the launcher's own metrics are read, if they are.
    pub metrics: Option<SocketAddr>,
}

/// What every rank knows once all workers have declared their tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The declarations, by worker.
    pub declarations: Vec<Vec<TensorSpec>>,
    /// How many servers.
    pub servers: u16,
    /// How many workers.
    pub workers: u16,
}

/// A view in which equal declarations stand once: a data-parallel job of 512 workers sends one copy, not 512.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PackedView {
    distinct: Vec<Vec<TensorSpec>>,
    by_worker: Vec<u16>,
    servers: u16,
}

impl PackedView {
    /// Packs the declarations (by worker).
    pub fn pack<'a>(declarations: impl Iterator<Item = &'a Vec<TensorSpec>>, servers: u16) -> PackedView {
        let mut packed = PackedView { distinct: Vec::new(), by_worker: Vec::new(), servers };
        for declaration in declarations {
            let known = packed.distinct.iter().position(|other| other == declaration);
            let index = known.unwrap_or_else(|| {
                packed.distinct.push(declaration.clone());
                packed.distinct.len() - 1
            });
            packed.by_worker.push(index as u16);
        }
        packed
    }

    /// What one worker has declared.
    pub fn of(&self, worker: u16) -> Option<&[TensorSpec]> {
        let index = self.by_worker.get(usize::from(worker))?;
        self.distinct.get(usize::from(*index)).map(Vec::as_slice)
    }

    /// The view; `None` if a worker points at a declaration that is not there.
    pub fn unpack(self) -> Option<View> {
        let declarations: Option<Vec<_>> =
            self.by_worker.iter().map(|&index| self.distinct.get(usize::from(index)).cloned()).collect();
        let declarations = declarations?;
        Some(View { workers: u16::try_from(declarations.len()).ok()?, servers: self.servers, declarations })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::line::{decode, encode},
        *,
    };

    #[test]
    fn equal_declarations_travel_once() {
        let (a, b) = (vec![TensorSpec::new("a", vec![2])], vec![TensorSpec::new("b", vec![3])]);
        let all = [a.clone(), b.clone(), a.clone(), a.clone()];
        let packed = PackedView::pack(all.iter(), 2);
        assert_eq!(packed.distinct.len(), 2);
        let view = decode::<PackedView>(encode(&packed).trim_ascii_end()).unwrap().unpack().unwrap();
        assert_eq!(view, View { declarations: all.to_vec(), servers: 2, workers: 4 });
        let broken = PackedView { distinct: vec![a], by_worker: vec![1], servers: 1 };
        assert_eq!(broken.unpack(), None);
    }
}
