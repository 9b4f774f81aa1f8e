//! Every kernel on a device against the scalar oracle, through a shard's own pipeline: all rules, all formats, special values,
//! runs that share no boundary, whole steps and steps in two, norms.
//!
//! Invariant: bits are compared, NaN being one value; a combination that differs anywhere is named.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    Error, Result,
    cuda::Context,
    layout::{Layout, LayoutOptions, Span, TensorSpec},
    mem::{Lease, Region, RegionOptions},
    optim::{
        GroupConfig, LearningRates, OptimizerConfig, OptimizerKind, Pass, Reduction, StepArguments,
        gpu::{ChunkPlan, Done, Gradient, Pipeline, PipelineOptions},
        oracle, squared_norm,
    },
    transport::sim::SimRandom,
    types::Dtype,
};

const KINDS: [OptimizerKind; 6] = [
    OptimizerKind::SGD,
    OptimizerKind::Sgd { momentum: 0.9, nesterov: false },
    OptimizerKind::Sgd { momentum: 0.9, nesterov: true },
    OptimizerKind::ADAM,
    OptimizerKind::ADAMW,
    OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.1 },
];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];
const WORKERS: usize = 3;
const STEPS: u64 = 3;
/// A job of some thousand elements that takes longer is a device that hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was compared.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Checked {
    /// Combinations of optimizer, gradient format and wire format, each whole and in two.
    pub combinations: u64,
    /// Elements of parameters, state and wire copies that were compared.
    pub elements: u64,
}

/// Holds the device to the oracle.
///
/// # Errors
///
/// [`Error::JobFailed`] naming the first combination and element that differ; [`Error::Gpu`] from the device.
pub fn check(context: &Context) -> Result<Checked> {
    let mut checked = Checked::default();
    for kind in KINDS {
        for gradient_dtype in DTYPES {
            for parameter_dtype in DTYPES {
                let mut case = Case::new(context, kind, gradient_dtype, parameter_dtype, checked.combinations)?;
                for step in 1..=STEPS {
                    case.step(step, step == 2)?;
                }
                case.compare_state()?;
                checked.combinations += 1;
                checked.elements += case.compared;
            }
        }
    }
    Ok(checked)
}

/// One combination: a chunk on the device, and beside it what the oracle makes of the same.
struct Case {
    name: String,
    pipeline: Pipeline,
    config: OptimizerConfig,
    rates: LearningRates,
    spans: Vec<Span>,
    gradient_dtype: Dtype,
    parameter_dtype: Dtype,
    /// Master, first and second by the oracle.
    state: [Vec<f32>; 3],
    random: SimRandom,
    /// Landing slots and the reply's, when no job holds them.
    landing: Vec<Lease>,
    wire: Option<Lease>,
    compared: u64,
}

impl Case {
    fn new(context: &Context, kind: OptimizerKind, gradient: Dtype, parameter: Dtype, seed: u64) -> Result<Case> {
        let mut config = OptimizerConfig::new(kind, 0.013);
        config.weight_decay = 0.01;
        config.clip.per_value = (seed % 2 == 1).then_some(0.5);
        config.groups = vec![GroupConfig { name: "other".into(), learning_rate: Some(0.5), weight_decay: Some(0.0) }];
        let sizes = [1u64, 7, 2048, 300, 2049, 5, 600 + seed % 9];
        let tensor = |(index, elements): (usize, &u64)| {
            TensorSpec::new(format!("tensor{index}"), [*elements]).group((index % 2) as u16)
        };
        let declaration = sizes.iter().enumerate().map(tensor).collect();
        let layout = Layout::build(&[declaration], LayoutOptions { chunk_elements: 1 << 16, shards: 1 })?;
        let chunk = &layout.chunks[0];
        let (elements, slots) = (chunk.len as usize, kind.state_slots());
        let options = PipelineOptions {
            chunks: vec![chunk.len],
            state_slots: slots,
            has_accumulator: true,
            gradient_dtype: gradient,
            parameter_dtype: parameter,
            contributions_max: WORKERS,
            spans_max: chunk.spans.len(),
            patience: PATIENCE,
            region: RegionOptions::default(),
        };
        let mut pipeline = Pipeline::new(context, options)?;
        let (region, lease) = Region::allocate((WORKERS + 1) * elements * 4, &RegionOptions::default())?;
        pipeline.pin(&region)?;
        let mut landing = lease.chunks(elements * 4);
        landing.truncate(WORKERS + 1);
        let mut random = SimRandom::new(seed + 1);
        let mut values =
            |wanted: bool| if wanted { (0..elements).map(|_| special(&mut random)).collect() } else { Vec::new() };
        let state: [Vec<f32>; 3] = [values(true), values(slots > 0), values(slots > 1)];
        pipeline.store(0, [&state[0], &state[1], &state[2]])?;
        let spans = chunk.spans.clone();
        let name = format!("{kind:?}, gradients in {gradient}, parameters in {parameter}");
        let (rates, wire) = (config.learning_rates(), landing.pop());
        let (gradient_dtype, parameter_dtype, compared) = (gradient, parameter, 0);
        Ok(Case {
            name,
            pipeline,
            config,
            rates,
            spans,
            gradient_dtype,
            parameter_dtype,
            state,
            random,
            landing,
            wire,
            compared,
        })
    }

