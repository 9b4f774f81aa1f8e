//! Where servers compute: the setting `device`, and the GPUs that it stands for on a machine.
//!
//! Invariant: a GPU that was asked for and is not there is an error, never a processor in its place; what `auto` chose is said.
#![forbid(unsafe_code)]

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    cuda::{self, DeviceInfo},
    types::ShardId,
};

/// Where servers keep their shards' state and compute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceChoice {
    /// On the processor.
    #[default]
    Cpu,
    /// On GPUs: those with these numbers, or all if none are given.
    Gpu(Vec<u32>),
    /// On all GPUs of the server's machine if there are any, else on the processor.
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        let wrong = || Error::Config(format!("`{text}` is no device: write cpu, gpu, gpu:0,1 or auto"));
        Ok(match text.split_once(':') {
            None if text == "cpu" => DeviceChoice::Cpu,
            None if text == "gpu" => DeviceChoice::Gpu(Vec::new()),
            None if text == "auto" => DeviceChoice::Auto,
            Some(("gpu", list)) => {
                let numbers = list.split(',').map(|number| number.trim().parse().map_err(|_| wrong()));
                DeviceChoice::Gpu(numbers.collect::<Result<_>>()?)
            }
            _ => return Err(wrong()),
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Cpu => write!(f, "cpu"),
            DeviceChoice::Auto => write!(f, "auto"),
            DeviceChoice::Gpu(numbers) if numbers.is_empty() => write!(f, "gpu"),
            DeviceChoice::Gpu(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
                write!(f, "gpu:{}", numbers.join(","))
            }
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<DeviceChoice> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> String {
        choice.to_string()
    }
}

impl DeviceChoice {
    /// The GPUs of this machine that it stands for; none for the processor. `who` chooses, for the log.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with the reason if a GPU is asked for and not there.
    pub fn devices(&self, who: impl fmt::Display) -> Result<Vec<DeviceInfo>> {
        match self {
            DeviceChoice::Cpu => Ok(Vec::new()),
            DeviceChoice::Auto => Ok(chosen(&who, cuda::devices())),
            DeviceChoice::Gpu(numbers) => {
                let there = cuda::devices().map_err(|why| refused(self, &why))?;
                if numbers.is_empty() {
                    return Ok(there);
                }
                let find = |number: &u32| {
                    let found = there.iter().find(|info| info.ordinal == *number).cloned();
                    found.ok_or_else(|| {
                        let names: Vec<String> = there.iter().map(DeviceInfo::to_string).collect();
                        let why = format!("there is no GPU {number} here; there are: {}", names.join(", "));
                        refused(self, &Error::Config(why))
                    })
                };
                numbers.iter().map(find).collect()
            }
        }
    }
}

fn refused(choice: &DeviceChoice, why: &Error) -> Error {
    Error::Config(format!("`device` is {choice}, but {why}; set it to cpu to compute on the processor"))
}

fn chosen(who: &impl fmt::Display, there: Result<Vec<DeviceInfo>>) -> Vec<DeviceInfo> {
    match there {
        Ok(devices) => {
            let names: Vec<String> = devices.iter().map(DeviceInfo::to_string).collect();
            tracing::warn!("{who} computes on {} (`device` is auto)", names.join(", "));
            devices
        }
        Err(why) => {
            tracing::warn!("{who} computes on the processor (`device` is auto): {why}");
            Vec::new()
        }
    }
}

/// The GPU of a shard: shards are dealt round and round, so that as many shards a server as it has GPUs have one each.
pub fn device_of(devices: &[DeviceInfo], shard: ShardId) -> Option<&DeviceInfo> {
    devices.get(usize::from(shard.0).checked_rem(devices.len())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_has_a_text_and_comes_back_from_it() {
        for (text, choice) in [
            ("cpu", DeviceChoice::Cpu),
            ("auto", DeviceChoice::Auto),
            ("gpu", DeviceChoice::Gpu(vec![])),
            ("gpu:3", DeviceChoice::Gpu(vec![3])),
            ("gpu:0,12", DeviceChoice::Gpu(vec![0, 12])),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string(), text);
        }
        for wrong in ["", "cuda", "gpu:", "gpu:a", "gpu:1,", "cpu:0", "GPU"] {
            let error = wrong.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(error.contains("gpu:0,1"), "{error}");
        }
    }

    #[test]
    fn shards_are_dealt_to_the_gpus_in_turn() {
        let info = |ordinal| DeviceInfo {
            ordinal,
            name: "a test".into(),
            memory_bytes: 1,
            capability: (9, 0),
            multiprocessors: 1,
            l2_bytes: 0,
            pci: None,
            numa_node: None,
        };
        let devices = [info(4), info(7)];
        let dealt = [0, 1, 2, 3].map(|shard| device_of(&devices, ShardId(shard)).unwrap().ordinal);
        assert_eq!(dealt, [4, 7, 4, 7]);
        assert_eq!(device_of(&[], ShardId(1)), None);
    }
}
