//! Loss scaling: workers multiply their loss, and so their gradients, by a number that keeps small gradients from vanishing in f16;
//! servers divide by it. A dynamic scale goes down when a gradient is not finite and up when none has been for a while.
//!
//! Invariant: the scale after a step is a function of the scale before it and of whether the step's gradient was finite, the one of
//! `torch.amp.GradScaler` (PyTorch 2, `_amp_update_scale_`).
#![forbid(unsafe_code)]

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::config::check;
use crate::{Error, Result};

/// Whether gradients come scaled, and by what; its text is `off`, a number, or `dynamic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum LossScaleMode {
    /// They come as they are.
    #[default]
    Off,
    /// Always by this.
    Fixed(f32),
    /// By what steps have made of it; a step that is not finite is skipped.
    Dynamic,
}

impl FromStr for LossScaleMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<LossScaleMode> {
        match text.trim() {
            "off" => Ok(LossScaleMode::Off),
            "dynamic" => Ok(LossScaleMode::Dynamic),
            number => match number.parse::<f32>() {
                Ok(scale) if scale > 0.0 && scale.is_finite() && (1.0 / scale).is_finite() => {
                    Ok(LossScaleMode::Fixed(scale))
                }
                _ => Err(Error::Config(format!("`{text}` is no loss scale: write off, dynamic, or a number above 0"))),
            },
        }
    }
}

impl TryFrom<String> for LossScaleMode {
    type Error = Error;

    fn try_from(text: String) -> Result<LossScaleMode> {
        text.parse()
    }
}

impl From<LossScaleMode> for String {
    fn from(mode: LossScaleMode) -> String {
        mode.to_string()
    }
}

impl fmt::Display for LossScaleMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LossScaleMode::Off => f.write_str("off"),
            LossScaleMode::Fixed(scale) => write!(f, "{scale}"),
            LossScaleMode::Dynamic => f.write_str("dynamic"),
        }
    }
}

/// How gradients are scaled. The numbers are those of a dynamic scale; their defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossScaleConfig {
    /// Whether, and how.
    pub mode: LossScaleMode,
    /// The scale of the first step.
    pub initial: f32,
    /// What it is multiplied by after enough steps in a row that were finite.
    pub growth_factor: f64,
    /// What it is multiplied by after a step that was not.
    pub backoff_factor: f64,
    /// How many steps in a row are enough.
    pub growth_interval: u64,
}

impl Default for LossScaleConfig {
    fn default() -> LossScaleConfig {
        let mode = LossScaleMode::Off;
        LossScaleConfig { mode, initial: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

impl LossScaleConfig {
    /// Whether steps change it.
    pub fn is_dynamic(&self) -> bool {
        self.mode == LossScaleMode::Dynamic
    }

    /// The scale of the first step of a job.
    pub fn first(&self) -> f32 {
        match self.mode {
            LossScaleMode::Off => 1.0,
            LossScaleMode::Fixed(scale) => scale,
            LossScaleMode::Dynamic => self.initial,
        }
    }

    /// Refuses what cannot work, saying which setting and what would.
    pub fn validate(&self) -> Result<()> {
        let initial = f64::from(self.initial);
        let usable = initial > 0.0 && self.initial.is_finite() && (1.0 / self.initial).is_finite();
        check("loss_scale.initial", initial, usable, "a finite number above 0")?;
        let grows = self.growth_factor > 1.0 && self.growth_factor.is_finite();
        check("loss_scale.growth_factor", self.growth_factor, grows, "a finite number above 1")?;
        let backs_off = self.backoff_factor > 0.0 && self.backoff_factor < 1.0;
        check("loss_scale.backoff_factor", self.backoff_factor, backs_off, "between 0 and 1")?;
        check("loss_scale.growth_interval", self.growth_interval as f64, self.growth_interval > 0, "at least 1")
    }
}

/// Where a dynamic scale stands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    /// The scale of the next step.
    pub scale: f32,
    /// Steps in a row that were finite, since it changed last.
    pub streak: u64,
}

impl LossScaler {
    /// At the beginning of a job.
    pub fn new(config: &LossScaleConfig) -> LossScaler {
        LossScaler { scale: config.first(), streak: 0 }
    }

    /// A step has been decided upon; `finite` if all its gradient was. Changes a dynamic scale alone.
    pub fn update(&mut self, config: &LossScaleConfig, finite: bool) {
        if !config.is_dynamic() {
            return;
        }
        if !finite {
            self.scale = (f64::from(self.scale) * config.backoff_factor) as f32;
            self.streak = 0;
            return;
        }
        self.streak += 1;
        if self.streak == config.growth_interval {
            let grown = (f64::from(self.scale) * config.growth_factor) as f32;
            if grown.is_finite() {
                self.scale = grown;
            }
            self.streak = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_after_enough_finite_steps_and_backs_off_at_once() {
        let config = LossScaleConfig { mode: LossScaleMode::Dynamic, growth_interval: 3, ..LossScaleConfig::default() };
        let mut scaler = LossScaler::new(&config);
        let scales: Vec<f32> = [true, true, false, true, true, true, true]
            .into_iter()
            .map(|finite| {
                scaler.update(&config, finite);
                scaler.scale
            })
            .collect();
        assert_eq!(scales, [65536.0, 65536.0, 32768.0, 32768.0, 32768.0, 65536.0, 65536.0]);
        let mut largest = LossScaler { scale: f32::MAX, streak: 2 };
        largest.update(&config, true);
        assert_eq!(largest, LossScaler { scale: f32::MAX, streak: 0 });
    }

    #[test]
    fn a_mode_is_read_as_it_is_written() {
        for text in ["off", "dynamic", "1024", "0.5"] {
            assert_eq!(text.parse::<LossScaleMode>().unwrap().to_string(), text);
        }
        for wrong in ["", "on", "0", "-1", "inf", "NaN", "1e-45"] {
            assert!(wrong.parse::<LossScaleMode>().is_err(), "{wrong}");
        }
        let wrong = LossScaleConfig { backoff_factor: 1.0, ..LossScaleConfig::default() };
        assert!(wrong.validate().unwrap_err().to_string().contains("loss_scale.backoff_factor"));
    }
}
