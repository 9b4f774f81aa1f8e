//! The numbers of one step: everything that is the same for all elements of a span, computed once in f64 and rounded to f32.
//!
//! Invariant: these numbers are functions of configuration, group, step and learning rate alone, made with correctly rounded
//! operations and `libm`; two machines with the same inputs hold the same bits.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::OptimizerKind;

/// How contributions become one gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// The sum.
    Sum,
    /// The sum divided by the total weight.
    #[default]
    Mean,
}

impl Reduction {
    /// What the sum is multiplied by: 1, or 1/total_weight rounded to f32 once. A contribution that is a sum over k workers
    /// weighs k.
    ///
    /// # Panics
    ///
    /// If the weight is 0: a chunk to which nobody contributed takes no step.
    pub fn factor(self, total_weight: u32) -> f32 {
        assert!(total_weight > 0, "a step of no contributions");
        match self {
            Reduction::Sum => 1.0,
            Reduction::Mean => (1.0 / f64::from(total_weight)) as f32,
        }
    }
}

/// The constants of one update rule at one step. In the formulas g is the gradient, p the master value, and an element's state
/// is a (`first`) and b (`second`). Each operation rounds to f32; none is contracted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepScalars {
    /// g = g + decay p; p = p - rate g.
    Sgd {
        /// Learning rate.
        rate: f32,
        /// Weight decay.
        decay: f32,
    },
    /// g = g + decay p; a = momentum a + g; p = p - rate a.
    ///
    /// With a = 0 at the start this is PyTorch's first step (a = g) as well.
    Momentum {
        /// Learning rate.
        rate: f32,
        /// Weight decay.
        decay: f32,
        /// Share of the velocity that is kept.
        momentum: f32,
    },
    /// g = g + decay p; a = momentum a + g; p = p - rate (g + momentum a).
    Nesterov {
        /// Learning rate.
        rate: f32,
        /// Weight decay.
        decay: f32,
        /// Share of the velocity that is kept.
        momentum: f32,
    },
    /// g = g + decay p; a = beta1 a + alpha1 g; b = beta2 b + (alpha2 g) g;
    /// p = shrink p - (step_size a) / (sqrt(b) root_scale + epsilon).
    ///
    /// Adam has shrink 1, AdamW decay 0.
    Adam {
        /// Weight decay added to the gradient (Adam).
        decay: f32,
        /// 1 - learning rate x weight decay (AdamW).
        shrink: f32,
        /// Decay of the first moment.
        beta1: f32,
        /// 1 - beta1.
        alpha1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// 1 - beta2.
        alpha2: f32,
        /// Learning rate / (1 - beta1^t).
        step_size: f32,
        /// 1 / sqrt(1 - beta2^t).
        root_scale: f32,
        /// Added last to the denominator.
        epsilon: f32,
    },
    /// g = g + decay p; a = a + g g; p = p - (rate g) / (sqrt(a) + epsilon).
    Adagrad {
        /// Learning rate.
        rate: f32,
        /// Weight decay.
        decay: f32,
        /// Added last to the denominator.
        epsilon: f32,
    },
}

impl StepScalars {
    /// The constants of step number `step`, counted from 1.
    ///
    /// # Panics
    ///
    /// If `step` is 0: the bias corrections divide by 1 - beta^0.
    pub fn new(kind: &OptimizerKind, step: u64, learning_rate: f64, weight_decay: f64) -> StepScalars {
        assert!(step > 0, "steps are counted from 1");
        let (rate, decay) = (learning_rate as f32, weight_decay as f32);
        match *kind {
            OptimizerKind::Sgd { momentum: 0.0, .. } => StepScalars::Sgd { rate, decay },
            OptimizerKind::Sgd { momentum, nesterov: false } => {
                StepScalars::Momentum { rate, decay, momentum: momentum as f32 }
            }
            OptimizerKind::Sgd { momentum, nesterov: true } => {
                StepScalars::Nesterov { rate, decay, momentum: momentum as f32 }
            }
            OptimizerKind::Adam { beta1, beta2, epsilon } => {
                StepScalars::adam([beta1, beta2, epsilon], step, learning_rate, weight_decay, 0.0)
            }
            OptimizerKind::AdamW { beta1, beta2, epsilon } => {
                StepScalars::adam([beta1, beta2, epsilon], step, learning_rate, 0.0, weight_decay)
            }
            OptimizerKind::Adagrad { epsilon, .. } => StepScalars::Adagrad { rate, decay, epsilon: epsilon as f32 },
        }
    }

    fn adam(constants: [f64; 3], step: u64, rate: f64, coupled: f64, decoupled: f64) -> StepScalars {
        let [beta1, beta2, epsilon] = constants;
        let correction = |beta: f64| 1.0 - libm::pow(beta, step as f64);
        StepScalars::Adam {
            decay: coupled as f32,
            shrink: (1.0 - rate * decoupled) as f32,
            beta1: beta1 as f32,
            alpha1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            alpha2: (1.0 - beta2) as f32,
            step_size: (rate / correction(beta1)) as f32,
            root_scale: (1.0 / correction(beta2).sqrt()) as f32,
            epsilon: epsilon as f32,
        }
    }

    /// What is added to the gradient for each unit of the master value.
    pub(super) fn decay(&self) -> f32 {
        match *self {
            StepScalars::Sgd { decay, .. }
            | StepScalars::Momentum { decay, .. }
            | StepScalars::Nesterov { decay, .. }
            | StepScalars::Adam { decay, .. }
            | StepScalars::Adagrad { decay, .. } => decay,
        }
    }
}

/// What a step does to a run of elements of one group: gradient = clip(sum x mean x scale), then the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpanStep {
    /// The update rule's constants.
    pub scalars: StepScalars,
    /// [`Reduction::factor`]; multiplied in first (not at all when 1).
    pub mean: f32,
    /// Un-scaling of a scaled loss, or the factor of a norm clip; multiplied in second (not at all when 1).
    pub scale: f32,
    /// Each element is brought into [-c, c]; NaN stays NaN.
    pub clip_value: Option<f32>,
}
