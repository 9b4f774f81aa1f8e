//! The command line: every option of a training run, with the tuned defaults of each model.
//!
//! Invariant: an option left out takes the model's default, so `news train --model M --seed S`
//! names a run completely.

use crate::home::Rule;
use crate::model::Pooling;
use crate::order::Sharding;
use crate::text::Tokenizer;
use crate::train::{Model, TrainConfig};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Classifies Chinese news titles with parameters kept by gradwire's servers.
///
/// A first session, from the repository's root:
///
///   scripts/fetch-news
///   gradwire run --config examples/news/decoder.toml --seed 1 -- news train --model decoder
///   gradwire run --config examples/news/lstm.toml --seed 1 -- news train --model lstm
///   news bayes --seed 1
///   news report
///
/// Each training run writes OUT/MODEL-SEED.json; the report gathers them. The servers take the
/// optimizer from the job's settings: for options other than the tuned ones, or for another number
/// of workers, `news settings` prints them.
#[derive(Debug, Parser)]
#[command(name = "news", version, verbatim_doc_comment)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train one model with one seed as a worker of a job, and score it after every pass.
    Train(Box<Train>),
    /// Print the job's settings (TOML) for these options of `train`.
    Settings(Box<Settings>),
    /// Score the baseline: naive Bayes on jieba words, trained on the same rows.
    Bayes(Bayes),
    /// Gather the runs in a directory: table, confusion matrices, summary.json, curves.svg.
    Report(Report),
}

/// Where titles come from and results go.
#[derive(Clone, Debug, Args)]
pub struct Places {
    /// Directory of the titles, filled by scripts/fetch-news.
    #[arg(long, default_value = "target/news/data")]
    pub data: PathBuf,
    /// Directory of the results.
    #[arg(long, default_value = "target/news")]
    pub out: PathBuf,
}

/// Options of `news bayes`.
#[derive(Debug, Args)]
pub struct Bayes {
    /// Directories.
    #[command(flatten)]
    pub places: Places,
    /// Names the result's file; naive Bayes itself draws nothing.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Options of `news report`.
#[derive(Debug, Args)]
pub struct Report {
    /// Directory of the results.
    #[arg(long, default_value = "target/news")]
    pub out: PathBuf,
}

/// The optimizer, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    Adamw,
    /// Gradient descent with momentum 0.9.
    Momentum,
    /// Plain gradient descent.
    Sgd,
}

/// Options of `news train`.
#[derive(Debug, Args)]
pub struct Train {
    /// Directories.
    #[command(flatten)]
    pub places: Places,
    /// The classifier to train.
    #[arg(long, value_enum)]
    pub model: Model,
    /// Seed of the starting parameters, the data order and dropout [default: the job's; 1 with
    /// --local]. The split never changes.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Passes over the training rows.
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Rows each worker takes at each clock.
    #[arg(long)]
    pub batch: Option<usize>,
    /// How titles become positions.
    #[arg(long, value_enum)]
    pub tokenizer: Option<Tokenizer>,
    /// How rows are divided among the workers.
    #[arg(long, value_enum, default_value = "shuffled")]
    pub sharding: Sharding,
    /// Hold out a K-th of all rows, instead of the fixed split: --fold says which. With --local and
    /// without --fold, train K times, each time holding out another one.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(2..))]
    pub folds: Option<u16>,
    /// The fold to hold out, from 1.
    #[arg(long, value_name = "I", requires = "folds", value_parser = clap::value_parser!(u16).range(1..))]
    pub fold: Option<u16>,
    /// Compute threads of each worker process.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Keep the parameters in this process instead of on servers; for one worker, for trying out.
    #[arg(long)]
    pub local: bool,
    /// Shape and optimization.
    #[command(flatten)]
    pub tuning: Tuning,
}

/// Options of `news settings`.
#[derive(Debug, Args)]
pub struct Settings {
    /// Workers of the job.
    #[arg(short = 'n', long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: u16,
    /// Servers of the job.
    #[arg(short, long, default_value_t = 2)]
    pub servers: u16,
    /// The training run.
    #[command(flatten)]
    pub train: Train,
}

