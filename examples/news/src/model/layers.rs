//! The pieces both models are made of.
//!
//! Invariant: every operation here has a backward pass. Some of candle's fused operations
//! (its layer norm module, softmax over the last dimension) have none and drop the gradient
//! without a word, so they are not used.

use super::Weights;
use crate::tensors::{Declarations, Init, Slot};
use crate::text::Batch;
use anyhow::Result;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape, Tensor};
use rand::RngCore;
use rand_chacha::ChaCha8Rng;

/// Dropout's random numbers.
pub enum Noise {
    /// No dropout: evaluation.
    Off,
    /// Dropout drawn from this stream.
    On(Box<ChaCha8Rng>),
}

impl Noise {
    /// Zeroes elements with the given probability and scales the others up.
    pub fn drop(&mut self, x: Tensor, probability: f32) -> Result<Tensor> {
        match self.mask(x.elem_count(), probability) {
            None => Ok(x),
            Some(mask) => {
                let mask = Tensor::from_vec(mask, x.shape(), &Device::Cpu)?;
                Ok((&x * mask.to_dtype(x.dtype())?)?)
            }
        }
    }

    /// Zeroes whole rows of the last dimension: a dropped token loses all of its features.
    pub fn drop_rows(&mut self, x: Tensor, probability: f32) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        match self.mask(rows, probability) {
            None => Ok(x),
            Some(mask) => {
                let mask: Vec<f32> = mask.into_iter().flat_map(|keep| std::iter::repeat_n(keep, width)).collect();
                let mask = Tensor::from_vec(mask, x.shape(), &Device::Cpu)?;
                Ok((&x * mask.to_dtype(x.dtype())?)?)
            }
        }
    }

    fn mask(&mut self, elements: usize, probability: f32) -> Option<Vec<f32>> {
        let Self::On(rng) = self else { return None };
        if probability <= 0.0 {
            return None;
        }
        // Sixteen bits decide an element: finer odds than 1 in 65,536 do not matter here.
        let threshold = (probability * 65_536.0) as u16;
        let scale = 1.0 / (1.0 - f32::from(threshold) / 65_536.0);
        let mut bytes = vec![0u8; elements * 2];
        rng.fill_bytes(&mut bytes);
        let keep = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) >= threshold;
        let draw = |pair| if keep(pair) { scale } else { 0.0 };
        Some(bytes.chunks_exact(2).map(draw).collect())
    }
}

/// x W + b over two-dimensional x.
pub struct Linear {
    weight: Slot,
    bias: Slot,
}

impl Linear {
    /// Declares the weight and a zero bias.
    pub fn new(decls: &mut Declarations, name: &str, (inputs, outputs): (usize, usize), init: Init) -> Self {
        Self {
            weight: decls.matrix(&format!("{name}.weight"), [inputs, outputs], init),
            bias: decls.vector(&format!("{name}.bias"), outputs, Init::Zeros),
        }
    }

    /// Applies it.
    pub fn forward(&self, weights: &Weights, x: &Tensor) -> Result<Tensor> {
        let product = x.matmul(weights.get(self.weight))?;
        Ok(product.broadcast_add(weights.get(self.bias))?)
    }
}

/// Normalises the last dimension.
pub struct LayerNorm {
    gain: Slot,
    bias: Slot,
}

impl LayerNorm {
    /// Declares gain one and bias zero.
    pub fn new(decls: &mut Declarations, name: &str, width: usize) -> Self {
        Self {
            gain: decls.vector(&format!("{name}.gain"), width, Init::Constant(1.0)),
            bias: decls.vector(&format!("{name}.bias"), width, Init::Zeros),
        }
    }

    /// Applies it.
    pub fn forward(&self, weights: &Weights, x: &Tensor) -> Result<Tensor> {
        let (gain, bias) = (weights.get(self.gain), weights.get(self.bias));
        Ok(candle_nn::ops::layer_norm_slow(x, gain, bias, 1e-5)?)
    }
}

/// One embedding table a feature; a position's vector is the sum of its features' vectors.
pub struct Embedding {
    tables: Vec<Slot>,
}

impl Embedding {
    /// Declares the tables.
    pub fn new(decls: &mut Declarations, sizes: &[usize], width: usize, std: f32) -> Self {
        let tables = sizes
            .iter()
            .enumerate()
            .map(|(feature, size)| decls.matrix(&format!("embedding.{feature}"), [*size, width], Init::Normal(std)));
        Self { tables: tables.collect() }
    }

    /// The table of a feature.
    pub fn table(&self, feature: usize) -> Slot {
        self.tables[feature]
    }

