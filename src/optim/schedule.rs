//! Learning rates over time: the schedule of the configuration and the changes that a person makes while the job runs.
//!
//! Invariant: the rate of a group at a clock is a pure function of what is stored here, so every shard that was told the same
//! changes computes the same rate, before and after a resume.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::{LiveChange, config::check};
use crate::{Error, Result, types::Clock};

/// What the learning rate is multiplied by, as a function of the clock (0 is the first step).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Always 1.
    #[default]
    Constant,
    /// `factor` to the power of the whole number of periods gone by (`torch.optim.lr_scheduler.StepLR`, by clock).
    Step {
        /// Clocks in a period.
        every: u64,
        /// Multiplied in after each period.
        factor: f64,
    },
    /// Linear from 1/warmup_steps at clock 0 to 1 at clock warmup_steps - 1, then half a cosine (Loshchilov and Hutter 2017,
    /// equation 5, without restarts) down to `final_factor` at clock total_steps, and that ever after.
    WarmupCosine {
        /// Clocks of the linear rise; 0 for none.
        warmup_steps: u64,
        /// The clock at which `final_factor` is reached.
        total_steps: u64,
        /// Where the cosine ends.
        final_factor: f64,
    },
}

impl Schedule {
    pub(super) fn is_constant(&self) -> bool {
        *self == Schedule::Constant
    }

    /// The factor at a clock. Computed with `libm`, so that its bits do not depend on the machine's C library.
    pub fn factor(&self, clock: Clock) -> f64 {
        match *self {
            Schedule::Constant => 1.0,
            Schedule::Step { every, factor } => libm::pow(factor, (clock / every) as f64),
            Schedule::WarmupCosine { warmup_steps, .. } if clock < warmup_steps => {
                (clock + 1) as f64 / warmup_steps as f64
            }
            Schedule::WarmupCosine { total_steps, final_factor, .. } if clock >= total_steps => final_factor,
            Schedule::WarmupCosine { warmup_steps, total_steps, final_factor } => {
                let progress = (clock - warmup_steps) as f64 / (total_steps - warmup_steps) as f64;
                final_factor + (1.0 - final_factor) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress))
            }
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        match *self {
            Schedule::Constant => Ok(()),
            Schedule::Step { every, factor } => {
                check("schedule.every", every as f64, every > 0, "at least 1")?;
                // Above 1 the power would overflow sooner or later.
                check("schedule.factor", factor, (0.0..=1.0).contains(&factor), "from 0 to 1")
            }
            Schedule::WarmupCosine { warmup_steps, total_steps, final_factor } => {
                let allowed = format!("above schedule.warmup_steps, which is {warmup_steps}");
                check("schedule.total_steps", total_steps as f64, total_steps > warmup_steps, &allowed)?;
                check("schedule.final_factor", final_factor, (0.0..=1.0).contains(&final_factor), "from 0 to 1")
            }
        }
    }
}

/// More live changes than this at once are a runaway script and refused. 16 bytes each, so 64 KiB in a checkpoint at most.
const CHANGES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    from_clock: Clock,
    learning_rate: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DecayChange {
    from_clock: Clock,
    weight_decay: f64,
}

/// The learning rate of every group at every clock: base rates, schedule, and live changes, those of the weight decay with them.
/// Serialisable as a whole.
///
/// The rule of a live change: from its clock on, the base rate of the default group is the new one, and every other group keeps
/// its proportion to the default group; the schedule goes on multiplying. The latest change at or before a clock decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRates {
    base: Vec<f64>,
    schedule: Schedule,
    changes: Vec<Change>,
    /// In the order of their clocks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    decays: Vec<DecayChange>,
}

impl LearningRates {
    pub(super) fn new(base: Vec<f64>, schedule: Schedule) -> LearningRates {
        LearningRates { base, schedule, changes: Vec::new(), decays: Vec::new() }
    }

