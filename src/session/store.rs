//! Where it is written down who serves a shard: one compare-and-swap, behind one trait.
//!
//! Invariant: of two swaps of a shard that expect the same epoch one succeeds at most, whoever asks and whatever crashes between.
#![forbid(unsafe_code)]

use super::Tenure;
use crate::types::{Epoch, ShardId};

/// What became of a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// It is written down, and stays.
    Swapped,
    /// It was not: the shard's tenure is another one already.
    Present(Tenure),
    /// Nothing is known: the store cannot be asked, or could not write. Nobody may act on a tenure that was to be.
    Unavailable(String),
}

/// Keeps the tenures of one job's shards.
pub trait TenureStore: Send {
    /// Makes `next` the tenure of a shard if its epoch is the expected one; a shard of which nothing is written is in epoch 0. It may
    /// take a while, but has an end.
    fn compare_and_swap(&mut self, shard: ShardId, expected: Epoch, next: Tenure) -> Swap;
}
