//! A PTX interpreter: runs gradwire's GPU kernels where there is no GPU, so that tests can hold every bit of them against the
//! scalar oracle. It knows the instructions that our compiled kernels contain and no others; one that it does not know is an
//! error that names the line.
//!
//! Arithmetic is exact: f32 and f64 as IEEE 754 has them (NaN is the canonical one, as on a card), f16 rounded to nearest even.
//! Checked are: alignment and bounds of every access, reads of memory that nobody wrote, two threads of a block that touch one
//! byte of shared memory without a barrier in between, barriers and shuffles that part of the threads miss, and the number of
//! instructions.
//!
//! Invariant: a launch that ends well did nothing that the PTX manual leaves undefined, as far as the checks above reach;
//! blocks run one after another, so races between blocks in global memory are beyond them.
#![forbid(unsafe_code)]

mod decode;
mod instruction;
mod lexer;
mod machine;
mod memory;
mod number;
mod parse;
mod shared;
mod thread;

use std::fmt;

pub use machine::{Launch, Statistics};
pub use memory::{Memory, SharedBytes};
pub use parse::{Function, Module};

/// Why a text is not a module that can be run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ParseError {
    /// Line of the text, counted from 1.
    pub line: u32,
    /// What is wrong with it.
    pub message: String,
}

/// What stopped a launch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The bytes are not all inside one live allocation.
    #[error("{bytes} bytes at {address:#x} are outside every allocation")]
    OutOfBounds {
        /// Where the access begins.
        address: u64,
        /// Its length.
        bytes: usize,
    },
    /// The address is not a multiple of the access's size.
    #[error("an access of {bytes} bytes at {address:#x}, which is not a multiple of that")]
    Misaligned {
        /// Where the access begins.
        address: u64,
        /// Its length.
        bytes: usize,
    },
    /// Nobody wrote these bytes before.
    #[error("{bytes} bytes at {address:#x} are read, and were not all written before")]
    Unwritten {
        /// Where the access begins.
        address: u64,
        /// Its length.
        bytes: usize,
    },
    /// Two threads of a block, no barrier between their accesses, at least one of which writes.
    #[error("shared byte {address:#x} is touched by another thread too, with no barrier in between")]
    Race {
        /// The byte in the block's shared memory.
        address: u64,
    },
    /// Some threads of a block wait at a barrier, others have ended or wait at another one.
    #[error("not all threads of the block come to this barrier")]
    DivergentBarrier,
    /// Some lanes of a warp wait at a shuffle and others do not.
    #[error("not all lanes of the warp come to this shuffle")]
    DivergentShuffle,
    /// More instructions than the launch was given: an endless loop?
    #[error("more than {0} instructions")]
    TooManyInstructions(u64),
    /// The launch itself is wrong.
    #[error("{0}")]
    Launch(String),
}

/// A launch that failed: what, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Name of the kernel.
    pub kernel: String,
    /// Line of the module's text; 0 if the launch never began.
    pub line: u32,
    /// Index of the block in the grid.
    pub block: u32,
    /// Index of the thread in the block.
    pub thread: u32,
    /// What happened.
    pub cause: Cause,
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { kernel, line, block, thread, cause } = self;
        write!(out, "{kernel}, line {line}, block {block}, thread {thread}: {cause}")
    }
}

impl std::error::Error for Fault {}