    /// Makes `learning_rate` the default group's base rate from clock `from_clock` on; a change already stored for that very
    /// clock is replaced. The clock must lie ahead of every step that has begun, or tiles of one chunk would differ.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the rate is negative or not finite, if the default group started at 0 while another group did not
    /// (then there is no proportion to keep), or if 4096 changes are stored already (see [`LearningRates::forget_before`]).
    pub fn set(&mut self, learning_rate: f64, from_clock: Clock) -> Result<()> {
        let good = (0.0..=f64::from(f32::MAX)).contains(&learning_rate);
        check("learning_rate", learning_rate, good, "a number from 0 to 3.4e38")?;
        if self.base[0] == 0.0 && self.base.iter().any(|&rate| rate != 0.0) {
            return Err(Error::Config(
                "the learning rate cannot be changed live: the default group started at 0, so the other groups have no \
                 proportion to it that could be kept"
                    .into(),
            ));
        }
        let change = Change { from_clock, learning_rate };
        match self.changes.binary_search_by_key(&from_clock, |change| change.from_clock) {
            Ok(at) => self.changes[at] = change,
            Err(_) if self.changes.len() == CHANGES_MAX => {
                return Err(Error::Config(format!(
                    "more than {CHANGES_MAX} learning-rate changes are waiting for their clock"
                )));
            }
            Err(at) => self.changes.insert(at, change),
        }
        Ok(())
    }

    /// Makes `weight_decay` that of the default group, and of every group without one of its own, from clock `from_clock` on; changes
    /// stored for that clock and later ones are replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if it is negative or not finite, or if 4096 changes are stored already.
    pub fn set_weight_decay(&mut self, weight_decay: f64, from_clock: Clock) -> Result<()> {
        let good = (0.0..=f64::from(f32::MAX)).contains(&weight_decay);
        check("weight_decay", weight_decay, good, "a number from 0 to 3.4e38")?;
        self.decays.retain(|change| change.from_clock < from_clock);
        if self.decays.len() == CHANGES_MAX {
            return Err(Error::Config(format!(
                "more than {CHANGES_MAX} changes of the weight decay wait for their clock"
            )));
        }
        self.decays.push(DecayChange { from_clock, weight_decay });
        Ok(())
    }

    /// The weight decay that was set live and holds at a clock; `None` for the configuration's.
    pub fn weight_decay(&self, clock: Clock) -> Option<f64> {
        let latest = self.decays.partition_point(|change| change.from_clock <= clock).checked_sub(1)?;
        Some(self.decays[latest].weight_decay)
    }

    /// All changes that were set live and are not forgotten, each with the clock from which on it holds.
    pub fn changes(&self) -> impl Iterator<Item = (Clock, LiveChange)> {
        let rate = |change: &Change| {
            (change.from_clock, LiveChange { learning_rate: Some(change.learning_rate), ..LiveChange::default() })
        };
        let decay = |change: &DecayChange| {
            (change.from_clock, LiveChange { weight_decay: Some(change.weight_decay), ..LiveChange::default() })
        };
        self.changes.iter().map(rate).chain(self.decays.iter().map(decay))
    }

    /// How many parameter groups there are, the default group included.
    pub fn groups(&self) -> usize {
        self.base.len()
    }

    /// Drops changes that no clock from `clock` on can see. Whoever calls [`LearningRates::set`] often calls this too, with the
    /// oldest clock that may still be stepped.
    pub fn forget_before(&mut self, clock: Clock) {
        let seen = self.changes.partition_point(|change| change.from_clock <= clock);
        self.changes.drain(..seen.saturating_sub(1));
        let seen = self.decays.partition_point(|change| change.from_clock <= clock);
        self.decays.drain(..seen.saturating_sub(1));
    }

    /// The learning rate of a group at a clock.
    ///
    /// # Panics
    ///
    /// If there is no such group.
    pub fn rate(&self, group: u16, clock: Clock) -> f64 {
        let own = self.base[usize::from(group)];
        let latest = self.changes.partition_point(|change| change.from_clock <= clock).checked_sub(1);
        let base = match latest.map(|at| self.changes[at].learning_rate) {
            None => own,
            // The default group, and groups that share its rate, take the new rate itself, unspoilt by rounding.
            Some(rate) if own == self.base[0] => rate,
            Some(rate) => rate * (own / self.base[0]),
        };
        base * self.schedule.factor(clock)
    }
}
