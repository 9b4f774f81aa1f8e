//! Packet sequence numbers: 24 bits that wrap around (IBA 9.7.1).
//!
//! Invariant: two numbers are compared by their distance around the circle and in no other way; it is right as long as they are
//! less than 2^23 apart, which the window of unacknowledged packets guarantees.

/// A packet's place in its direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Psn(u32);

impl Psn {
    /// All bits set.
    pub const MASK: u32 = (1 << 24) - 1;

    /// The number with the low 24 of these bits.
    pub const fn new(bits: u32) -> Psn {
        Psn(bits & Psn::MASK)
    }

    /// The number, below 2^24.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The number `count` packets later.
    pub const fn plus(self, count: u64) -> Psn {
        Psn::new(self.0.wrapping_add(count as u32))
    }

    /// The number one packet earlier.
    pub const fn before(self) -> Psn {
        Psn::new(self.0.wrapping_sub(1))
    }

    /// How many packets this one comes after `base`; negative if before.
    pub const fn distance_from(self, base: Psn) -> i32 {
        // The sign bit of 24 moves into that of 32 and back.
        ((self.0.wrapping_sub(base.0) << 8) as i32) >> 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_go_around_the_circle() {
        for base in [0, 1, Psn::MASK / 2, Psn::MASK - 1, Psn::MASK] {
            let base = Psn::new(base);
            for distance in [-(1 << 23), -70_000, -1, 0, 1, 70_000, (1 << 23) - 1] {
                let other = Psn::new(base.bits().wrapping_add(distance as u32));
                assert_eq!(other.distance_from(base), distance);
            }
            assert_eq!(base.plus(1).before(), base);
            assert_eq!(base.plus(1 << 24), base);
        }
    }
}
