//! The report: a table of all jobs, a confusion matrix a model, `summary.json`, `curves.svg`.
//!
//! Invariant: it only reads the jobs' files; running it twice writes the same bytes.

use crate::data::LABELS;
use crate::metrics::Confusion;
use crate::plot::curves_svg;
use crate::record::{Record, Summary, write_json, write_whole};
use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use std::fmt::Write;
use std::path::Path;

/// Writes the files and returns what to print.
pub fn report(directory: &Path) -> Result<String> {
    let (records, folds): (Vec<_>, Vec<_>) =
        Record::read_all(directory)?.into_iter().partition(|record| record.fold.is_none());
    ensure!(
        !records.is_empty() || !folds.is_empty(),
        "{} holds no results yet; `news train` and `news bayes` write them",
        directory.display()
    );
    let summaries: Vec<Summary> = records.iter().map(Record::summary).collect();
    write_json(&directory.join("summary.json"), &summaries)?;
    write_whole(&directory.join("curves.svg"), &curves_svg(&records)?)?;
    let mut text = if records.is_empty() { String::new() } else { table(&records) };
    text.push_str(&comparison(&records));
    if !folds.is_empty() {
        write!(text, "\ncross-validation, each fold trained on the rows of the others:\n{}", cross_validation(&folds))?;
    }
    for model in models(&records) {
        let of_model = records.iter().filter(|r| r.model == model);
        let mut confusion = Confusion::new(LABELS.len());
        of_model.clone().for_each(|r| confusion.merge(&r.confusion));
        let seeds: Vec<String> = of_model.map(|r| r.seed.to_string()).collect();
        let seeds = seeds.join(", ");
        write!(text, "\n{model}, rows truth, columns answer, seeds {seeds}:\n")?;
        text.push_str(&matrix(&confusion));
    }
    let at = directory.display();
    write!(text, "\nwrote {at}/summary.json and {at}/curves.svg\n")?;
    Ok(text)
}

fn models(records: &[Record]) -> Vec<String> {
    let mut models: Vec<String> = records.iter().map(|r| r.model.clone()).collect();
    models.dedup();
    models
}

fn plain(head: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(head);
    table
}

fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// One row a job, then each model's mean over its seeds.
fn table(records: &[Record]) -> String {
    let head = "model,seed,accuracy,precision,recall,F1,train s,wait s,workers,parameters";
    let mut table = plain(head.split(',').map(str::to_string).collect());
    let percent = |value: f64| format!("{:.2} %", 100.0 * value);
    for model in models(records) {
        let jobs: Vec<&Record> = records.iter().filter(|r| r.model == model).collect();
        for job in &jobs {
            table.add_row(vec![
                model.clone(),
                job.seed.to_string(),
                percent(job.scores.accuracy),
                percent(job.scores.macro_precision),
                percent(job.scores.macro_recall),
                percent(job.scores.macro_f1),
                format!("{:.1}", job.train_s),
                format!("{:.1}", job.wait_s),
                job.workers.to_string(),
                job.parameters.to_string(),
            ]);
        }
        let mean = |figure: fn(&Record) -> f64| jobs.iter().map(|job| figure(job)).sum::<f64>() / jobs.len() as f64;
        table.add_row(vec![
            model.clone(),
            "mean".to_string(),
            percent(mean(|r| r.scores.accuracy)),
            percent(mean(|r| r.scores.macro_precision)),
            percent(mean(|r| r.scores.macro_recall)),
            percent(mean(|r| r.scores.macro_f1)),
            format!("{:.1}", mean(|r| r.train_s)),
            format!("{:.1}", mean(|r| r.wait_s)),
        ]);
    }
    finish(table)
}

/// The best model beside naive Bayes, seed by seed; naive Bayes draws nothing, so one run of it serves all seeds.
fn comparison(records: &[Record]) -> String {
    let (bayes, trained): (Vec<_>, Vec<_>) = records.iter().partition(|record| record.model == "bayes");
    let Some(bayes) = bayes.first() else { return String::new() };
    let seeds: std::collections::BTreeSet<u64> = trained.iter().map(|record| record.seed).collect();
    let line = |seed: u64| {
        let of_seed = trained.iter().filter(|record| record.seed == seed);
        let best = of_seed.max_by(|a, b| a.scores.accuracy.total_cmp(&b.scores.accuracy))?;
        let gap = 100.0 * (best.scores.accuracy - bayes.scores.accuracy);
        let side = if gap > 0.0 { "above" } else { "below" };
        Some(format!("seed {seed}: {} is best, {:.2} points {side} naive Bayes\n", best.model, gap.abs()))
    };
    seeds.into_iter().filter_map(line).collect()
}

