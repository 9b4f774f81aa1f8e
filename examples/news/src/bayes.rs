//! The baseline: multinomial naive Bayes on jieba words.
//!
//! Invariant: it is trained on the same rows as the models and sees the held-out rows only to be
//! scored on them; nothing in it is random.

use crate::data::Title;
use crate::metrics::Confusion;
use crate::text::words;
use std::collections::HashMap;

/// Added to every word count. The best of a few tried on other splits of the titles, so that the
/// models are held against a strong baseline.
const SMOOTHING: f64 = 0.3;

/// Word probabilities by class, smoothed.
#[derive(Debug)]
pub struct Bayes {
    priors: Vec<f64>,
    words: HashMap<String, Vec<f64>>,
}

impl Bayes {
    /// Counts the words of the training documents.
    pub fn train(documents: &[(Vec<String>, usize)], classes: usize, smoothing: f64) -> Self {
        let mut counts: HashMap<String, Vec<f64>> = HashMap::new();
        let (mut priors, mut totals) = (vec![0.0; classes], vec![0.0; classes]);
        for (words, class) in documents {
            priors[*class] += 1.0;
            for word in words {
                totals[*class] += 1.0;
                let count = counts.entry(word.clone()).or_insert_with(|| vec![0.0; classes]);
                count[*class] += 1.0;
            }
        }
        let vocabulary = counts.len() as f64;
        for count in counts.values_mut() {
            for (class, value) in count.iter_mut().enumerate() {
                *value = ((*value + smoothing) / (totals[class] + smoothing * vocabulary)).ln();
            }
        }
        let documents = documents.len() as f64;
        priors.iter_mut().for_each(|p| *p = (*p / documents).ln());
        Self { priors, words: counts }
    }

    /// The most likely class; words never seen in training say nothing.
    pub fn classify(&self, words: &[String]) -> usize {
        let mut scores = self.priors.clone();
        for weights in words.iter().filter_map(|word| self.words.get(word)) {
            scores.iter_mut().zip(weights).for_each(|(s, w)| *s += w);
        }
        let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(class, _)| class)
    }
}

/// Trains on some titles and scores on others.
pub fn evaluate(train: &[&Title], held_out: &[&Title], classes: usize) -> Confusion {
    let documents: Vec<_> = train.iter().map(|t| (words(&t.text), t.label)).collect();
    let bayes = Bayes::train(&documents, classes, SMOOTHING);
    let mut confusion = Confusion::new(classes);
    for title in held_out {
        confusion.add(title.label, bayes.classify(&words(&title.text)));
    }
    confusion
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str, class: usize) -> (Vec<String>, usize) {
        (text.split(' ').map(str::to_string).collect(), class)
    }

    #[test]
    fn probabilities_match_values_worked_by_hand() {
        let documents = [document("ball goal ball", 0), document("goal", 0), document("share price", 1)];
        let bayes = Bayes::train(&documents, 2, 1.0);
        let close = |found: f64, expected: f64| assert!((found - expected.ln()).abs() < 1e-12);
        close(bayes.priors[0], 2.0 / 3.0);
        // Four words in class 0, two in class 1, four different ones in all.
        close(bayes.words["ball"][0], 3.0 / 8.0);
        close(bayes.words["ball"][1], 1.0 / 6.0);
        let class = |text: &str| bayes.classify(&document(text, 0).0);
        assert_eq!(class("goal ball"), 0);
        assert_eq!(class("price ball price"), 1);
        // Unknown words leave it to the priors.
        assert_eq!(class("weather"), 0);
    }

    #[test]
    fn titles_are_learned_from_their_words() {
        let title = |text: &str, label| Title { label, text: text.to_string() };
        let train = [title("今天足球，足球", 0), title("今天股票，股票", 1)];
        let test = [title("足球今天", 0), title("昨天股票", 1)];
        let (train, test): (Vec<_>, Vec<_>) = (train.iter().collect(), test.iter().collect());
        let confusion = evaluate(&train, &test, 2);
        assert_eq!(confusion.counts, [[1, 0], [0, 1]]);
    }
}
