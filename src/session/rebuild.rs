//! A path that broke and is being built again: what its end knows of that.
//!
//! An end that finds its path broken fences its side, and only then makes an offer for the path's next *generation*, which reaches
//! the other end through the rendezvous. The other end fences its own side when it hears of a generation that is newer than its
//! own, whether it had noticed or not, and only then makes its own offer of that generation. An end connects once it has offered
//! and holds the other's offer. So when a path of a generation comes up, both ends have fenced all earlier ones.
//!
//! Invariant: no offer leaves before the fence of what was there before, nor while the fence withholds a slot.

use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{mem::Lease, transport::Endpoint, types::PeerId};

/// Tries in a row that bring nothing through, after which a path counts as lost.
pub(super) const TRIES_MAX: u32 = 16;

/// The pause before the second try; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What one end of a path that is to be rebuilt offers the other, through the rendezvous.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The other end: to whom, when it is sent; from whom, when it has come.
    pub peer: PeerId,
    /// The path's generation.
    pub generation: u32,
    /// Which life of the sender this is: a process that was started again, or a lane that began anew, knows of no generation.
    #[serde(default)]
    pub life: u64,
    /// How the sender is reached in it.
    pub endpoint: Endpoint,
}

/// The number of a life that begins now: of two that begin one after the other, at most one in a microsecond, the later has the
/// greater number. That of the processes with which a job begins is 0.
pub fn life_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as u64
}

/// Where a path is in its life.
#[derive(Debug)]
pub(super) enum Stage {
    /// It has never been there.
    Begun,
    Up,
    Rebuilding(Box<Rebuilding>),
    /// It broke when nothing was owed over it: the other end may rebuild it.
    Dormant,
    /// It is gone for good.
    Ended,
}

#[derive(Debug)]
pub(super) struct Rebuilding {
    /// Why it broke.
    pub cause: String,
    /// Why the last try came to nothing.
    pub defect: Option<String>,
    pub since: Instant,
    /// The path is given up then.
    pub until: Instant,
    /// When this was looked at last.
    pub polled: Instant,
    /// Nothing is tried before.
    pub pause: Instant,
    /// Our offer of this generation has left.
    pub offered: bool,
    /// The other end's.
    pub remote: Option<Endpoint>,
    pub connecting: bool,
}

impl Rebuilding {
    /// Time in which this thread itself did not run is not counted against the other end: what it did meanwhile, and who serves in
    /// its place, may be in messages that nobody has read yet.
    pub fn forgive_absence(&mut self, patience: Duration, now: Instant) {
        let gap = now.saturating_duration_since(self.polled);
        self.polled = now;
        if gap > patience / 2 {
            self.until += gap;
        }
    }

    /// When the next step is due, or this is to be looked at so that a gap tells of an absence.
    pub fn next_deadline(&self, patience: Duration, is_free: bool) -> Instant {
        let can_try = is_free && !self.connecting && (!self.offered || self.remote.is_some());
        let looked_at = self.until.min(self.polled + patience / 4);
        if can_try { self.pause.min(looked_at) } else { looked_at }
    }
}

/// One end's view of a path and of what lies beside it.
#[derive(Debug)]
pub(super) struct Path {
    pub stage: Stage,
    /// Which path between the two ends this is; 0 is the first.
    pub generation: u32,
    /// Slots that the transport holds.
    pub armed: usize,
    /// Slots to be armed when the path is there again.
    pub held: Vec<Lease>,
    /// Tries since something came through.
    pub tries: u32,
    /// Payloads carry a checksum.
    pub is_checked: bool,
    /// The peer may go without harm.
    pub is_released: bool,
    /// The latest life of the peer's that an offer came from.
    pub life: u64,
    /// Who gets the slots of this path.
    pub heir: Option<PeerId>,
    /// How long rebuilding it may take, if not as long as others.
    pub patience: Option<Duration>,
}

impl Path {
    pub fn begun() -> Path {
        Path {
            stage: Stage::Begun,
            generation: 0,
            armed: 0,
            held: Vec::new(),
            tries: 0,
            is_checked: false,
            is_released: false,
            life: 0,
            heir: None,
            patience: None,
        }
    }

    pub fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up)
    }

    /// Slots have come back from a fence.
    pub fn hold(&mut self, slots: impl IntoIterator<Item = Lease>) {
        let before = self.held.len();
        self.held.extend(slots);
        self.armed -= self.held.len() - before;
    }

    /// The pause before the next try.
    pub fn pause(&self) -> Duration {
        match self.tries {
            0 | 1 => Duration::ZERO,
            tries => (PAUSE * 2u32.pow(tries.min(16) - 2)).min(PAUSE_MAX),
        }
    }
}