/// One row a cross-validation: its figures over all rows together, each held out once.
fn cross_validation(folds: &[Record]) -> String {
    let head = "model,seed,folds done,accuracy,lowest,highest,F1,train s";
    let mut table = plain(head.split(',').map(str::to_string).collect());
    let name = |record: &Record| (record.model.clone(), record.seed, record.fold.map_or(0, |fold| fold.of));
    let percent = |value: f64| format!("{:.2} %", 100.0 * value);
    for group in folds.chunk_by(|a, b| name(a) == name(b)) {
        let mut confusion = Confusion::new(LABELS.len());
        group.iter().for_each(|record| confusion.merge(&record.confusion));
        let (scores, (model, seed, of)) = (confusion.scores(), name(&group[0]));
        let accuracies = || group.iter().map(|record| record.scores.accuracy);
        table.add_row(vec![
            model,
            seed.to_string(),
            format!("{} of {of}", group.len()),
            percent(scores.accuracy),
            percent(accuracies().fold(1.0, f64::min)),
            percent(accuracies().fold(0.0, f64::max)),
            percent(scores.macro_f1),
            format!("{:.1}", group.iter().map(|record| record.train_s).sum::<f64>()),
        ]);
    }
    finish(table)
}

/// The confusion matrix, columns named by the classes' first four letters.
pub fn matrix(confusion: &Confusion) -> String {
    let short = LABELS.iter().map(|label| label[..4].to_string());
    let mut table = plain(std::iter::once(String::new()).chain(short).collect());
    for (label, row) in LABELS.iter().zip(&confusion.counts) {
        let counts = row.iter().map(usize::to_string);
        table.add_row(std::iter::once(label.to_string()).chain(counts));
    }
    finish(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scores;
    use crate::train::Epoch;

    fn record(model: &str, seed: u64, right: usize) -> Record {
        let mut confusion = Confusion::new(LABELS.len());
        for row in 0..100 {
            let truth = row % 10;
            let said = if row < right { truth } else { (truth + 1) % 10 };
            confusion.add(truth, said);
        }
        let scores: Scores = confusion.scores();
        let curve = [(1, 2.0), (2, 1.0), (3, 0.5)].map(|(epoch, loss)| Epoch { epoch, loss, scores });
        Record {
            model: model.to_string(),
            seed,
            fold: None,
            scores,
            train_s: 2.0,
            wait_s: 0.5,
            workers: 2,
            parameters: 1_000,
            clocks: 30,
            curve: if model == "bayes" { vec![] } else { curve.to_vec() },
            confusion,
        }
    }

    #[test]
    fn a_report_gathers_every_job_and_repeats_itself() {
        let place = format!("gradwire-news-report-{}", std::process::id());
        let directory = std::env::temp_dir().join(place);
        for job in [("lstm", 1, 80), ("lstm", 2, 90), ("decoder", 1, 70), ("bayes", 1, 60)] {
            record(job.0, job.1, job.2).write(&directory).unwrap();
        }
        let first = report(&directory).unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
        let (summary, svg) = (read("summary.json"), read("curves.svg"));
        assert_eq!(first, report(&directory).unwrap());
        assert_eq!((summary.clone(), svg.clone()), (read("summary.json"), read("curves.svg")));
        std::fs::remove_dir_all(&directory).unwrap();

        let lines: Vec<serde_json::Value> = serde_json::from_str(&summary).unwrap();
        assert_eq!(lines.len(), 4);
        let names: Vec<_> = lines.iter().map(|line| line["model"].as_str().unwrap()).collect();
        assert_eq!(names, ["bayes", "decoder", "lstm", "lstm"]);
        for field in "seed accuracy macro_precision macro_recall macro_f1 train_s".split(' ') {
            assert!(lines.iter().all(|line| line[field].is_number()), "{field}");
        }
        assert_eq!(lines[3]["accuracy"], 0.9);
        assert!(first.contains("seed 1: lstm is best, 20.00 points above naive Bayes"), "{first}");
        // The mean of the two LSTM jobs.
        assert!(first.contains("85.00 %"), "{first}");
        assert!(svg.contains("<svg") && svg.contains("polyline") && svg.contains("lstm-2"));
    }

    #[test]
    fn the_folds_of_a_cross_validation_add_up() {
        let fold = |number: usize, right: usize| {
            let fold = Some(crate::record::Fold { number, of: 3 });
            Record { fold, ..record("lstm", 1, right) }
        };
        let text = cross_validation(&[fold(1, 80), fold(3, 90)]);
        for word in ["2 of 3", "85.00 %", "80.00 %", "90.00 %", "4.0"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn an_empty_directory_says_what_is_missing() {
        let place = format!("gradwire-news-empty-{}", std::process::id());
        let directory = std::env::temp_dir().join(place);
        std::fs::create_dir_all(&directory).unwrap();
        let error = report(&directory).unwrap_err().to_string();
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(error.contains("no results"), "{error}");
    }
}
