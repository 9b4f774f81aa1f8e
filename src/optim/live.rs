//! What a person changes while the job runs: the learning rate, the weight decay, the limit of the gradient's norm, the bound of
//! staleness.
//!
//! Invariant: a change names at least one setting, and each of its values has been checked against the job's configuration before
//! any server hears of it.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{OptimizerConfig, config::check};
use crate::{Error, Result, consistency::Consistency};

/// New values of some settings, to hold from one clock on; the others stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LiveChange {
    /// The default group's base rate; other groups keep their proportion to it, and the schedule goes on multiplying.
    pub learning_rate: Option<f64>,
    /// The weight decay of the default group and of every group that has none of its own.
    pub weight_decay: Option<f64>,
    /// The largest norm that a whole gradient may have.
    pub clip_norm: Option<f32>,
    /// How many clocks a worker may run ahead of the slowest.
    pub staleness: Option<u64>,
}

impl LiveChange {
    /// The names of what can be changed.
    pub const KEYS: [&str; 4] = ["lr", "weight-decay", "clip-norm", "staleness"];

    /// Reads settings of the form `key=value`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a key that is none of [`LiveChange::KEYS`], naming those, for one that is given twice, and for a value
    /// that is no number.
    pub fn parse<'a>(settings: impl IntoIterator<Item = &'a str>) -> Result<LiveChange> {
        let mut change = LiveChange::default();
        for setting in settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Error::Config(format!("`{setting}` has no `=`: write KEY=VALUE, such as lr=0.01")))?;
            let (key, value) = (key.trim(), value.trim());
            let wrong = || {
                Error::Config(format!(
                    "`{key}` is `{value}`; it must be a number{}",
                    if key == "staleness" { " of clocks" } else { "" }
                ))
            };
            let given = match key {
                "lr" => change.learning_rate.replace(value.parse().map_err(|_| wrong())?).is_some(),
                "weight-decay" => change.weight_decay.replace(value.parse().map_err(|_| wrong())?).is_some(),
                "clip-norm" => change.clip_norm.replace(value.parse().map_err(|_| wrong())?).is_some(),
                "staleness" => change.staleness.replace(value.parse().map_err(|_| wrong())?).is_some(),
                _ => {
                    let known = LiveChange::KEYS.join(", ");
                    return Err(Error::Config(format!(
                        "`{key}` cannot be changed while a job runs; what can: {known}"
                    )));
                }
            };
            if given {
                return Err(Error::Config(format!("`{key}` is given twice")));
            }
        }
        Ok(change)
    }

    /// Whether a job of this configuration can take the change.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] naming the first setting that it cannot take, and why.
    pub fn check(&self, config: &OptimizerConfig, consistency: Consistency) -> Result<()> {
        if *self == LiveChange::default() {
            let known = LiveChange::KEYS.join(", ");
            return Err(Error::Config(format!("nothing is to be changed: give at least one of {known}")));
        }
        let mut rates = config.learning_rates();
        if let Some(rate) = self.learning_rate {
            rates.set(rate, 0)?;
        }
        if let Some(decay) = self.weight_decay {
            rates.set_weight_decay(decay, 0)?;
        }
        if self.staleness.is_some() && !matches!(consistency, Consistency::Ssp { .. }) {
            return Err(Error::Config(format!(
                "`staleness` can be changed only where it is bounded: this job is {consistency}; start it with --consistency ssp:N"
            )));
        }
        let Some(limit) = self.clip_norm else { return Ok(()) };
        check("clip.global_norm", limit.into(), limit > 0.0 && limit.is_finite(), "a finite number above 0")?;
        if config.clip.global_norm.is_none() {
            return Err(Error::Config(
                "`clip-norm` can be changed only where a norm is clipped: start the job with --clip-norm".into(),
            ));
        }
        Ok(())
    }
}

impl fmt::Display for LiveChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let staleness = self.staleness.map(|bound| bound as f64);
        let values = [self.learning_rate, self.weight_decay, self.clip_norm.map(f64::from), staleness];
        let given = LiveChange::KEYS.iter().zip(values).filter_map(|(key, value)| Some(format!("{key} = {}", value?)));
        f.write_str(&given.collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::OptimizerKind;

    #[test]
    fn what_cannot_be_changed_is_refused_with_what_can() {
        let change = LiveChange::parse(["lr=0.01", "clip-norm = 2"]).unwrap();
        assert_eq!((change.learning_rate, change.weight_decay, change.clip_norm), (Some(0.01), None, Some(2.0)));
        assert_eq!(change.to_string(), "lr = 0.01, clip-norm = 2");
        for (settings, hint) in [
            (&["lrate=1"][..], "lr, weight-decay, clip-norm, staleness"),
            (&["lr"], "KEY=VALUE"),
            (&["lr=fast"], "must be a number"),
            (&["lr=1", "lr=2"], "twice"),
            (&["staleness=-1"], "a number of clocks"),
        ] {
            let text = LiveChange::parse(settings.iter().copied()).unwrap_err().to_string();
            assert!(text.contains(hint), "{text}");
        }
        let config = OptimizerConfig::new(OptimizerKind::SGD, 0.1);
        for (settings, hint) in [
            (&["lr=-1"][..], "learning_rate"),
            (&["weight-decay=inf"], "weight_decay"),
            (&["clip-norm=1"], "--clip-norm"),
            (&["staleness=1"], "this job is bsp"),
            (&["clip-norm=0"], "above 0"),
            (&[], "nothing"),
        ] {
            let change = LiveChange::parse(settings.iter().copied()).unwrap();
            let text = change.check(&config, Consistency::Bsp).unwrap_err().to_string();
            assert!(text.contains(hint), "{text}");
        }
    }
}
