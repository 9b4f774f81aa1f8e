//! Settings: what is read, what is written, what is refused and in which words.
//!
//! Invariant: every refusal is checked for the setting's name.

use super::{super::Reduction, kernel::KINDS};
use crate::optim::{Clip, GroupConfig, OptimizerConfig, OptimizerKind, Schedule, StepScalars};

#[test]
fn toml_is_one_flat_table() {
    let config: OptimizerConfig = toml::from_str(
        r#"
        kind = "adamw"
        learning_rate = 3e-4
        weight_decay = 0.01
        beta2 = 0.95
        [schedule]
        kind = "warmup_cosine"
        warmup_steps = 10
        total_steps = 100
        final_factor = 0.1
        [clip]
        per_value = 1.0
        [[groups]]
        name = "no_decay"
        weight_decay = 0.0
        "#,
    )
    .unwrap();
    config.validate().unwrap();
    assert_eq!(config.kind, OptimizerKind::AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 });
    assert_eq!(config.schedule, Schedule::WarmupCosine { warmup_steps: 10, total_steps: 100, final_factor: 0.1 });
    assert_eq!(config.clip, Clip { per_value: Some(1.0), ..Clip::default() });
    assert_eq!((config.weight_decay(0), config.weight_decay(1)), (0.01, 0.0));
    assert_eq!((config.group_index("default"), config.group_index("no_decay")), (Some(0), Some(1)));
    assert_eq!((config.group_index("other"), config.group_count()), (None, 2));
}

#[test]
fn what_is_written_is_read_back() {
    for kind in KINDS {
        let config = OptimizerConfig {
            weight_decay: 0.1,
            schedule: Schedule::Step { every: 5, factor: 0.5 },
            clip: Clip { per_chunk_norm: Some(2.0), ..Clip::default() },
            groups: vec![GroupConfig { name: "g".into(), learning_rate: Some(1.0), weight_decay: None }],
            ..OptimizerConfig::new(kind, 0.3)
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<OptimizerConfig>(&json).unwrap(), config, "{json}");
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<OptimizerConfig>(&text).unwrap(), config, "{text}");
    }
}

