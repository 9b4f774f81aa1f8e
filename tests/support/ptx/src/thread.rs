//! One thread: its registers and what an instruction does to them.
//!
//! Invariant: a register never holds bits beyond the width of what was put into it.

use crate::{
    Cause, Memory,
    instruction::{Instruction, Integer, Operation, Source, Space, Special, Type},
    number,
    shared::Shared,
};

/// Where a thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Past the barrier before the instruction of this index.
    AtBarrier(usize),
    /// Past the shuffle before the instruction of this index.
    AtShuffle(usize),
    Done,
}

pub(crate) struct Thread {
    pub(crate) state: State,
    /// The instruction that it runs next.
    pub(crate) next: usize,
    /// Its index, its block's, and how many there are of each.
    pub(crate) ids: [u64; 4],
    pub(crate) registers: Vec<u64>,
}

impl Thread {
    #[inline]
    pub(crate) fn value(&self, source: Source) -> u64 {
        match source {
            Source::Register(register) => self.registers[register as usize],
            Source::Immediate(value) => value,
            Source::Special(Special::Thread) => self.ids[0],
            Source::Special(Special::Block) => self.ids[1],
            Source::Special(Special::Threads) => self.ids[2],
            Source::Special(Special::Blocks) => self.ids[3],
        }
    }

    /// Anything but a branch, a barrier, a shuffle and a return.
    #[inline]
    pub(crate) fn step(
        &mut self,
        instruction: &Instruction,
        memory: &mut Memory,
        shared: &mut Shared,
        arguments: &[u64],
    ) -> Result<(), Cause> {
        let [a, b, c] = [0, 1, 2].map(|index| self.value(instruction.sources[index]));
        let result = match instruction.operation {
            Operation::Move(kind) => a & kind.mask(),
            Operation::Integer(operation, kind) => integer(operation, kind, a, b),
            Operation::MultiplyWide => (a & 0xFFFF_FFFF) * (b & 0xFFFF_FFFF),
            Operation::ExtractBits => extract_bits(a, b, c),
            Operation::Single(operation, rounding) => number::single(operation, rounding, a, b),
            Operation::Double(operation) => number::double(operation, a, b),
            Operation::NegateSingle => (a ^ 0x8000_0000) & 0xFFFF_FFFF,
            Operation::Compare(comparison, kind) => u64::from(number::compare(comparison, kind, a, b)),
            Operation::Select(kind) => kind.mask() & if c == 1 { a } else { b },
            Operation::Convert(conversion) => number::convert(conversion, a),
            Operation::LoadParameter(kind) => arguments[a as usize] & kind.mask(),
            Operation::Unpack(bits) => {
                let mask = (1 << bits) - 1;
                self.registers[instruction.targets[1] as usize] = a >> bits & mask;
                a & mask
            }
            Operation::AtomicAdd(kind) => {
                let address = a.wrapping_add(instruction.offset);
                let [old, ..] = memory.load(address, kind.size, 1)?;
                memory.store(address, kind.size, &[old.wrapping_add(b)])?;
                old
            }
            Operation::Load(space, kind) => {
                let address = a.wrapping_add(instruction.offset);
                let values = match space {
                    Space::Global => memory.load(address, kind.size, instruction.width)?,
                    Space::Shared => shared.load(self.ids[0] as u32, address, kind.size, instruction.width)?,
                };
                for (target, value) in instruction.targets.iter().zip(values).take(instruction.width) {
                    self.registers[*target as usize] = value;
                }
                return Ok(());
            }
            Operation::Store(space, kind) => return self.store(instruction, space, kind, memory, shared),
            Operation::Branch(_) | Operation::Barrier | Operation::ShuffleDown | Operation::Return => {
                unreachable!("the machine runs these itself")
            }
        };
        self.registers[instruction.targets[0] as usize] = result;
        Ok(())
    }

    fn store(
        &self,
        instruction: &Instruction,
        space: Space,
        kind: Type,
        memory: &mut Memory,
        shared: &mut Shared,
    ) -> Result<(), Cause> {
        let address = self.value(instruction.sources[0]).wrapping_add(instruction.offset);
        let values = [1, 2, 3, 4].map(|index| self.value(instruction.sources[index]));
        let values = &values[..instruction.width];
        match space {
            Space::Global => memory.store(address, kind.size, values),
            Space::Shared => shared.store(self.ids[0] as u32, address, kind.size, values),
        }
    }
}

/// The register is cut to the type first: it may be wider than the operation.
fn integer(operation: Integer, kind: Type, a: u64, b: u64) -> u64 {
    let (mask, bits) = (kind.mask(), 8 * kind.size as u64);
    let shift = b & 0xFFFF_FFFF;
    let result = match operation {
        Integer::Add => a.wrapping_add(b),
        Integer::Subtract => a.wrapping_sub(b),
        Integer::And => a & b,
        Integer::Or => a | b,
        Integer::Xor => a ^ b,
        Integer::Not => !a,
        Integer::Negate => a.wrapping_neg(),
        Integer::ShiftLeft if shift < bits => a << shift,
        Integer::ShiftRight if shift < bits => (a & mask) >> shift,
        Integer::ShiftLeft | Integer::ShiftRight => 0,
        Integer::Minimum => (a & mask).min(b & mask),
    };
    result & mask
}

/// `bfe.u32`: `len` bits from bit `start` on.
fn extract_bits(value: u64, start: u64, len: u64) -> u64 {
    let (start, len) = (start & 0xFF, len & 0xFF);
    let value = value & 0xFFFF_FFFF;
    let shifted = if start < 32 { value >> start } else { 0 };
    if len < 32 { shifted & ((1 << len) - 1) } else { shifted }
}
