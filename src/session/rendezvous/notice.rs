//! What the launcher learns from its rendezvous.
//!
//! Invariant: every notice speaks of a rank that has proved itself, or of the job as a whole.

use crate::{
    session::{Change, Tenure, TimelinePart, Verdict},
    transport::PathChoice,
    types::{Clock, Rank, ShardId},
};

/// How a rank left, and who goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    /// Who.
    pub rank: Rank,
    /// Its process.
    pub pid: u32,
    /// Its host.
    pub host: String,
    /// Why, if that is known: its own words, or what the others found.
    pub why: Option<String>,
    /// Of a server, those of its shards' other copies.
    pub others: Vec<Rank>,
}

/// What the launcher must know.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// A rank has taken its seat.
    Joined(Rank),
    /// All workers have declared and every rank has offered its endpoints: the job runs.
    Running,
    /// A worker has chosen the fabrics of its paths.
    Paths {
        /// Who.
        rank: Rank,
        /// One for each lane.
        paths: Vec<PathChoice>,
    },
    /// A rank says that it cannot go on.
    Failed {
        /// Who.
        rank: Rank,
        /// Why, in its words.
        text: String,
        /// Whether it lays the cause with another rank.
        elsewhere: bool,
    },
    /// A gradient was not finite; told once for each clock, however many tensors and shards it concerns.
    NotFinite {
        /// At which clock.
        clock: Clock,
        /// Whose gradient; nobody's if each worker's is finite and their sum is not.
        worker: Option<u16>,
        /// In which tensor.
        tensor: String,
        /// At how many clocks that has been so until now.
        count: u64,
    },
    /// Somebody has been waited for too long; told again when it has lasted twice as long, or when it is somebody else.
    Waiting(Box<Verdict>),
    /// Settings change, on every shard at the same clock.
    Changed {
        /// From which clock on.
        clock: Clock,
        /// What.
        change: Change,
    },
    /// What a thread of a rank has done, and when.
    Timeline {
        /// Whose thread.
        rank: Rank,
        /// Some of its marks.
        part: Box<TimelinePart>,
    },
    /// A rank is gone, and the job goes on without it: a server whose shards have other copies, or a worker.
    Gone(Box<Departure>),
    /// A process is to be started for a worker or a server that is wanted.
    Wanted(Rank),
    /// Steps were taken without what a lost worker had not given in whole; the text says which.
    Lacked(String),
    /// No worker is left.
    Deserted,
    /// A shard has no copy left.
    CopiesLost {
        /// Which.
        shard: ShardId,
        /// The servers that held it.
        servers: Vec<Rank>,
    },
    /// A shard is served in another way from now on.
    Tenure {
        /// Which shard.
        shard: ShardId,
        /// Who serves it.
        tenure: Tenure,
        /// The shards that have no backup now.
        alone: Vec<ShardId>,
    },
    /// The job is to have so many servers, for which so many shards move.
    Scaling {
        /// How many servers.
        servers: u16,
        /// How many shards.
        moves: u32,
    },
    /// A shard has moved.
    Moved {
        /// Which.
        shard: ShardId,
        /// Who served it.
        from: Rank,
        /// Who serves it.
        to: Rank,
    },
    /// The job has so many servers.
    Scaled {
        /// How many servers.
        servers: u16,
        /// How many shards have moved for that.
        moved: u32,
    },
    /// The job does not get the servers that it was to have; the text says why.
    ScaleFailed(String),
    /// A server that had no shard any more has gone; its seat is free.
    Retired(Rank),
    /// The store of tenures cannot be used: no copy takes over until it can; told once until then.
    StoreUnavailable(String),
    /// A rank's connection ended before it had finished.
    Lost(Rank),
    /// A rank has done its part.
    Finished {
        /// Who.
        rank: Rank,
        /// What it said about it.
        summary: serde_json::Value,
    },
    /// Somebody did not come in time; the text names all who are missing.
    TimedOut(String),
    /// The job cannot begin; the text says why and what would help.
    Refused(String),
    /// A checkpoint is complete, its manifest included.
    Checkpoint {
        /// Of which clock.
        clock: Clock,
        /// Whether the job was told to end with it.
        stopping: bool,
    },
    /// A checkpoint's manifest could not be written.
    CheckpointFailed(String),
}
