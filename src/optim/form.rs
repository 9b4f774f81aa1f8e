//! The flat table in which an [`OptimizerConfig`] is written and read (TOML, JSON, checkpoints).
//!
//! Invariant: every constant in the table belongs to the kind in the table; one that does not is an error, never ignored.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::{
    Schedule,
    config::{Clip, GroupConfig, OptimizerConfig, OptimizerKind},
};
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindName {
    Sgd,
    Adam,
    AdamW,
    Adagrad,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerForm {
    kind: KindName,
    learning_rate: f64,
    #[serde(default)]
    weight_decay: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    momentum: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nesterov: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beta1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beta2: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epsilon: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    initial_accumulator: Option<f64>,
    #[serde(default, skip_serializing_if = "Schedule::is_constant")]
    schedule: Schedule,
    #[serde(default, skip_serializing_if = "Clip::is_default")]
    clip: Clip,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    groups: Vec<GroupConfig>,
}

impl OptimizerForm {
    /// Refuses every constant that is given but not in `own`.
    fn only(&self, own: &[&str]) -> Result<()> {
        let given = [
            ("momentum", self.momentum.is_some()),
            ("nesterov", self.nesterov.is_some()),
            ("beta1", self.beta1.is_some()),
            ("beta2", self.beta2.is_some()),
            ("epsilon", self.epsilon.is_some()),
            ("initial_accumulator", self.initial_accumulator.is_some()),
        ];
        match given.iter().find(|(name, is_given)| *is_given && !own.contains(name)) {
            None => Ok(()),
            Some((name, _)) => Err(Error::Config(format!(
                "optimizer setting `{name}` does not belong to kind \"{}\", whose own settings are {}",
                format!("{:?}", self.kind).to_lowercase(),
                own.join(", ")
            ))),
        }
    }
}

impl TryFrom<OptimizerForm> for OptimizerConfig {
    type Error = Error;

    fn try_from(form: OptimizerForm) -> Result<OptimizerConfig> {
        let moments = ["beta1", "beta2", "epsilon"];
        let [beta1, beta2, epsilon] =
            [form.beta1.unwrap_or(0.9), form.beta2.unwrap_or(0.999), form.epsilon.unwrap_or(1e-8)];
        let kind = match form.kind {
            KindName::Sgd => {
                form.only(&["momentum", "nesterov"])?;
                OptimizerKind::Sgd { momentum: form.momentum.unwrap_or(0.0), nesterov: form.nesterov.unwrap_or(false) }
            }
            KindName::Adam => {
                form.only(&moments)?;
                OptimizerKind::Adam { beta1, beta2, epsilon }
            }
            KindName::AdamW => {
                form.only(&moments)?;
                OptimizerKind::AdamW { beta1, beta2, epsilon }
            }
            KindName::Adagrad => {
                form.only(&["epsilon", "initial_accumulator"])?;
                OptimizerKind::Adagrad {
                    epsilon: form.epsilon.unwrap_or(1e-10),
                    initial_accumulator: form.initial_accumulator.unwrap_or(0.0),
                }
            }
        };
        Ok(OptimizerConfig {
            kind,
            learning_rate: form.learning_rate,
            weight_decay: form.weight_decay,
            groups: form.groups,
            schedule: form.schedule,
            clip: form.clip,
        })
    }
}

impl From<OptimizerConfig> for OptimizerForm {
    fn from(config: OptimizerConfig) -> OptimizerForm {
        let mut form = OptimizerForm {
            kind: KindName::Sgd,
            learning_rate: config.learning_rate,
            weight_decay: config.weight_decay,
            momentum: None,
            nesterov: None,
            beta1: None,
            beta2: None,
            epsilon: None,
            initial_accumulator: None,
            schedule: config.schedule,
            clip: config.clip,
            groups: config.groups,
        };
        match config.kind {
            OptimizerKind::Sgd { momentum, nesterov } => {
                (form.momentum, form.nesterov) = (Some(momentum), Some(nesterov));
            }
            OptimizerKind::Adam { beta1, beta2, epsilon } => {
                form.kind = KindName::Adam;
                (form.beta1, form.beta2, form.epsilon) = (Some(beta1), Some(beta2), Some(epsilon));
            }
            OptimizerKind::AdamW { beta1, beta2, epsilon } => {
                form.kind = KindName::AdamW;
                (form.beta1, form.beta2, form.epsilon) = (Some(beta1), Some(beta2), Some(epsilon));
            }
            OptimizerKind::Adagrad { epsilon, initial_accumulator } => {
                form.kind = KindName::Adagrad;
                (form.epsilon, form.initial_accumulator) = (Some(epsilon), Some(initial_accumulator));
            }
        }
        form
    }
}
