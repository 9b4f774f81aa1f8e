//! Faults on purpose: what happens to a packet between the queue pair and the socket.
//!
//! Invariant: what happens is a function of the seed and of the sequence of packets; every fault is counted.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{SoftCounters, SoftFaults};

/// How long an overtaken packet is held back, at most.
const REORDER_US_MAX: u64 = 2_000;

/// A packet on its way to the socket.
#[derive(Clone, Debug)]
pub(super) struct Datagram {
    pub(super) to: SocketAddr,
    pub(super) bytes: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Injector {
    faults: SoftFaults,
    random: u64,
    packets: u64,
    /// By when they are due, and their number.
    held: BTreeMap<(Instant, u64), Datagram>,
    serial: u64,
}

impl Injector {
    pub(super) fn new(faults: SoftFaults) -> Injector {
        Injector { faults, random: faults.seed, packets: 0, held: BTreeMap::new(), serial: 0 }
    }

    /// Counts a packet; whether the queue pair that made it dies of it.
    pub(super) fn is_fatal(&mut self) -> bool {
        self.packets += 1;
        self.faults.die_after == Some(self.packets)
    }

    /// A packet is sent; what becomes of it goes to `out`, now or later.
    pub(super) fn pass(
        &mut self,
        now: Instant,
        mut datagram: Datagram,
        counters: &mut SoftCounters,
        out: &mut impl Extend<Datagram>,
    ) {
        if self.faults.is_calm() {
            out.extend([datagram]);
            return;
        }
        let SoftFaults { loss, duplicate, reorder, corrupt, delay_us, .. } = self.faults;
        if self.happens(loss) {
            counters.lost += 1;
            return;
        }
        let copy = self.happens(duplicate).then(|| datagram.clone());
        if self.happens(corrupt) {
            counters.corrupted += 1;
            let bit = self.below(datagram.bytes.len() as u64 * 8) as usize;
            datagram.bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let mut wait_us = if delay_us > 0 { self.below(delay_us + 1) } else { 0 };
        counters.delayed += u64::from(wait_us > 0);
        if self.happens(reorder) {
            counters.reordered += 1;
            wait_us += 1 + self.below(REORDER_US_MAX);
        }
        counters.duplicated += u64::from(copy.is_some());
        for datagram in std::iter::once(datagram).chain(copy) {
            if wait_us == 0 {
                out.extend([datagram]);
            } else {
                self.serial += 1;
                self.held.insert((now + Duration::from_micros(wait_us), self.serial), datagram);
            }
        }
    }

    /// What was held back until now.
    pub(super) fn release(&mut self, now: Instant, out: &mut impl Extend<Datagram>) {
        while let Some(first) = self.held.first_entry().filter(|first| first.key().0 <= now) {
            out.extend([first.remove()]);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.held.keys().next().map(|(due, _)| *due)
    }

    /// A chance of exactly 0 does not touch the random numbers.
    fn happens(&mut self, chance: f64) -> bool {
        chance > 0.0 && (self.bits() >> 11) as f64 / ((1u64 << 53) as f64) < chance
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }

    /// 64 random bits (SplitMix64: Steele, Lea and Flood 2014).
    fn bits(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seed: u64) -> (Vec<u8>, SoftCounters) {
        let faults =
            SoftFaults { loss: 0.2, duplicate: 0.2, reorder: 0.2, corrupt: 0.2, seed, ..SoftFaults::default() };
        let (mut injector, mut counters, mut out) = (Injector::new(faults), SoftCounters::default(), Vec::new());
        let (now, to) = (Instant::now(), SocketAddr::from(([127, 0, 0, 1], 1)));
        for at in 0..200u8 {
            injector.pass(now, Datagram { to, bytes: vec![at] }, &mut counters, &mut out);
        }
        injector.release(now + Duration::from_secs(1), &mut out);
        assert_eq!(injector.next_deadline(), None);
        (out.into_iter().map(|datagram| datagram.bytes[0]).collect(), counters)
    }

    #[test]
    fn the_same_seed_does_the_same_and_counts_it() {
        let (bytes, counters) = run(1);
        assert_eq!((bytes.clone(), counters), run(1));
        assert_ne!(bytes, run(2).0);
        let SoftCounters { lost, duplicated, reordered, corrupted, .. } = counters;
        for count in [lost, duplicated, reordered, corrupted] {
            assert!((15..65).contains(&count), "{counters:?}");
        }
        assert_eq!(bytes.len() as u64, 200 - lost + duplicated);
    }
}