    /// A step on the device and by the oracle; `in_two` through the accumulator, whose norm is compared too.
    fn step(&mut self, step: u64, in_two: bool) -> Result<()> {
        let dtype = self.gradient_dtype;
        let elements = self.state[0].len();
        for lease in &mut self.landing {
            for index in 0..elements {
                oracle::encode(dtype, special(&mut self.random), lease.bytes_mut(), index);
            }
        }
        let contributions: Vec<&[u8]> = self.landing.iter().map(Lease::bytes).collect();
        let sums: Vec<f32> = (0..elements).map(|index| oracle::reduce(dtype, &contributions, index)).collect();
        let reduction = if step == 1 { Reduction::Sum } else { Reduction::Mean };
        let arguments = StepArguments {
            pass: Pass::Fused,
            step,
            clock: step,
            total_weight: WORKERS as u32,
            reduction,
            scale: 1.0,
            measures: false,
        };
        let scale = if step == 3 { 0.7 } else { 1.0 };
        let landed = std::mem::take(&mut self.landing);
        let wire = self.wire.take();
        let gradient = match in_two {
            false => Gradient::Landed(landed),
            true => {
                self.pipeline.reduce(0, landed, true)?;
                let done = self.wait()?;
                let (found, expected) = (done.squared_norm.unwrap_or(0.0), squared_norm(&sums));
                if found.to_bits() != expected.to_bits() && !(found.is_nan() && expected.is_nan()) {
                    return Err(self.differs(&format!("the squared norm is {found:e}, not {expected:e}")));
                }
                self.landing = done.contributions;
                Gradient::Accumulator
            }
        };
        let plan = ChunkPlan { spans: &self.spans, config: &self.config, rates: &self.rates, arguments, scale };
        self.pipeline.update(0, &plan, gradient, wire)?;
        let done = self.wait()?;
        if !in_two {
            self.landing = done.contributions;
        }
        self.by_oracle(&arguments, scale, &sums);
        let wire = done.wire.expect("it was given one");
        self.compare_wire(&wire)?;
        self.wire = Some(wire);
        Ok(())
    }

    fn by_oracle(&mut self, arguments: &StepArguments, scale: f32, sums: &[f32]) {
        let mean = arguments.reduction.factor(arguments.total_weight);
        let [master, first, second] = &mut self.state;
        for span in &self.spans {
            let rate = self.rates.rate(span.group, arguments.clock);
            let mut plan = self.config.span_step(span.group, arguments.step, rate, mean);
            plan.scale = scale;
            for index in span.start as usize..span.end() as usize {
                let gradient = oracle::gradient(&plan, sums[index]);
                let (mut no_first, mut no_second) = (0.0, 0.0);
                let first = first.get_mut(index).unwrap_or(&mut no_first);
                let second = second.get_mut(index).unwrap_or(&mut no_second);
                oracle::update(&plan.scalars, gradient, &mut master[index], first, second);
            }
        }
    }

    fn compare_wire(&mut self, wire: &Lease) -> Result<()> {
        let dtype = self.parameter_dtype;
        let mut expected = vec![0; self.state[0].len() * dtype.size()];
        for (index, value) in self.state[0].iter().enumerate() {
            oracle::encode(dtype, *value, &mut expected, index);
        }
        for index in 0..self.state[0].len() {
            let [found, wanted] = [wire.bytes(), &expected].map(|bytes| oracle::decode(dtype, bytes, index));
            if !is_same(found, wanted) {
                return Err(self.differs(&format!("element {index} of the wire copy is {found:e}, not {wanted:e}")));
            }
        }
        self.compared += self.state[0].len() as u64;
        Ok(())
    }

    fn compare_state(&mut self) -> Result<()> {
        self.pipeline.fetch(0)?;
        let arrays = self.wait()?.arrays.expect("fetched");
        for ((name, found), wanted) in ["master", "first", "second"].iter().zip(&arrays).zip(&self.state) {
            let differs = found.iter().zip(wanted).position(|(found, wanted)| !is_same(*found, *wanted));
            if let Some(index) = differs.or((found.len() != wanted.len()).then_some(0)) {
                return Err(self.differs(&format!("element {index} of {name} is not the oracle's")));
            }
            self.compared += found.len() as u64;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<Done> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.pipeline.poll()? {
                return Ok(done);
            }
            if Instant::now() > deadline {
                return Err(self.differs("the device did not finish"));
            }
            std::thread::yield_now();
        }
    }

    fn differs(&self, what: &str) -> Error {
        Error::JobFailed(format!("{}: {what}", self.name))
    }
}

fn is_same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// Mostly numbers around one; often enough zeros, subnormals, infinities, NaN, what f16 cannot hold, and any pattern at all.
fn special(random: &mut SimRandom) -> f32 {
    const SPECIAL: [f32; 10] =
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-40, 65520.0, 6e-8];
    match random.bits() % 16 {
        0 => f32::from_bits(random.bits() as u32),
        1 => SPECIAL[(random.bits() % 10) as usize],
        _ => (random.bits() % 4001) as f32 / 1000.0 - 2.0,
    }
}
