//! Hostile input on tcp: at the decoders, at a live port before the handshake, and from a peer that has passed it.
//!
//! Invariant: nothing that a stranger or a rogue peer sends makes anything panic, allocate by a length field, or disturb the pair
//! that keeps exchanging correctly on the same listener.

mod allocator;
mod decoders;
mod pair;
mod port;
mod raw;
mod refusals;

/// Reproducible random numbers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.next() as u8);
    }
}
