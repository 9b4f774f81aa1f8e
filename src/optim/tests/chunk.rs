//! Whole chunks: tiles, spans and norm clipping against an element-by-element run of the oracle.
//!
//! Invariant: the expected chunk is made without [`ChunkStep`].

use proptest::prelude::*;

use super::{
    super::{
        ChunkParts, ChunkStep, Gradients, Kernels, Pass, Reduction, StateMut, StepArguments, Wire, oracle, squared_norm,
    },
    kernel::KINDS,
};
use crate::{
    layout::Span,
    optim::{Clip, GroupConfig, OptimizerConfig, OptimizerKind, Schedule},
    types::Dtype,
};

fn config(kind: OptimizerKind, per_chunk_norm: Option<f32>) -> OptimizerConfig {
    let group =
        |name: &str, learning_rate, weight_decay| GroupConfig { name: name.into(), learning_rate, weight_decay };
    OptimizerConfig {
        weight_decay: 0.05,
        groups: vec![group("fast", Some(0.5), None), group("bare", None, Some(0.0))],
        schedule: Schedule::Step { every: 2, factor: 0.5 },
        clip: Clip { per_value: Some(0.8), per_chunk_norm, global_norm: None },
        ..OptimizerConfig::new(kind, 0.1)
    }
}

const ARGUMENTS: StepArguments = StepArguments {
    pass: Pass::Fused,
    step: 4,
    clock: 3,
    total_weight: 3,
    reduction: Reduction::Mean,
    scale: 0.5,
    measures: false,
};

/// A chunk of its own making: values that are exact in bf16, so that one set serves as both formats' input.
#[derive(Clone, Debug, PartialEq)]
struct Chunk {
    spans: Vec<Span>,
    contributions: Vec<Vec<u8>>,
    accumulator: Vec<f32>,
    master: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    wire: Vec<u8>,
}

impl Chunk {
    fn new(lens: &[(u32, u16)], kind: OptimizerKind) -> Chunk {
        let mut spans: Vec<Span> = Vec::new();
        for (len, group) in lens {
            spans.push(Span { start: spans.last().map_or(0, |span| span.end()), len: *len, group: *group });
        }
        let elements = spans.last().map_or(0, |span| span.end()) as usize;
        let value = |salt: usize, i: usize| ((i * 31 + salt * 17) % 255) as f32 / 64.0 - 2.0;
        let contribution = |rank: usize| {
            let mut bytes = vec![0; 2 * elements];
            (0..elements).for_each(|i| oracle::encode(Dtype::Bf16, value(rank, i), &mut bytes, i));
            bytes
        };
        let slot = |has: bool| vec![kind.state_start(); if has { elements } else { 0 }];
        Chunk {
            spans,
            contributions: (0..2).map(contribution).collect(),
            accumulator: vec![f32::NAN; elements],
            master: (0..elements).map(|i| value(9, i)).collect(),
            first: slot(kind.state_slots() > 0),
            second: slot(kind.state_slots() > 1),
            wire: vec![0; 2 * elements],
        }
    }

    fn parts<'a>(&'a mut self, config: &'a OptimizerConfig, rates: &'a super::super::LearningRates) -> ChunkParts<'a> {
        ChunkParts {
            config,
            rates,
            spans: &self.spans,
            gradients: Gradients { dtype: Dtype::Bf16, contributions: &self.contributions, start: 0 },
            accumulator: &mut self.accumulator,
            state: StateMut { master: &mut self.master, first: &mut self.first, second: &mut self.second },
            wire: Some(Wire { bytes: &mut self.wire, dtype: Dtype::Bf16 }),
        }
    }

    /// Runs passes one after another in tiles of a size, and says how many tiles it took.
    fn run(&mut self, config: &OptimizerConfig, passes: &[Pass], tile: usize) -> usize {
        let rates = config.learning_rates();
        let mut tiles = 0;
        for pass in passes {
            let mut step = ChunkStep::new(Kernels::best(), config, StepArguments { pass: *pass, ..ARGUMENTS });
            loop {
                tiles += 1;
                if step.advance(&mut self.parts(config, &rates), tile) {
                    break;
                }
            }
        }
        tiles
    }

    fn by_oracle(&mut self, config: &OptimizerConfig) {
        let contributions: Vec<&[u8]> = self.contributions.iter().map(Vec::as_slice).collect();
        let sums: Vec<f32> = (0..self.master.len()).map(|i| oracle::reduce(Dtype::Bf16, &contributions, i)).collect();
        let mean = (1.0f64 / 3.0) as f32;
        let mut scale = 0.5;
        if let Some(limit) = config.clip.per_chunk_norm {
            let norm = squared_norm(&sums).sqrt() * (f64::from(mean) * 0.5);
            let coefficient = f64::from(limit) / (norm + 1e-6);
            scale = if coefficient < 1.0 { (0.5 * coefficient) as f32 } else { 0.5 };
        }
        for span in &self.spans {
            for (i, sum) in sums.iter().enumerate().skip(span.start as usize).take(span.len as usize) {
                // Clock 3 is in the second period of the schedule.
                let rate = [0.1, 0.5, 0.1][usize::from(span.group)] * 0.5;
                let mut plan = config.span_step(span.group, 4, rate, mean);
                plan.scale = scale;
                let (mut none_first, mut none_second) = (0.0, 0.0);
                let first = self.first.get_mut(i).unwrap_or(&mut none_first);
                let second = self.second.get_mut(i).unwrap_or(&mut none_second);
                oracle::update(&plan.scalars, oracle::gradient(&plan, *sum), &mut self.master[i], first, second);
                oracle::encode(Dtype::Bf16, self.master[i], &mut self.wire, i);
            }
        }
    }
}

