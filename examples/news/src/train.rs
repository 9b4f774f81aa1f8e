//! The training loop: batches in, gradients out, parameters back, and a score after every pass.
//!
//! Invariant: a step is a pure function of (configuration, rank, clock, parameters). The loop keeps
//! no state that a resumed run would lack: the batch, the dropout and the learning rate all follow
//! from the clock.

use crate::data::{LABELS, Split, Title};
use crate::home::{Home, Hyper, OpenHome, Opened, Rule, Schedule};
use crate::metrics::{Confusion, Scores};
use crate::model::{Decoder, DecoderConfig, Lstm, LstmConfig, Net, Noise, Pooling, Weights, classify, gradients};
use crate::order::{Order, Sharding};
use crate::progress::Progress;
use crate::streams::stream;
use crate::text::{Batch, Encoded, Tokenizer, Vocabulary};
use anyhow::{Result, ensure};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Which classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Model {
    /// GPT-2-style decoder.
    Decoder,
    /// Embedding, LSTM, softmax.
    Lstm,
}

impl Model {
    /// The name used in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decoder => "decoder",
            Self::Lstm => "lstm",
        }
    }
}

/// Everything that decides a training run.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Which classifier.
    pub model: Model,
    /// Seed of parameters, order and dropout.
    pub seed: u64,
    /// How titles become positions.
    pub tokenizer: Tokenizer,
    /// Passes over the training rows.
    pub epochs: usize,
    /// Rows a worker takes each clock.
    pub batch: usize,
    /// How rows are divided among workers.
    pub sharding: Sharding,
    /// Width of embeddings and positions.
    pub width: usize,
    /// Width of the LSTM's state, or of a decoder block's inner layer.
    pub hidden: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Dropout of activations.
    pub dropout: f32,
    /// Dropout of whole input tokens.
    pub token_dropout: f32,
    /// What the head reads.
    pub pooling: Pooling,
    /// Weight of the decoder's next-token loss.
    pub next_token: f64,
    /// Label smoothing.
    pub smoothing: f64,
    /// The optimizer.
    pub rule: Rule,
    /// Base learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Share of the clocks spent warming up; the rest follows a cosine. Negative: constant rate.
    pub warmup: f64,
}

impl TrainConfig {
    /// What a home applies, for a run of `clocks`.
    pub fn hyper(&self, clocks: u64) -> Hyper {
        let schedule = match self.warmup {
            share if share < 0.0 => Schedule::Constant,
            share => Schedule::WarmupCosine { warmup: (clocks as f64 * share) as u64, total: clocks },
        };
        Hyper {
            seed: self.seed,
            rule: self.rule,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            schedule,
        }
    }

    /// The classifier for a vocabulary.
    pub fn net(&self, vocabulary: Vec<usize>) -> Box<dyn Net> {
        let (classes, pooling) = (LABELS.len(), self.pooling);
        let (dropout, token_dropout) = (self.dropout, self.token_dropout);
        match self.model {
            Model::Decoder => Box::new(Decoder::new(DecoderConfig {
                vocabulary,
                classes,
                width: self.width,
                heads: self.heads,
                layers: self.layers,
                inner: self.hidden,
                dropout,
                token_dropout,
                pooling,
                next_token: self.next_token,
            })),
            Model::Lstm => Box::new(Lstm::new(LstmConfig {
                vocabulary,
                classes,
                width: self.width,
                hidden: self.hidden,
                dropout,
                token_dropout,
                pooling,
            })),
        }
    }
}

/// One pass over the training rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its number, from 1; a resumed run has no entry for the passes before it.
    pub epoch: usize,
    /// Mean training loss of this worker's batches.
    pub loss: f64,
    /// On the held-out rows after the pass.
    #[serde(flatten)]
    pub scores: Scores,
}

/// What a training run leaves behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One entry a pass; empty on every rank but 0.
    pub epochs: Vec<Epoch>,
    /// After the last pass; empty on every rank but 0.
    pub confusion: Confusion,
    /// Training loss of this worker's batch at every clock that it ran.
    pub losses: Vec<f32>,
    /// Wall-clock seconds of the training steps, evaluation left out.
    pub train_s: f64,
    /// How many of them went by in handing over gradients and waiting for parameters.
    pub wait_s: f64,
    /// Clocks run in all.
    pub clocks: u64,
    /// Elements of all tensors.
    pub parameters: usize,
    /// This worker.
    pub rank: usize,
    /// Worker processes.
    pub workers: usize,
}

type Rows = Vec<(Encoded, usize)>;

