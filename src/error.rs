//! The one error type of the crate: a variant per way to fail, each text saying what happened, to whom, and what to do.
//!
//! Invariant: our own bugs are asserted, the world's failures are returned; an error never holds a secret.
#![forbid(unsafe_code)]

use std::{io, path::PathBuf, time::Duration};

use crate::types::{ChunkId, Clock, PeerId, Rank};

/// Everything that can go wrong outside our own code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{call} failed for {subject}: {source}")]
    Os {
        /// The C name of the call.
        call: &'static str,
        /// What it was applied to, in words.
        subject: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// "read", "write", "rename" …
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The limit on locked memory is too small for a region that a device must reach.
    #[error(
        "cannot lock {subject}: with what is locked already that needs {needed_bytes} bytes, and the limit on locked memory \
         (RLIMIT_MEMLOCK) is {limit_bytes} bytes soft, {hard_limit_bytes} hard; {}",
        raise_memlock(*needed_bytes, *hard_limit_bytes)
    )]
    Memlock {
        /// What was to be locked, in words.
        subject: String,
        /// What this process would have locked in all.
        needed_bytes: u64,
        /// The soft limit in force.
        limit_bytes: u64,
        /// How far the soft limit can be raised without root.
        hard_limit_bytes: u64,
    },
    /// A call of a GPU's driver failed.
    #[error("{call} failed on {device}: {cause}")]
    Gpu {
        /// The C name of the call.
        call: &'static str,
        /// The device, in words.
        device: String,
        /// What the driver said, and what to do about it.
        cause: String,
    },
    /// A path to a peer ended; what was in flight on it is lost.
    #[error("the path to {peer} broke: {reason}")]
    Broken {
        /// The other end.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// A wait passed its deadline.
    #[error("waited {:.1} s for {awaited} from {from}{}", waited.as_secs_f64(), detail(*chunk, *clock))]
    Deadline {
        /// Whom we waited for.
        from: String,
        /// What we waited for, in words.
        awaited: &'static str,
        /// The chunk, if it was about one.
        chunk: Option<ChunkId>,
        /// The clock, if it was about one.
        clock: Option<Clock>,
        /// How long.
        waited: Duration,
    },
    /// A peer did what the protocol forbids.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// Who.
        peer: PeerId,
        /// What it did.
        what: String,
    },
    /// The other side refused us.
    #[error("{who} refused: {why}")]
    Refused {
        /// Who refused.
        who: String,
        /// Its reason.
        why: String,
    },
    /// Two workers declared one tensor differently.
    #[error(
        "tensor `{tensor}` is declared as {first:?} by {first_rank} and as {second:?} by {second_rank}; \
         every worker must give a tensor the same shape and settings"
    )]
    LayoutConflict {
        /// The tensor's name.
        tensor: String,
        /// Who declared it first.
        first_rank: Rank,
        /// Shape and settings it gave.
        first: String,
        /// Who disagrees.
        second_rank: Rank,
        /// Shape and settings it gave.
        second: String,
    },
    /// A setting is wrong.
    #[error("{0}")]
    Config(String),
    /// A checkpoint cannot be used.
    #[error("checkpoint {}: {defect}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        defect: String,
    },
    /// Another part of the job failed first; this is its report.
    #[error("{0}")]
    JobFailed(String),
    /// The job was told to stop (preemption) and did so in order.
    #[error("the job was stopped at clock {clock} on request; resume it with --resume")]
    Preempted {
        /// The clock whose checkpoint was written.
        clock: Clock,
    },
    /// This worker was told to leave, and has done all that it had to do.
    #[error("this worker is of the job no more from clock {clock} on, as was asked: it has only to finish")]
    Left {
        /// The first clock at which nothing of it counts.
        clock: Clock,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps a failed system call.
    pub fn os(call: &'static str, subject: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::Os { call, subject: subject.into(), source: source.into() }
    }

    /// Wraps a failed file operation.
    pub fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Error {
        Error::File { action, path: path.into(), source }
    }
}

fn detail(chunk: Option<ChunkId>, clock: Option<Clock>) -> String {
    let mut text = String::new();
    if let Some(chunk) = chunk {
        text.push_str(&format!(", chunk {}", chunk.0));
    }
    if let Some(clock) = clock {
        text.push_str(&format!(", clock {clock}"));
    }
    text
}

/// The line to change: the shell's own limit where the hard limit allows it, else what root has to write.
fn raise_memlock(needed_bytes: u64, hard_limit_bytes: u64) -> String {
    let kib = needed_bytes.div_ceil(1024);
    if needed_bytes <= hard_limit_bytes {
        return format!("run `ulimit -l {kib}` in the shell that starts the job");
    }
    format!(
        "root must raise the hard limit: the line `* - memlock {kib}` in /etc/security/limits.d/gradwire.conf (then log in \
         again), or `LimitMEMLOCK={needed_bytes}` in the [Service] section of the systemd unit, or `--ulimit \
         memlock={needed_bytes}` for a container, or CAP_IPC_LOCK for the process"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_memlock_limit_is_told_with_the_line_to_change() {
        let text = |hard_limit_bytes| {
            let subject = "region `slots`".to_owned();
            Error::Memlock { subject, needed_bytes: 4097, limit_bytes: 1024, hard_limit_bytes }.to_string()
        };
        let soft = text(8192);
        for part in ["region `slots`", "needs 4097 bytes", "1024 bytes soft", "8192 hard", "`ulimit -l 5`"] {
            assert!(soft.contains(part), "{soft}");
        }
        assert!(!soft.contains("root"), "{soft}");
        let hard = text(2048);
        for part in ["`* - memlock 5`", "LimitMEMLOCK=4097", "CAP_IPC_LOCK"] {
            assert!(hard.contains(part), "{hard}");
        }
        assert!(!hard.contains("ulimit -l"), "the shell cannot help here: {hard}");
    }
}
