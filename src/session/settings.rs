//! A job's settings from their three sources: flags win over the TOML file, the file wins over `GRADWIRE_*` variables, and those
//! win over the defaults.
//!
//! Invariant: a key or value that nothing is assigned to is an error that names its source and the nearest right one; nothing
//! given is ever ignored.
#![forbid(unsafe_code)]

use std::path::Path;

use serde_json::{Map, Value};

use super::{JobConfig, setting};
use crate::{Error, Result};

/// Variables of one rank's own: no settings of a job, and passed on to ranks on other hosts.
pub const RANK_VARIABLES: [&str; 12] = [
    "GRADWIRE_LOG",
    "GRADWIRE_ISA",
    "GRADWIRE_TARGET",
    "GRADWIRE_RANK_TRANSPORTS",
    "GRADWIRE_TCP_IO",
    "GRADWIRE_CUDA_LIBRARY",
    "GRADWIRE_HCA",
    "GRADWIRE_RAILS",
    "GRADWIRE_GID_INDEX",
    "GRADWIRE_TRAFFIC_CLASS",
    "GRADWIRE_SERVICE_LEVEL",
    "GRADWIRE_PKEY_INDEX",
];

/// Other variables of this program that are no settings of a job.
const OTHER_VARIABLES: [&str; 15] = [
    "GRADWIRE_CONFIG",
    "GRADWIRE_HOME",
    "GRADWIRE_RENDEZVOUS",
    "GRADWIRE_RENDEZVOUS_DIR",
    "GRADWIRE_ROLE",
    "GRADWIRE_RANK",
    "GRADWIRE_LOCAL_RANK",
    "GRADWIRE_SSH",
    "GRADWIRE_TOKEN",
    "GRADWIRE_TOKEN_FILE",
    "GRADWIRE_CORES",
    "GRADWIRE_JOB",
    "GRADWIRE_IFNAME",
    "GRADWIRE_TORCH",
    "GRADWIRE_TEST_RDMA",
];

/// Gathers the settings of a job, weakest source first: `environment` (all variables; those of other programs are passed over),
/// then the TOML `file`, then `flags` as pairs of a dotted key and a text.
///
/// # Errors
///
/// [`Error::Config`] for an unknown key, a value of the wrong kind, or settings that cannot work together; [`Error::File`] if
/// the file cannot be read.
pub fn gather(
    environment: impl Iterator<Item = (String, String)>,
    file: Option<&Path>,
    flags: &[(String, String)],
) -> Result<JobConfig> {
    let mut tree = defaults();
    for (name, text) in environment {
        if let Some(key) = key_of_variable(&name)? {
            set(&mut tree, &key, setting::parse(&key, &text, &name)?);
        }
    }
    if let Some(path) = file {
        read_file(&mut tree, path)?;
    }
    for (key, text) in flags {
        let source = format!("the flag for `{key}`");
        setting::kind_of(key, &source)?;
        set(&mut tree, key, setting::parse(key, text, &source)?);
    }
    let job: JobConfig = serde_json::from_value(Value::Object(tree)).map_err(|e| Error::Config(e.to_string()))?;
    job.validate()?;
    Ok(job)
}

/// The defaults as a tree. Of the optimizer only what every kind has: the constants of the default kind would be refused as soon
/// as somebody chose another.
fn defaults() -> Map<String, Value> {
    let Ok(Value::Object(mut tree)) = serde_json::to_value(JobConfig::default()) else {
        unreachable!("a job's configuration is an object with text keys");
    };
    if let Some(Value::Object(optimizer)) = tree.get_mut("optimizer") {
        optimizer.retain(|key, _| key == "kind" || key == "learning_rate");
    }
    tree
}

fn variable_of_key(key: &str) -> String {
    format!("GRADWIRE_{}", key.replace('.', "_").to_uppercase())
}

/// The setting that a variable carries; `None` if it carries none.
fn key_of_variable(name: &str) -> Result<Option<String>> {
    if !name.starts_with("GRADWIRE_") {
        return Ok(None);
    }
    if name == "GRADWIRE_IFNAME" {
        return Ok(Some("interface".into()));
    }
    if OTHER_VARIABLES.contains(&name) || RANK_VARIABLES.contains(&name) {
        return Ok(None);
    }
    if let Some(key) = setting::keys().find(|key| variable_of_key(key) == name) {
        return Ok(Some(key.into()));
    }
    let known: Vec<String> = setting::keys().map(variable_of_key).collect();
    let all = known.iter().map(String::as_str).chain(OTHER_VARIABLES).chain(RANK_VARIABLES);
    Err(Error::Config(format!("the variable {name} means nothing to gradwire{}", setting::suggestion(name, all))))
}

fn read_file(tree: &mut Map<String, Value>, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file("read", path, e))?;
    let table: toml::Table =
        text.parse().map_err(|e: toml::de::Error| Error::Config(format!("{}: {e}", path.display())))?;
    let Ok(Value::Object(given)) = serde_json::to_value(table) else {
        return Err(Error::Config(format!("{} is not a table of settings", path.display())));
    };
    merge(tree, "", given, &path.display().to_string())
}

