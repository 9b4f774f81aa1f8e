//! Where it is written down who serves a shard: one compare-and-swap, behind one trait.
//!
//! Invariant: of two swaps of a shard that expect the same epoch one succeeds at most, whoever asks and whatever crashes between.
#![forbid(unsafe_code)]

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Tenure;
use crate::{
    Error, Result,
    types::{Epoch, ShardId},
};

/// What became of a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// It is written down, and stays.
    Swapped,
    /// It was not: the shard's tenure is another one already.
    Present(Tenure),
    /// Nothing is known: the store cannot be asked, or could not write. Nobody may act on a tenure that was to be.
    Unavailable(String),
}

/// Keeps the tenures of one job's shards.
pub trait TenureStore: Send {
    /// Makes `next` the tenure of a shard if its epoch is the expected one; a shard of which nothing is written is in epoch 0. It may
    /// take a while, but has an end.
    fn compare_and_swap(&mut self, shard: ShardId, expected: Epoch, next: Tenure) -> Swap;
}

/// Where the tenures of a job are kept: `embedded`, or `etcd:` and the URLs of an etcd cluster's members, with commas between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum StoreChoice {
    /// A log on the launcher's disk.
    #[default]
    Embedded,
    /// An etcd cluster.
    Etcd(Vec<String>),
}

impl FromStr for StoreChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<StoreChoice> {
        let members =
            |list: &str| list.split(',').map(|member| member.trim().trim_end_matches('/').to_string()).collect();
        let wrong = || {
            Error::Config(format!(
                "`store` is `{text}`; it must be embedded, or etcd: and its members, such as etcd:http://h1:2379,http://h2:2379"
            ))
        };
        match text.split_once(':') {
            None if text == "embedded" => Ok(StoreChoice::Embedded),
            Some(("etcd", list)) => {
                let members: Vec<String> = members(list);
                let is_address = |member: &String| member.strip_prefix("http://").is_some_and(|rest| !rest.is_empty());
                members.iter().all(is_address).then_some(StoreChoice::Etcd(members)).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for StoreChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<StoreChoice> {
        text.parse()
    }
}

impl From<StoreChoice> for String {
    fn from(choice: StoreChoice) -> String {
        match choice {
            StoreChoice::Embedded => "embedded".into(),
            StoreChoice::Etcd(members) => format!("etcd:{}", members.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_named_by_its_kind_and_its_members() {
        let etcd: StoreChoice = "etcd:http://a:2379, http://b:2379/".parse().unwrap();
        assert_eq!(etcd, StoreChoice::Etcd(vec!["http://a:2379".into(), "http://b:2379".into()]));
        assert_eq!(String::from(etcd), "etcd:http://a:2379,http://b:2379");
        assert_eq!("embedded".parse::<StoreChoice>().unwrap(), StoreChoice::default());
        for wrong in ["", "etcd", "etcd:", "etcd:a:2379", "etcd:https://a:2379", "zookeeper:http://a:1"] {
            let text = wrong.parse::<StoreChoice>().unwrap_err().to_string();
            assert!(text.contains("etcd:http://h1:2379"), "{text}");
        }
    }
}
