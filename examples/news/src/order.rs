//! Which rows each worker takes at each clock.
//!
//! Invariant: the rows are a pure function of (seed, rank, clock, batch sizes), nothing is carried
//! over between clocks, so a resumed run continues exactly. Under [`Sharding::Shuffled`] the global
//! batch of a clock depends on the global batch size only: two workers of batch B take together
//! what one worker of batch 2B takes.

use crate::streams::permutation;
use std::collections::BTreeMap;
use std::ops::Range;

/// How the training rows are divided among the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sharding {
    /// One global order a pass, shuffled by the seed; each worker takes its slice of every batch.
    Shuffled,
    /// Each worker owns one contiguous range of rows and shuffles inside it.
    Contiguous,
}

/// The rows of `rank`'s contiguous shard: sizes differ by one at most.
pub fn shard(rows: usize, rank: usize, workers: usize) -> Range<usize> {
    rows * rank / workers..rows * (rank + 1) / workers
}

/// The plan of one worker; holds the few permutations that the current batches touch.
#[derive(Debug)]
pub struct Order {
    rows: usize,
    seed: u64,
    rank: usize,
    workers: usize,
    batch: usize,
    sharding: Sharding,
    passes: BTreeMap<u64, Vec<usize>>,
}

impl Order {
    /// A plan for worker `rank` of `workers`, taking `batch` of `rows` rows each clock.
    pub fn new(rows: usize, seed: u64, (rank, workers): (usize, usize), batch: usize, sharding: Sharding) -> Self {
        Self { rows, seed, rank, workers, batch, sharding, passes: BTreeMap::new() }
    }

    /// Clocks that it takes to see `epochs` passes over all rows.
    pub fn clocks(&self, epochs: usize) -> u64 {
        (epochs * self.rows).div_ceil(self.batch * self.workers) as u64
    }

    /// The rows this worker takes at `clock`.
    pub fn batch(&mut self, clock: u64) -> Vec<usize> {
        let batch = self.batch as u64;
        let (start, range, stream) = match self.sharding {
            Sharding::Shuffled => {
                let global = batch * self.workers as u64;
                (clock * global + self.rank as u64 * batch, 0..self.rows, 0)
            }
            Sharding::Contiguous => (clock * batch, shard(self.rows, self.rank, self.workers), 1 + self.rank as u64),
        };
        // The stream of rows runs on from one pass into the next: no row is left out of a pass.
        let length = range.len() as u64;
        self.passes.retain(|pass, _| pass + 1 >= start / length);
        (start..start + batch)
            .map(|place| {
                let (pass, at) = (place / length, (place % length) as usize);
                let order = self
                    .passes
                    .entry(pass)
                    .or_insert_with(|| permutation(range.len(), "order", &[self.seed, stream, pass]));
                range.start + order[at]
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::stream;
    use rand::Rng;

    /// Sizes drawn at random: rows, workers, batch, seed.
    fn cases() -> Vec<(usize, usize, usize, u64)> {
        let mut rng = stream("order tests", &[]);
        (0..60)
            .map(|_| {
                let workers = rng.random_range(1..6);
                let rows = rng.random_range(workers..300);
                (rows, workers, rng.random_range(1..40), rng.random())
            })
            .collect()
    }

    #[test]
    fn shards_are_disjoint_complete_and_even() {
        for (rows, workers, _, _) in cases() {
            let shards: Vec<_> = (0..workers).map(|rank| shard(rows, rank, workers)).collect();
            let all: Vec<usize> = shards.iter().cloned().flatten().collect();
            assert_eq!(all, (0..rows).collect::<Vec<_>>());
            let sizes = shards.iter().map(ExactSizeIterator::len);
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }

    #[test]
    fn the_workers_of_a_pass_see_every_row_once() {
        for (rows, workers, batch, seed) in cases() {
            for sharding in [Sharding::Shuffled, Sharding::Contiguous] {
                let mut streams: Vec<Vec<usize>> = vec![Vec::new(); workers];
                let mut global = Vec::new();
                for clock in 0..rows.div_ceil(batch) as u64 {
                    for (rank, seen) in streams.iter_mut().enumerate() {
                        let place = (rank, workers);
                        let taken = Order::new(rows, seed, place, batch, sharding).batch(clock);
                        global.extend(&taken);
                        seen.extend(taken);
                    }
                }
                let mut pass: Vec<usize> = match sharding {
                    Sharding::Shuffled => global[..rows].to_vec(),
                    Sharding::Contiguous => (0..workers)
                        .flat_map(|rank| streams[rank][..shard(rows, rank, workers).len()].to_vec())
                        .collect(),
                };
                pass.sort_unstable();
                assert_eq!(pass, (0..rows).collect::<Vec<_>>(), "{sharding:?}");
            }
        }
    }

    #[test]
    fn many_workers_take_what_one_takes() {
        for (rows, workers, batch, seed) in cases() {
            let mut one = Order::new(rows, seed, (0, 1), batch * workers, Sharding::Shuffled);
            for clock in [0, 1, 7, 31] {
                let together: Vec<usize> = (0..workers)
                    .flat_map(|rank| Order::new(rows, seed, (rank, workers), batch, Sharding::Shuffled).batch(clock))
                    .collect();
                assert_eq!(one.batch(clock), together);
            }
        }
    }

    #[test]
    fn a_resumed_plan_continues_identically() {
        for sharding in [Sharding::Shuffled, Sharding::Contiguous] {
            let mut whole = Order::new(103, 9, (1, 2), 8, sharding);
            let all: Vec<_> = (0..40).map(|clock| whole.batch(clock)).collect();
            let mut resumed = Order::new(103, 9, (1, 2), 8, sharding);
            let tail: Vec<_> = (23..40).map(|clock| resumed.batch(clock)).collect();
            assert_eq!(all[23..], tail[..]);
            let mut other = Order::new(103, 10, (1, 2), 8, sharding);
            assert_ne!(all[0], other.batch(0));
        }
    }
}
