//! What a worker says of its tensors, and the union of what all workers say.
//!
//! Invariant: a tensor has one shape, one rule of initialisation and one parameter group, whoever declares it.

use serde::{Deserialize, Serialize};

use super::Init;
use crate::{Error, Result, types::Rank};

/// One tensor as a worker declares it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Unique within the model.
    pub name: String,
    /// Elements along each dimension; empty for a scalar.
    pub shape: Vec<u64>,
    /// How servers fill it before the first step.
    #[serde(default)]
    pub init: Init,
    /// Parameter group: 0 is the default one, i is the i-th of the optimizer's `groups`.
    #[serde(default)]
    pub group: u16,
}

impl TensorSpec {
    /// A tensor of zeros in the default group.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<u64>>) -> TensorSpec {
        TensorSpec { name: name.into(), shape: shape.into(), init: Init::Zeros, group: 0 }
    }

    /// The same with another rule of initialisation.
    pub fn init(self, init: Init) -> TensorSpec {
        TensorSpec { init, ..self }
    }

    /// The same in another parameter group.
    pub fn group(self, group: u16) -> TensorSpec {
        TensorSpec { group, ..self }
    }

    /// Number of elements; `None` if it overflows.
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension))
    }

    fn settings(&self) -> String {
        format!("{:?} {:?} group {}", self.shape, self.init, self.group)
    }
}

/// A tensor of the union, with the workers that declared it in rank order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Declared {
    pub spec: TensorSpec,
    pub contributors: Vec<u16>,
}

/// Limits that keep a mistaken declaration from becoming an allocation.
const ELEMENTS_MAX: u64 = 1 << 42;
const TENSORS_MAX: usize = 1 << 20;

/// The union of all declarations, in the order of the first worker, then of the others' own tensors.
pub(super) fn union(declarations: &[Vec<TensorSpec>]) -> Result<Vec<Declared>> {
    let mut tensors: Vec<Declared> = Vec::new();
    let mut by_name = std::collections::HashMap::new();
    for (worker, specs) in declarations.iter().enumerate() {
        let worker = worker as u16;
        for spec in specs {
            check(spec, worker)?;
            let Some(&index) = by_name.get(spec.name.as_str()) else {
                by_name.insert(spec.name.as_str(), tensors.len());
                tensors.push(Declared { spec: spec.clone(), contributors: vec![worker] });
                continue;
            };
            let known: &mut Declared = &mut tensors[index];
            if known.contributors.last() == Some(&worker) {
                return Err(Error::Config(format!("worker {worker} declares tensor `{}` twice", spec.name)));
            }
            if known.spec != *spec {
                return Err(Error::LayoutConflict {
                    tensor: spec.name.clone(),
                    first_rank: Rank::worker(known.contributors[0]),
                    first: known.spec.settings(),
                    second_rank: Rank::worker(worker),
                    second: spec.settings(),
                });
            }
            known.contributors.push(worker);
        }
    }
    if tensors.is_empty() {
        return Err(Error::Config("no worker declares a tensor: there is nothing to train".into()));
    }
    if tensors.len() > TENSORS_MAX {
        return Err(Error::Config(format!("{} tensors are declared, the limit is {TENSORS_MAX}", tensors.len())));
    }
    Ok(tensors)
}

fn check(spec: &TensorSpec, worker: u16) -> Result<()> {
    match spec.elements() {
        Some(1..=ELEMENTS_MAX) => Ok(()),
        Some(0) => Err(Error::Config(format!(
            "tensor `{}` of worker {worker} has no elements (shape {:?})",
            spec.name, spec.shape
        ))),
        _ => Err(Error::Config(format!(
            "tensor `{}` of worker {worker} has more than 2^42 elements (shape {:?})",
            spec.name, spec.shape
        ))),
    }
}
