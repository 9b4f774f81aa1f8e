//! Random streams: one independent generator for each (purpose, numbers) pair.
//!
//! Invariant: a stream depends on its name and numbers and on nothing else. No generator is
//! carried from one step to the next, so a run that resumes at clock `c` draws exactly what the
//! uninterrupted run would have drawn at `c`.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The generator named by `purpose` and `numbers`; ChaCha, because its output is specified.
pub fn stream(purpose: &str, numbers: &[u64]) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update((purpose.len() as u64).to_le_bytes());
    hash.update(purpose.as_bytes());
    for number in numbers {
        hash.update(number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// The numbers `0..n` in an order drawn from the stream (purpose, numbers).
pub fn permutation(n: usize, purpose: &str, numbers: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut stream(purpose, numbers));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngCore;

    #[test]
    fn a_stream_is_its_name_and_numbers() {
        let first = |purpose: &str, numbers: &[u64]| stream(purpose, numbers).next_u64();
        assert_eq!(first("a", &[1, 2]), first("a", &[1, 2]));
        assert_ne!(first("a", &[1, 2]), first("a", &[2, 1]));
        assert_ne!(first("a", &[1, 2]), first("b", &[1, 2]));
        assert_ne!(first("a", &[]), first("", &[]));
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = permutation(257, "p", &[3]);
        assert_ne!(order, (0..257).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..257).collect::<Vec<_>>());
    }
}
