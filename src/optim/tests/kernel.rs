//! Every instruction set, gradient format, wire format and update rule against the scalar oracle.
//!
//! Invariant: values are compared as bits, NaN being one value (see the module's invariant).

use proptest::prelude::*;

use super::super::{Gradients, Isa, Kernels, SpanStep, StateMut, StepScalars, Wire, isa, oracle};
use crate::{optim::OptimizerKind, types::Dtype};

pub(super) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

pub(super) const KINDS: [OptimizerKind; 6] = [
    OptimizerKind::SGD,
    OptimizerKind::Sgd { momentum: 0.9, nesterov: false },
    OptimizerKind::Sgd { momentum: 0.9, nesterov: true },
    OptimizerKind::ADAM,
    OptimizerKind::ADAMW,
    OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.1 },
];

const SPECIAL: [f32; 17] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    1e-40,
    -1e-42,
    f32::from_bits(1),
    65504.0,
    65520.0,
    6e-8,
];

/// Any f32 pattern, with the special ones often: zeros of both signs, subnormals, infinities, NaN, the largest values.
fn any_f32() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -2.0f32..2.0,
        2 => any::<u32>().prop_map(f32::from_bits),
        1 => prop::sample::select(&SPECIAL[..]),
    ]
}

fn bytes_of(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    for (index, value) in values.iter().enumerate() {
        oracle::encode(dtype, *value, &mut bytes, index);
    }
    bytes
}

#[derive(Clone, Debug)]
struct Case {
    dtype: Dtype,
    wire: Option<Dtype>,
    plan: SpanStep,
    start: usize,
    /// Master, first and second of each element.
    state: Vec<[f32; 3]>,
    contributions: Vec<Vec<u8>>,
}