proptest! {
    #[test]
    fn tiles_spans_and_passes_change_no_bit(
        kind in prop::sample::select(&KINDS[..]),
        norm in prop_oneof![Just(None), Just(Some(0.7f32)), Just(Some(1e6))],
        lens in prop::collection::vec((1u32..600, 0u16..3), 1..12),
        tile in prop_oneof![1usize..5, 50usize..700, Just(1_000_000)],
    ) {
        let config = config(kind, norm);
        let start = Chunk::new(&lens, kind);
        let mut expected = start.clone();
        expected.by_oracle(&config);
        expected.accumulator.clear();
        for passes in [&[Pass::Fused][..], &[Pass::Reduce, Pass::Apply]] {
            let mut chunk = start.clone();
            let tiles = chunk.run(&config, passes, tile);
            let sweeps = passes.len() + usize::from(norm.is_some());
            prop_assert_eq!(tiles, sweeps * chunk.master.len().div_ceil(tile));
            // Scratch memory, and NaN where it was not used.
            chunk.accumulator.clear();
            prop_assert_eq!(&chunk, &expected);
        }
    }
}

#[test]
fn norm_clipping_limits_the_norm_and_reports_it() {
    let config = OptimizerConfig {
        clip: Clip { per_chunk_norm: Some(0.5), ..Clip::default() },
        ..OptimizerConfig::new(OptimizerKind::SGD, 1.0)
    };
    let mut chunk = Chunk::new(&[(300, 0)], config.kind);
    let before = chunk.master.clone();
    let rates = config.learning_rates();
    let mut step = ChunkStep::new(Kernels::best(), &config, ARGUMENTS);
    assert!(ChunkStep::needs_accumulator(&config));
    assert_eq!(step.norm(), None);
    while !step.advance(&mut chunk.parts(&config, &rates), 128) {}
    let moved: Vec<f32> = before.iter().zip(&chunk.master).map(|(a, b)| a - b).collect();
    assert!((squared_norm(&moved).sqrt() - 0.5).abs() < 1e-5);
    let sums = squared_norm(&chunk.accumulator).sqrt();
    assert!((step.norm().unwrap() - sums / 6.0).abs() < 1e-5 * sums);
}

#[test]
fn without_norm_clipping_a_fused_step_needs_no_accumulator() {
    let config = config(OptimizerKind::ADAM, None);
    let mut chunk = Chunk::new(&[(1500, 0), (10, 2)], config.kind);
    chunk.accumulator = Vec::new();
    assert!(!ChunkStep::needs_accumulator(&config));
    assert_eq!(chunk.run(&config, &[Pass::Fused], 512), 3);
}

#[test]
#[should_panic(expected = "a gap before element 20")]
fn spans_with_a_gap_are_our_own_bug() {
    let config = config(OptimizerKind::SGD, None);
    let mut chunk = Chunk::new(&[(10, 0), (20, 1)], config.kind);
    chunk.spans[1] = Span { start: 20, len: 10, group: 1 };
    chunk.run(&config, &[Pass::Fused], 100);
}

#[test]
#[should_panic(expected = "no contributions")]
fn a_step_that_nobody_contributed_to_is_our_own_bug() {
    Reduction::Mean.factor(0);
}