/// What is usually left alone.
#[derive(Debug, Args)]
#[command(next_help_heading = "Tuning (the defaults differ by model)")]
pub struct Tuning {
    /// Width of embeddings and positions.
    #[arg(long)]
    pub width: Option<usize>,
    /// Width of the LSTM's state, or of a decoder block's inner layer.
    #[arg(long)]
    pub hidden: Option<usize>,
    /// Decoder blocks.
    #[arg(long)]
    pub layers: Option<usize>,
    /// Attention heads.
    #[arg(long)]
    pub heads: Option<usize>,
    /// Dropout of activations.
    #[arg(long)]
    pub dropout: Option<f32>,
    /// Dropout of whole input tokens.
    #[arg(long)]
    pub token_dropout: Option<f32>,
    /// What the classification head reads.
    #[arg(long, value_enum)]
    pub pooling: Option<Pooling>,
    /// Weight of the decoder's auxiliary next-token loss.
    #[arg(long)]
    pub next_token: Option<f64>,
    /// Label smoothing.
    #[arg(long)]
    pub smoothing: Option<f64>,
    /// The optimizer that the servers run.
    #[arg(long, value_enum, default_value = "adamw")]
    pub optimizer: Optimizer,
    /// Base learning rate.
    #[arg(long)]
    pub lr: Option<f64>,
    /// Decoupled weight decay of matrices.
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Share of the clocks to warm up in, before the cosine; negative keeps the rate constant.
    #[arg(long, allow_negative_numbers = true)]
    pub warmup: Option<f64>,
}

impl Train {
    /// The run these options name.
    pub fn config(&self) -> TrainConfig {
        let (defaults, tuning) = (defaults(self.model), &self.tuning);
        TrainConfig {
            model: self.model,
            seed: self.seed.unwrap_or(defaults.seed),
            tokenizer: self.tokenizer.unwrap_or(defaults.tokenizer),
            epochs: self.epochs.unwrap_or(defaults.epochs),
            batch: self.batch.unwrap_or(defaults.batch),
            sharding: self.sharding,
            width: tuning.width.unwrap_or(defaults.width),
            hidden: tuning.hidden.unwrap_or(defaults.hidden),
            layers: tuning.layers.unwrap_or(defaults.layers),
            heads: tuning.heads.unwrap_or(defaults.heads),
            dropout: tuning.dropout.unwrap_or(defaults.dropout),
            token_dropout: tuning.token_dropout.unwrap_or(defaults.token_dropout),
            pooling: tuning.pooling.unwrap_or(defaults.pooling),
            next_token: tuning.next_token.unwrap_or(defaults.next_token),
            smoothing: tuning.smoothing.unwrap_or(defaults.smoothing),
            rule: match tuning.optimizer {
                Optimizer::Adamw => defaults.rule,
                Optimizer::Momentum => Rule::Momentum(0.9),
                Optimizer::Sgd => Rule::Sgd,
            },
            learning_rate: tuning.lr.unwrap_or(defaults.learning_rate),
            weight_decay: tuning.weight_decay.unwrap_or(defaults.weight_decay),
            warmup: tuning.warmup.unwrap_or(defaults.warmup),
        }
    }
}

/// The tuned run of a model.
pub fn defaults(model: Model) -> TrainConfig {
    let decoder = TrainConfig {
        model: Model::Decoder,
        seed: 1,
        tokenizer: Tokenizer::Bigrams,
        epochs: 8,
        batch: 32,
        sharding: Sharding::Shuffled,
        width: 128,
        hidden: 256,
        layers: 2,
        heads: 4,
        dropout: 0.3,
        token_dropout: 0.3,
        pooling: Pooling::Mean,
        next_token: 0.0,
        smoothing: 0.1,
        rule: Rule::AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8 },
        learning_rate: 1e-3,
        weight_decay: 0.1,
        warmup: 0.1,
    };
    match model {
        Model::Decoder => decoder,
        Model::Lstm => TrainConfig {
            model: Model::Lstm,
            hidden: 128,
            dropout: 0.4,
            token_dropout: 0.2,
            pooling: Pooling::Last,
            learning_rate: 2e-3,
            ..decoder
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_option_replaces_the_models_default_and_nothing_else() {
        let parse = |line: &str| match Cli::parse_from(line.split(' ')).command {
            Command::Train(train) => train.config(),
            other => panic!("{other:?} is not training"),
        };
        let plain = parse("news train --model lstm");
        assert_eq!(format!("{plain:?}"), format!("{:?}", defaults(Model::Lstm)));
        let changed = parse("news train --model lstm --seed 3 --lr 0.5 --optimizer sgd");
        assert_eq!((changed.seed, changed.learning_rate), (3, 0.5));
        assert_eq!((changed.rule, changed.epochs), (Rule::Sgd, plain.epochs));
    }
}