fn plan() -> impl Strategy<Value = SpanStep> {
    let factor = || prop_oneof![Just(1.0f32), Just(0.5), Just(1.0 / 3.0), Just(1e-3)];
    let clip = prop_oneof![Just(None), Just(Some(0.5f32)), Just(Some(1e-3))];
    let kind = prop::sample::select(&KINDS[..]);
    (kind, 1u64..5000, prop::sample::select(&[0.0, 0.01, 0.3][..]), factor(), factor(), clip).prop_map(
        |(kind, step, decay, mean, scale, clip_value)| SpanStep {
            scalars: StepScalars::new(&kind, step, 0.013, decay),
            mean,
            scale,
            clip_value,
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    // Around the vector widths, the block size of 1024, and a few blocks.
    let len = prop_oneof![0usize..70, 1000usize..1050, 2000usize..3100];
    let wire = prop::option::of(prop::sample::select(&DTYPES[..]));
    (prop::sample::select(&DTYPES[..]), wire, plan(), 0usize..20, len, 0usize..5).prop_flat_map(
        |(dtype, wire, plan, start, len, count)| {
            let state = prop::collection::vec([any_f32(), any_f32(), any_f32()], len);
            let values = prop::collection::vec(any_f32(), start + len);
            let contributions = prop::collection::vec(values.prop_map(move |v| bytes_of(dtype, &v)), count);
            (state, contributions).prop_map(move |(state, contributions)| Case {
                dtype,
                wire,
                plan,
                start,
                state,
                contributions,
            })
        },
    )
}

/// What a step leaves: the sums, the three state arrays, and the wire bytes decoded again.
#[derive(Clone, Debug, Default)]
struct Outcome {
    sums: Vec<f32>,
    state: [Vec<f32>; 3],
    wire: Vec<f32>,
}

impl Outcome {
    fn bits(&self) -> Vec<Vec<u32>> {
        let class = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
        let [master, first, second] = &self.state;
        [&self.sums, master, first, second, &self.wire].map(|values| values.iter().map(class).collect()).into()
    }
}

impl Case {
    fn len(&self) -> usize {
        self.state.len()
    }

    fn start_state(&self) -> [Vec<f32>; 3] {
        [0, 1, 2].map(|slot| self.state.iter().map(|values| values[slot]).collect())
    }

    fn gradients(&self) -> Gradients<'_> {
        Gradients { dtype: self.dtype, contributions: &self.contributions, start: self.start }
    }

    fn decode_wire(&self, bytes: &[u8]) -> Vec<f32> {
        let decode = |dtype| (0..self.len()).map(|i| oracle::decode(dtype, bytes, i)).collect();
        self.wire.map_or_else(Vec::new, decode)
    }

    fn wire_bytes(&self) -> Vec<u8> {
        vec![0xA5; self.wire.map_or(0, |dtype| dtype.size() * self.len())]
    }

    fn by_oracle(&self) -> Outcome {
        let contributions: Vec<&[u8]> = self.contributions.iter().map(Vec::as_slice).collect();
        let mut outcome = Outcome { state: self.start_state(), ..Outcome::default() };
        let [master, first, second] = &mut outcome.state;
        let mut bytes = self.wire_bytes();
        for i in 0..self.len() {
            let sum = oracle::reduce(self.dtype, &contributions, self.start + i);
            let gradient = oracle::gradient(&self.plan, sum);
            oracle::update(&self.plan.scalars, gradient, &mut master[i], &mut first[i], &mut second[i]);
            if let Some(dtype) = self.wire {
                oracle::encode(dtype, master[i], &mut bytes, i);
            }
            outcome.sums.push(sum);
        }
        outcome.wire = self.decode_wire(&bytes);
        outcome
    }

    fn by_kernels(&self, kernels: Kernels, is_fused: bool) -> Outcome {
        let mut outcome = Outcome { sums: vec![f32::NAN; self.len()], state: self.start_state(), wire: Vec::new() };
        kernels.reduce(self.gradients(), &mut outcome.sums);
        let [master, first, second] = &mut outcome.state;
        let mut bytes = self.wire_bytes();
        let state = StateMut { master, first, second };
        let wire = self.wire.map(|dtype| Wire { bytes: &mut bytes, dtype });
        if is_fused {
            kernels.fused(&self.plan, self.gradients(), state, wire);
        } else {
            kernels.apply(&self.plan, &outcome.sums, state, wire);
        }
        outcome.wire = self.decode_wire(&bytes);
        if let Some(dtype) = self.wire {
            let mut again = self.wire_bytes();
            kernels.encode(&outcome.state[0], Wire { bytes: &mut again, dtype });
            assert_eq!(again, bytes, "encode and the step's own copy differ on {}", kernels.isa().name());
        }
        outcome
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_isa_equals_the_oracle(case in case()) {
        let expected = case.by_oracle().bits();
        for isa in Isa::available() {
            for is_fused in [false, true] {
                let outcome = case.by_kernels(Kernels::on(*isa), is_fused).bits();
                for (name, (got, want)) in
                    ["sum", "master", "first", "second", "wire"].iter().zip(outcome.iter().zip(&expected))
                {
                    let at = got.iter().zip(want).position(|(a, b)| a != b);
                    prop_assert!(got == want, "{} on {}, fused {is_fused}: element {at:?}", name, isa.name());
                }
            }
        }
    }
}

/// The property above draws kinds and formats at random; this one makes sure that none is left out.
#[test]
fn every_combination_equals_the_oracle() {
    let values = |salt: usize, len: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + salt * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    };
    let mut combinations = 0;
    for kind in KINDS {
        for dtype in DTYPES {
            for wire in [None, Some(Dtype::F32), Some(Dtype::Bf16), Some(Dtype::F16)] {
                let plan = SpanStep {
                    scalars: StepScalars::new(&kind, 3, 0.01, 0.1),
                    mean: 1.0 / 3.0,
                    scale: 0.7,
                    clip_value: Some(0.2),
                };
                let [p, a, b] = [1, 2, 3].map(|salt| values(salt, 1100));
                let state = (0..1100).map(|i| [p[i], a[i], b[i].abs()]).collect();
                let contributions = (4..7).map(|salt| bytes_of(dtype, &values(salt, 1100))).collect();
                let case = Case { dtype, wire, plan, start: 0, state, contributions };
                let expected = case.by_oracle().bits();
                for isa in Isa::available() {
                    for is_fused in [false, true] {
                        let outcome = case.by_kernels(Kernels::on(*isa), is_fused).bits();
                        assert_eq!(outcome, expected, "{kind:?} {dtype} {wire:?} {} {is_fused}", isa.name());
                        combinations += 1;
                    }
                }
            }
        }
    }
    assert_eq!(combinations, 6 * 3 * 4 * 2 * Isa::available().len());
}

/// Rank order decides the bits: (1e8 + -1e8) + 1 is 1, while 1e8 + (-1e8 + 1) is 0.
#[test]
fn contributions_are_summed_in_rank_order() {
    let contributions = [1e8f32, -1e8, 1.0].map(|x| bytes_of(Dtype::F32, &[x; 40]));
    let reversed: Vec<_> = contributions.iter().rev().cloned().collect();
    for isa in Isa::available() {
        for (contributions, expected) in [(&contributions[..], 1.0), (&reversed[..], 0.0)] {
            let mut sums = [f32::NAN; 40];
            let gradients = Gradients { dtype: Dtype::F32, contributions: &contributions, start: 0 };
            Kernels::on(*isa).reduce(gradients, &mut sums);
            assert_eq!(sums, [expected; 40], "{}", isa.name());
        }
    }
}

/// A multiply and an add contracted into one operation would keep the product's low bits.
#[test]
fn nothing_is_contracted_and_nothing_flushed() {
    let x = 1.0 + f32::EPSILON;
    let plan =
        |rate| SpanStep { scalars: StepScalars::Sgd { rate, decay: 0.0 }, mean: 1.0, scale: 1.0, clip_value: None };
    for isa in Isa::available() {
        let step = |rate: f32, p: f32, g: f32| {
            let mut master = [p; 37];
            let state = StateMut { master: &mut master, ..StateMut::default() };
            Kernels::on(*isa).apply(&plan(rate), &[g; 37], state, None);
            assert!(master.iter().all(|p| p.to_bits() == master[0].to_bits()), "{}", isa.name());
            master[0]
        };
        // x * x = 1 + 2 e + e^2 rounds to 1 + 2 e; contracted, the difference would be -e^2 and not 0.
        assert_eq!(step(x, 1.0 + 2.0 * f32::EPSILON, x), 0.0, "{}", isa.name());
        assert_eq!(step(1.0, f32::from_bits(3), f32::from_bits(1)).to_bits(), 2, "{}", isa.name());
    }
}

#[test]
fn the_best_isa_is_the_last_available_and_has_a_name() {
    assert_eq!(Isa::available()[0], Isa::BASELINE);
    assert_eq!(Kernels::default().isa(), *Isa::available().last().unwrap());
    assert_eq!(isa(), Kernels::best().isa().name());
    println!("instruction sets tested here: {:?}", Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>());
}

#[test]
#[should_panic(expected = "different lengths")]
fn a_wire_copy_of_another_length_is_refused() {
    let mut wire = [0; 10];
    Kernels::best().encode(&[1.0; 4], Wire { bytes: &mut wire, dtype: Dtype::Bf16 });
}