/// Trains on one side of a split and scores on the other.
pub fn train(
    config: &TrainConfig,
    titles: &[Title],
    split: &Split,
    workers: usize,
    open: &mut OpenHome,
) -> Result<Outcome> {
    let training = split.train.iter().map(|row| titles[*row].text.as_str());
    let vocabulary = Vocabulary::build(config.tokenizer, training);
    let encode = |rows: &[usize]| -> Rows {
        let rows = rows.iter().map(|row| &titles[*row]);
        rows.map(|t| (vocabulary.encode(&t.text), t.label)).collect()
    };
    let (rows, held_out) = (encode(&split.train), encode(&split.held_out));
    let net = config.net(vocabulary.sizes());
    // The schedule needs the number of clocks before a home, and with it the rank, exists.
    let order = |rank| {
        let place = (rank, workers);
        Order::new(rows.len(), config.seed, place, config.batch, config.sharding)
    };
    let clocks = order(0).clocks(config.epochs);
    let opened = open(net.tensors(), &config.hyper(clocks))?;
    let (rank, found) = (opened.home.rank(), opened.home.workers());
    ensure!(found == workers, "{workers} workers planned, {found} there");
    let mut run = Run {
        config,
        net: net.as_ref(),
        rows: &rows,
        held_out: &held_out,
        order: order(rank),
        progress: Progress::new(config.model.name(), clocks, rank),
    };
    let outcome = run.all(opened, clocks);
    run.progress.finish();
    outcome
}

struct Run<'a> {
    config: &'a TrainConfig,
    net: &'a dyn Net,
    rows: &'a Rows,
    held_out: &'a Rows,
    order: Order,
    progress: Progress,
}

