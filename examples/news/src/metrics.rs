//! Accuracy and macro precision, recall and F1, from a confusion matrix.
//!
//! Invariant: everything reported is computed from the matrix, so that a report made later from a
//! stored matrix says exactly what the job said.

use serde::{Deserialize, Serialize};

/// `counts[truth][said]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Confusion {
    /// One row a true class, one column a predicted class.
    pub counts: Vec<Vec<usize>>,
}

/// The figures of one evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Share of rows classified rightly.
    pub accuracy: f64,
    /// Precision, averaged over the classes.
    pub macro_precision: f64,
    /// Recall, averaged over the classes.
    pub macro_recall: f64,
    /// F1, averaged over the classes.
    pub macro_f1: f64,
}

impl Confusion {
    /// An empty matrix.
    pub fn new(classes: usize) -> Self {
        Self { counts: vec![vec![0; classes]; classes] }
    }

    /// Counts one row.
    pub fn add(&mut self, truth: usize, said: usize) {
        self.counts[truth][said] += 1;
    }

    /// Adds another matrix of the same classes.
    pub fn merge(&mut self, other: &Self) {
        for (row, more) in self.counts.iter_mut().zip(&other.counts) {
            row.iter_mut().zip(more).for_each(|(a, b)| *a += b);
        }
    }

    /// The figures; a class never predicted has precision 0, a class never seen recall 0.
    pub fn scores(&self) -> Scores {
        let classes = self.counts.len();
        let ratio = |part: usize, whole: usize| match whole {
            0 => 0.0,
            _ => part as f64 / whole as f64,
        };
        let (mut right, mut total) = (0, 0);
        let (mut precision, mut recall, mut f1) = (0.0, 0.0, 0.0);
        for class in 0..classes {
            let hit = self.counts[class][class];
            let seen: usize = self.counts[class].iter().sum();
            let said: usize = self.counts.iter().map(|row| row[class]).sum();
            right += hit;
            total += seen;
            precision += ratio(hit, said);
            recall += ratio(hit, seen);
            f1 += ratio(2 * hit, said + seen);
        }
        let share = 1.0 / classes.max(1) as f64;
        Scores {
            accuracy: ratio(right, total),
            macro_precision: precision * share,
            macro_recall: recall * share,
            macro_f1: f1 * share,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_match_values_worked_by_hand() {
        // Truth a: 3 right, 1 said b. Truth b: 2 right, 2 said a. Truth c: said a once, b once.
        let confusion = Confusion { counts: vec![vec![3, 1, 0], vec![2, 2, 0], vec![1, 1, 0]] };
        let scores = confusion.scores();
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        };
        close(scores.accuracy, 0.5);
        // a 3/6, b 2/4, c never said.
        close(scores.macro_precision, (0.5 + 0.5 + 0.0) / 3.0);
        // a 3/4, b 2/4, c 0/2.
        close(scores.macro_recall, (0.75 + 0.5 + 0.0) / 3.0);
        // a 6/10, b 4/8, c 0/2.
        close(scores.macro_f1, (0.6 + 0.5 + 0.0) / 3.0);
    }

    #[test]
    fn a_perfect_and_an_empty_matrix() {
        let mut confusion = Confusion::new(2);
        assert_eq!(confusion.scores().accuracy, 0.0);
        confusion.add(0, 0);
        confusion.add(1, 1);
        let scores = confusion.scores();
        assert_eq!((scores.accuracy, scores.macro_f1), (1.0, 1.0));
    }
}
