//! Where the parameters live: the one seam between training and whatever keeps the parameters.
//!
//! Invariant: training knows no optimizer. It hands over the gradients of one step and gets back
//! the parameters of the next; learning rate, schedule, moments and decay belong to the home.
//! [`LocalHome`] keeps them in this process, for tests and for tuning without servers;
//! [`crate::gradwire_home`] keeps them on servers.

use crate::tensors::TensorDecl;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Takes the gradients of one step, gives back the new parameters.
pub trait Home {
    /// This worker's number.
    fn rank(&self) -> usize;
    /// How many workers there are.
    fn workers(&self) -> usize;
    /// Takes the gradient of one tensor, which may travel while the next one is read out.
    fn push(&mut self, tensor: usize, gradient: Vec<f32>) -> Result<()>;
    /// Ends the clock, in which a tensor that was not pushed had no part; brings the new parameters.
    fn wait(&mut self, parameters: &mut [Vec<f32>]) -> Result<()>;
    /// This worker has run all its clocks.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// What a home starts with.
pub struct Opened {
    /// The home itself.
    pub home: Box<dyn Home>,
    /// The parameters now, in declaration order.
    pub parameters: Vec<Vec<f32>>,
    /// The first clock to run: 0, or where an interrupted job left off.
    pub clock: u64,
}

/// Opens a home for declared tensors; called once a training run, so once a fold.
pub type OpenHome<'a> = dyn FnMut(&[TensorDecl], &Hyper) -> Result<Opened> + 'a;

/// The optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Rule {
    /// Plain gradient descent.
    Sgd,
    /// Gradient descent with momentum.
    Momentum(f64),
    /// Adam with decoupled weight decay.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the denominator.
        eps: f64,
    },
}

/// How the learning rate moves with the clock.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Schedule {
    /// It does not.
    Constant,
    /// Multiplied by `factor` every `every` clocks.
    Step {
        /// Clocks between two drops.
        every: u64,
        /// The factor of a drop.
        factor: f64,
    },
    /// Linear warm-up over `warmup` clocks, then half a cosine down to zero at `total`.
    WarmupCosine {
        /// Clocks of warm-up.
        warmup: u64,
        /// Clocks in all.
        total: u64,
    },
}

