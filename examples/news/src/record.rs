//! What a job leaves on disk: one JSON file a model and seed, or a fold of them.
//!
//! Invariant: a file holds everything its report needs (curves, confusion matrix, figures), so a
//! report never trains anything, and a file is replaced whole or not at all.

use crate::metrics::{Confusion, Scores};
use crate::train::{Epoch, Outcome};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// One finished job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// `decoder`, `lstm` or `bayes`.
    pub model: String,
    /// The training seed.
    pub seed: u64,
    /// Which fold of a cross-validation this was; absent for the fixed split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fold: Option<Fold>,
    /// The final figures.
    #[serde(flatten)]
    pub scores: Scores,
    /// Seconds of training.
    pub train_s: f64,
    /// How many of them the first worker spent in handing over gradients and waiting for parameters.
    pub wait_s: f64,
    /// Worker processes.
    pub workers: usize,
    /// Elements of all tensors.
    pub parameters: usize,
    /// Clocks run.
    pub clocks: u64,
    /// One entry a pass; empty for naive Bayes.
    pub curve: Vec<Epoch>,
    /// Where the final figures come from.
    pub confusion: Confusion,
}

/// One fold of a cross-validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fold {
    /// Its number, from 1.
    pub number: usize,
    /// How many there are.
    pub of: usize,
}

impl Record {
    /// What is kept of a training run.
    pub fn of(model: &str, seed: u64, fold: Option<Fold>, outcome: &Outcome) -> Self {
        Self {
            model: model.to_string(),
            seed,
            fold,
            scores: outcome.confusion.scores(),
            train_s: outcome.train_s,
            wait_s: outcome.wait_s,
            workers: outcome.workers,
            parameters: outcome.parameters,
            clocks: outcome.clocks,
            curve: outcome.epochs.clone(),
            confusion: outcome.confusion.clone(),
        }
    }

    /// The line of `summary.json`.
    pub fn summary(&self) -> Summary {
        Summary { model: self.model.clone(), seed: self.seed, scores: self.scores, train_s: self.train_s }
    }

    /// Writes DIR/MODEL-SEED.json, or DIR/MODEL-SEED-fold-I-of-K.json.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        let fold = self.fold.map_or(String::new(), |fold| format!("-fold-{}-of-{}", fold.number, fold.of));
        let path = directory.join(format!("{}-{}{fold}.json", self.model, self.seed));
        write_json(&path, self)?;
        Ok(path)
    }

    /// Reads every job's file in a directory, by model and seed.
    pub fn read_all(directory: &Path) -> Result<Vec<Self>> {
        let listing = std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
        let mut records = Vec::new();
        for entry in listing {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !is_job(&name) {
                continue;
            }
            let text = std::fs::read_to_string(&path)?;
            let record: Self =
                serde_json::from_str(&text).with_context(|| format!("{} is not a job's file", path.display()))?;
            records.push(record);
        }
        let place = |record: &Self| (record.seed, record.fold.map_or((0, 0), |fold| (fold.of, fold.number)));
        records.sort_by(|a, b| a.model.cmp(&b.model).then(place(a).cmp(&place(b))));
        Ok(records)
    }
}

/// `MODEL-SEED.json` or `MODEL-SEED-fold-I-of-K.json`, where SEED is a number.
fn is_job(name: &str) -> bool {
    let stem = name.strip_suffix(".json").and_then(|stem| stem.split_once('-'));
    stem.is_some_and(|(_, rest)| rest.split("-fold-").next().is_some_and(|seed| seed.parse::<u64>().is_ok()))
}

/// A job as machines read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The model's name.
    pub model: String,
    /// The training seed.
    pub seed: u64,
    /// The final figures.
    #[serde(flatten)]
    pub scores: Scores,
    /// Seconds of training.
    pub train_s: f64,
}

/// Writes a JSON file by way of a neighbour, so that no reader sees half of it.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_whole(path, &text)
}

/// Writes a file by way of a neighbour, making its directory first.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let beside = path.with_extension("partial");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_jobs_are_gathered() {
        assert!(is_job("lstm-3.json") && is_job("bayes-12.json") && is_job("lstm-3-fold-2-of-5.json"));
        for other in ["summary.json", "lstm-3-folds.json", "lstm-3.svg", "lstm-x.json"] {
            assert!(!is_job(other), "{other}");
        }
    }

    #[test]
    fn a_record_survives_the_disk() {
        let outcome = |counts: [[usize; 2]; 2]| Outcome {
            epochs: Vec::new(),
            confusion: Confusion { counts: counts.iter().map(|row| row.to_vec()).collect() },
            losses: Vec::new(),
            train_s: 1.5,
            wait_s: 0.5,
            clocks: 10,
            parameters: 7,
            rank: 0,
            workers: 2,
        };
        let fold = Some(Fold { number: 2, of: 5 });
        let part = Record::of("lstm", 5, fold, &outcome([[1, 1], [2, 0]]));
        let whole = Record::of("lstm", 5, None, &outcome([[3, 1], [0, 4]]));
        let place = format!("gradwire-news-record-{}", std::process::id());
        let directory = std::env::temp_dir().join(place);
        assert!(part.write(&directory).unwrap().ends_with("lstm-5-fold-2-of-5.json"));
        whole.write(&directory).unwrap();
        let found = Record::read_all(&directory).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].summary(), whole.summary());
        assert_eq!(found[0].scores.accuracy, 7.0 / 8.0);
        assert_eq!((found[1].fold, &found[1].confusion), (fold, &part.confusion));
    }
}