impl Run<'_> {
    fn all(&mut self, opened: Opened, clocks: u64) -> Result<Outcome> {
        let Opened { mut home, mut parameters, clock: first } = opened;
        ensure!(
            first < clocks,
            "nothing is left to train: the job continues at clock {first}, and the run has {clocks}"
        );
        let (rank, workers) = (home.rank(), home.workers());
        let mut outcome = Outcome {
            epochs: Vec::new(),
            confusion: Confusion::new(LABELS.len()),
            losses: Vec::new(),
            train_s: 0.0,
            wait_s: 0.0,
            clocks,
            parameters: self.net.tensors().iter().map(|t| t.elements()).sum(),
            rank,
            workers,
        };
        let (mut started, mut pass) = (Instant::now(), 0);
        for clock in first..clocks {
            let (loss, waited) = self.step(home.as_mut(), &mut parameters, clock)?;
            outcome.losses.push(loss);
            outcome.wait_s += waited.as_secs_f64();
            self.progress.step(clock, loss);
            let epoch = self.ends_epoch(clock);
            if let Some(epoch) = epoch {
                let took = started.elapsed();
                outcome.train_s += took.as_secs_f64();
                let losses = &outcome.losses[pass..];
                let loss = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len() as f64;
                pass = outcome.losses.len();
                if rank == 0 {
                    outcome.confusion = self.evaluate(&parameters)?;
                    let scores = outcome.confusion.scores();
                    let epochs = self.config.epochs;
                    self.progress.epoch(epoch, epochs, loss, &scores, took);
                    outcome.epochs.push(Epoch { epoch, loss, scores });
                }
                started = Instant::now();
            }
        }
        home.finish()?;
        Ok(outcome)
    }

    /// The number of the pass that `clock` completes, if it does.
    fn ends_epoch(&self, clock: u64) -> Option<usize> {
        (1..=self.config.epochs).find(|epoch| self.order.clocks(*epoch) == clock + 1)
    }

    /// One clock; its loss, and the time that the parameters were on their way.
    fn step(&mut self, home: &mut dyn Home, parameters: &mut [Vec<f32>], clock: u64) -> Result<(f32, Duration)> {
        let taken = self.order.batch(clock);
        let rows: Vec<_> = taken.iter().map(|at| &self.rows[*at]).collect();
        let rows: Vec<_> = rows.iter().map(|(row, label)| (row, *label)).collect();
        let batch = Batch::new(&rows);
        let numbers = [self.config.seed, home.rank() as u64, clock];
        let mut noise = Noise::On(Box::new(stream("dropout", &numbers)));
        let weights = Weights::new(self.net.tensors(), parameters, DType::F32)?;
        let smoothing = self.config.smoothing;
        let (loss, mut gradients) = gradients(self.net, &weights, &batch, &mut noise, smoothing)?;
        ensure!(loss.is_finite(), "the loss is {loss} at clock {clock}");
        let started = Instant::now();
        // The servers work through the chunks from the last tensor to the first.
        for tensor in (0..self.net.tensors().len()).rev() {
            if let Some(gradient) = gradients.take(tensor)? {
                home.push(tensor, gradient)?;
            }
        }
        home.wait(parameters)?;
        Ok((loss, started.elapsed()))
    }

    fn evaluate(&self, parameters: &[Vec<f32>]) -> Result<Confusion> {
        let weights = Weights::new(self.net.tensors(), parameters, DType::F32)?;
        let mut confusion = Confusion::new(LABELS.len());
        for rows in self.held_out.chunks(100) {
            let rows: Vec<_> = rows.iter().map(|(row, label)| (row, *label)).collect();
            let said = classify(self.net, &weights, &Batch::new(&rows))?;
            for ((_, truth), said) in rows.iter().zip(said) {
                confusion.add(*truth, said);
            }
        }
        Ok(confusion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::defaults;
    use crate::home::LocalHome;
    use crate::tensors::TensorDecl;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Titles whose class shows in their characters, at a place that varies.
    fn titles() -> Vec<Title> {
        let title = |row: usize| {
            let sign = ["球赛", "股市", "楼盘"][row % 3];
            let filler: String = "天地玄黄宇宙洪荒".chars().cycle().skip(row % 8).take(row % 5).collect();
            Title { label: row % 3, text: format!("{filler}{sign}{filler}") }
        };
        (0..90).map(title).collect()
    }

    fn config(model: Model) -> TrainConfig {
        let small = defaults(model);
        TrainConfig {
            epochs: 6,
            dropout: 0.1,
            token_dropout: 0.0,
            batch: 8,
            width: 16,
            hidden: 16,
            warmup: -1.0,
            learning_rate: 1e-2,
            ..small
        }
    }

    fn split() -> Split {
        Split { train: (0..60).collect(), held_out: (60..90).collect() }
    }

    type Log = Rc<RefCell<Vec<Vec<Vec<f32>>>>>;

    /// Keeps the parameters of every clock.
    struct Logged(Box<dyn Home>, Log);

    impl Home for Logged {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn workers(&self) -> usize {
            self.0.workers()
        }

        fn push(&mut self, tensor: usize, gradient: Vec<f32>) -> Result<()> {
            self.0.push(tensor, gradient)
        }

        fn wait(&mut self, parameters: &mut [Vec<f32>]) -> Result<()> {
            self.0.wait(parameters)?;
            self.1.borrow_mut().push(parameters.to_vec());
            Ok(())
        }

        fn finish(self: Box<Self>) -> Result<()> {
            self.0.finish()
        }
    }

    /// Runs from a clock with given parameters; returns the parameters after every clock.
    fn logged(config: &TrainConfig, resume: Option<(u64, Vec<Vec<f32>>)>) -> (Outcome, Vec<Vec<Vec<f32>>>) {
        let log = Log::default();
        let mut open = |tensors: &[TensorDecl], hyper: &Hyper| {
            let mut opened = LocalHome::open(tensors, hyper);
            if let Some((clock, parameters)) = resume.clone() {
                opened.clock = clock;
                opened.parameters = parameters;
            }
            opened.home = Box::new(Logged(opened.home, log.clone()));
            Ok(opened)
        };
        let outcome = train(config, &titles(), &split(), 1, &mut open).unwrap();
        (outcome, log.take())
    }

    #[test]
    fn both_models_learn_what_can_be_learned() {
        for model in [Model::Decoder, Model::Lstm] {
            let (outcome, log) = logged(&config(model), None);
            assert_eq!(log.len() as u64, outcome.clocks);
            let numbers: Vec<usize> = outcome.epochs.iter().map(|epoch| epoch.epoch).collect();
            assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
            assert!(outcome.epochs[5].loss < outcome.epochs[0].loss);
            let scores = outcome.confusion.scores();
            assert!(scores.accuracy > 0.9, "{model:?}: {scores:?}");
        }
    }

    #[test]
    fn a_resumed_run_continues_identically() {
        for model in [Model::Decoder, Model::Lstm] {
            // Plain descent keeps nothing between steps, so a fresh home can take over.
            let config = TrainConfig { rule: Rule::Sgd, epochs: 2, ..config(model) };
            let (_, whole) = logged(&config, None);
            let (_, tail) = logged(&config, Some((6, whole[5].clone())));
            assert_eq!(whole[6..], tail[..], "{model:?}");
            let (_, other) = logged(&TrainConfig { seed: 2, ..config }, Some((6, whole[5].clone())));
            assert_ne!(tail, other, "{model:?}");
        }
    }

    #[test]
    fn a_plan_for_other_workers_than_there_are_is_refused() {
        let mut open = |tensors: &[TensorDecl], hyper: &Hyper| Ok(LocalHome::open(tensors, hyper));
        let error = train(&config(Model::Lstm), &titles(), &split(), 2, &mut open).unwrap_err();
        assert!(error.to_string().contains("2 workers planned"), "{error}");
    }
}
