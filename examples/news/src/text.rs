//! From titles to numbers: segmentation, stop words, tags, characters, vocabulary, padding.
//!
//! Invariant: a title becomes a row of positions, and every position carries the same number of
//! features (a character, its bigram, its word ...), each an index into that feature's vocabulary.
//! Index 0 is padding and 1 is "not in the vocabulary"; a vocabulary is built from the training
//! rows alone, in an order that depends on their content only.

use jieba_rs::Jieba;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

/// Titles are cut to this many positions (one of the 10,000 titles is longer).
pub const MAX_LEN: usize = 32;
const UNKNOWN: u32 = 1;
const RESERVED: usize = 2;

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);
static STOP_WORDS: LazyLock<HashSet<&'static str>> = LazyLock::new(|| stop_words::get("zh").iter().copied().collect());

/// How a title is cut into positions, and what each position carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Tokenizer {
    /// Words less stop words; each carries the word and its part of speech.
    Words,
    /// Characters.
    Chars,
    /// Characters; each carries the character and the bigram it begins.
    Bigrams,
    /// Characters; each carries the character, the bigram, its word and the word's part of speech.
    Mixed,
}

impl Tokenizer {
    /// How often a feature must occur among the training rows to be in its vocabulary.
    fn thresholds(self) -> &'static [usize] {
        match self {
            Self::Words => &[2, 1],
            Self::Chars => &[2],
            Self::Bigrams => &[2, 3],
            Self::Mixed => &[2, 3, 2, 1],
        }
    }

    /// The features of every position of a title.
    pub fn features(self, title: &str) -> Vec<Vec<String>> {
        let title = normalise(title);
        let mut positions = match self {
            Self::Words => tagged_words(&title)
                .into_iter()
                .filter(|(word, _)| !is_stop_word(word))
                .map(|(word, tag)| vec![word, tag])
                .collect(),
            Self::Chars => title.chars().map(|c| vec![c.to_string()]).collect(),
            Self::Bigrams => bigrams(&title),
            Self::Mixed => mixed(&title),
        };
        positions.truncate(MAX_LEN);
        if positions.is_empty() {
            // A title of stop words only still needs one position to classify from.
            positions.push(vec![String::new(); self.thresholds().len()]);
        }
        positions
    }
}

/// Full-width forms become their ASCII twins, letters lower case, so that they share an index.
fn normalise(title: &str) -> String {
    title
        .chars()
        .filter(|c| !c.is_whitespace())
        .flat_map(|c| {
            let narrow = match u32::from(c) {
                code @ 0xFF01..=0xFF5E => char::from_u32(code - 0xFEE0).unwrap_or(c),
                _ => c,
            };
            narrow.to_lowercase()
        })
        .collect()
}

fn tagged_words(title: &str) -> Vec<(String, String)> {
    JIEBA.tag(title, true).into_iter().map(|tag| (tag.word.to_string(), tag.tag.to_string())).collect()
}

/// Stop words, and whatever holds neither a letter nor a digit.
fn is_stop_word(word: &str) -> bool {
    STOP_WORDS.contains(word) || !word.chars().any(char::is_alphanumeric)
}

/// Every word of a title, as the naive Bayes baseline counts them: it does better with the stop
/// words and the punctuation than without.
pub fn words(title: &str) -> Vec<String> {
    tagged_words(&normalise(title)).into_iter().map(|(word, _)| word).collect()
}

fn bigrams(title: &str) -> Vec<Vec<String>> {
    let chars: Vec<char> = title.chars().collect();
    (0..chars.len())
        .map(|at| {
            let next = chars.get(at + 1);
            let bigram = [chars[at]].iter().chain(next).collect();
            vec![chars[at].to_string(), bigram]
        })
        .collect()
}

fn mixed(title: &str) -> Vec<Vec<String>> {
    let words = tagged_words(title).into_iter().flat_map(|(word, tag)| vec![(word.clone(), tag); word.chars().count()]);
    bigrams(title)
        .into_iter()
        .zip(words)
        .map(|(mut position, (word, tag))| {
            position.push(word);
            position.push(tag);
            position
        })
        .collect()
}

/// A title as indices: `ids[feature][position]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// One row of indices a feature, all of one length.
    pub ids: Vec<Vec<u32>>,
}

impl Encoded {
    /// The number of positions.
    pub fn len(&self) -> usize {
        self.ids[0].len()
    }

    /// Whether there is no position; [`Vocabulary::encode`] always makes one.
    pub fn is_empty(&self) -> bool {
        self.ids[0].is_empty()
    }
}

/// The indices of every feature, built from training titles.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    tables: Vec<HashMap<String, u32>>,
}

