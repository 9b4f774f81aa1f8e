//! The optimizers against `torch.optim` itself, 20 steps each with weight decay and a second parameter group; what is decided about a
//! step against `clip_grad_norm_` and `GradScaler`. Installs nothing: runs where `$GRADWIRE_PYTHON` (or `python3`) can import torch,
//! and says so where it cannot.
//!
//! Invariant: torch's parameters and ours start equal, see the same gradients, and share no code.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use gradwire::{
    optim::{
        Gradients, GroupConfig, Kernels, LossScaleConfig, LossScaleMode, LossScaler, OptimizerConfig, OptimizerKind,
        StateMut, squared_norm,
    },
    server::DecisionRules,
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

/// What torch answers to requests.
fn ask<A: serde::de::DeserializeOwned>(requests: &[Value]) -> Vec<A> {
    let mut child = Command::new(python())
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/torch_oracle.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let requests = serde_json::to_vec(requests).unwrap();
    child.stdin.take().unwrap().write_all(&requests).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "tests/torch_oracle.py failed");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Whether torch is there; says which, or why not.
fn torch_is_there(what: &str) -> bool {
    let version = torch_version();
    match &version {
        Ok(version) => println!("comparing {what} with torch {version}"),
        Err(reason) => println!("NOT RUN: the comparison of {what} needs torch ({reason})"),
    }
    version.is_ok()
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
            json!({ "kind": "optimizer", "optimizer": optimizer, "options": options, "groups": groups })
        })
        .collect();
    ask(&request)
}

#[test]
fn twenty_steps_agree_with_torch_optim() {
    if !torch_is_there("optimizers") {
        return;
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

/// The rules of a job that clips.
fn clipping(limit: f32) -> DecisionRules {
    DecisionRules { norm_limit: Some(limit), skip_nonfinite: false, loss_scale: LossScaleConfig::default() }
}

#[test]
fn the_global_norm_and_clipped_gradients_are_those_of_clip_grad_norm() {
    if !torch_is_there("clipping") {
        return;
    }
    #[derive(serde::Deserialize)]
    struct Answer {
        norm: f64,
        gradients: Vec<Vec<f64>>,
    }
    let tensors = |salt: u64, size: f32| -> Vec<Vec<f32>> {
        (0..4).map(|tensor| values(salt * 10 + tensor).iter().map(|value| value * size).collect()).collect()
    };
    // Clipped hard, a little, not at all; tiny, huge, and nothing.
    let cases = [(1.0, 1.0), (16.2, 1.0), (1e6, 1.0), (1e-3, 1e-4), (1.0, 1e18), (0.5, 0.0)];
    let gradients: Vec<_> = (1u64..).zip(cases).map(|(salt, (_, size))| tensors(salt, size)).collect();
    let requests: Vec<Value> = gradients
        .iter()
        .zip(cases)
        .map(|(gradients, (limit, _))| json!({ "kind": "clip", "gradients": gradients, "limit": limit }))
        .collect();
    let mut clipped = 0;
    for (((limit, _), gradients), theirs) in cases.into_iter().zip(&gradients).zip(ask::<Answer>(&requests)) {
        let squares = gradients.iter().map(|gradient| squared_norm(gradient)).sum();
        let ours = clipping(limit).decide(squares, 1.0);
        let close = |a: f64, b: f64, tolerance: f64| (a - b).abs() <= tolerance * b.abs();
        assert!(close(ours.norm, theirs.norm, 1e-6), "norm {}, torch {}", ours.norm, theirs.norm);
        clipped += u32::from(ours.scale < 1.0);
        for (ours, theirs) in gradients.iter().flatten().map(|g| g * ours.scale).zip(theirs.gradients.iter().flatten())
        {
            // The norm, the factor and the product are each rounded to f32 there: a few units in the last place.
            assert!(close(ours.into(), *theirs, 6e-7), "{ours}, torch {theirs}, limit {limit}");
        }
    }
    assert_eq!(clipped, 4);
}

#[test]
fn a_dynamic_loss_scale_skips_grows_and_backs_off_as_grad_scaler_does() {
    if !torch_is_there("the loss scale") {
        return;
    }
    #[derive(serde::Deserialize)]
    struct Answer {
        skipped: bool,
        scale: f64,
        parameters: Vec<f64>,
    }
    let config = |initial, growth_factor, backoff_factor, growth_interval| LossScaleConfig {
        mode: LossScaleMode::Dynamic,
        initial,
        growth_factor,
        backoff_factor,
        growth_interval,
    };
    let configs = [config(65536.0, 2.0, 0.5, 4), config(1000.0, 1.7, 0.3, 2), config(1e37, 3.0, 0.9, 1)];
    // 60 steps, some of which have an element that is no number or infinite.
    let gradients: Vec<Vec<f32>> = (0..60u64)
        .map(|step| {
            let mut gradient = values(500 + step);
            match mix(step) % 7 {
                0 => gradient[step as usize] = f32::INFINITY,
                1 => gradient[step as usize + 3] = f32::NAN,
                _ => {}
            }
            gradient
        })
        .collect();
    let number = |value: &f32| match (value.is_nan(), value.is_infinite()) {
        (true, _) => json!("nan"),
        (_, true) => Value::Null,
        _ => json!(value),
    };
    let sent: Vec<Vec<Value>> = gradients.iter().map(|gradient| gradient.iter().map(number).collect()).collect();
    let requests = configs.map(|config| {
        let options = json!({ "init_scale": config.initial, "growth_factor": config.growth_factor,
                              "backoff_factor": config.backoff_factor, "growth_interval": config.growth_interval });
        json!({ "kind": "scaler", "options": options, "gradients": sent })
    });
    for (config, theirs) in configs.into_iter().zip(ask::<Vec<Answer>>(&requests)) {
        let rules = DecisionRules { norm_limit: None, skip_nonfinite: false, loss_scale: config };
        let (mut scaler, mut parameters) = (LossScaler::new(&config), vec![0f32; ELEMENTS]);
        let (mut skipped, mut grown) = (0, 0);
        for (step, (gradient, theirs)) in gradients.iter().zip(theirs).enumerate() {
            let scaled: Vec<f32> = gradient.iter().map(|value| value * scaler.scale).collect();
            let squares = squared_norm(&scaled);
            let (decision, before) = (rules.decide(squares, scaler.scale), scaler.scale);
            scaler.update(&config, squares.is_finite());
            assert_eq!(decision.skips, theirs.skipped, "{config:?}, step {step}");
            assert_eq!(f64::from(scaler.scale), theirs.scale, "{config:?}, step {step}");
            (skipped, grown) = (skipped + u32::from(decision.skips), grown + u32::from(scaler.scale > before));
            if !decision.skips {
                parameters.iter_mut().zip(&scaled).for_each(|(parameter, value)| *parameter -= value * decision.scale);
            }
            for (ours, theirs) in parameters.iter().zip(&theirs.parameters) {
                assert!((f64::from(*ours) - theirs).abs() <= 1e-6, "{config:?}, step {step}: {ours}, torch {theirs}");
            }
        }
        assert!(skipped > 5 && grown > 3, "{config:?}: {skipped} skipped, {grown} grown");
    }
}

fn mix(step: u64) -> u64 {
    step.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40
}
