//! Number formats without branches, so that compilers can vectorise them: bf16 and f16 to f32 and back, rounding to nearest,
//! ties to even.
//!
//! Invariant: bit for bit what the `half` crate's portable conversions give, NaN payloads included (tested over all 16-bit
//! patterns, and over all 32-bit patterns in the long tests). Little-endian bytes on every machine.
#![forbid(unsafe_code)]

/// The quiet bit of an f32 NaN; a signalling NaN becomes quiet in any conversion (IEEE 754-2019, 6.2).
const QUIET: u32 = 0x0040_0000;
const INFINITY: u32 = 0x7F80_0000;
const MAGNITUDE: u32 = 0x7FFF_FFFF;

#[inline(always)]
pub(super) fn decode_f32(bytes: [u8; 4]) -> f32 {
    f32::from_le_bytes(bytes)
}

#[inline(always)]
pub(super) fn encode_f32(value: f32) -> [u8; 4] {
    value.to_le_bytes()
}

/// bf16 is the upper half of an f32.
#[inline(always)]
pub(super) fn decode_bf16(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes)) << 16;
    let quiet = if bits & MAGNITUDE > INFINITY { QUIET } else { 0 };
    f32::from_bits(bits | quiet)
}

/// Adding 0x7FFF plus the last kept bit carries into the kept half exactly when rounding to nearest even goes up; a carry out of
/// the largest finite value gives infinity.
#[inline(always)]
pub(super) fn encode_bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    let kept = if bits & MAGNITUDE > INFINITY { bits | QUIET } else { rounded };
    ((kept >> 16) as u16).to_le_bytes()
}

/// The exponent moves from bias 15 to bias 127. A subnormal gets its leading bit by a subtraction of two normal numbers, which is
/// exact and never touches a subnormal f32.
#[inline(always)]
pub(super) fn decode_f16(bytes: [u8; 2]) -> f32 {
    let half = u32::from(u16::from_le_bytes(bytes));
    let sign = (half & 0x8000) << 16;
    let shifted = (half & 0x7FFF) << 13;
    let normal = shifted + ((127 - 15) << 23);
    let subnormal = (f32::from_bits(shifted + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
    let special = shifted | INFINITY | if shifted > (31 << 23) { QUIET } else { 0 };
    let finite = if shifted < (1 << 23) { subnormal } else { normal };
    let magnitude = if shifted >= (31 << 23) { special } else { finite };
    f32::from_bits(sign | magnitude)
}

/// A normal result rounds like [`encode_bf16`], 13 bits further down; a subnormal one is rounded by the adder itself, by adding a
/// number whose last place is the smallest f16.
#[inline(always)]
pub(super) fn encode_f16(value: f32) -> [u8; 2] {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const BEYOND_LARGEST: u32 = (127 + 16) << 23;
    const ONE_HALF: u32 = (127 - 1) << 23;
    let sign = (value.to_bits() >> 16) & 0x8000;
    let bits = value.to_bits() & MAGNITUDE;
    let rebased = bits.wrapping_sub((127 - 15) << 23);
    let normal = rebased.wrapping_add(0xFFF + ((bits >> 13) & 1)) >> 13;
    let subnormal = (f32::from_bits(bits) + f32::from_bits(ONE_HALF)).to_bits().wrapping_sub(ONE_HALF);
    let special = if bits > INFINITY { 0x7E00 | ((bits >> 13) & 0x3FF) } else { 0x7C00 };
    let finite = if bits < SMALLEST_NORMAL { subnormal } else { normal };
    let magnitude = if bits >= BEYOND_LARGEST { special } else { finite };
    ((sign | magnitude) as u16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn decoding_agrees_on_all_patterns() {
        for pattern in 0..=u16::MAX {
            let bytes = pattern.to_le_bytes();
            let wide = bf16::from_bits(pattern).to_f32_const();
            assert_eq!(decode_bf16(bytes).to_bits(), wide.to_bits(), "bf16 {pattern:#06x}");
            let wide = f16::from_bits(pattern).to_f32_const();
            assert_eq!(decode_f16(bytes).to_bits(), wide.to_bits(), "f16 {pattern:#06x}");
        }
    }

    fn encoding_agrees(bits: u32) {
        let value = f32::from_bits(bits);
        let narrow = bf16::from_f32_const(value).to_bits();
        assert_eq!(u16::from_le_bytes(encode_bf16(value)), narrow, "bf16 of {bits:#010x}");
        let narrow = f16::from_f32_const(value).to_bits();
        assert_eq!(u16::from_le_bytes(encode_f16(value)), narrow, "f16 of {bits:#010x}");
    }

    /// Every upper half with the lower halves at which a rounding decision of either format can change.
    #[test]
    fn encoding_agrees_around_every_tie() {
        let mut lower = vec![0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF];
        for bit in 0..16 {
            lower.extend([1 << bit, (1 << bit) - 1, (1 << bit) + 1, 0xFFFF ^ (1 << bit)]);
        }
        lower.extend([0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0xF000, 0xEFFF, 0xF001]);
        lower.sort_unstable();
        lower.dedup();
        for upper in 0..=u32::from(u16::MAX) {
            for low in &lower {
                encoding_agrees(upper << 16 | low);
            }
        }
    }

    #[test]
    #[ignore = "all 2^32 patterns: about a minute"]
    fn encoding_agrees_on_all_patterns() {
        (0..=u32::MAX).for_each(encoding_agrees);
    }
}
