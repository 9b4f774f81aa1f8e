//! The kernels of the PTX by name.
//!
//! Invariant: each value of [`GpuKernel`] has exactly one entry in the PTX and the other way round (tested).
#![forbid(unsafe_code)]

use super::super::{OptimizerKind, StepScalars};
use crate::types::Dtype;

/// An update rule for which kernels are compiled. Adam and AdamW are one: they differ in their constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// [`StepScalars::Sgd`]
    Sgd,
    /// [`StepScalars::Momentum`]
    Momentum,
    /// [`StepScalars::Nesterov`]
    Nesterov,
    /// [`StepScalars::Adam`]
    Adam,
    /// [`StepScalars::Adagrad`]
    Adagrad,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 5] = [Rule::Sgd, Rule::Momentum, Rule::Nesterov, Rule::Adam, Rule::Adagrad];

    /// The rule by which an optimizer steps.
    pub fn of(kind: &OptimizerKind) -> Rule {
        match kind {
            OptimizerKind::Sgd { momentum: 0.0, .. } => Rule::Sgd,
            OptimizerKind::Sgd { nesterov: false, .. } => Rule::Momentum,
            OptimizerKind::Sgd { nesterov: true, .. } => Rule::Nesterov,
            OptimizerKind::Adam { .. } | OptimizerKind::AdamW { .. } => Rule::Adam,
            OptimizerKind::Adagrad { .. } => Rule::Adagrad,
        }
    }

    /// The rule to which a step's constants belong.
    pub fn of_scalars(scalars: &StepScalars) -> Rule {
        match scalars {
            StepScalars::Sgd { .. } => Rule::Sgd,
            StepScalars::Momentum { .. } => Rule::Momentum,
            StepScalars::Nesterov { .. } => Rule::Nesterov,
            StepScalars::Adam { .. } => Rule::Adam,
            StepScalars::Adagrad { .. } => Rule::Adagrad,
        }
    }

    /// f32 values of state an element has beside its master value.
    pub const fn state_slots(self) -> usize {
        match self {
            Rule::Sgd => 0,
            Rule::Momentum | Rule::Nesterov | Rule::Adagrad => 1,
            Rule::Adam => 2,
        }
    }
}

/// A kernel of the PTX. A number format is that of the contributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GpuKernel {
    /// From contributions to new parameters and, where asked, their wire copy. With the accumulator as the one contribution, in
    /// f32, it is the second half of a step in two.
    Update(Rule, Dtype),
    /// From contributions to the accumulator.
    Reduce(Dtype),
    /// The wire copy of parameters that have not changed.
    Encode,
    /// The sums of the squares of an accumulator's tiles in the order of [`super::super::SquaredNorm`], stored as f64 at
    /// `partials`: the first half of a norm.
    SquaredNorm,
    /// The sum of what [`GpuKernel::SquaredNorm`] has left, stored as f64 at `result`.
    FoldNorm,
    /// Adds the number of infinities and NaN of an accumulator to the u64 at `result`, which must have been set.
    CountNonFinite,
}

/// One of three texts by number format.
const fn by_dtype(dtype: Dtype, [f32, bf16, f16]: [&'static str; 3]) -> &'static str {
    match dtype {
        Dtype::F32 => f32,
        Dtype::Bf16 => bf16,
        Dtype::F16 => f16,
    }
}

/// The names of a kernel for the three formats.
macro_rules! names {
    ($stem:literal) => {
        [concat!("gradwire_", $stem, "_f32"), concat!("gradwire_", $stem, "_bf16"), concat!("gradwire_", $stem, "_f16")]
    };
}

impl GpuKernel {
    /// Every kernel once.
    pub fn all() -> impl Iterator<Item = GpuKernel> {
        let formats = [Dtype::F32, Dtype::Bf16, Dtype::F16];
        let updates = Rule::ALL.into_iter().flat_map(move |rule| formats.map(|dtype| GpuKernel::Update(rule, dtype)));
        updates.chain(formats.map(GpuKernel::Reduce)).chain([
            GpuKernel::Encode,
            GpuKernel::SquaredNorm,
            GpuKernel::FoldNorm,
            GpuKernel::CountNonFinite,
        ])
    }

    /// The name of its entry in [`super::PTX`].
    pub const fn name(self) -> &'static str {
        match self {
            GpuKernel::Update(Rule::Sgd, dtype) => by_dtype(dtype, names!("sgd")),
            GpuKernel::Update(Rule::Momentum, dtype) => by_dtype(dtype, names!("momentum")),
            GpuKernel::Update(Rule::Nesterov, dtype) => by_dtype(dtype, names!("nesterov")),
            GpuKernel::Update(Rule::Adam, dtype) => by_dtype(dtype, names!("adam")),
            GpuKernel::Update(Rule::Adagrad, dtype) => by_dtype(dtype, names!("adagrad")),
            GpuKernel::Reduce(dtype) => by_dtype(dtype, names!("reduce")),
            GpuKernel::Encode => "gradwire_encode",
            GpuKernel::SquaredNorm => "gradwire_norm",
            GpuKernel::FoldNorm => "gradwire_fold",
            GpuKernel::CountNonFinite => "gradwire_count_nonfinite",
        }
    }
}