#[test]
fn unknown_and_foreign_settings_are_refused() {
    for (text, word) in [
        ("kind = \"sgd\"\nlearning_rate = 1\nlerning_rate = 2", "lerning_rate"),
        ("kind = \"sgd\"\nlearning_rate = 1\nbeta1 = 0.9", "`beta1` does not belong to kind \"sgd\""),
        ("kind = \"adamw\"\nlearning_rate = 1\nmomentum = 0.9", "`momentum` does not belong to kind \"adamw\""),
        ("kind = \"lion\"\nlearning_rate = 1", "lion"),
        ("kind = \"sgd\"", "learning_rate"),
        ("kind = \"sgd\"\nlearning_rate = 1\n[clip]\nnorm = 1", "norm"),
        ("kind = \"sgd\"\nlearning_rate = 1\n[schedule]\nkind = \"step\"\nevery = 1\nfactor = 1\nfoo = 1", "foo"),
    ] {
        let error = toml::from_str::<OptimizerConfig>(text).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

fn group(name: &str) -> GroupConfig {
    GroupConfig { name: name.into(), ..GroupConfig::default() }
}

#[test]
fn validation_names_the_setting() {
    let base = OptimizerConfig::new(OptimizerKind::ADAM, 0.1);
    let of = |kind| OptimizerConfig { kind, ..base.clone() };
    let clip = |per_value, per_chunk_norm| OptimizerConfig {
        clip: Clip { per_value, per_chunk_norm, global_norm: per_chunk_norm },
        ..base.clone()
    };
    let schedule = |schedule| OptimizerConfig { schedule, ..base.clone() };
    let groups = |groups| OptimizerConfig { groups, ..base.clone() };
    let adam = |beta1, beta2, epsilon| of(OptimizerKind::Adam { beta1, beta2, epsilon });
    let cases = [
        (OptimizerConfig { learning_rate: -1.0, ..base.clone() }, "`learning_rate` is -1"),
        (OptimizerConfig { learning_rate: f64::NAN, ..base.clone() }, "`learning_rate` is NaN"),
        (OptimizerConfig { weight_decay: f64::INFINITY, ..base.clone() }, "`weight_decay` is inf"),
        (of(OptimizerKind::Sgd { momentum: 1.0, nesterov: false }), "`momentum` is 1"),
        (of(OptimizerKind::Sgd { momentum: 0.0, nesterov: true }), "`nesterov`"),
        (adam(1.0, 0.9, 1e-8), "`beta1`"),
        (adam(0.9, 0.999_999_999, 1e-8), "`beta2`"),
        (adam(0.9, 0.9, 1e-50), "`epsilon`"),
        (of(OptimizerKind::Adagrad { epsilon: 0.0, initial_accumulator: -1.0 }), "`initial_accumulator`"),
        (clip(Some(0.0), None), "`clip.per_value`"),
        (clip(None, Some(f32::NAN)), "`clip.per_chunk_norm`"),
        (schedule(Schedule::Step { every: 0, factor: 0.5 }), "`schedule.every`"),
        (schedule(Schedule::Step { every: 1, factor: 1.5 }), "`schedule.factor`"),
        (
            schedule(Schedule::WarmupCosine { warmup_steps: 5, total_steps: 5, final_factor: 0.0 }),
            "`schedule.total_steps`",
        ),
        (
            schedule(Schedule::WarmupCosine { warmup_steps: 5, total_steps: 9, final_factor: -0.1 }),
            "`schedule.final_factor`",
        ),
        (groups(vec![group("a"), group("a")]), "named `a`"),
        (groups(vec![group("default")]), "named `default`"),
        (groups(vec![group("")]), "named ``"),
        (groups(vec![GroupConfig { learning_rate: Some(-1.0), ..group("x") }]), "`groups.x.learning_rate`"),
        (groups(vec![GroupConfig { weight_decay: Some(-1.0), ..group("x") }]), "`groups.x.weight_decay`"),
    ];
    base.validate().unwrap();
    for (config, word) in cases {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(word), "{error} does not say {word}");
    }
}

#[test]
fn state_slots_and_their_start() {
    let slots: Vec<_> = KINDS.iter().map(OptimizerKind::state_slots).collect();
    assert_eq!(slots, [0, 1, 1, 2, 2, 1]);
    assert_eq!(KINDS[5].state_start(), 0.1);
    assert_eq!(KINDS[3].state_start(), 0.0);
}

#[test]
fn step_scalars_are_made_in_f64_and_rounded_once() {
    let StepScalars::Adam { step_size, root_scale, alpha2, shrink, decay, .. } =
        StepScalars::new(&OptimizerKind::ADAMW, 1, 0.1, 0.5)
    else {
        panic!("AdamW has Adam's scalars");
    };
    // 1 - f32(0.999) would be 0.00099998712: the difference must be taken before rounding.
    assert_eq!(alpha2, 0.001);
    assert_eq!(step_size, 1.0);
    assert_eq!(root_scale, (1.0 / 0.001f64.sqrt()) as f32);
    assert_eq!((shrink, decay), (0.95, 0.0));
    // Far out, the corrections are gone and nothing overflows.
    let StepScalars::Adam { step_size, root_scale, .. } = StepScalars::new(&OptimizerKind::ADAM, u64::MAX, 0.1, 0.5)
    else {
        panic!("Adam has Adam's scalars");
    };
    assert_eq!((step_size, root_scale), (0.1, 1.0));
}

#[test]
fn mean_divides_by_the_weight_and_sum_does_not() {
    assert_eq!(Reduction::Mean.factor(3), 1.0 / 3.0);
    assert_eq!(Reduction::Mean.factor(1), 1.0);
    assert_eq!(Reduction::Sum.factor(3), 1.0);
}
