//! How a tensor's first values come about: a pure function of the job's seed, the tensor's name and the element's index, so that
//! any number of shards gives the same bits.
//!
//! Invariant: the value of an element never depends on which chunk, shard or thread computes it.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::philox::philox;
use crate::{Error, Result};

/// The rule by which a server fills a tensor before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// All zeros.
    #[default]
    Zeros,
    /// All the same value.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform on ±sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 16).
    XavierUniform,
    /// Normal with standard deviation sqrt(2 / fan_in) (He et al. 2015, equation 10).
    KaimingNormal,
}

impl Init {
    /// Whether the rule can fill `tensor` of this `shape`; to be asked when the tensor is declared.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a rule with fans on a tensor of fewer than two dimensions (as PyTorch's `torch.nn.init`), a
    /// standard deviation that is negative or not finite, or a constant that is not finite.
    pub fn check(&self, tensor: &str, shape: &[usize]) -> Result<()> {
        match *self {
            Init::Constant(value) if !value.is_finite() => {
                Err(Error::Config(format!("tensor `{tensor}`: the initial constant is {value}; it must be finite")))
            }
            Init::Normal(deviation) if !(deviation >= 0.0 && deviation.is_finite()) => Err(Error::Config(format!(
                "tensor `{tensor}`: the initial standard deviation is {deviation}; it must be finite and at least 0"
            ))),
            Init::XavierUniform | Init::KaimingNormal if shape.len() < 2 => Err(Error::Config(format!(
                "tensor `{tensor}` of shape {shape:?} has no fan_in and fan_out (that takes two dimensions), so it cannot start \
                 as xavier_uniform or kaiming_normal; use zeros, constant or normal"
            ))),
            _ => Ok(()),
        }
    }

    /// Fills `out` with elements `[start, start + out.len())` of the tensor, counted in its flattened (row-major) order.
    ///
    /// `shape` is the tensor's whole shape; it gives fan_in = shape[1] x receptive field and fan_out = shape[0] x receptive
    /// field, where the receptive field is the product of the dimensions after the first two, as PyTorch's `torch.nn.init`
    /// counts them. Elements 2k and 2k + 1 share one draw of 128 bits; the normal law is made by Box and Muller's transform
    /// ("A Note on the Generation of Random Normal Deviates", 1958, equation 1) in f64 and rounded to f32 once.
    ///
    /// # Panics
    ///
    /// If [`Init::check`] refuses the shape.
    pub fn fill(&self, seed: u64, tensor: &str, shape: &[usize], start: usize, out: &mut [f32]) {
        match *self {
            Init::Zeros => out.fill(0.0),
            Init::Constant(value) => out.fill(value),
            Init::Normal(deviation) => {
                Stream::new(seed, tensor).fill(start, out, |a, b| normal_pair(f64::from(deviation), a, b));
            }
            Init::XavierUniform => {
                let (fan_in, fan_out) = fans(tensor, shape);
                let bound = (6.0 / (fan_in + fan_out)).sqrt();
                let uniform = |bits| ((2.0 * unit(bits) - 1.0) * bound) as f32;
                Stream::new(seed, tensor).fill(start, out, |a, b| [uniform(a), uniform(b)]);
            }
            Init::KaimingNormal => {
                let deviation = (2.0 / fans(tensor, shape).0).sqrt();
                Stream::new(seed, tensor).fill(start, out, |a, b| normal_pair(deviation, a, b));
            }
        }
    }
}

fn fans(tensor: &str, shape: &[usize]) -> (f64, f64) {
    let [outputs, inputs, receptive @ ..] = shape else {
        panic!("tensor `{tensor}` of shape {shape:?} has no fans: Init::check was not asked");
    };
    let receptive: f64 = receptive.iter().map(|&n| n as f64).product();
    (*inputs as f64 * receptive, *outputs as f64 * receptive)
}

