//! Who may run how far ahead: the staleness gate, the window over the agreed chunk order, the arrival bits, and what may have to be
//! sent again. Pure.
//!
//! Invariant: nothing here knows memory or time; the same code runs in the simulator and in the server.
#![forbid(unsafe_code)]

mod gate;
mod unproven;
mod window;

pub use gate::StalenessGate;
pub use unproven::Unproven;
pub use window::{Window, WindowRefusal, position};

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Error;

/// What an update is and how far ahead of the slowest worker one may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Consistency {
    /// Bulk synchronous: one step on the mean of all contributions. Results are bit-identical from run to run.
    #[default]
    Bsp,
    /// Stale synchronous: each push is a step; a worker runs at most `bound` clocks ahead of the slowest (Ho et al. 2013).
    Ssp {
        /// Clocks that a worker may be ahead.
        bound: u64,
    },
    /// Asynchronous: each push is a step; nobody waits.
    Asp,
}

impl Consistency {
    /// Whether all contributions of a clock make one step.
    pub const fn aggregates(self) -> bool {
        matches!(self, Consistency::Bsp)
    }

    /// Clocks that a worker may be ahead of the slowest; `None` is "any number".
    pub const fn bound(self) -> Option<u64> {
        match self {
            Consistency::Bsp => Some(0),
            Consistency::Ssp { bound } => Some(bound),
            Consistency::Asp => None,
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Consistency::Bsp => f.write_str("bsp"),
            Consistency::Ssp { bound } => write!(f, "ssp:{bound}"),
            Consistency::Asp => f.write_str("asp"),
        }
    }
}

impl FromStr for Consistency {
    type Err = Error;

    fn from_str(text: &str) -> Result<Consistency, Error> {
        let wrong = || Error::Config(format!("consistency `{text}` is not one of bsp, ssp:N (N clocks ahead), asp"));
        match text.split_once(':') {
            None if text == "bsp" => Ok(Consistency::Bsp),
            None if text == "asp" => Ok(Consistency::Asp),
            Some(("ssp", bound)) => Ok(Consistency::Ssp { bound: bound.parse().map_err(|_| wrong())? }),
            _ => Err(wrong()),
        }
    }
}

impl From<Consistency> for String {
    fn from(consistency: Consistency) -> String {
        consistency.to_string()
    }
}

impl TryFrom<String> for Consistency {
    type Error = Error;

    fn try_from(text: String) -> Result<Consistency, Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_errors_teach() {
        for text in ["bsp", "ssp:3", "asp"] {
            assert_eq!(text.parse::<Consistency>().unwrap().to_string(), text);
        }
        for text in ["", "ssp", "ssp:", "ssp:-1", "bsp:1", "BSP"] {
            assert!(text.parse::<Consistency>().unwrap_err().to_string().contains("bsp, ssp:N"));
        }
    }
}
