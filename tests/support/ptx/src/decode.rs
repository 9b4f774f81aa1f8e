//! Opcode text to operation.
//!
//! Invariant: every modifier of an opcode is understood or refused; none is skipped, except those that change no result
//! (`bra.uni`, and `.aligned`, which our kernels do not use).

use crate::instruction::{Comparison, Conversion, Float, Integer, Operation, Rounding, Space, Type};

/// How many operands the text gives, and which of them are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) targets: usize,
    pub(crate) sources: usize,
}

/// The operation that an opcode names, and the length of the vector that it moves.
pub(crate) fn operation(opcode: &str) -> Option<(Operation, usize)> {
    let (parts, width) = match opcode.split('.').collect::<Vec<_>>() {
        parts if parts.contains(&"v2") => (parts.into_iter().filter(|part| *part != "v2").collect(), 2),
        parts if parts.contains(&"v4") => (parts.into_iter().filter(|part| *part != "v4").collect(), 4),
        parts => (parts, 1),
    };
    let operation = arithmetic(&parts).or_else(|| movement(&parts))?;
    let vectors = matches!(operation, Operation::Load(..) | Operation::Store(..));
    (width == 1 || vectors).then_some((operation, width))
}

fn arithmetic(parts: &[&str]) -> Option<Operation> {
    Some(match *parts {
        ["mul", "wide", "u32"] => Operation::MultiplyWide,
        ["bfe", "u32"] => Operation::ExtractBits,
        ["neg", "f32"] => Operation::NegateSingle,
        [name, rounding, "f32"] if name != "cvt" && name != "setp" => match (float(name)?, rounding) {
            (float, "rn") => Operation::Single(float, Rounding::Nearest),
            (float @ (Float::Add | Float::Multiply), "rz") => Operation::Single(float, Rounding::Zero),
            _ => return None,
        },
        ["add", "rn", "f64"] => Operation::Double(Float::Add),
        ["mul", "rn", "f64"] => Operation::Double(Float::Multiply),
        ["setp", comparison, kind] => Operation::Compare(self::comparison(comparison)?, Type::named(kind)?),
        ["selp", kind] => Operation::Select(Type::named(kind)?),
        ["cvt", "f32", "f16"] => Operation::Convert(Conversion::F16ToF32),
        ["cvt", "rn", "f16", "f32"] => Operation::Convert(Conversion::F32ToF16),
        ["cvt", "f64", "f32"] => Operation::Convert(Conversion::F32ToF64),
        ["cvt", to @ ("u16" | "u32" | "u64"), from @ ("u16" | "u32" | "u64")] => {
            Operation::Convert(Conversion::Integer(Type::named(to)?.size.min(Type::named(from)?.size)))
        }
        [name, kind] => {
            let kind = Type::named(kind).filter(|kind| !kind.is_float())?;
            Operation::Integer(integer(name, kind)?, kind)
        }
        _ => return None,
    })
}

fn movement(parts: &[&str]) -> Option<Operation> {
    let space = |name| match name {
        "global" => Some(Space::Global),
        "shared" => Some(Space::Shared),
        _ => None,
    };
    Some(match *parts {
        ["mov", kind] => Operation::Move(Type::named(kind)?),
        ["ld", "param", kind] => Operation::LoadParameter(Type::named(kind)?),
        ["ld", from, kind] => Operation::Load(space(from)?, Type::named(kind)?),
        ["st", to, kind] => Operation::Store(space(to)?, Type::named(kind)?),
        // A generic address: no kernel makes one of shared memory, so it is one of global memory.
        ["atom", "add", "u64"] | ["atom", "global", "add", "u64"] => Operation::AtomicAdd(Type::named("u64")?),
        ["bra"] | ["bra", "uni"] => Operation::Branch(usize::MAX),
        ["bar", "sync"] => Operation::Barrier,
        ["shfl", "sync", "down", "b32"] => Operation::ShuffleDown,
        ["ret"] => Operation::Return,
        _ => return None,
    })
}

fn float(name: &str) -> Option<Float> {
    Some(match name {
        "add" => Float::Add,
        "mul" => Float::Multiply,
        "div" => Float::Divide,
        "sqrt" => Float::Root,
        _ => return None,
    })
}

fn comparison(name: &str) -> Option<Comparison> {
    Some(match name {
        "eq" => Comparison::Equal,
        "ne" => Comparison::NotEqual,
        "lt" => Comparison::Less,
        "le" => Comparison::LessOrEqual,
        "gt" => Comparison::Greater,
        "ge" => Comparison::GreaterOrEqual,
        _ => return None,
    })
}

/// Operations on bits and on numbers; what would need the sign of a number that our kernels never shift or compare is left out.
fn integer(name: &str, kind: Type) -> Option<Integer> {
    use crate::instruction::Meaning;
    Some(match (name, kind.meaning) {
        ("add", Meaning::Signed | Meaning::Unsigned) => Integer::Add,
        ("sub", Meaning::Signed | Meaning::Unsigned) => Integer::Subtract,
        ("neg", Meaning::Signed) => Integer::Negate,
        ("min", Meaning::Unsigned) => Integer::Minimum,
        ("and", Meaning::Bits | Meaning::Predicate) => Integer::And,
        ("or", Meaning::Bits | Meaning::Predicate) => Integer::Or,
        ("xor", Meaning::Bits | Meaning::Predicate) => Integer::Xor,
        ("not", Meaning::Bits | Meaning::Predicate) => Integer::Not,
        ("shl", Meaning::Bits) => Integer::ShiftLeft,
        ("shr", Meaning::Unsigned) => Integer::ShiftRight,
        _ => return None,
    })
}

/// The operands of an operation, in the text's order: those written come first (a store's address is read).
pub(crate) fn shape(operation: Operation) -> Shape {
    let (targets, sources) = match operation {
        Operation::Unpack(_) => (2, 1),
        Operation::Move(_) | Operation::Convert(_) | Operation::NegateSingle => (1, 1),
        Operation::Integer(Integer::Not | Integer::Negate, _) | Operation::Single(Float::Root, _) => (1, 1),
        Operation::Integer(..) | Operation::MultiplyWide | Operation::Compare(..) => (1, 2),
        Operation::Single(..) | Operation::Double(_) | Operation::AtomicAdd(_) => (1, 2),
        Operation::ExtractBits | Operation::Select(_) => (1, 3),
        Operation::Load(..) | Operation::LoadParameter(_) => (1, 1),
        Operation::Store(..) => (0, 2),
        Operation::ShuffleDown => (1, 4),
        Operation::Branch(_) | Operation::Return => (0, 0),
        Operation::Barrier => (0, 1),
    };
    Shape { targets, sources }
}
