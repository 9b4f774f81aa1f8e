//! The same bits as the scalar oracle, under seeds: fused and in two steps, clipped, skipped, and with scaled losses.
//!
//! Invariant: the oracle shares no code with the servers but the arithmetic of one element.

use std::collections::{HashMap, HashSet};

use gradwire::{
    consistency::Consistency,
    layout::{Chunk, Init, Layout, LayoutOptions},
    optim::{
        LossScaleConfig, LossScaleMode, OptimizerConfig, OptimizerKind, Reduction, SpanStep, StepScalars, oracle,
        squared_norm,
    },
    types::{Clock, Dtype},
    world::{At, Outcome, Program, WorldOptions, run},
};

use super::{mix, options, seeds};

/// Gradients that look random, and what the scalar oracle makes of them.
pub struct Bits {
    seed: u64,
    /// One gradient in so many has an element that is not a number; 0: none.
    spoilt: u64,
    /// By clock: the loss scales that workers were told.
    scales: HashMap<Clock, Vec<f32>>,
    /// Workers that are not of the job from one clock on, and perhaps are again from another.
    pub absences: Vec<(u16, Clock, Option<Clock>)>,
    /// Worker, chunk, clock: what did not come, although the worker was of the job.
    pub lacked: HashSet<(u16, u32, Clock)>,
}

impl Bits {
    pub fn new(seed: u64, spoilt: u64) -> Bits {
        Bits { seed, spoilt, scales: HashMap::new(), absences: Vec::new(), lacked: HashSet::new() }
    }

    fn value(&self, worker: u16, chunk: u32, clock: Clock, element: usize) -> f32 {
        let bits = mix(&[self.seed, worker.into(), chunk.into(), clock, element as u64]);
        if element == 1 && self.spoilt > 0 && bits.is_multiple_of(self.spoilt) {
            return [f32::NAN, f32::INFINITY][bits as usize % 2];
        }
        (bits % 2_000_001) as f32 / 1_000_000.0 - 1.0
    }

    fn gives(&self, worker: u16, chunk: u32, clock: Clock) -> bool {
        let comes = self.is_member(worker, clock) && !self.lacked.contains(&(worker, chunk, clock));
        comes && !mix(&[self.seed, worker.into(), chunk.into(), clock]).is_multiple_of(5)
    }

    fn is_member(&self, worker: u16, clock: Clock) -> bool {
        let is_out = |(of, from, until): &(u16, Clock, Option<Clock>)| {
            *of == worker && *from <= clock && until.is_none_or(|until| clock < until)
        };
        !self.absences.iter().any(is_out)
    }

    /// The divisor of a chunk's mean at a clock.
    fn members(&self, chunk: &Chunk, clock: Clock) -> u32 {
        chunk.contributors.iter().filter(|worker| self.is_member(**worker, clock)).count().max(1) as u32
    }
}

impl Program for Bits {
    fn gradient(&mut self, at: At, _parameters: &[f32], gradient: &mut [f32]) -> bool {
        for (element, value) in gradient.iter_mut().enumerate() {
            *value = at.loss_scale * self.value(at.worker, at.chunk.0, at.clock, element);
        }
        self.scales.entry(at.clock).or_default().push(at.loss_scale);
        self.gives(at.worker, at.chunk.0, at.clock)
    }

    fn received(&mut self, _at: At, _parameters: &[f32]) -> Result<(), String> {
        Ok(())
    }
}

/// BSP gives the bits of the scalar oracle, whatever the network does, fused and two-step alike. An absent worker counts in the
/// mean with a gradient of zero.
#[test]
fn bsp_equals_the_oracle_bit_for_bit() {
    for seed in seeds(100) {
        let base = options(seed + 30_000);
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.weight_decay = 0.1;
        let mut options = WorldOptions {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            optimizer,
            checkpoint_every: None,
            ..base
        };
        for declaration in &mut options.declarations {
            declaration.iter_mut().for_each(|spec| spec.init = Init::Normal(0.02));
        }
        // Fused, in two steps, clipped, and clipped with steps that are skipped.
        for (two_step, global_norm, spoilt) in
            [(false, None, 0), (true, None, 0), (false, Some(0.5), 0), (false, Some(2.0), 20)]
        {
            (options.two_step, options.optimizer.clip.global_norm) = (two_step, global_norm);
            options.skip_nonfinite = spoilt > 0;
            let mut bits = Bits::new(seed, spoilt);
            let outcome = run(&options, &mut bits).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
            assert!(outcome.failure.is_none(), "seed {seed}: {:?}", outcome.failure);
            compare_with_oracle(&options, &outcome, &bits);
        }
    }
}

