//! A channel that loses, doubles, delays, reorders and damages datagrams, as its seed decides.
//!
//! Invariant: no datagram is delivered that was not sent, except damaged by one bit.

use std::collections::BTreeMap;

/// Small random numbers (SplitMix64, Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How hostile the channel is; chances in percent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    pub loss: u64,
    pub duplicate: u64,
    /// Longest extra delay; datagrams overtake each other.
    pub delay_us: u64,
    pub corrupt: u64,
    /// How often the receiver has no room.
    pub not_ready: u64,
    /// From when on, and for how long, nothing passes.
    pub blackout: Option<(u64, u64)>,
}

pub struct Channel {
    random: Random,
    weather: Weather,
    under_way: BTreeMap<(u64, u64), (usize, Vec<u8>)>,
    serial: u64,
    pub now_us: u64,
    pub damaged: u64,
}

impl Channel {
    pub fn new(seed: u64, weather: Weather) -> Channel {
        let random = Random(seed ^ 0x5eed);
        Channel { random, weather, under_way: BTreeMap::new(), serial: 0, now_us: 0, damaged: 0 }
    }

    pub fn send(&mut self, to: usize, bytes: Vec<u8>) {
        let copies = 1 + u64::from(self.random.percent(self.weather.duplicate));
        for _ in 0..copies {
            let dark =
                self.weather.blackout.is_some_and(|(from, length)| self.now_us >= from && self.now_us - from < length);
            if dark || self.random.percent(self.weather.loss) {
                continue;
            }
            let mut bytes = bytes.clone();
            if self.random.percent(self.weather.corrupt) {
                let bit = self.random.below(bytes.len() as u64 * 8) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
                self.damaged += 1;
            }
            let due = self.now_us + 20 + self.random.below(self.weather.delay_us + 1);
            self.serial += 1;
            self.under_way.insert((due, self.serial), (to, bytes));
        }
    }

    pub fn next_due(&self) -> Option<u64> {
        self.under_way.keys().next().map(|(due, _)| *due)
    }

    /// What has arrived by `now_us`.
    pub fn deliver(&mut self, now_us: u64) -> Vec<(usize, Vec<u8>)> {
        self.now_us = now_us;
        let later = self.under_way.split_off(&(now_us.saturating_add(1), 0));
        std::mem::replace(&mut self.under_way, later).into_values().collect()
    }
}
