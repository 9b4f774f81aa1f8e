//! What an instruction is, decoded.
//!
//! Invariant: a register holds the bits of its value in the low part of 64, the rest 0.

/// What a value's bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    Bits,
    Unsigned,
    Signed,
    Float,
    Predicate,
}

/// The type of an instruction: `.u32`, `.f64`, `.pred` …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Type {
    pub(crate) meaning: Meaning,
    /// Bytes; 1 for a predicate.
    pub(crate) size: usize,
}

impl Type {
    pub(crate) fn named(name: &str) -> Option<Type> {
        if name == "pred" {
            return Some(Type { meaning: Meaning::Predicate, size: 1 });
        }
        let meaning = match name.get(..1)? {
            "b" => Meaning::Bits,
            "u" => Meaning::Unsigned,
            "s" => Meaning::Signed,
            "f" => Meaning::Float,
            _ => return None,
        };
        let size = match &name[1..] {
            "8" => 1,
            "16" => 2,
            "32" => 4,
            "64" => 8,
            _ => return None,
        };
        Some(Type { meaning, size })
    }

    /// The low bits that a value of this type has.
    pub(crate) fn mask(self) -> u64 {
        match self.meaning {
            Meaning::Predicate => 1,
            _ => u64::MAX >> (64 - 8 * self.size),
        }
    }

    pub(crate) fn is_float(self) -> bool {
        self.meaning == Meaning::Float
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Integer {
    Add,
    Subtract,
    And,
    Or,
    Xor,
    Not,
    Negate,
    ShiftLeft,
    ShiftRight,
    Minimum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Float {
    Add,
    Multiply,
    Divide,
    Root,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Towards zero: not in our kernels, but what a wrong one would hold.
    Zero,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conversion {
    /// Between unsigned integers: cut to, or filled with zeros up to, this many bytes.
    Integer(usize),
    F16ToF32,
    F32ToF16,
    F32ToF64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Shared,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Move(Type),
    /// A value into two halves of this many bits.
    Unpack(u32),
    Integer(Integer, Type),
    /// Two 32-bit factors, a 64-bit product.
    MultiplyWide,
    ExtractBits,
    Single(Float, Rounding),
    Double(Float),
    NegateSingle,
    Compare(Comparison, Type),
    Select(Type),
    Convert(Conversion),
    Load(Space, Type),
    Store(Space, Type),
    LoadParameter(Type),
    AtomicAdd(Type),
    /// To the instruction of this index.
    Branch(usize),
    Barrier,
    ShuffleDown,
    Return,
}

/// The built-in values that kernels read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Thread,
    Block,
    Threads,
    Blocks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Register(u32),
    Immediate(u64),
    Special(Special),
}

/// A condition: the register, and the value of it with which the instruction runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(crate) register: u32,
    pub(crate) wanted: u64,
}

/// Registers that one instruction writes, or sources that it reads, at most: a vector of four, and an address.
pub(crate) const OPERANDS_MAX: usize = 5;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    pub(crate) guard: Option<Guard>,
    /// Elements of the vector that a load or a store moves; else 1.
    pub(crate) width: usize,
    pub(crate) targets: [u32; 4],
    /// In the order of the text; of a load or a store, the address first.
    pub(crate) sources: [Source; OPERANDS_MAX],
    /// Added to the address.
    pub(crate) offset: u64,
    pub(crate) line: u32,
}
