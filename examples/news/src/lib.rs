//! A Chinese news title classifier, trained for real on gradwire.
//!
//! Every worker process runs the same program: it takes its rows of each batch, computes the
//! gradients of a [`model`] with candle, and hands them to a [`home::Home`], which answers with
//! the new parameters. The library knows nothing else of where parameters live.
//!
//! - [`data`]: the titles, verified; the stratified split; folds.
//! - [`text`]: jieba words with tags and stop words, characters, bigrams; vocabulary; padding.
//! - [`order`], [`streams`]: which rows at which clock, and all random numbers.
//! - [`model`], [`tensors`]: a GPT-2-style decoder and an LSTM over declared tensors.
//! - [`train`], [`home`], [`progress`]: the loop and its seam.
//! - [`gradwire_home`], [`settings`]: the servers behind the seam, and what they must be told.
//! - [`bayes`], [`metrics`], [`record`], [`report`], [`plot`]: the baseline and the results.
//!
//! Invariant: what a worker does at a clock is a pure function of the configuration, its rank, the
//! clock and the parameters, so a job stopped at any clock can be taken up again there.

pub mod bayes;
pub mod cli;
pub mod data;
pub mod gradwire_home;
pub mod home;
pub mod metrics;
pub mod model;
pub mod order;
pub mod plot;
pub mod progress;
pub mod record;
pub mod report;
pub mod settings;
pub mod streams;
pub mod tensors;
pub mod text;
pub mod train;