impl Schedule {
    /// The factor on the base learning rate at `clock`.
    pub fn factor(&self, clock: u64) -> f64 {
        match *self {
            Self::Constant => 1.0,
            Self::Step { every, factor } => factor.powf((clock / every.max(1)) as f64),
            Self::WarmupCosine { warmup, total } => {
                if clock < warmup {
                    return (clock + 1) as f64 / warmup as f64;
                }
                let span = total.saturating_sub(warmup).max(1) as f64;
                let done = ((clock - warmup) as f64 / span).min(1.0);
                0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

/// The hyper-parameters that a home applies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyper {
    /// The seed that the parameters start from.
    pub seed: u64,
    /// The optimizer.
    pub rule: Rule,
    /// The base learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay, on the tensors declared for it.
    pub weight_decay: f64,
    /// How the learning rate moves.
    pub schedule: Schedule,
}

/// The parameters in this process, for one worker.
pub struct LocalHome {
    hyper: Hyper,
    clock: u64,
    decays: Vec<bool>,
    pushed: Vec<Option<Vec<f32>>>,
    moments: Vec<Moments>,
}

#[derive(Default)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl LocalHome {
    /// Draws the starting parameters.
    pub fn open(tensors: &[TensorDecl], hyper: &Hyper) -> Opened {
        let parameters = tensors.iter().map(|t| t.draw(hyper.seed)).collect();
        let home = Self {
            hyper: hyper.clone(),
            clock: 0,
            decays: tensors.iter().map(|t| t.decay).collect(),
            pushed: tensors.iter().map(|_| None).collect(),
            moments: tensors.iter().map(|_| Moments::default()).collect(),
        };
        Opened { home: Box::new(home), parameters, clock: 0 }
    }
}

impl Home for LocalHome {
    fn rank(&self) -> usize {
        0
    }

    fn workers(&self) -> usize {
        1
    }

    fn push(&mut self, tensor: usize, gradient: Vec<f32>) -> Result<()> {
        ensure!(self.pushed[tensor].is_none(), "the gradient of tensor {tensor} was pushed twice");
        self.pushed[tensor] = Some(gradient);
        Ok(())
    }

    fn wait(&mut self, parameters: &mut [Vec<f32>]) -> Result<()> {
        let lr = self.hyper.learning_rate * self.hyper.schedule.factor(self.clock);
        self.clock += 1;
        for (at, (gradient, parameter)) in self.pushed.iter_mut().zip(parameters).enumerate() {
            let Some(gradient) = gradient.take() else { continue };
            ensure!(gradient.len() == parameter.len(), "tensor {at} has a wrong length");
            if self.decays[at] {
                let keep = (1.0 - lr * self.hyper.weight_decay) as f32;
                parameter.iter_mut().for_each(|p| *p *= keep);
            }
            self.moments[at].apply(self.hyper.rule, lr, self.clock, &gradient, parameter);
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl Moments {
    fn apply(&mut self, rule: Rule, lr: f64, step: u64, gradient: &[f32], parameter: &mut [f32]) {
        match rule {
            Rule::Sgd => {
                for (p, g) in parameter.iter_mut().zip(gradient) {
                    *p -= lr as f32 * g;
                }
            }
            Rule::Momentum(keep) => {
                self.first.resize(gradient.len(), 0.0);
                for ((p, g), v) in parameter.iter_mut().zip(gradient).zip(&mut self.first) {
                    *v = keep as f32 * *v + g;
                    *p -= lr as f32 * *v;
                }
            }
            Rule::AdamW { beta1, beta2, eps } => {
                self.first.resize(gradient.len(), 0.0);
                self.second.resize(gradient.len(), 0.0);
                let rate = (lr / (1.0 - beta1.powf(step as f64))) as f32;
                let unbias = (1.0 / (1.0 - beta2.powf(step as f64))) as f32;
                let (b1, b2, eps) = (beta1 as f32, beta2 as f32, eps as f32);
                let moments = self.first.iter_mut().zip(&mut self.second);
                for ((p, g), (m, v)) in parameter.iter_mut().zip(gradient).zip(moments) {
                    *m = b1 * *m + (1.0 - b1) * g;
                    *v = b2 * *v + (1.0 - b2) * g * g;
                    *p -= rate * *m / ((*v * unbias).sqrt() + eps);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::Init;

    fn run(rule: Rule, schedule: Schedule, decay: bool, gradients: &[f32]) -> f32 {
        let tensor = TensorDecl { name: "w".to_string(), shape: vec![1], init: Init::Constant(1.0), decay };
        let hyper = Hyper { seed: 1, rule, learning_rate: 0.1, weight_decay: 0.5, schedule };
        let Opened { mut home, mut parameters, .. } = LocalHome::open(&[tensor], &hyper);
        for gradient in gradients {
            home.push(0, vec![*gradient]).unwrap();
            home.wait(&mut parameters).unwrap();
        }
        parameters[0][0]
    }

    fn close(found: f32, expected: f32) {
        assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
    }

    #[test]
    fn the_rules_follow_their_formulas() {
        let constant = Schedule::Constant;
        close(run(Rule::Sgd, constant, false, &[2.0, 1.0]), 0.7);
        // Velocity 2, then 0.5 * 2 + 1 = 2.
        close(run(Rule::Momentum(0.5), constant, false, &[2.0, 1.0]), 0.6);
        // Decay first: 1 * (1 - 0.1 * 0.5) - 0.1 * 2.
        close(run(Rule::Sgd, constant, true, &[2.0]), 0.75);
        let adam = Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 0.0 };
        // The first step of Adam moves by the learning rate whatever the gradient's size.
        close(run(adam, constant, false, &[7.0]), 0.9);
        // m = 0.19 * 3 / 0.19, v = 0.0199 * 9 / 0.0199: equal gradients move by it every time.
        close(run(adam, constant, false, &[3.0, 3.0]), 0.8);
    }

    #[test]
    fn the_schedules_follow_their_formulas() {
        let step = Schedule::Step { every: 2, factor: 0.5 };
        close(run(Rule::Sgd, step, false, &[1.0, 1.0, 1.0]), 0.75);
        let cosine = Schedule::WarmupCosine { warmup: 4, total: 12 };
        let factors: Vec<f64> = [0, 3, 4, 8, 12, 20].map(|at| cosine.factor(at)).to_vec();
        for (found, expected) in factors.iter().zip([0.25, 1.0, 1.0, 0.5, 0.0, 0.0]) {
            close(*found as f32, expected);
        }
    }

    #[test]
    fn a_tensor_without_a_gradient_stays_and_a_wrong_gradient_is_refused() {
        let tensor = TensorDecl { name: "w".to_string(), shape: vec![2], init: Init::Constant(1.0), decay: true };
        let hyper =
            Hyper { seed: 1, rule: Rule::Sgd, learning_rate: 0.1, weight_decay: 0.0, schedule: Schedule::Constant };
        let mut opened = LocalHome::open(&[tensor], &hyper);
        opened.home.wait(&mut opened.parameters).unwrap();
        assert_eq!(opened.parameters[0], [1.0, 1.0]);
        opened.home.push(0, vec![5.0, 2.5]).unwrap();
        assert!(opened.home.push(0, vec![5.0, 2.5]).is_err());
        opened.home.wait(&mut opened.parameters).unwrap();
        assert_eq!(opened.parameters[0], [0.5, 0.75]);
        opened.home.push(0, vec![1.0]).unwrap();
        assert!(opened.home.wait(&mut opened.parameters).is_err());
    }
}
