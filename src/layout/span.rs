//! A range of a chunk that belongs to one parameter group.
//!
//! Invariant: the spans of a chunk are sorted, disjoint and cover it.

/// A range of elements of a chunk and the parameter group whose settings apply to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First element, counted from the chunk's start.
    pub start: u32,
    /// Number of elements.
    pub len: u32,
    /// Index of the parameter group.
    pub group: u16,
}
