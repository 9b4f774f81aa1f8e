//! What this process has used so far: processor time, payload bytes sent, bytes copied on their way; what each thread has done, for
//! metrics and for a timeline; and how much is logged.
//!
//! Invariant: counting never decides anything; a count is one relaxed addition a system call or payload, and never goes down.
#![forbid(unsafe_code)]

mod log;
mod meter;
mod timeline;

use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use serde::{Deserialize, Serialize};

pub use log::log_filter;
pub use meter::{BUCKETS, Cause, Counter, Gauge, Histogram, LaneMeter, Meters, PeerMeter, Queue, TaskKind, bucket_ns};
pub use timeline::{MARKS_MAX, Mark, Ring, WORDS, What, monotonic_ns};

/// Fabrics by whose names bytes are counted.
const FABRICS: [&str; 4] = ["shm", "verbs", "tcp", "soft"];

/// By fabric.
static SENT: [AtomicU64; FABRICS.len()] = [const { AtomicU64::new(0) }; FABRICS.len()];
static COPIED: AtomicU64 = AtomicU64::new(0);

/// What a process, or several together, have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Processor time of all threads, in user and in kernel mode, in nanoseconds.
    pub cpu_ns: u64,
    /// Payload bytes handed to fabrics, headers and what is sent again not counted.
    pub sent_bytes: u64,
    /// Bytes that a processor has copied to move them: into another process' memory, into the kernel, out of it, or out of a
    /// buffer of ours; headers and what is sent again included.
    pub copied_bytes: u64,
}

impl Usage {
    /// What this process has used since it began.
    pub fn now() -> Usage {
        // It fails only for a `who` that does not exist.
        let cpu = getrusage(UsageWho::RUSAGE_SELF).map(|used| used.user_time() + used.system_time());
        let cpu_ns = cpu.map_or(0, |time| time.num_nanoseconds().max(0) as u64);
        let sent_bytes = sent_by_fabric().map(|(_, bytes)| bytes).sum();
        let copied_bytes = COPIED.load(Ordering::Relaxed);
        Usage { cpu_ns, sent_bytes, copied_bytes }
    }

    /// What has been used since `earlier`.
    pub fn since(self, earlier: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
            copied_bytes: self.copied_bytes.saturating_sub(earlier.copied_bytes),
        }
    }
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Usage>>(parts: I) -> Usage {
        parts.fold(Usage::default(), |sum, part| Usage {
            cpu_ns: sum.cpu_ns + part.cpu_ns,
            sent_bytes: sum.sent_bytes + part.sent_bytes,
            copied_bytes: sum.copied_bytes + part.copied_bytes,
        })
    }
}

/// So many payload bytes were handed to a fabric.
pub fn count_sent(fabric: &str, bytes: usize) {
    if let Some(at) = FABRICS.iter().position(|known| *known == fabric) {
        SENT[at].fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Payload bytes that this process has handed to each fabric.
pub fn sent_by_fabric() -> impl Iterator<Item = (&'static str, u64)> {
    FABRICS.into_iter().zip(&SENT).map(|(fabric, sent)| (fabric, sent.load(Ordering::Relaxed)))
}

/// So many bytes were copied by a processor.
pub fn count_copied(bytes: usize) {
    COPIED.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_differences_are_taken() {
        let before = Usage::now();
        count_sent("tcp", 5);
        count_copied(7);
        let used = Usage::now().since(before);
        // Other tests of this process may count too.
        assert!(used.sent_bytes >= 5 && used.copied_bytes >= 7, "{used:?}");
        let one = Usage { cpu_ns: 1, sent_bytes: 2, copied_bytes: 3 };
        assert_eq!([one, one].into_iter().sum::<Usage>(), Usage { cpu_ns: 2, sent_bytes: 4, copied_bytes: 6 });
        assert_eq!(one.since(Usage { cpu_ns: 9, ..one }), Usage::default());
    }
}
