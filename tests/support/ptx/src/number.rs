//! Arithmetic as a card does it: IEEE 754, nothing flushed to zero, every NaN the canonical one.
//!
//! Invariant: each function takes and gives the bits of its operands; the host's rounding mode is never changed.

use half::f16;

use crate::instruction::{Comparison, Conversion, Float, Meaning, Rounding, Type};

const NAN_F32: u32 = 0x7FFF_FFFF;
const NAN_F64: u64 = 0x7FFF_FFFF_FFFF_FFFF;

fn bits_f32(value: f32) -> u64 {
    u64::from(if value.is_nan() { NAN_F32 } else { value.to_bits() })
}

fn bits_f64(value: f64) -> u64 {
    if value.is_nan() { NAN_F64 } else { value.to_bits() }
}

pub(crate) fn single(operation: Float, rounding: Rounding, a: u64, b: u64) -> u64 {
    let (a, b) = (f32::from_bits(a as u32), f32::from_bits(b as u32));
    bits_f32(match (operation, rounding) {
        (Float::Add, Rounding::Nearest) => a + b,
        (Float::Multiply, Rounding::Nearest) => a * b,
        (Float::Divide, _) => a / b,
        (Float::Root, _) => a.sqrt(),
        (Float::Add, Rounding::Zero) => add_to_zero(a, b),
        // A product of two f32 is exact in f64.
        (Float::Multiply, Rounding::Zero) => to_zero(f64::from(a) * f64::from(b), 0.0),
    })
}

/// The sum in f64 and what it lacks (Knuth's two-sum), cut to f32.
fn add_to_zero(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let sum = a + b;
    let lost = (a - (sum - b)) + (b - (sum - a));
    to_zero(sum, lost)
}

/// `value` + `rest`, rounded towards zero; `rest` is below the last place of `value`.
fn to_zero(value: f64, rest: f64) -> f32 {
    let nearest = value as f32;
    if !value.is_finite() || nearest.is_nan() {
        return nearest;
    }
    let wide = f64::from(nearest);
    let shrinks = rest != 0.0 && (rest < 0.0) != (value < 0.0);
    if wide.abs() > value.abs() || (wide == value && shrinks) {
        // The neighbour nearer to zero: one less in sign-and-magnitude.
        return f32::from_bits(nearest.to_bits() - 1);
    }
    nearest
}

pub(crate) fn double(operation: Float, a: u64, b: u64) -> u64 {
    let (a, b) = (f64::from_bits(a), f64::from_bits(b));
    bits_f64(match operation {
        Float::Add => a + b,
        Float::Multiply => a * b,
        Float::Divide => a / b,
        Float::Root => a.sqrt(),
    })
}

pub(crate) fn convert(conversion: Conversion, value: u64) -> u64 {
    match conversion {
        Conversion::Integer(size) => value & (u64::MAX >> (64 - 8 * size)),
        Conversion::F16ToF32 => bits_f32(f16::from_bits(value as u16).to_f32_const()),
        Conversion::F32ToF16 => {
            let half = f16::from_f32_const(f32::from_bits(value as u32));
            u64::from(if half.is_nan() { 0x7FFF } else { half.to_bits() })
        }
        Conversion::F32ToF64 => bits_f64(f64::from(f32::from_bits(value as u32))),
    }
}

/// Comparisons of floating-point numbers are false where one is NaN.
pub(crate) fn compare(comparison: Comparison, kind: Type, a: u64, b: u64) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let (a, b) = (a & kind.mask(), b & kind.mask());
    let ordering = match (kind.meaning, kind.size) {
        (Meaning::Float, 8) => f64::from_bits(a).partial_cmp(&f64::from_bits(b)),
        (Meaning::Float, _) => f32::from_bits(a as u32).partial_cmp(&f32::from_bits(b as u32)),
        (Meaning::Signed, size) => {
            let extend = |value: u64| (value << (64 - 8 * size)) as i64;
            Some(extend(a).cmp(&extend(b)))
        }
        _ => Some(a.cmp(&b)),
    };
    match comparison {
        Comparison::Equal => ordering == Some(Equal),
        Comparison::NotEqual => matches!(ordering, Some(Less | Greater)),
        Comparison::Less => ordering == Some(Less),
        Comparison::LessOrEqual => matches!(ordering, Some(Less | Equal)),
        Comparison::Greater => ordering == Some(Greater),
        Comparison::GreaterOrEqual => matches!(ordering, Some(Greater | Equal)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zero(operation: Float, a: f32, b: f32) -> f32 {
        let bits = |x: f32| u64::from(x.to_bits());
        f32::from_bits(single(operation, Rounding::Zero, bits(a), bits(b)) as u32)
    }

    #[test]
    fn rounding_towards_zero_never_grows() {
        let below_one = f32::from_bits(1.0f32.to_bits() - 1);
        assert_eq!(zero(Float::Add, 1.0, -1e-30), below_one);
        assert_eq!(zero(Float::Add, -1.0, 1e-30), -below_one);
        assert_eq!(zero(Float::Add, 1.0, 1e-30), 1.0);
        assert_eq!(zero(Float::Add, f32::MAX, f32::MAX), f32::MAX);
        assert_eq!(zero(Float::Add, f32::INFINITY, 1.0), f32::INFINITY);
        assert_eq!(zero(Float::Multiply, 3.0, 0.5), 1.5);
        let third = 1.0f32 / 3.0;
        let exact = f64::from(third) * f64::from(third);
        assert!(f64::from(zero(Float::Multiply, third, -third)).abs() <= exact);
        assert_eq!(zero(Float::Multiply, f32::from_bits(1), 0.75), 0.0);
    }

    #[test]
    fn nan_is_canonical_and_compares_with_nothing() {
        let nan = u64::from(0x7F80_0001u32);
        assert_eq!(single(Float::Add, Rounding::Nearest, nan, 0), u64::from(NAN_F32));
        let kind = Type::named("f32").unwrap();
        let comparisons = [Comparison::Equal, Comparison::NotEqual, Comparison::Less, Comparison::GreaterOrEqual];
        assert!(comparisons.iter().all(|comparison| !compare(*comparison, kind, nan, nan)));
        assert!(compare(Comparison::Less, Type::named("s32").unwrap(), 0xFFFF_FFFF, 0));
        assert!(!compare(Comparison::Less, Type::named("u32").unwrap(), 0xFFFF_FFFF, 0));
    }
}
