//! The oracle against the published update rules, written out in f64 in the notation of the papers and of PyTorch's pages.
//!
//! Invariant: the f64 rules share no code with the oracle and take the configuration, not its rounded scalars.

use super::{super::oracle, kernel::KINDS};
use crate::optim::{OptimizerConfig, OptimizerKind};

const STEPS: u64 = 30;

#[derive(Clone, Copy)]
struct Exact {
    theta: f64,
    m: f64,
    v: f64,
}

/// One step t of the rule as published.
fn published(kind: OptimizerKind, at: Exact, gradient: f64, t: u64, gamma: f64, lambda: f64) -> Exact {
    let Exact { theta, m, v } = at;
    let coupled = gradient + lambda * theta;
    let adam = |g: f64, beta1: f64, beta2: f64, epsilon: f64| {
        let m = beta1 * m + (1.0 - beta1) * g;
        let v = beta2 * v + (1.0 - beta2) * g.powi(2);
        let m_hat = m / (1.0 - beta1.powi(t as i32));
        let v_hat = v / (1.0 - beta2.powi(t as i32));
        (m, v, gamma * m_hat / (v_hat.sqrt() + epsilon))
    };
    match kind {
        OptimizerKind::Sgd { momentum, nesterov } => {
            let b = if t == 1 { coupled } else { momentum * m + coupled };
            let g = if nesterov { coupled + momentum * b } else { b };
            // Plain descent keeps no velocity.
            Exact { theta: theta - gamma * g, m: if momentum == 0.0 { m } else { b }, v }
        }
        OptimizerKind::Adam { beta1, beta2, epsilon } => {
            let (m, v, step) = adam(coupled, beta1, beta2, epsilon);
            Exact { theta: theta - step, m, v }
        }
        OptimizerKind::AdamW { beta1, beta2, epsilon } => {
            let (m, v, step) = adam(gradient, beta1, beta2, epsilon);
            Exact { theta: theta - gamma * lambda * theta - step, m, v }
        }
        OptimizerKind::Adagrad { epsilon, .. } => {
            let sum = m + coupled.powi(2);
            Exact { theta: theta - gamma * coupled / (sum.sqrt() + epsilon), m: sum, v }
        }
    }
}

#[test]
fn oracle_follows_the_published_formulas_within_rounding() {
    for kind in KINDS {
        for weight_decay in [0.0, 0.1] {
            let config = OptimizerConfig { weight_decay, ..OptimizerConfig::new(kind, 0.02) };
            config.validate().unwrap();
            for element in 0..50 {
                let start = f64::from(element as f32 / 10.0 - 2.5);
                let state = kind.state_start();
                let mut exact = Exact { theta: start, m: f64::from(state), v: f64::from(state) };
                let (mut p, mut a, mut b) = (start as f32, state, state);
                for t in 1..=STEPS {
                    let gradient = libm::sinf((element as f32 + 1.0) * t as f32) + 0.1;
                    exact = published(kind, exact, f64::from(gradient), t, 0.02, weight_decay);
                    let plan = config.span_step(0, t, 0.02, 1.0);
                    oracle::update(&plan.scalars, oracle::gradient(&plan, gradient), &mut p, &mut a, &mut b);
                    // Each step rounds a handful of times, and each rounding moves a value by 2^-24 of its size at most.
                    let bound = t as f64 * 8.0 * 2f64.powi(-24);
                    let close = |x: f32, y: f64| (f64::from(x) - y).abs() <= bound * (y.abs() + 1.0);
                    assert!(close(p, exact.theta), "{kind:?} step {t}: master {p}, formula {}", exact.theta);
                    assert!(close(a, exact.m), "{kind:?} step {t}: first {a}, formula {}", exact.m);
                    assert!(close(b, exact.v), "{kind:?} step {t}: second {b}, formula {}", exact.v);
                }
            }
        }
    }
}

/// Where epsilon stands can be seen only when it matters: with a gradient of its own size.
#[test]
fn epsilon_stands_outside_the_root_and_after_the_correction() {
    let kind = OptimizerKind::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-3 };
    let plan = OptimizerConfig::new(kind, 1.0).span_step(0, 1, 1.0, 1.0);
    let (mut p, mut a, mut b) = (0.0, 0.0, 0.0);
    oracle::update(&plan.scalars, 1e-3, &mut p, &mut a, &mut b);
    // m_hat = g, sqrt(v_hat) = g = epsilon: the step is one half.
    assert!((p + 0.5).abs() < 1e-6, "{p}");
}

#[test]
fn gradient_is_mean_then_scale_then_clip() {
    let config = OptimizerConfig::new(OptimizerKind::SGD, 1.0);
    let mut plan = config.span_step(0, 1, 1.0, 0.25);
    plan.scale = 2.0;
    plan.clip_value = Some(1.5);
    assert_eq!(oracle::gradient(&plan, 2.0), 1.0);
    assert_eq!(oracle::gradient(&plan, 8.0), 1.5);
    assert_eq!(oracle::gradient(&plan, f32::NEG_INFINITY), -1.5);
    assert!(oracle::gradient(&plan, f32::NAN).is_nan());
}