/// Uniform on [0, 1) in steps of 2^-53.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Two independent normal values. `libm` and not the C library, whose last bit differs from machine to machine.
fn normal_pair(deviation: f64, a: u64, b: u64) -> [f32; 2] {
    // 1 - u lies in (0, 1], so the logarithm is finite.
    let radius = (-2.0 * libm::log(1.0 - unit(a))).sqrt() * deviation;
    let angle = std::f64::consts::TAU * unit(b);
    [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
}

/// The random bits of one tensor. 64 bits of a hash of seed and name are Philox's key and 64 more the upper half of its counter,
/// so that two tensors have no block in common.
struct Stream {
    key: [u32; 2],
    high: [u32; 2],
}

impl Stream {
    fn new(seed: u64, tensor: &str) -> Stream {
        let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(tensor.as_bytes()).finalize();
        let word = |i: usize| u32::from_le_bytes([hash[4 * i], hash[4 * i + 1], hash[4 * i + 2], hash[4 * i + 3]]);
        Stream { key: [word(0), word(1)], high: [word(2), word(3)] }
    }

    fn fill(&self, start: usize, out: &mut [f32], pair: impl Fn(u64, u64) -> [f32; 2]) {
        let draw = |index: usize| {
            let block = (index / 2) as u64;
            let [a, b, c, d] = philox(self.key, [block as u32, (block >> 32) as u32, self.high[0], self.high[1]]);
            pair(u64::from(a) | u64::from(b) << 32, u64::from(c) | u64::from(d) << 32)
        };
        // A range that starts on an odd element owns only the second half of its first pair.
        let (head, body) = out.split_at_mut((start % 2).min(out.len()));
        if let [first] = head {
            *first = draw(start)[1];
        }
        let start = start + head.len();
        for (k, values) in body.chunks_mut(2).enumerate() {
            values.copy_from_slice(&draw(start + 2 * k)[..values.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: [Init; 5] =
        [Init::Zeros, Init::Constant(0.25), Init::Normal(0.02), Init::XavierUniform, Init::KaimingNormal];

    fn whole(rule: Init, seed: u64, tensor: &str, shape: &[usize]) -> Vec<f32> {
        let mut out = vec![f32::NAN; shape.iter().product()];
        rule.fill(seed, tensor, shape, 0, &mut out);
        out
    }

    proptest! {
        #[test]
        fn value_does_not_depend_on_the_cut(rule in prop::sample::select(&RULES[..]), seed: u64, a in 0usize..=63, b in 0usize..=63) {
            let shape = [9, 7];
            let expected = whole(rule, seed, "layer.weight", &shape);
            let (from, to) = (a.min(b), a.max(b));
            let mut part = vec![f32::NAN; to - from];
            rule.fill(seed, "layer.weight", &shape, from, &mut part);
            prop_assert_eq!(part, &expected[from..to]);
        }
    }

    fn moments(values: &[f32]) -> (f64, f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let central = |p| values.iter().map(|&x| (f64::from(x) - mean).powi(p)).sum::<f64>() / n;
        let deviation = central(2).sqrt();
        (mean, deviation, central(4) / central(2).powi(2))
    }

    /// With n = 200,000 the standard errors of mean, deviation and kurtosis are sigma/447, sigma/632 and about 0.011 (normal);
    /// the bounds are five of them.
    #[test]
    fn moments_are_those_of_the_law() {
        let shape = [400, 250, 2];
        let laws = [
            (Init::Normal(0.02), 0.02, 3.0),
            (Init::KaimingNormal, (2.0f64 / 500.0).sqrt(), 3.0),
            (Init::XavierUniform, (6.0f64 / 1300.0).sqrt() / 3f64.sqrt(), 1.8),
        ];
        for (rule, sigma, kurtosis) in laws {
            let (mean, deviation, k) = moments(&whole(rule, 7, "w", &shape));
            assert!(mean.abs() < 5.0 * sigma / 447.0, "{rule:?}: mean {mean}");
            assert!((deviation / sigma - 1.0).abs() < 5.0 / 632.0, "{rule:?}: deviation {deviation}, not {sigma}");
            assert!((k - kurtosis).abs() < 0.055, "{rule:?}: kurtosis {k}, not {kurtosis}");
        }
    }

    #[test]
    fn uniform_stays_within_its_bound_and_reaches_it() {
        let bound = (6.0f64 / 1300.0).sqrt() as f32;
        let largest = whole(Init::XavierUniform, 7, "w", &[400, 250, 2]).iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(largest <= bound && largest > 0.9999 * bound, "{largest} against {bound}");
    }

    #[test]
    fn seed_and_name_each_change_every_value() {
        let base = whole(Init::Normal(1.0), 1, "a", &[64]);
        for other in [whole(Init::Normal(1.0), 2, "a", &[64]), whole(Init::Normal(1.0), 1, "b", &[64])] {
            assert!(base.iter().zip(&other).all(|(x, y)| x != y));
        }
    }

    /// Values that jobs already started with must never change. Made by an independent program from the description: Philox, the
    /// hash and Box-Muller written anew in Python.
    #[test]
    fn golden_values() {
        const INDICES: [usize; 5] = [0, 1, 2, 1_000_003, (1 << 33) + 5];
        let shape = [64, 96, 3, 3];
        let golden = [
            (Init::Normal(0.02), [0x3cad_b6a8, 0x3d19_b516, 0x3bac_2be8, 0x3c87_a0dc, 0x3b87_304e]),
            (Init::XavierUniform, [0x3d54_8d29, 0xbd2f_7c2e, 0xbd45_6101, 0xbd18_bab1, 0xbd71_703c]),
            (Init::KaimingNormal, [0x3d50_f1e3, 0x3db8_e199, 0x3c4f_1714, 0x3d23_22b4, 0x3c22_9b52]),
        ];
        for (rule, bits) in golden {
            for (index, bits) in INDICES.into_iter().zip(bits) {
                let mut value = [0.0];
                rule.fill(42, "block.0.weight", &shape, index, &mut value);
                assert_eq!(value[0].to_bits(), bits, "{rule:?}, element {index}");
            }
        }
    }

    #[test]
    fn rules_that_cannot_apply_are_refused_by_name() {
        for (rule, word) in [
            (Init::KaimingNormal, "kaiming_normal"),
            (Init::XavierUniform, "fan_in"),
            (Init::Normal(-1.0), "standard deviation"),
            (Init::Constant(f32::NAN), "finite"),
        ] {
            let text = rule.check("bias", &[8]).unwrap_err().to_string();
            assert!(text.contains("bias") && text.contains(word), "{text}");
        }
        for rule in RULES {
            rule.check("weight", &[8, 4]).unwrap();
        }
    }
}
