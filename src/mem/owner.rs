//! The process that something belongs to: `fork` copies memory, but neither threads nor what is at the other end of a descriptor.
//!
//! Invariant: what was made before a fork belongs to the parent alone.

/// Remembers in which process it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    /// This process.
    pub fn here() -> Owner {
        Owner(std::process::id())
    }

    /// Whether this is the process in which it was made, and no copy of that.
    pub fn is_here(self) -> bool {
        self == Owner::here()
    }

    /// Its number.
    pub fn process(self) -> u32 {
        self.0
    }
}
