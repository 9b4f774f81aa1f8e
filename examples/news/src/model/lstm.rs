//! Embedding, one LSTM layer, softmax: the classic text classifier.
//!
//! Invariant: a row's pooled state reads the steps before its padding only; steps after it are
//! computed with the batch and ignored.

use super::layers::{Embedding, Linear, Noise, Pooling, pool};
use super::{Net, Output, Weights};
use crate::tensors::{Declarations, Init, Slot, TensorDecl};
use crate::text::Batch;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_nn::ops::sigmoid;

/// The LSTM's shape.
#[derive(Clone, Debug)]
pub struct LstmConfig {
    /// Size of each feature's vocabulary.
    pub vocabulary: Vec<usize>,
    /// Classes to tell apart.
    pub classes: usize,
    /// Width of the embedding.
    pub width: usize,
    /// Width of the state.
    pub hidden: usize,
    /// Dropout on the embedding and before the head.
    pub dropout: f32,
    /// Chance that a whole input token is dropped.
    pub token_dropout: f32,
    /// What the head reads.
    pub pooling: Pooling,
}

/// The model.
pub struct Lstm {
    config: LstmConfig,
    decls: Vec<TensorDecl>,
    embedding: Embedding,
    input: Linear,
    recurrent: Slot,
    head: Linear,
}

impl Lstm {
    /// Declares the tensors.
    pub fn new(config: LstmConfig) -> Self {
        let mut decls = Declarations::default();
        let embedding = Embedding::new(&mut decls, &config.vocabulary, config.width, 0.1);
        let gates = 4 * config.hidden;
        let input = Linear::new(&mut decls, "input", (config.width, gates), Init::Xavier);
        let recurrent = decls.matrix("recurrent", [config.hidden, gates], Init::Xavier);
        let head = Linear::new(&mut decls, "head", (config.hidden, config.classes), Init::Xavier);
        Self { decls: decls.0, embedding, input, recurrent, head, config }
    }

    /// The states of all steps, (rows, len, hidden), from the gates' input shares.
    fn unroll(&self, w: &Weights, inputs: &Tensor, batch: &Batch) -> Result<Tensor> {
        let hidden = self.config.hidden;
        let recurrent = w.get(self.recurrent);
        let shape = (batch.rows, hidden);
        let mut state = Tensor::zeros(shape, inputs.dtype(), &Device::Cpu)?;
        let mut cell = state.clone();
        let mut states = Vec::with_capacity(batch.len);
        for step in 0..batch.len {
            let gates = inputs.narrow(0, step, 1)?.squeeze(0)?;
            let gates = (gates + state.matmul(recurrent)?)?;
            let gate = |at: usize| gates.narrow(1, at * hidden, hidden);
            let (admit, emit) = (sigmoid(&gate(0)?)?, sigmoid(&gate(2)?)?);
            // The forget gate starts open: its bias is one more than the parameter.
            let keep = sigmoid(&(gate(1)? + 1.0)?)?;
            cell = ((keep * cell)? + (admit * gate(3)?.tanh()?)?)?;
            state = (emit * cell.tanh()?)?;
            states.push(state.clone());
        }
        Ok(Tensor::stack(&states, 1)?)
    }
}

impl Net for Lstm {
    fn tensors(&self) -> &[TensorDecl] {
        &self.decls
    }

    fn forward(&self, w: &Weights, batch: &Batch, noise: &mut Noise) -> Result<Output> {
        let config = &self.config;
        let x = self.embedding.forward(w, batch)?;
        let x = noise.drop_rows(x, config.token_dropout)?;
        let x = noise.drop(x, config.dropout)?;
        // One product for the inputs of all steps; then time goes first, to cut steps off cheaply.
        let inputs = self
            .input
            .forward(w, &x)?
            .reshape((batch.rows, batch.len, 4 * config.hidden))?
            .transpose(0, 1)?
            .contiguous()?;
        let states = self.unroll(w, &inputs, batch)?;
        let pooled = noise.drop(pool(&states, batch, config.pooling)?, config.dropout)?;
        Ok(Output { logits: self.head.forward(w, &pooled)?, auxiliary: None })
    }
}
