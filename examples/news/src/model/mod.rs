//! The two classifiers, as pure functions of named parameters and a batch.
//!
//! Invariant: a model holds no parameter. It declares tensors in a fixed order, and computes
//! logits from whatever [`Weights`] it is given; a row's logits do not depend on the rows or on
//! the padding beside it.

mod decoder;
mod layers;
mod lstm;

pub use decoder::{Decoder, DecoderConfig};
pub use layers::{Noise, Pooling};
pub use lstm::{Lstm, LstmConfig};

use crate::tensors::{Slot, TensorDecl};
use crate::text::Batch;
use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

/// What a model makes of a batch.
pub struct Output {
    /// (rows, classes), before softmax.
    pub logits: Tensor,
    /// An auxiliary loss, already weighted, averaged over the rows.
    pub auxiliary: Option<Tensor>,
}

/// A classifier.
pub trait Net {
    /// The parameters, in their fixed order.
    fn tensors(&self) -> &[TensorDecl];
    /// The logits of a batch; `noise` decides whether dropout applies.
    fn forward(&self, weights: &Weights, batch: &Batch, noise: &mut Noise) -> Result<Output>;
}

/// The values of a model's tensors, as candle variables.
pub struct Weights(Vec<Var>);

impl Weights {
    /// Copies the values in.
    pub fn new(decls: &[TensorDecl], values: &[Vec<f32>], dtype: DType) -> Result<Self> {
        let variables = decls.iter().zip(values).map(|(decl, values)| {
            let tensor = Tensor::from_slice(values, decl.shape.as_slice(), &Device::Cpu)?;
            Ok(Var::from_tensor(&tensor.to_dtype(dtype)?)?)
        });
        Ok(Self(variables.collect::<Result<_>>()?))
    }

    /// The tensor in a slot.
    pub fn get(&self, slot: Slot) -> &Tensor {
        self.0[slot.0].as_tensor()
    }

    /// All variables, in declaration order.
    pub fn variables(&self) -> &[Var] {
        &self.0
    }
}

/// Mean cross-entropy of the logits against the batch's labels, smoothed towards uniform.
pub fn cross_entropy(logits: &Tensor, labels: &[u32], smoothing: f64) -> Result<Tensor> {
    let log_probabilities = candle_nn::ops::log_softmax(logits, 1)?;
    let labels = Tensor::from_slice(labels, (labels.len(), 1), &Device::Cpu)?;
    let hard = log_probabilities.gather(&labels, 1)?.mean_all()?;
    if smoothing == 0.0 {
        return Ok(hard.neg()?);
    }
    let soft = log_probabilities.mean_all()?;
    Ok(((hard * (smoothing - 1.0))? - (soft * smoothing)?)?)
}

/// What backward has left behind, to be read out tensor by tensor.
pub struct Gradients<'a> {
    weights: &'a Weights,
    store: GradStore,
}

impl Gradients<'_> {
    /// The gradient of a tensor, flat; `None` if the loss does not depend on it.
    pub fn take(&mut self, tensor: usize) -> Result<Option<Vec<f32>>> {
        let Some(gradient) = self.store.remove(self.weights.0[tensor].as_tensor()) else {
            return Ok(None);
        };
        let flat = gradient.to_dtype(DType::F32)?.flatten_all()?;
        Ok(Some(flat.to_vec1::<f32>().context("a gradient cannot be read back")?))
    }
}

/// The loss of a batch and the gradients of all tensors.
pub fn gradients<'a>(
    net: &dyn Net,
    weights: &'a Weights,
    batch: &Batch,
    noise: &mut Noise,
    smoothing: f64,
) -> Result<(f32, Gradients<'a>)> {
    let output = net.forward(weights, batch, noise)?;
    let loss = cross_entropy(&output.logits, &batch.labels, smoothing)?;
    let total = match output.auxiliary {
        Some(auxiliary) => (&loss + auxiliary)?,
        None => loss.clone(),
    };
    let store = total.backward()?;
    Ok((loss.to_dtype(DType::F32)?.to_scalar()?, Gradients { weights, store }))
}

/// The most likely class of every row.
pub fn classify(net: &dyn Net, weights: &Weights, batch: &Batch) -> Result<Vec<usize>> {
    let logits = net.forward(weights, batch, &mut Noise::Off)?.logits;
    let classes = logits.argmax(1)?.to_vec1::<u32>()?;
    Ok(classes.into_iter().map(|class| class as usize).collect())
}

#[cfg(test)]
mod tests;
