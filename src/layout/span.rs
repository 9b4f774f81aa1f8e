//! A span: a run of elements of one chunk that share hyper-parameters.
//!
//! Invariant: the spans of a chunk are in order, do not overlap and leave no gap, so together they are the chunk.

use serde::{Deserialize, Serialize};

/// Elements `[start, start + len)` of a chunk, counted from the chunk's own first element, and the parameter group whose
/// learning rate and weight decay they take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// First element, relative to the chunk.
    pub start: u32,
    /// Number of elements.
    pub len: u32,
    /// Index of the parameter group; 0 is the default group.
    pub group: u16,
}

impl Span {
    /// One past the last element, relative to the chunk.
    pub const fn end(self) -> u32 {
        self.start + self.len
    }
}
