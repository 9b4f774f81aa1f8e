//! One run of elements: random state and contributions in arrays of random alignment, what a kernel makes of them and what the
//! oracle does.
//!
//! Invariant: a case is a function of its seed and its settings; values are compared as bits, NaN being one value.

use std::sync::Arc;

use gradwire::{
    optim::{
        OptimizerKind, SpanStep, StepScalars,
        gpu::{Batch, ChunkAddresses, GpuKernel, Rule},
        oracle,
    },
    types::Dtype,
};
use gradwire_ptx::Function;

use crate::device::{Array, Device, classes};

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];
pub const WIRES: [Option<Dtype>; 4] = [None, Some(Dtype::F32), Some(Dtype::Bf16), Some(Dtype::F16)];
pub const KINDS: [OptimizerKind; 6] = [
    OptimizerKind::SGD,
    OptimizerKind::Sgd { momentum: 0.9, nesterov: false },
    OptimizerKind::Sgd { momentum: 0.9, nesterov: true },
    OptimizerKind::ADAM,
    OptimizerKind::ADAMW,
    OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.1 },
];

/// A small deterministic generator (SplitMix64: Steele, Lea and Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Mostly numbers around one; often enough zeros of both signs, subnormals, infinities, NaN, and any pattern at all.
    pub fn value(&mut self) -> f32 {
        const SPECIAL: [f32; 14] = [
            0.0,
            -0.0,
            1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            1e-40,
            -1e-42,
            65504.0,
            65520.0,
            6e-8,
        ];
        match self.below(12) {
            0 => f32::from_bits(self.next() as u32),
            1 => self.pick(&SPECIAL),
            _ => self.plain(),
        }
    }

    pub fn plain(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: Dtype,
    pub wire: Option<Dtype>,
    pub plan: SpanStep,
    /// Master, first and second.
    pub state: [Vec<f32>; 3],
    pub contributions: Vec<Vec<u8>>,
    /// Elements before the run's first in every array of the chunk.
    pub start: usize,
    /// Elements that each array starts off a boundary: of the state, of the wire copy, of the contributions.
    pub skew: [usize; 3],
}

impl Case {
    /// Arrays of one chunk start on one boundary, so that the kernels can take 16 bytes at a time.
    pub fn aligned(
        seed: u64,
        kind: &OptimizerKind,
        dtype: Dtype,
        wire: Option<Dtype>,
        len: usize,
        count: usize,
    ) -> Case {
        let random = &mut Random(seed);
        let plan = SpanStep {
            scalars: StepScalars::new(kind, 1 + random.next() % 5000, 0.013, random.pick(&[0.0, 0.01, 0.3])),
            mean: random.pick(&[1.0, 0.5, 1.0 / 3.0]),
            scale: random.pick(&[1.0, 0.7, 1e-3]),
            clip_value: random.pick(&[None, Some(0.5), Some(1e-3)]),
        };
        let state = [0, 1, 2].map(|_| random.values(len));
        let contributions = (0..count).map(|_| bytes_of(dtype, &random.values(len))).collect();
        let start = random.pick(&[0, 0, 1, 5, 8]);
        Case { dtype, wire, plan, state, contributions, start, skew: [0; 3] }
    }

    /// Arrays that share no boundary.
    pub fn skewed(self, seed: u64) -> Case {
        let random = &mut Random(seed);
        Case { skew: [0, 1, 2].map(|_| random.below(8)), ..self }
    }

    pub fn len(&self) -> usize {
        self.state[0].len()
    }

    fn rule(&self) -> Rule {
        Rule::of_scalars(&self.plan.scalars)
    }

    /// Sum, master, first, second and wire copy by the oracle.
    pub fn by_oracle(&self) -> Outcome {
        let contributions: Vec<&[u8]> = self.contributions.iter().map(Vec::as_slice).collect();
        let [mut master, mut first, mut second] = self.state.clone();
        let mut sums = vec![0.0; self.len()];
        let mut wire = vec![0; self.wire.map_or(0, Dtype::size) * self.len()];
        for i in 0..self.len() {
            sums[i] = oracle::reduce(self.dtype, &contributions, i);
            let gradient = oracle::gradient(&self.plan, sums[i]);
            oracle::update(&self.plan.scalars, gradient, &mut master[i], &mut first[i], &mut second[i]);
            if let Some(dtype) = self.wire {
                oracle::encode(dtype, master[i], &mut wire, i);
            }
        }
        let plain = |values: &[f32]| classes(Dtype::F32, &bytes_of(Dtype::F32, values));
        Outcome {
            sums: plain(&sums),
            state: [&master, &first, &second].map(|values| plain(values)),
            wire: self.wire.map_or_else(Vec::new, |dtype| classes(dtype, &wire)),
        }
    }

    pub fn upload(&self, device: &mut Device) -> Uploaded {
        let [state_skew, wire_skew, gradient_skew] = self.skew.map(|skew| skew + self.start);
        let slots = self.rule().state_slots();
        let mut uploaded = Uploaded { state: Vec::new(), sums: None, wire: None, contributions: Vec::new() };
        for slot in &self.state[..=slots] {
            uploaded.state.push(device.upload_f32(slot, state_skew * 4));
        }
        uploaded.sums = Some(device.reserve(self.len() * 4, state_skew * 4));
        uploaded.wire = self.wire.map(|dtype| device.reserve(self.len() * dtype.size(), wire_skew * dtype.size()));
        for bytes in &self.contributions {
            uploaded.contributions.push(device.upload(bytes, gradient_skew * self.dtype.size()));
        }
        uploaded
    }

