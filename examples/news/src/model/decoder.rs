//! A GPT-2-style decoder: pre-norm blocks of causal attention and GELU, learned positions, a
//! classification head on the pooled positions, and an optional next-token loss beside it.
//!
//! Invariant: a position sees itself and the positions before it only, and since padding comes
//! last no position that counts ever sees padding.

use super::layers::{Embedding, LayerNorm, Linear, Noise, Pooling, causal_mask, gelu, pool};
use super::{Net, Output, Weights};
use crate::tensors::{Declarations, Init, Slot, TensorDecl};
use crate::text::{Batch, MAX_LEN};
use anyhow::Result;
use candle_core::{Device, Tensor};

/// The decoder's shape.
#[derive(Clone, Debug)]
pub struct DecoderConfig {
    /// Size of each feature's vocabulary.
    pub vocabulary: Vec<usize>,
    /// Classes to tell apart.
    pub classes: usize,
    /// Width of every position.
    pub width: usize,
    /// Attention heads; divides the width.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// Width of a block's inner layer.
    pub inner: usize,
    /// Dropout on residual branches and before the head.
    pub dropout: f32,
    /// Chance that a whole input token is dropped.
    pub token_dropout: f32,
    /// What the head reads.
    pub pooling: Pooling,
    /// Weight of the next-token loss; 0 leaves it out.
    pub next_token: f64,
}

struct Block {
    attention_norm: LayerNorm,
    attention_in: Linear,
    attention_out: Linear,
    inner_norm: LayerNorm,
    inner_in: Linear,
    inner_out: Linear,
}

/// The model.
pub struct Decoder {
    config: DecoderConfig,
    decls: Vec<TensorDecl>,
    embedding: Embedding,
    positions: Slot,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl Decoder {
    /// Declares the tensors.
    pub fn new(config: DecoderConfig) -> Self {
        let mut decls = Declarations::default();
        let (width, inner) = (config.width, config.inner);
        let small = Init::Normal(0.02);
        // Residual branches start smaller the deeper the stack, so that its output keeps its size.
        let branch = Init::Normal(0.02 / (2.0 * config.layers as f32).sqrt());
        let embedding = Embedding::new(&mut decls, &config.vocabulary, width, 0.05);
        let positions = decls.matrix("positions", [MAX_LEN, width], small);
        let blocks = (0..config.layers).map(|at| {
            let mut linear =
                |part: &str, shape, init| Linear::new(&mut decls, &format!("block.{at}.{part}"), shape, init);
            let attention_in = linear("attention_in", (width, 3 * width), Init::Xavier);
            let attention_out = linear("attention_out", (width, width), branch);
            let inner_in = linear("inner_in", (width, inner), Init::Xavier);
            let inner_out = linear("inner_out", (inner, width), branch);
            let mut norm = |part: &str| LayerNorm::new(&mut decls, &format!("block.{at}.{part}"), width);
            Block {
                attention_norm: norm("attention_norm"),
                inner_norm: norm("inner_norm"),
                attention_in,
                attention_out,
                inner_in,
                inner_out,
            }
        });
        let blocks = blocks.collect();
        let norm = LayerNorm::new(&mut decls, "norm", width);
        let head = Linear::new(&mut decls, "head", (width, config.classes), small);
        Self { decls: decls.0, embedding, positions, blocks, norm, head, config }
    }

    /// (rows * len, width) in and out.
    fn attention(&self, block: &Block, w: &Weights, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (heads, size) = (self.config.heads, self.config.width / self.config.heads);
        let x = block.attention_norm.forward(w, x)?;
        let parts = block
            .attention_in
            .forward(w, &x)?
            .reshape((batch.rows, batch.len, 3, heads, size))?
            .permute((2, 0, 3, 1, 4))?
            .contiguous()?;
        let part = |at: usize| parts.get(at)?.flatten(0, 1);
        let (query, key, value) = (part(0)?, part(1)?, part(2)?);
        let scores = (query.matmul(&key.transpose(1, 2)?)? * (1.0 / (size as f64).sqrt()))?;
        let scores = scores.broadcast_add(&causal_mask(batch.len, x.dtype())?)?;
        let seen = candle_nn::ops::softmax(&scores, 2)?.matmul(&value)?;
        let joined = seen
            .reshape((batch.rows, heads, batch.len, size))?
            .transpose(1, 2)?
            .reshape((batch.rows * batch.len, heads * size))?;
        block.attention_out.forward(w, &joined)
    }

    fn inner(&self, block: &Block, w: &Weights, x: &Tensor) -> Result<Tensor> {
        let x = block.inner_norm.forward(w, x)?;
        let x = gelu(&block.inner_in.forward(w, &x)?)?;
        block.inner_out.forward(w, &x)
    }

    /// Cross-entropy of predicting each row's next first feature, from the tied embedding;
    /// averaged inside a row first, so that it is a mean over rows as the main loss is.
    fn next_token(&self, w: &Weights, x: &Tensor, batch: &Batch) -> Result<Option<Tensor>> {
        let (mut places, mut targets, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for (row, length) in batch.lengths.iter().enumerate() {
            for at in 1..*length {
                let place = (row * batch.len + at) as u32;
                places.push(place - 1);
                targets.push(batch.ids[0][place as usize]);
                shares.push(1.0 / ((length - 1) * batch.rows) as f32);
            }
        }
        if places.is_empty() {
            return Ok(None);
        }
        let count = places.len();
        let x = x.index_select(&Tensor::from_vec(places, count, &Device::Cpu)?, 0)?;
        let logits = x.matmul(&w.get(self.embedding.table(0)).t()?)?;
        let targets = Tensor::from_vec(targets, (count, 1), &Device::Cpu)?;
        let shares = Tensor::from_vec(shares, (count, 1), &Device::Cpu)?.to_dtype(x.dtype())?;
        let picked = candle_nn::ops::log_softmax(&logits, 1)?.gather(&targets, 1)?;
        let loss = (picked * shares)?.sum_all()?;
        Ok(Some((loss * -self.config.next_token)?))
    }
}

impl Net for Decoder {
    fn tensors(&self) -> &[TensorDecl] {
        &self.decls
    }

    fn forward(&self, w: &Weights, batch: &Batch, noise: &mut Noise) -> Result<Output> {
        let config = &self.config;
        let flat = (batch.rows * batch.len, config.width);
        let x = self.embedding.forward(w, batch)?;
        let x = noise.drop_rows(x, config.token_dropout)?;
        let positions = w.get(self.positions).narrow(0, 0, batch.len)?;
        let x = x.reshape((batch.rows, batch.len, config.width))?.broadcast_add(&positions)?.reshape(flat)?;
        let mut x = noise.drop(x, config.dropout)?;
        for block in &self.blocks {
            let branch = self.attention(block, w, &x, batch)?;
            x = (x + noise.drop(branch, config.dropout)?)?;
            let branch = self.inner(block, w, &x)?;
            x = (x + noise.drop(branch, config.dropout)?)?;
        }
        let x = self.norm.forward(w, &x)?;
        // Evaluation has no use for the next-token loss.
        let training = matches!(noise, Noise::On(_));
        let auxiliary = match training && config.next_token > 0.0 {
            true => self.next_token(w, &x, batch)?,
            false => None,
        };
        let x = x.reshape((batch.rows, batch.len, config.width))?;
        let pooled = noise.drop(pool(&x, batch, config.pooling)?, config.dropout)?;
        Ok(Output { logits: self.head.forward(w, &pooled)?, auxiliary })
    }
}