fn merge(tree: &mut Map<String, Value>, prefix: &str, given: Map<String, Value>, source: &str) -> Result<()> {
    for (name, value) in given {
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value {
            Value::Object(inner) if setting::is_table(&key) => merge(tree, &key, inner, source)?,
            value => {
                let kind = setting::kind_of(&key, source)?;
                set(tree, &key, kind.check(&key, value, source)?);
            }
        }
    }
    Ok(())
}

/// Puts a value at its dotted key; tables on the way come into being.
fn set(tree: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            tree.insert(key.into(), value);
        }
        Some((head, rest)) => {
            let inner = tree.entry(head).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            if let Value::Object(inner) = inner {
                set(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{consistency::Consistency, types::Dtype};

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(key, text)| (key.to_string(), text.to_string())).collect()
    }

    fn gather_all(variables: &[(&str, &str)], file: &str, flags: &[(&str, &str)]) -> Result<JobConfig> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("job.toml");
        std::fs::write(&path, file).unwrap();
        gather(pairs(variables).into_iter(), Some(&path), &pairs(flags))
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_variables() {
        let variables = [("GRADWIRE_SEED", "1"), ("GRADWIRE_WORKERS", "3"), ("GRADWIRE_SERVERS", "4"), ("HOME", "/")];
        let job = gather_all(&variables, "seed = 2\nworkers = 5", &[("seed", "7")]).unwrap();
        assert_eq!((job.seed, job.workers, job.servers), (7, 5, 4));
    }

    #[test]
    fn every_kind_of_value_has_a_text() {
        let flags = [
            ("consistency", "ssp:3"),
            ("chunk_bytes", "64KiB"),
            ("gradient_dtype", "bf16"),
            ("two_step", "true"),
            ("checkpoint.every", "10"),
            ("checkpoint.dir", "/tmp/123"),
            ("ports", "20000-20010"),
            ("transports", "tcp"),
            ("name", "123"),
            ("optimizer.kind", "sgd"),
            ("optimizer.momentum", "0.5"),
            ("optimizer.clip.per_value", "2"),
        ];
        let job = gather_all(&[("GRADWIRE_IFNAME", "lo")], "", &flags).unwrap();
        assert_eq!(job.consistency, Consistency::Ssp { bound: 3 });
        assert_eq!((job.chunk_bytes, job.gradient_dtype, job.two_step), (65536, Dtype::Bf16, true));
        assert_eq!((job.checkpoint.every, job.name.as_str()), (Some(10), "123"));
        assert_eq!(job.optimizer.clip.per_value, Some(2.0));
        assert_eq!(job.interface.as_deref(), Some("lo"));
    }

    #[test]
    fn a_file_may_have_tables() {
        let file = "[optimizer]\nkind = \"adam\"\nbeta1 = 0.8\n[checkpoint]\ndir = \"/c\"\nevery = 5\n";
        let job = gather_all(&[], file, &[]).unwrap();
        assert_eq!(job.checkpoint.every, Some(5));
        assert_eq!(job.optimizer.learning_rate, 1e-3);
    }

    #[test]
    fn a_wrong_key_is_told_the_right_one() {
        type Pairs = &'static [(&'static str, &'static str)];
        let cases: [(Pairs, &str, Pairs, &str); 5] = [
            (&[("GRADWIRE_CHUNK_BYTE", "1")], "", &[], "GRADWIRE_CHUNK_BYTES"),
            (&[], "chunk_byte = 1", &[], "chunk_bytes"),
            (&[], "[checkpoint]\nevry = 1", &[], "checkpoint.every"),
            (&[], "", &[("optimizer.learning_rat", "1")], "optimizer.learning_rate"),
            (&[], "heartbeat = 5", &[], "heartbeat_ms"),
        ];
        for (variables, file, flags, right) in cases {
            let text = gather_all(variables, file, flags).unwrap_err().to_string();
            assert!(text.contains(&format!("did you mean `{right}`")), "{text}");
        }
    }

    #[test]
    fn a_wrong_value_is_told_what_would_be_right() {
        let cases: [(&str, &str, &str); 6] = [
            ("gradient_dtype", "bf61", "bf16"),
            ("seed", "-1", "whole number"),
            ("two_step", "yes", "true or false"),
            ("consistency", "ssp", "ssp:N"),
            ("optimizer.kind", "agadrad", "did you mean `adagrad`"),
            ("chunk_bytes", "1 lightyear", "MiB"),
        ];
        for (key, value, hint) in cases {
            let text = gather_all(&[], "", &[(key, value)]).unwrap_err().to_string();
            assert!(text.contains(hint), "{key}: {text}");
        }
        let text = gather_all(&[], "workers = \"two\"", &[]).unwrap_err().to_string();
        assert!(text.contains("workers") && text.contains("job.toml"), "{text}");
    }
}