    /// Adds the case to a batch of updates (from the accumulator if `second_half`) or of reductions.
    pub fn push(&self, batch: &mut Batch, uploaded: &Uploaded, second_half: bool) {
        let back = |array: Array, size: usize| array.address - (self.start * size) as u64;
        let sums = uploaded.sums.map_or(0, |array| back(array, 4));
        let own: Vec<u64> = uploaded.contributions.iter().map(|array| back(*array, self.dtype.size())).collect();
        let slot = |index: usize| uploaded.state.get(index).map_or(0, |array| back(*array, 4));
        let chunk = ChunkAddresses {
            contributions: if second_half { std::slice::from_ref(&sums) } else { &own },
            sums,
            master: slot(0),
            first: slot(1),
            second: slot(2),
            wire: self.wire.zip(uploaded.wire).map(|(dtype, array)| (back(array, dtype.size()), dtype)),
            partials: 0,
            result: 0,
        };
        batch.push(&chunk, self.start as u32, self.len() as u32, Some(&self.plan)).expect("the batch has room");
    }

    /// What the fused kernel, or one put in its place, leaves; or what it was stopped by.
    pub fn fused(&self, other: Option<&Arc<Function>>, multiprocessors: u32) -> Result<Outcome, String> {
        let mut device = Device::default();
        let uploaded = self.upload(&mut device);
        let mut batch = Batch::new(GpuKernel::Update(self.rule(), self.dtype), 1, self.contributions.len());
        self.push(&mut batch, &uploaded, false);
        let done = match other {
            _ if batch.is_empty() => Ok(0),
            Some(function) => device.run_function(function, &batch, multiprocessors),
            None => device.run(&batch, multiprocessors),
        };
        done.map_err(|fault| fault.to_string())?;
        uploaded.outcome(&device, self.wire)
    }

    /// What reducing and then applying leaves.
    pub fn in_two(&self, multiprocessors: u32) -> Result<Outcome, String> {
        let mut device = Device::default();
        let uploaded = self.upload(&mut device);
        for (kernel, second_half) in
            [(GpuKernel::Reduce(self.dtype), false), (GpuKernel::Update(self.rule(), Dtype::F32), true)]
        {
            let mut batch = Batch::new(kernel, 1, self.contributions.len().max(1));
            self.push(&mut batch, &uploaded, second_half);
            if !batch.is_empty() {
                device.run(&batch, multiprocessors).map_err(|fault| fault.to_string())?;
            }
        }
        let sums = classes(Dtype::F32, &device.download(uploaded.sums.unwrap()));
        Ok(Outcome { sums, ..uploaded.outcome(&device, self.wire)? })
    }

    /// Fails the test where an outcome is not the oracle's. Sums are looked at where there are any, slots that the rule has.
    pub fn demand(&self, outcome: &Outcome, what: &str) {
        let expected = self.by_oracle();
        if let Some(place) = outcome.difference(&expected) {
            panic!(
                "{what}: {place}; {:?} {} {:?} start {} skew {:?} of {}",
                self.plan,
                self.dtype,
                self.wire,
                self.start,
                self.skew,
                self.len()
            );
        }
    }
}

pub struct Uploaded {
    pub state: Vec<Array>,
    pub sums: Option<Array>,
    pub wire: Option<Array>,
    pub contributions: Vec<Array>,
}

impl Uploaded {
    pub fn outcome(&self, device: &Device, wire: Option<Dtype>) -> Result<Outcome, String> {
        let mut outcome = Outcome::default();
        for (slot, array) in outcome.state.iter_mut().zip(&self.state) {
            *slot = classes(Dtype::F32, &device.read(*array)?);
        }
        if let (Some(array), Some(dtype)) = (self.wire, wire) {
            outcome.wire = classes(dtype, &device.read(array)?);
        }
        Ok(outcome)
    }
}

/// What a step leaves, as classes of bits; what it does not have is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub sums: Vec<u32>,
    pub state: [Vec<u32>; 3],
    pub wire: Vec<u32>,
}

impl Outcome {
    /// The first place where it is not what is expected.
    pub fn difference(&self, expected: &Outcome) -> Option<String> {
        let [master, first, second] = &self.state;
        let [wanted_master, wanted_first, wanted_second] = &expected.state;
        if master.len() != wanted_master.len() || self.wire.len() != expected.wire.len() {
            return Some("another number of elements".into());
        }
        let pairs = [
            ("sums", &self.sums, &expected.sums),
            ("master", master, wanted_master),
            ("first", first, wanted_first),
            ("second", second, wanted_second),
            ("wire", &self.wire, &expected.wire),
        ];
        pairs.into_iter().find_map(|(name, got, wanted)| {
            let at = got.iter().zip(wanted).position(|(a, b)| a != b)?;
            Some(format!("{name}[{at}] is {:#010x}, not {:#010x}", got[at], wanted[at]))
        })
    }
}

pub fn bytes_of(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    for (index, value) in values.iter().enumerate() {
        oracle::encode(dtype, *value, &mut bytes, index);
    }
    bytes
}
