//! What becomes of a job that loses workers, and whether workers may leave it and come to it.
//!
//! Invariant: what does not go together with it is refused by name before the job begins.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::{JobConfig, RANKS_MAX};
use crate::{Error, Result};

/// What becomes of a job when a worker is lost: it dies, it is silent, or its paths break for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnWorkerLoss {
    /// The job ends.
    #[default]
    Fail,
    /// It goes on with the workers that are left.
    Continue,
    /// It goes on, and the launcher starts the worker again, which takes part from a later clock on.
    Restart,
}

impl JobConfig {
    /// Whether the job goes on when a worker is lost.
    pub fn may_lose_workers(&self) -> bool {
        self.on_worker_loss != OnWorkerLoss::Fail
    }

    /// Why workers cannot leave this job or come to it while it runs.
    pub fn keeps_workers(&self) -> Option<&'static str> {
        (!self.consistency.aggregates()).then_some("that needs `consistency` bsp")
    }

    fn validate_seats(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::Config(format!("`max_workers` is {}; {why}", self.max_workers)));
        match self.max_workers {
            0 => Ok(()),
            seats if seats < self.workers || seats > RANKS_MAX => {
                refuse(&format!("it must be from `workers`, which is {}, to {RANKS_MAX}", self.workers))
            }
            seats if seats == self.workers => Ok(()),
            _ if self.rebuild_ms == 0 => {
                refuse("a worker that comes later builds its paths by itself: `rebuild_ms` must not be 0")
            }
            _ => self.keeps_workers().map_or(Ok(()), refuse),
        }
    }

    pub(super) fn validate_elastic(&self) -> Result<()> {
        self.validate_seats()?;
        let refuse = |why: &str| {
            let text = format!("`on_worker_loss` is `continue` or `restart`; {why}");
            Err(Error::Config(text))
        };
        let straggler = |why: String| {
            Err(Error::Config(format!("`straggler_deadline_ms` is {}; {why}", self.straggler_deadline_ms)))
        };
        let warn_ms = self.warn().as_millis() as u64;
        match self.on_worker_loss {
            OnWorkerLoss::Fail if self.straggler_deadline_ms > 0 => {
                straggler("who is too slow is lost: say what becomes of the job then (`on_worker_loss`)".into())
            }
            OnWorkerLoss::Fail => Ok(()),
            _ if (1..warn_ms).contains(&self.straggler_deadline_ms) => straggler(format!(
                "who waits for whom is looked at after {warn_ms} ms (`warn_ms`, and three times `heartbeat_ms`): it must not be less"
            )),
            OnWorkerLoss::Restart if self.rebuild_ms == 0 => {
                refuse("a worker that is started again builds its paths anew: `rebuild_ms` must not be 0")
            }
            _ => self.keeps_workers().map_or(Ok(()), refuse),
        }
    }
}
