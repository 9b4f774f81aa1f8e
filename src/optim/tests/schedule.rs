//! Schedules and live changes against values worked out by hand.
//!
//! Invariant: expected rates are written as numbers, not computed by the schedule.

use super::super::{LearningRates, Schedule};
use crate::optim::{GroupConfig, OptimizerConfig, OptimizerKind};

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} is not {b}");
}

#[test]
fn step_falls_after_each_period() {
    let schedule = Schedule::Step { every: 3, factor: 0.5 };
    for (clock, factor) in [(0, 1.0), (2, 1.0), (3, 0.5), (5, 0.5), (6, 0.25), (30, 1.0 / 1024.0)] {
        near(schedule.factor(clock), factor);
    }
}

#[test]
fn warmup_rises_and_cosine_falls() {
    let schedule = Schedule::WarmupCosine { warmup_steps: 4, total_steps: 12, final_factor: 0.2 };
    let expected = [
        (0, 0.25),
        (3, 1.0),
        (4, 1.0),
        (6, 0.2 + 0.8 * 0.5 * (1.0 + 0.5f64.sqrt())),
        (8, 0.6),
        (12, 0.2),
        (1_000_000, 0.2),
    ];
    for (clock, factor) in expected {
        near(schedule.factor(clock), factor);
    }
    near(Schedule::WarmupCosine { warmup_steps: 0, total_steps: 2, final_factor: 0.0 }.factor(1), 0.5);
}

fn rates() -> LearningRates {
    OptimizerConfig {
        groups: vec![
            GroupConfig { name: "slow".into(), learning_rate: Some(0.025), weight_decay: None },
            GroupConfig { name: "same".into(), learning_rate: None, weight_decay: Some(0.0) },
        ],
        schedule: Schedule::Step { every: 10, factor: 0.1 },
        ..OptimizerConfig::new(OptimizerKind::SGD, 0.1)
    }
    .learning_rates()
}

#[test]
fn a_live_change_takes_effect_at_its_clock_and_keeps_proportions() {
    let mut rates = rates();
    rates.set(0.3, 5).unwrap();
    rates.set(0.7, 12).unwrap();
    rates.set(0.4, 5).unwrap();
    for (clock, default) in [(4, 0.1), (5, 0.4), (9, 0.4), (10, 0.04), (12, 0.07)] {
        near(rates.rate(0, clock), default);
        near(rates.rate(1, clock), default / 4.0);
        assert_eq!(rates.rate(2, clock).to_bits(), rates.rate(0, clock).to_bits());
    }
}

#[test]
fn forgetting_changes_no_rate_that_can_still_be_asked_for() {
    let mut rates = rates();
    for clock in [3, 6, 9] {
        rates.set(clock as f64, clock).unwrap();
    }
    let before = rates.clone();
    rates.forget_before(7);
    assert_ne!(rates, before);
    for clock in 7..20 {
        assert_eq!(rates.rate(1, clock), before.rate(1, clock));
    }
}

#[test]
fn rates_survive_a_checkpoint() {
    let mut rates = rates();
    rates.set(1.0 / 3.0, 7).unwrap();
    let text = serde_json::to_string(&rates).unwrap();
    assert_eq!(serde_json::from_str::<LearningRates>(&text).unwrap(), rates);
}

#[test]
fn impossible_changes_are_refused_and_change_nothing() {
    let mut rates = rates();
    let before = rates.clone();
    for rate in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(rates.set(rate, 1).unwrap_err().to_string().contains("learning_rate"));
    }
    assert_eq!(rates, before);
    let mut frozen = OptimizerConfig {
        groups: vec![GroupConfig { name: "head".into(), learning_rate: Some(0.1), weight_decay: None }],
        ..OptimizerConfig::new(OptimizerKind::SGD, 0.0)
    }
    .learning_rates();
    assert!(frozen.set(0.1, 1).unwrap_err().to_string().contains("proportion"));
    for clock in 0..4096 {
        rates.set(0.1, clock).unwrap();
    }
    assert!(rates.set(0.1, 4096).unwrap_err().to_string().contains("4096"));
    rates.forget_before(4095);
    rates.set(0.1, 4096).unwrap();
}
