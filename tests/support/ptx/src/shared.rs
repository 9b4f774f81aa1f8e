//! A block's shared memory, with the last accesses to each byte.
//!
//! Invariant: between two barriers a byte is either read by any number of threads or touched by one alone; anything else is a
//! race, whichever order the interpreter happened to choose.

use crate::{Cause, memory::little_endian};

/// Reader of a byte that more than one thread has read since the last barrier.
const MANY: u32 = u32::MAX;

#[derive(Clone, Copy, Default)]
struct Byte {
    value: u8,
    /// The barrier count (from 1) at the last write and the last read; 0 for none.
    written: u32,
    read: u32,
    writer: u32,
    reader: u32,
}

pub(crate) struct Shared {
    bytes: Vec<Byte>,
    /// Barriers passed, and one.
    pub(crate) turn: u32,
}

impl Shared {
    pub(crate) fn new(bytes: usize) -> Shared {
        Shared { bytes: vec![Byte::default(); bytes], turn: 1 }
    }

    fn place(&self, address: u64, bytes: usize) -> Result<usize, Cause> {
        if !address.is_multiple_of(bytes as u64) {
            return Err(Cause::Misaligned { address, bytes });
        }
        let end = address.checked_add(bytes as u64).filter(|end| *end <= self.bytes.len() as u64);
        end.map(|_| address as usize).ok_or(Cause::OutOfBounds { address, bytes })
    }

    pub(crate) fn load(&mut self, thread: u32, address: u64, size: usize, width: usize) -> Result<[u64; 4], Cause> {
        let at = self.place(address, size * width)?;
        let mut buffer = [0; 32];
        for (index, byte) in self.bytes[at..at + size * width].iter_mut().enumerate() {
            if byte.written == 0 {
                return Err(Cause::Unwritten { address, bytes: size * width });
            }
            if byte.written == self.turn && byte.writer != thread {
                return Err(Cause::Race { address: address + index as u64 });
            }
            byte.reader = if byte.read == self.turn && byte.reader != thread { MANY } else { thread };
            byte.read = self.turn;
            buffer[index] = byte.value;
        }
        let mut values = [0; 4];
        for (value, bytes) in values.iter_mut().zip(buffer[..size * width].chunks_exact(size)) {
            *value = little_endian(bytes);
        }
        Ok(values)
    }

    pub(crate) fn store(&mut self, thread: u32, address: u64, size: usize, values: &[u64]) -> Result<(), Cause> {
        let at = self.place(address, size * values.len())?;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes().into_iter().take(size));
        for (index, value) in bytes.enumerate() {
            let byte = &mut self.bytes[at + index];
            let by_another = byte.written == self.turn && byte.writer != thread;
            if by_another || (byte.read == self.turn && byte.reader != thread) {
                return Err(Cause::Race { address: address + index as u64 });
            }
            *byte = Byte { value, written: self.turn, writer: thread, ..*byte };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_must_lie_between_two_threads() {
        let mut shared = Shared::new(8);
        assert_eq!(shared.load(0, 0, 4, 1), Err(Cause::Unwritten { address: 0, bytes: 4 }));
        shared.store(0, 0, 4, &[5]).unwrap();
        assert_eq!(shared.load(0, 0, 4, 1).unwrap()[0], 5);
        assert_eq!(shared.load(1, 0, 4, 1), Err(Cause::Race { address: 0 }));
        shared.turn += 1;
        assert!(shared.load(1, 0, 4, 1).is_ok() && shared.load(2, 0, 4, 1).is_ok());
        assert_eq!(shared.store(1, 0, 4, &[6]), Err(Cause::Race { address: 0 }));
        shared.turn += 1;
        assert!(shared.store(1, 0, 4, &[6]).is_ok());
        assert_eq!(shared.store(0, 8, 4, &[6]), Err(Cause::OutOfBounds { address: 8, bytes: 4 }));
    }
}
