//! The table of a job's settings: their keys, and what a value of each may be.
//!
//! Invariant: every field of `JobConfig` that a person may set stands here; a test holds the two together.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::{Error, Result};

/// What a setting's value may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// Any text.
    Text,
    /// A number without sign or fraction.
    Whole,
    /// Bytes: a whole number, or one with a unit.
    Bytes,
    /// A number.
    Number,
    /// true or false.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Several of these words.
    Choices(&'static [&'static str]),
    /// Whatever TOML can say; its owner checks it.
    Any,
}

const SETTINGS: &[(&str, Kind)] = &[
    ("name", Kind::Text),
    ("servers", Kind::Whole),
    ("max_servers", Kind::Whole),
    ("workers", Kind::Whole),
    ("max_workers", Kind::Whole),
    ("shards_per_server", Kind::Whole),
    ("replicas", Kind::Whole),
    ("on_worker_loss", Kind::Choice(&["fail", "continue", "restart"])),
    ("straggler_deadline_ms", Kind::Whole),
    ("suspect_ms", Kind::Whole),
    ("store", Kind::Text),
    ("consistency", Kind::Text),
    ("reduction", Kind::Choice(&["mean", "sum"])),
    ("gradient_dtype", Kind::Choice(&["f32", "bf16", "f16"])),
    ("parameter_dtype", Kind::Choice(&["f32", "bf16"])),
    ("chunk_bytes", Kind::Bytes),
    ("landing_bytes", Kind::Bytes),
    ("seed", Kind::Whole),
    ("two_step", Kind::Flag),
    ("device", Kind::Text),
    ("gpu_ms", Kind::Whole),
    ("gpu_direct", Kind::Flag),
    ("skip_nonfinite", Kind::Flag),
    ("loss_scale.mode", Kind::Text),
    ("loss_scale.initial", Kind::Number),
    ("loss_scale.growth_factor", Kind::Number),
    ("loss_scale.backoff_factor", Kind::Number),
    ("loss_scale.growth_interval", Kind::Whole),
    ("resume", Kind::Text),
    ("init_from", Kind::Text),
    ("heartbeat_ms", Kind::Whole),
    ("deadline_ms", Kind::Whole),
    ("warn_ms", Kind::Whole),
    ("rebuild_ms", Kind::Whole),
    ("payload_checksums", Kind::Choice(&["auto", "on", "off"])),
    ("join_ms", Kind::Whole),
    ("setup_ms", Kind::Whole),
    ("wait_ms", Kind::Whole),
    ("transports", Kind::Choices(&["shm", "verbs", "tcp", "soft"])),
    ("soft.loss", Kind::Number),
    ("soft.duplicate", Kind::Number),
    ("soft.reorder", Kind::Number),
    ("soft.corrupt", Kind::Number),
    ("soft.delay_us", Kind::Whole),
    ("soft.die_after", Kind::Whole),
    ("soft.seed", Kind::Whole),
    ("interface", Kind::Text),
    ("ports", Kind::Text),
    ("metrics", Kind::Text),
    ("timeline", Kind::Text),
    ("checkpoint.dir", Kind::Text),
    ("checkpoint.every", Kind::Whole),
    ("checkpoint.at_end", Kind::Flag),
    ("checkpoint.keep", Kind::Whole),
    ("checkpoint.incremental", Kind::Flag),
    ("optimizer.kind", Kind::Choice(&["sgd", "adam", "adamw", "adagrad"])),
    ("optimizer.learning_rate", Kind::Number),
    ("optimizer.weight_decay", Kind::Number),
    ("optimizer.momentum", Kind::Number),
    ("optimizer.nesterov", Kind::Flag),
    ("optimizer.beta1", Kind::Number),
    ("optimizer.beta2", Kind::Number),
    ("optimizer.epsilon", Kind::Number),
    ("optimizer.initial_accumulator", Kind::Number),
    ("optimizer.schedule", Kind::Any),
    ("optimizer.clip", Kind::Any),
    ("optimizer.groups", Kind::Any),
];

/// The keys of all settings.
pub(super) fn keys() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|(key, _)| *key)
}