impl Vocabulary {
    /// Counts the features of the training titles and keeps the frequent ones.
    pub fn build<'a>(tokenizer: Tokenizer, titles: impl Iterator<Item = &'a str>) -> Self {
        let thresholds = tokenizer.thresholds();
        let mut counts: Vec<HashMap<String, usize>> = vec![HashMap::new(); thresholds.len()];
        for title in titles {
            for position in tokenizer.features(title) {
                for (feature, count) in position.into_iter().zip(&mut counts) {
                    *count.entry(feature).or_default() += 1;
                }
            }
        }
        let tables = counts
            .into_iter()
            .zip(thresholds)
            .map(|(count, threshold)| {
                let mut kept: Vec<(String, usize)> =
                    count.into_iter().filter(|(_, times)| times >= threshold).collect();
                // Equal counts fall back on the text: a hash map's own order differs by process.
                kept.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
                let numbered = kept.into_iter().zip(RESERVED as u32..);
                numbered.map(|((feature, _), id)| (feature, id)).collect()
            })
            .collect();
        Self { tokenizer, tables }
    }

    /// The size of each feature's vocabulary, padding and unknown included.
    pub fn sizes(&self) -> Vec<usize> {
        self.tables.iter().map(|t| t.len() + RESERVED).collect()
    }

    /// Encodes one title.
    pub fn encode(&self, title: &str) -> Encoded {
        let positions = self.tokenizer.features(title);
        let ids = self.tables.iter().enumerate().map(|(feature, table)| {
            let id = |position: &Vec<String>| table.get(&position[feature]).copied();
            positions.iter().map(|p| id(p).unwrap_or(UNKNOWN)).collect()
        });
        Encoded { ids: ids.collect() }
    }
}

/// Rows padded to one length, ready for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The number of rows.
    pub rows: usize,
    /// The padded length.
    pub len: usize,
    /// `ids[feature]` holds `rows * len` indices, row after row.
    pub ids: Vec<Vec<u32>>,
    /// Each row's length before padding.
    pub lengths: Vec<usize>,
    /// Each row's class.
    pub labels: Vec<u32>,
}

impl Batch {
    /// Pads the rows to the longest of them.
    pub fn new(rows: &[(&Encoded, usize)]) -> Self {
        let len = rows.iter().map(|(row, _)| row.len()).max().unwrap_or(0);
        let features = rows.first().map_or(0, |(row, _)| row.ids.len());
        let padded = |feature: usize| {
            rows.iter()
                .flat_map(|(row, _)| {
                    let ids = row.ids[feature].iter().copied();
                    ids.chain(std::iter::repeat(0)).take(len)
                })
                .collect()
        };
        Self {
            rows: rows.len(),
            len,
            ids: (0..features).map(padded).collect(),
            lengths: rows.iter().map(|(row, _)| row.len()).collect(),
            labels: rows.iter().map(|(_, label)| *label as u32).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TITLE: &str = "我爱北京的天安门，ＡＢ１２";

    #[test]
    fn characters_are_narrowed_and_lowered() {
        let found: Vec<String> = Tokenizer::Chars.features("Ａb １！").concat();
        assert_eq!(found, ["a", "b", "1", "!"]);
    }

    #[test]
    fn bigrams_run_over_the_title() {
        let found = Tokenizer::Bigrams.features("新华社");
        assert_eq!(found, [["新", "新华"], ["华", "华社"], ["社", "社"]]);
    }

    #[test]
    fn words_carry_tags_and_lose_stop_words() {
        let found = Tokenizer::Words.features(TITLE);
        let words: Vec<&str> = found.iter().map(|p| p[0].as_str()).collect();
        assert!(words.contains(&"北京") && words.contains(&"天安门"), "{words:?}");
        assert!(!words.contains(&"的") && !words.contains(&","), "{words:?}");
        let beijing = found.iter().find(|p| p[0] == "北京").unwrap();
        assert_eq!(beijing[1], "ns");
    }

    #[test]
    fn mixed_positions_name_the_word_they_lie_in() {
        let found = Tokenizer::Mixed.features(TITLE);
        let gate = found.iter().find(|p| p[0] == "安").unwrap();
        assert_eq!(gate[1..3], ["安门", "天安门"]);
        assert!(found.iter().all(|p| p.len() == 4));
    }

    #[test]
    fn a_title_of_stop_words_keeps_one_position() {
        assert_eq!(Tokenizer::Words.features("，的").len(), 1);
    }

    #[test]
    fn the_vocabulary_knows_only_frequent_training_features() {
        let titles = ["甲乙甲", "甲乙丙"];
        let vocabulary = Vocabulary::build(Tokenizer::Chars, titles.into_iter());
        assert_eq!(vocabulary.sizes(), [4]);
        assert_eq!(vocabulary.encode("甲乙丙丁").ids, [[2, 3, 1, 1]]);
    }

    #[test]
    fn a_batch_pads_to_its_longest_row() {
        let row = |ids: &[u32]| Encoded { ids: vec![ids.to_vec(), ids.iter().map(|id| id + 10).collect()] };
        let (a, b) = (row(&[5]), row(&[6, 7, 8]));
        let batch = Batch::new(&[(&a, 3), (&b, 1)]);
        assert_eq!(batch.ids[0], [5, 0, 0, 6, 7, 8]);
        assert_eq!(batch.ids[1], [15, 0, 0, 16, 17, 18]);
        assert_eq!((batch.rows, batch.len), (2, 3));
        assert_eq!((batch.lengths, batch.labels), (vec![1, 3], vec![3, 1]));
    }
}