/// A dynamic loss scale is the one of torch.amp.GradScaler, told to every worker in time; and since it is a power of two here, the
/// bits are those of gradients that were never scaled, with the same steps skipped. A fixed one gives the bits of none.
#[test]
fn a_loss_scale_is_that_of_grad_scaler_and_leaves_no_trace_in_the_bits() {
    let mut changes = 0;
    for seed in seeds(100) {
        let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
        optimizer.clip.global_norm = seed.is_multiple_of(2).then_some(0.5);
        let consistency = Consistency::Bsp;
        let (reduction, checkpoint_every, separate_pull) = (Reduction::Mean, None, false);
        let base = options(seed + 120_000);
        let job =
            WorldOptions { consistency, reduction, optimizer, checkpoint_every, separate_pull, clocks: 12, ..base };
        let dynamic = LossScaleConfig {
            mode: LossScaleMode::Dynamic,
            initial: 1024.0,
            growth_factor: 4.0,
            backoff_factor: 0.5,
            growth_interval: 2,
        };
        for loss_scale in [dynamic, LossScaleConfig { mode: LossScaleMode::Fixed(256.0), ..dynamic }] {
            let options = WorldOptions { loss_scale, skip_nonfinite: true, ..job.clone() };
            let mut bits = Bits::new(seed, 10);
            let outcome = run(&options, &mut bits).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
            assert!(outcome.failure.is_none(), "seed {seed}: {:?}", outcome.failure);
            compare_with_oracle(&options, &outcome, &bits);
            let layout = LayoutOptions { chunk_elements: options.chunk_elements, shards: options.servers };
            let layout = Layout::build(&options.declarations, layout).unwrap();
            let (mut scale, mut streak) = (loss_scale.first(), 0);
            for (clock, decision) in decisions(&options, &layout, &bits).into_iter().enumerate() {
                let told = &bits.scales[&(clock as Clock)];
                assert!(told.iter().all(|told| *told == scale), "seed {seed}, clock {clock}: {told:?} for {scale}");
                let before = scale;
                match decision {
                    _ if loss_scale != dynamic => {}
                    None => (scale, streak) = (scale * 0.5, 0),
                    Some(_) if streak == 1 => (scale, streak) = (scale * 4.0, 0),
                    Some(_) => streak += 1,
                }
                changes += u32::from(scale != before);
            }
        }
    }
    assert!(changes > 100 || seeds(100).len() < 50, "{changes} changes of the scale");
}

/// What the oracle decides about every clock: the factor on the gradient, or nothing for a step that is skipped.
fn decisions(options: &WorldOptions, layout: &Layout, bits: &Bits) -> Vec<Option<f32>> {
    let decide = |clock| {
        let mut total = 0.0;
        for (id, chunk) in layout.chunks.iter().enumerate() {
            let elements = 0..chunk.len as usize;
            let sums: Vec<f32> = elements.map(|element| sum(bits, (id as u32, chunk), clock, element)).collect();
            let mean = f64::from(Reduction::Mean.factor(bits.members(chunk, clock)));
            total += squared_norm(&sums) * (mean * mean);
        }
        let norm = f64::sqrt(total);
        if options.skip_nonfinite && !norm.is_finite() {
            return None;
        }
        let limit = options.optimizer.clip.global_norm.map(f64::from);
        // torch.nn.utils.clip_grad_norm_: max_norm / (total_norm + 1e-6), at most 1.
        Some(limit.map_or(1.0, |limit| f64::min(1.0, limit / (norm + 1e-6)) as f32))
    };
    (0..options.clocks).map(decide).collect()
}

/// The sum of what the workers give for an element, in rank order.
fn sum(bits: &Bits, chunk: (u32, &Chunk), clock: Clock, element: usize) -> f32 {
    let values = given(bits, chunk, clock, element);
    let slices: Vec<&[u8]> = values.iter().map(|value| value.as_slice()).collect();
    if slices.is_empty() { 0.0 } else { oracle::reduce(Dtype::F32, &slices, 0) }
}

fn given(bits: &Bits, (id, chunk): (u32, &Chunk), clock: Clock, element: usize) -> Vec<[u8; 4]> {
    let givers = chunk.contributors.iter().filter(|worker| bits.gives(**worker, id, clock));
    givers.map(|worker| bits.value(*worker, id, clock, element).to_le_bytes()).collect()
}

pub fn compare_with_oracle(options: &WorldOptions, outcome: &Outcome, bits: &Bits) {
    let layout_options = LayoutOptions { chunk_elements: options.chunk_elements, shards: options.servers };
    let layout = Layout::build(&options.declarations, layout_options).unwrap();
    let decisions = decisions(options, &layout, bits);
    for image in outcome.finals.iter().flat_map(|snapshot| &snapshot.chunks) {
        let chunk = layout.chunk(image.chunk);
        let mut start = vec![0.0; chunk.len as usize];
        for tensor in layout.tensors_of(image.chunk) {
            let shape: Vec<usize> = tensor.spec.shape.iter().map(|d| *d as usize).collect();
            let piece = layout.pieces(tensor).find(|piece| piece.chunk == image.chunk).unwrap();
            let out = &mut start[piece.chunk_start as usize..][..piece.len as usize];
            tensor.spec.init.fill(options.seed, &tensor.spec.name, &shape, piece.tensor_start as usize, out);
        }
        for (element, mut master) in start.into_iter().enumerate() {
            let (mut first, mut second, mut steps) = (0.0, 0.0, 0);
            for clock in 0..options.clocks {
                let Some(scale) = decisions[clock as usize] else { continue };
                if given(bits, (image.chunk.0, chunk), clock, element).is_empty() {
                    continue; // a clock without gradients is no step
                }
                steps += 1;
                let sum = sum(bits, (image.chunk.0, chunk), clock, element);
                let mean = Reduction::Mean.factor(bits.members(chunk, clock));
                let plan = options.optimizer.span_step(0, steps, options.optimizer.learning_rate, mean);
                let plan = SpanStep { scale, ..plan };
                let gradient = oracle::gradient(&plan, sum);
                let scalars: &StepScalars = &plan.scalars;
                oracle::update(scalars, gradient, &mut master, &mut first, &mut second);
            }
            let found = image.master[element];
            assert_eq!(found.to_bits(), master.to_bits(), "seed {}: {found} for {master}", options.seed);
        }
    }
}