/// Whether a key names a table of settings rather than a setting.
pub(super) fn is_table(key: &str) -> bool {
    keys().any(|known| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// What the value of `key` may be.
pub(super) fn kind_of(key: &str, source: &str) -> Result<Kind> {
    let inside = |known: &str| key.strip_prefix(known).is_some_and(|rest| rest.starts_with('.'));
    let found = SETTINGS.iter().find(|(known, kind)| *known == key || (*kind == Kind::Any && inside(known)));
    match found {
        Some((_, kind)) => Ok(*kind),
        None => Err(Error::Config(format!("{source}: there is no setting `{key}`{}", suggestion(key, keys())))),
    }
}

/// The value that `text` is for this key.
pub(super) fn parse(key: &str, text: &str, source: &str) -> Result<Value> {
    let kind = kind_of(key, source)?;
    let value = match kind {
        Kind::Text | Kind::Choice(_) => Value::from(text),
        Kind::Choices(_) => Value::from_iter(text.split(',').map(str::trim)),
        Kind::Bytes => bytes(text).map_or_else(|| Value::from(text), Value::from),
        Kind::Whole => text.parse::<u64>().map_or_else(|_| Value::from(text), Value::from),
        Kind::Number => text.parse::<f64>().map_or_else(|_| Value::from(text), Value::from),
        Kind::Flag => text.parse::<bool>().map_or_else(|_| Value::from(text), Value::from),
        Kind::Any => toml_value(text),
    };
    kind.check(key, value, source)
}

/// What a text says in TOML; a text that is no TOML value is a string.
fn toml_value(text: &str) -> Value {
    let table = format!("value = {text}").parse::<toml::Table>().ok();
    table.and_then(|table| serde_json::to_value(table.get("value")?).ok()).unwrap_or_else(|| Value::from(text))
}

fn bytes(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let factor: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

impl Kind {
    /// The value if it is of this kind.
    pub(super) fn check(self, key: &str, value: Value, source: &str) -> Result<Value> {
        let value = match (self, &value) {
            (Kind::Bytes, Value::String(text)) => bytes(text).map_or(value, Value::from),
            _ => value,
        };
        let one_of = |words: &[&str]| value.as_str().is_some_and(|word| words.contains(&word));
        let (fits, wanted) = match self {
            Kind::Text => (value.is_string(), "a text".to_string()),
            Kind::Whole => (value.is_u64(), "a whole number, 0 or more".into()),
            Kind::Bytes => (value.is_u64(), "bytes: a whole number, or one with KiB, MiB or GiB".into()),
            Kind::Number => (value.is_number(), "a number".into()),
            Kind::Flag => (value.is_boolean(), "true or false".into()),
            Kind::Any => (true, String::new()),
            Kind::Choice(words) => (one_of(words), format!("one of {}", words.join(", "))),
            Kind::Choices(words) => {
                let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
                let fits = !list.is_empty() && list.iter().all(|v| v.as_str().is_some_and(|w| words.contains(&w)));
                (fits, format!("a list of {}", words.join(", ")))
            }
        };
        if fits {
            return Ok(value);
        }
        let hint = match (self, value.as_str()) {
            (Kind::Choice(words), Some(word)) => suggestion(word, words.iter().copied()),
            _ => String::new(),
        };
        Err(Error::Config(format!("{source}: `{key}` is {value}, but it must be {wanted}{hint}")))
    }
}

/// `; did you mean …?` with the nearest of the known words, if one is near.
pub(crate) fn suggestion<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|k| (strsim::jaro_winkler(word, k), k)).max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        // Below this the nearest word has little in common with the one given.
        Some((likeness, nearest)) if likeness > 0.8 => format!("; did you mean `{nearest}`?"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::JobConfig;

    #[test]
    fn the_table_and_the_configuration_agree() {
        let Value::Object(job) = serde_json::to_value(JobConfig::default()).unwrap() else { panic!() };
        let mut fields = Vec::new();
        for (key, value) in &job {
            match value {
                Value::Object(inner) => fields.extend(inner.keys().map(|name| format!("{key}.{name}"))),
                // Drawn, or read from the checkpoint to be resumed, by the launcher; never set by hand.
                _ if key == "instance" || key == "start_clock" => {}
                _ => fields.push(key.clone()),
            }
        }
        for field in &fields {
            assert!(keys().any(|key| key == field), "`{field}` cannot be set");
        }
        for key in keys().filter(|key| !key.starts_with("optimizer.")) {
            assert!(fields.iter().any(|field| field == key), "`{key}` is no field");
        }
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!(bytes("1 MiB"), Some(1 << 20));
        assert_eq!(bytes("4096"), Some(4096));
        for wrong in ["", "MiB", "1 MB", "-1", "99999999999999 GiB"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }
}
