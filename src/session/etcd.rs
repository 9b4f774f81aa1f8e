//! etcd as the store of tenures: for a job whose launcher's disk is not to be what everything hangs on.
//!
//! Spoken to over its JSON gateway (`/v3/kv/…`, bytes in base64), member after member, each with a deadline. A shard's key is written
//! once each epoch, so that the number of its writes, which etcd counts (`version`), is its epoch: a swap compares that.
//!
//! Invariant: success is what etcd has said; a call without an answer may have been made all the same, which the next one finds.
#![forbid(unsafe_code)]

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use ureq::Agent;

use super::{Swap, Tenure, TenureStore};
use crate::{
    Error, Result,
    types::{Epoch, ShardId},
};

/// How long one member may take to answer. With the majority gone a member that is left takes longer than this to give up.
const CALL_TIME: Duration = Duration::from_secs(1);

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// The members of an etcd cluster, and a job's keys in it.
#[derive(Debug)]
pub struct EtcdStore {
    agent: Agent,
    /// The one that answered last comes first.
    members: Vec<String>,
    prefix: String,
}

impl EtcdStore {
    /// The store of a run of a job. The members are URLs such as `http://h1:2379`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if no member answers: the cluster must have its majority when the job begins.
    pub fn open(members: &[String], job: &str, instance: u64) -> Result<EtcdStore> {
        let config = Agent::config_builder().timeout_global(Some(CALL_TIME)).http_status_as_error(false);
        let prefix = format!("gradwire/{job}/{instance:016x}/");
        let mut store = EtcdStore { agent: config.build().into(), members: members.to_vec(), prefix };
        // Not served by a member alone: it asks the majority.
        let probe = json!({ "key": BASE64_STANDARD.encode(&store.prefix) });
        match store.call("range", &probe) {
            Ok(_) => Ok(store),
            Err(why) => Err(Error::Config(format!("`store`: {why}"))),
        }
    }

    /// The answer of the first member that gives one; otherwise why each of them gave none.
    fn call(&mut self, what: &str, request: &Value) -> Result<Value, String> {
        let mut failures = Vec::new();
        for index in 0..self.members.len() {
            match self.ask(&self.members[index], what, request) {
                Ok(answer) => {
                    self.members[..=index].rotate_right(1);
                    return Ok(answer);
                }
                Err(why) => failures.push(format!("{}: {why}", self.members[index])),
            }
        }
        Err(format!("etcd has not answered ({})", failures.join("; ")))
    }

    fn ask(&self, member: &str, what: &str, request: &Value) -> Result<Value, String> {
        let address = format!("{member}/v3/kv/{what}");
        let sent = self.agent.post(&address).content_type("application/json").send(request.to_string());
        let mut answer = sent.map_err(|error| error.to_string())?;
        let text = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        let text = text.map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("{} {:.200}", answer.status(), text.trim()));
        }
        serde_json::from_str(&text).map_err(|error| format!("no answer of etcd's ({error})"))
    }
}

impl TenureStore for EtcdStore {
    fn compare_and_swap(&mut self, shard: ShardId, expected: Epoch, next: Tenure) -> Swap {
        let key = BASE64_STANDARD.encode(format!("{}{}", self.prefix, shard.0));
        let value = BASE64_STANDARD.encode(serde_json::to_vec(&next).expect("a tenure has text keys"));
        // Numbers of 64 bits are texts there.
        let request = json!({
            "compare": [{ "key": key, "target": "VERSION", "result": "EQUAL", "version": expected.to_string() }],
            "success": [{ "request_put": { "key": key, "value": value } }],
            "failure": [{ "request_range": { "key": key } }],
        });
        match self.call("txn", &request) {
            Ok(answer) if answer["succeeded"] == true => Swap::Swapped,
            Ok(answer) => present(&answer).map_or_else(Swap::Unavailable, Swap::Present),
            Err(why) => Swap::Unavailable(why),
        }
    }
}

/// The tenure in the answer to a swap that was not made.
fn present(answer: &Value) -> Result<Tenure, String> {
    let strange = || format!("etcd holds no tenure where one must be: {:.200}", answer.to_string());
    let value = answer["responses"][0]["response_range"]["kvs"][0]["value"].as_str().ok_or_else(strange)?;
    let bytes = BASE64_STANDARD.decode(value).map_err(|_| strange())?;
    serde_json::from_slice(&bytes).map_err(|_| strange())
}

impl Drop for EtcdStore {
    /// Takes the job's keys away, if etcd can be asked.
    fn drop(&mut self) {
        let mut end = self.prefix.clone().into_bytes();
        // The first key behind all that begin with the prefix: its last byte is `/`, and the next one is `0`.
        *end.last_mut().expect("a prefix is not empty") += 1;
        let request = json!({ "key": BASE64_STANDARD.encode(&self.prefix), "range_end": BASE64_STANDARD.encode(&end) });
        if let Err(why) = self.call("deleterange", &request) {
            tracing::info!("the keys {} stay in etcd: {why}", self.prefix);
        }
    }
}
