//! What a user says about the optimizer: its kind, learning rate, weight decay, parameter groups, schedule and clipping.
//!
//! Invariant: in a configuration that passed [`OptimizerConfig::validate`] every number is finite and in its range, as f32
//! too.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::{
    LearningRates, Schedule,
    form::OptimizerForm,
    plan::{SpanStep, StepScalars},
};
use crate::{Error, Result, types::Clock};

/// The name by which messages and [`OptimizerConfig::group_index`] call group 0.
const DEFAULT_GROUP: &str = "default";

/// The update rule and the constants that belong to it alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerKind {
    /// Stochastic gradient descent, with momentum if that is not 0. Formulas: `torch.optim.SGD` with dampening 0 (Sutskever et
    /// al. 2013 in the form that PyTorch documents).
    Sgd {
        /// Share of the velocity kept each step, in [0, 1); 0 keeps no state.
        momentum: f64,
        /// Look one step ahead (Nesterov); needs momentum.
        nesterov: bool,
    },
    /// Adam (Kingma and Ba 2015, algorithm 1) with weight decay added to the gradient, as `torch.optim.Adam`.
    Adam {
        /// Decay of the first moment, in [0, 1).
        beta1: f64,
        /// Decay of the second moment, in [0, 1).
        beta2: f64,
        /// Added to the denominator after the root and the bias correction.
        epsilon: f64,
    },
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`.
    AdamW {
        /// Decay of the first moment, in [0, 1).
        beta1: f64,
        /// Decay of the second moment, in [0, 1).
        beta2: f64,
        /// Added to the denominator after the root and the bias correction.
        epsilon: f64,
    },
    /// Adagrad (Duchi, Hazan and Singer 2011, figure 1), as `torch.optim.Adagrad` without learning-rate decay.
    Adagrad {
        /// Added to the denominator after the root.
        epsilon: f64,
        /// Where the sum of squares starts.
        initial_accumulator: f64,
    },
}

/// A named parameter group: what it does not say, it takes from the top level.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The name by which tensors choose it.
    pub name: String,
    /// Learning rate before the schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Weight decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

/// Limits on the gradient, applied after reduction: first the norm, then each value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clip {
    /// Each element is brought into [-c, c] (`torch.nn.utils.clip_grad_value_`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_value: Option<f32>,
    /// Each chunk whose Euclidean norm n exceeds c is scaled by c / (n + 1e-6) (`torch.nn.utils.clip_grad_norm_`, per chunk).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_chunk_norm: Option<f32>,
    /// A whole gradient, of all tensors on all shards, whose Euclidean norm n exceeds c is scaled by c / (n + 1e-6)
    /// (`torch.nn.utils.clip_grad_norm_`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub global_norm: Option<f32>,
}

impl Clip {
    pub(super) fn is_default(&self) -> bool {
        *self == Clip::default()
    }
}

/// Everything about the optimizer of a job. In TOML and JSON it is one flat table: `kind = "adamw"`, `beta1 = 0.9`,
/// `learning_rate = 0.001`, `[[groups]]`, `[schedule]`, `[clip]`; the constants that are left out take PyTorch's defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "OptimizerForm", into = "OptimizerForm")]
pub struct OptimizerConfig {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Learning rate of the default group, before the schedule.
    pub learning_rate: f64,
    /// Weight decay of the default group.
    pub weight_decay: f64,
    /// Further groups: `groups[i]` is group i + 1; group 0 is the default group.
    pub groups: Vec<GroupConfig>,
    /// How the learning rates change with the clock.
    pub schedule: Schedule,
    /// Limits on the gradient.
    pub clip: Clip,
}

impl OptimizerKind {
    /// Plain gradient descent.
    pub const SGD: OptimizerKind = OptimizerKind::Sgd { momentum: 0.0, nesterov: false };
    /// Adam with PyTorch's defaults.
    pub const ADAM: OptimizerKind = OptimizerKind::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    /// AdamW with PyTorch's defaults (but for weight decay, which is a setting of its own).
    pub const ADAMW: OptimizerKind = OptimizerKind::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    /// Adagrad with PyTorch's defaults.
    pub const ADAGRAD: OptimizerKind = OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.0 };

    /// f32 values of state an element has beside its master value: 0, 1 (`first`) or 2 (`first` and `second`).
    pub fn state_slots(&self) -> usize {
        match self {
            OptimizerKind::Sgd { momentum: 0.0, .. } => 0,
            OptimizerKind::Sgd { .. } | OptimizerKind::Adagrad { .. } => 1,
            OptimizerKind::Adam { .. } | OptimizerKind::AdamW { .. } => 2,
        }
    }

    /// What a state slot holds before the first step.
    pub fn state_start(&self) -> f32 {
        match self {
            OptimizerKind::Adagrad { initial_accumulator, .. } => *initial_accumulator as f32,
            _ => 0.0,
        }
    }

    fn validate(&self) -> Result<()> {
        match *self {
            OptimizerKind::Sgd { momentum, nesterov } => {
                check("momentum", momentum, fraction(momentum), "at least 0 and below 1")?;
                if nesterov && momentum == 0.0 {
                    return Err(Error::Config(
                        "optimizer setting `nesterov` is true but `momentum` is 0: Nesterov's step needs \
                         a momentum above 0"
                            .into(),
                    ));
                }
                Ok(())
            }
            OptimizerKind::Adam { beta1, beta2, epsilon } | OptimizerKind::AdamW { beta1, beta2, epsilon } => {
                check("beta1", beta1, fraction(beta1), "at least 0 and below 1")?;
                check("beta2", beta2, fraction(beta2), "at least 0 and below 1")?;
                check_epsilon(epsilon)
            }
            OptimizerKind::Adagrad { epsilon, initial_accumulator } => {
                check_epsilon(epsilon)?;
                check("initial_accumulator", initial_accumulator, weight(initial_accumulator), WEIGHT)
            }
        }
    }
}

impl OptimizerConfig {
    /// This kind at this learning rate; no weight decay, groups, schedule or clipping.
    pub fn new(kind: OptimizerKind, learning_rate: f64) -> OptimizerConfig {
        OptimizerConfig {
            kind,
            learning_rate,
            weight_decay: 0.0,
            groups: Vec::new(),
            schedule: Schedule::Constant,
            clip: Clip::default(),
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] naming the first wrong setting, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.kind.validate()?;
        check("learning_rate", self.learning_rate, weight(self.learning_rate), WEIGHT)?;
        check("weight_decay", self.weight_decay, weight(self.weight_decay), WEIGHT)?;
        if self.groups.len() > usize::from(u16::MAX) {
            return Err(Error::Config(format!(
                "optimizer setting `groups` has {} entries; at most {} are allowed",
                self.groups.len(),
                u16::MAX
            )));
        }
        let mut names = std::collections::HashSet::from([DEFAULT_GROUP]);
        for group in &self.groups {
            if group.name.is_empty() || !names.insert(&group.name) {
                return Err(Error::Config(format!(
                    "optimizer setting `groups` has a group named `{}`; each name must be non-empty, used once, and not \
                     `{DEFAULT_GROUP}`, which is the group of the top-level settings",
                    group.name
                )));
            }
            let setting = |field: &str| format!("groups.{}.{field}", group.name);
            if let Some(rate) = group.learning_rate {
                check(&setting("learning_rate"), rate, weight(rate), WEIGHT)?;
            }
            if let Some(decay) = group.weight_decay {
                check(&setting("weight_decay"), decay, weight(decay), WEIGHT)?;
            }
        }
        self.schedule.validate()?;
        let Clip { per_value, per_chunk_norm, global_norm } = self.clip;
        for (name, limit) in
            [("clip.per_value", per_value), ("clip.per_chunk_norm", per_chunk_norm), ("clip.global_norm", global_norm)]
        {
            if let Some(limit) = limit {
                check(name, f64::from(limit), limit > 0.0 && limit.is_finite(), "a finite number above 0")?;
            }
        }
        Ok(())
    }

    /// How many groups there are, the default group included.
    pub fn group_count(&self) -> usize {
        1 + self.groups.len()
    }

    /// The index of the group with this name ("default" is group 0).
    pub fn group_index(&self, name: &str) -> Option<u16> {
        if name == DEFAULT_GROUP {
            return Some(0);
        }
        self.groups.iter().position(|group| group.name == name).map(|i| (i + 1) as u16)
    }

    /// The learning rates with which a job of this configuration starts.
    pub fn learning_rates(&self) -> LearningRates {
        let own = self.groups.iter().map(|group| group.learning_rate.unwrap_or(self.learning_rate));
        LearningRates::new(std::iter::once(self.learning_rate).chain(own).collect(), self.schedule)
    }

    /// The weight decay of a group.
    ///
    /// # Panics
    ///
    /// If there is no such group.
    pub fn weight_decay(&self, group: u16) -> f64 {
        match group.checked_sub(1) {
            None => self.weight_decay,
            Some(i) => self.groups[usize::from(i)].weight_decay.unwrap_or(self.weight_decay),
        }
    }

    /// What step number `step` (counted from 1, per chunk) does to the elements of `group` at this learning rate. `mean` is
    /// what the sum of the contributions is multiplied by ([`super::Reduction::factor`]).
    ///
    /// # Panics
    ///
    /// If there is no such group, or `step` is 0.
    pub fn span_step(&self, group: u16, step: u64, learning_rate: f64, mean: f32) -> SpanStep {
        self.span_step_of(step, (learning_rate, self.weight_decay(group)), mean)
    }

    /// The same at a clock, with the rate and the weight decay that hold there.
    ///
    /// # Panics
    ///
    /// As [`OptimizerConfig::span_step`].
    pub fn span_step_at(&self, rates: &LearningRates, at: (u16, Clock), step: u64, mean: f32) -> SpanStep {
        let (group, clock) = at;
        let own = group.checked_sub(1).is_some_and(|i| self.groups[usize::from(i)].weight_decay.is_some());
        let live = rates.weight_decay(clock).filter(|_| !own);
        let decay = live.unwrap_or_else(|| self.weight_decay(group));
        self.span_step_of(step, (rates.rate(group, clock), decay), mean)
    }

    fn span_step_of(&self, step: u64, (learning_rate, weight_decay): (f64, f64), mean: f32) -> SpanStep {
        SpanStep {
            scalars: StepScalars::new(&self.kind, step, learning_rate, weight_decay),
            mean,
            scale: 1.0,
            clip_value: self.clip.per_value,
        }
    }
}

const WEIGHT: &str = "a number from 0 to 3.4e38";

/// Whether a number is not negative and finite as f32 too.
fn weight(value: f64) -> bool {
    (0.0..=f64::from(f32::MAX)).contains(&value)
}

/// Whether a number can be a decay: in [0, 1), and still below 1 when rounded to f32 (0.99999999 is not).
fn fraction(value: f64) -> bool {
    value >= 0.0 && (value as f32) < 1.0
}

pub(super) fn check(setting: &str, value: f64, good: bool, allowed: &str) -> Result<()> {
    if good {
        return Ok(());
    }
    Err(Error::Config(format!("setting `{setting}` is {value}; it must be {allowed}")))
}

/// An epsilon that f32 cannot hold would silently be none.
fn check_epsilon(epsilon: f64) -> Result<()> {
    let good = epsilon == 0.0 || (weight(epsilon) && epsilon as f32 >= f32::MIN_POSITIVE);
    check("epsilon", epsilon, good, "0, or a number from 1.2e-38 to 3.4e38")
}
