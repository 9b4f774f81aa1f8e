//! The optimizers against `torch.optim` itself, 20 steps each with weight decay and a second parameter group. Installs nothing:
//! runs where `$GRADWIRE_PYTHON` (or `python3`) can import torch, and says so where it cannot.
//!
//! Invariant: torch's parameters and ours start equal, see the same gradients, and share no code.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use gradwire::{
    optim::{Gradients, GroupConfig, Kernels, OptimizerConfig, OptimizerKind, StateMut},
    types::Dtype,
};
use serde_json::{Value, json};

const STEPS: u64 = 20;
const ELEMENTS: usize = 200;
/// Relative to the parameter's size, or to 1 for smaller ones: they start on [-2, 2] and their steps, not they, carry the error.
const TOLERANCE: f64 = 1e-6;

fn python() -> String {
    std::env::var("GRADWIRE_PYTHON").unwrap_or_else(|_| "python3".into())
}

/// Torch's version, or why there is none.
fn torch_version() -> Result<String, String> {
    let output = Command::new(python())
        .args(["-c", "import torch; print(torch.__version__)"])
        .output()
        .map_err(|error| format!("`{}` cannot be started: {error}", python()))?;
    let last = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().lines().last().unwrap_or("").to_owned();
    if output.status.success() { Ok(last(&output.stdout)) } else { Err(last(&output.stderr)) }
}

fn cases() -> Vec<(&'static str, OptimizerKind, Value)> {
    let betas = |beta1: f64, beta2: f64, epsilon: f64| json!({ "betas": [beta1, beta2], "eps": epsilon });
    vec![
        ("SGD", OptimizerKind::SGD, json!({})),
        ("SGD", OptimizerKind::Sgd { momentum: 0.9, nesterov: false }, json!({ "momentum": 0.9 })),
        ("SGD", OptimizerKind::Sgd { momentum: 0.8, nesterov: true }, json!({ "momentum": 0.8, "nesterov": true })),
        ("Adam", OptimizerKind::ADAM, json!({})),
        ("Adam", OptimizerKind::Adam { beta1: 0.8, beta2: 0.95, epsilon: 1e-3 }, betas(0.8, 0.95, 1e-3)),
        ("AdamW", OptimizerKind::ADAMW, json!({})),
        ("AdamW", OptimizerKind::AdamW { beta1: 0.85, beta2: 0.99, epsilon: 1e-5 }, betas(0.85, 0.99, 1e-5)),
        ("Adagrad", OptimizerKind::ADAGRAD, json!({})),
        (
            "Adagrad",
            OptimizerKind::Adagrad { epsilon: 1e-6, initial_accumulator: 0.1 },
            json!({ "eps": 1e-6, "initial_accumulator_value": 0.1 }),
        ),
    ]
}

/// Numbers on [-1, 1] that look random and are the same every time.
fn values(salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..ELEMENTS).map(|_| next()).collect()
}

fn start(group: u16) -> Vec<f32> {
    values(1000 + u64::from(group)).iter().map(|x| 2.0 * x).collect()
}

fn gradient(group: u16, step: u64) -> Vec<f32> {
    values(step * 2 + u64::from(group))
}

fn config(kind: OptimizerKind) -> OptimizerConfig {
    OptimizerConfig {
        weight_decay: 0.1,
        groups: vec![GroupConfig { name: "slow".into(), learning_rate: Some(0.003), weight_decay: Some(0.01) }],
        ..OptimizerConfig::new(kind, 0.02)
    }
}

/// Parameters after each step, of each group.
fn ours(kind: OptimizerKind) -> Vec<Vec<Vec<f32>>> {
    let config = config(kind);
    config.validate().unwrap();
    let rates = config.learning_rates();
    let slot = || vec![kind.state_start(); ELEMENTS];
    let mut groups: Vec<_> = (0..2).map(|group| (group, start(group), slot(), slot())).collect();
    (1..=STEPS)
        .map(|step| {
            for (group, master, first, second) in &mut groups {
                let contributions = [little_endian(&gradient(*group, step))];
                let gradients = Gradients { dtype: Dtype::F32, contributions: &&contributions[..], start: 0 };
                let plan = config.span_step(*group, step, rates.rate(*group, step - 1), 1.0);
                Kernels::best().fused(&plan, gradients, StateMut { master, first, second }, None);
            }
            groups.iter().map(|(_, master, ..)| master.clone()).collect()
        })
        .collect()
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn theirs() -> Vec<Vec<Vec<Vec<f64>>>> {
    let group = |group: u16, options: Value| {
        let gradients: Vec<_> = (1..=STEPS).map(|step| gradient(group, step)).collect();
        json!({ "options": options, "start": start(group), "gradients": gradients })
    };
    let request: Vec<Value> = cases()
        .into_iter()
        .map(|(optimizer, _, mut options)| {
            options["lr"] = json!(0.02);
            options["weight_decay"] = json!(0.1);
            let groups = [group(0, json!({})), group(1, json!({ "lr": 0.003, "weight_decay": 0.01 }))];
            json!({ "optimizer": optimizer, "options": options, "groups": groups })
        })
        .collect();
    let mut child = Command::new(python())
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/torch_oracle.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let request = serde_json::to_vec(&request).unwrap();
    child.stdin.take().unwrap().write_all(&request).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "tests/torch_oracle.py failed");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn twenty_steps_agree_with_torch_optim() {
    match torch_version() {
        Ok(version) => println!("comparing with torch {version}"),
        Err(reason) => {
            println!("NOT RUN: the comparison with torch.optim needs torch ({reason})");
            return;
        }
    }
    for ((name, kind, _), theirs) in cases().into_iter().zip(theirs()) {
        let mut worst = 0f64;
        for (step, (ours, theirs)) in ours(kind).iter().zip(&theirs).enumerate() {
            for (group, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                assert_eq!(ours.len(), theirs.len());
                for (element, (a, b)) in ours.iter().zip(theirs).enumerate() {
                    let error = (f64::from(*a) - b).abs() / b.abs().max(1.0);
                    assert!(
                        error <= TOLERANCE,
                        "{name} {kind:?} step {step} group {group} [{element}]: {a}, torch {b}"
                    );
                    worst = worst.max(error);
                }
            }
        }
        println!("{name} {kind:?}: largest relative difference {worst:.1e}");
    }
}