    /// (rows * len, width).
    pub fn forward(&self, weights: &Weights, batch: &Batch) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (table, ids) in self.tables.iter().zip(&batch.ids) {
            let ids = Tensor::from_slice(ids, ids.len(), &Device::Cpu)?;
            let found = weights.get(*table).index_select(&ids, 0)?;
            sum = Some(match sum {
                None => found,
                Some(sum) => (sum + found)?,
            });
        }
        sum.ok_or_else(|| anyhow::anyhow!("a model needs at least one feature"))
    }
}

/// What the classifier reads of a row's positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pooling {
    /// The last position.
    Last,
    /// The mean of all positions.
    Mean,
}

/// (rows, len, width) to (rows, width), never looking at padding.
pub fn pool(x: &Tensor, batch: &Batch, pooling: Pooling) -> Result<Tensor> {
    let mut shares = vec![0f32; batch.rows * batch.len];
    for (row, length) in batch.lengths.iter().enumerate() {
        let row = &mut shares[row * batch.len..][..*length];
        match pooling {
            Pooling::Last => row[length - 1] = 1.0,
            Pooling::Mean => row.fill(1.0 / *length as f32),
        }
    }
    let shape = (batch.rows, 1, batch.len);
    let shares = Tensor::from_vec(shares, shape, &Device::Cpu)?.to_dtype(x.dtype())?;
    Ok(shares.matmul(x)?.squeeze(1)?)
}

/// GELU in its tanh form, forward and backward in one pass each: composed of candle's own
/// operations it was the costliest part of a training step.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1(Gelu)?)
}

struct Gelu;
struct GeluGradient;

/// 2 sqrt(2 / pi): half of 1 + tanh(u) is the logistic function of 2 u.
const SCALE: f64 = 1.595_769_121_605_730_8;
const CUBE: f64 = 0.044_715;

macro_rules! gelu_kernels {
    ($value:ident, $slope:ident, $float:ty) => {
        fn $value(x: $float) -> $float {
            let inner = SCALE as $float * x * (1.0 + CUBE as $float * x * x);
            x / (1.0 + (-inner).exp())
        }

        fn $slope(x: $float, gradient: $float) -> $float {
            let (scale, cube) = (SCALE as $float, CUBE as $float);
            let inner = scale * x * (1.0 + cube * x * x);
            let gate = 1.0 / (1.0 + (-inner).exp());
            let inner_slope = scale * (1.0 + 3.0 * cube * x * x);
            gradient * gate * (1.0 + x * (1.0 - gate) * inner_slope)
        }
    };
}

gelu_kernels!(gelu_f32, gelu_slope_f32, f32);
gelu_kernels!(gelu_f64, gelu_slope_f64, f64);

fn dense<'a, T>(values: &'a [T], layout: &Layout) -> candle_core::Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&values[from..to]),
        None => candle_core::bail!("gelu wants a contiguous tensor"),
    }
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(dense(x, layout)?.iter().map(|x| gelu_f32(*x)).collect()),
            CpuStorage::F64(x) => CpuStorage::F64(dense(x, layout)?.iter().map(|x| gelu_f64(*x)).collect()),
            _ => candle_core::bail!("gelu wants f32 or f64"),
        };
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        x.apply_op2_no_bwd(&gradient, &GeluGradient).map(Some)
    }
}

impl CustomOp2 for GeluGradient {
    fn name(&self) -> &'static str {
        "gelu-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match (x, gradient) {
            (CpuStorage::F32(x), CpuStorage::F32(g)) => {
                let pairs = dense(x, x_layout)?.iter().zip(dense(g, layout)?);
                CpuStorage::F32(pairs.map(|(x, g)| gelu_slope_f32(*x, *g)).collect())
            }
            (CpuStorage::F64(x), CpuStorage::F64(g)) => {
                let pairs = dense(x, x_layout)?.iter().zip(dense(g, layout)?);
                CpuStorage::F64(pairs.map(|(x, g)| gelu_slope_f64(*x, *g)).collect())
            }
            _ => candle_core::bail!("gelu wants f32 or f64, both of one type"),
        };
        Ok((out, layout.shape().clone()))
    }
}

/// Adds -inf-like values above the diagonal: position i sees positions 0..=i.
pub fn causal_mask(len: usize, dtype: DType) -> Result<Tensor> {
    let mask: Vec<f32> = (0..len * len).map(|at| if at % len > at / len { -1e9 } else { 0.0 }).collect();
    Ok(Tensor::from_vec(mask, (len, len), &Device::Cpu)?.to_dtype(dtype)?)
}
