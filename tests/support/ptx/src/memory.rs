//! Device memory: allocations with addresses of their own.
//!
//! Invariant: between two allocations lie at least [`GAP`] bytes that belong to nobody, so an access past an end never lands in
//! another; a byte is read only after it was written, unless others write there too; addresses are never given twice.

use std::{collections::BTreeMap, fmt};

use crate::Cause;

const FIRST_ADDRESS: u64 = 0x7000_0000_0000;
/// What `cuMemAlloc` promises.
const ALIGNMENT: u64 = 256;
const GAP: u64 = 4096;

/// The memory of one device.
#[derive(Debug)]
pub struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    next: u64,
    limit: usize,
    used: usize,
}

/// Bytes of an allocation that others than the device reach too, as a NIC does.
pub trait SharedBytes: fmt::Debug + Send {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies out of them; the range was checked.
    fn read(&self, at: usize, out: &mut [u8]);

    /// Copies into them; the range was checked.
    fn write(&mut self, at: usize, bytes: &[u8]);
}

#[derive(Debug)]
enum Allocation {
    Own { bytes: Vec<u8>, written: Vec<bool> },
    Shared(Box<dyn SharedBytes>),
}

impl Allocation {
    fn len(&self) -> usize {
        match self {
            Allocation::Own { bytes, .. } => bytes.len(),
            Allocation::Shared(shared) => shared.len(),
        }
    }

    fn write(&mut self, at: usize, from: &[u8]) {
        match self {
            Allocation::Own { bytes, written } => {
                bytes[at..at + from.len()].copy_from_slice(from);
                written[at..at + from.len()].fill(true);
            }
            Allocation::Shared(shared) => shared.write(at, from),
        }
    }

    /// False if one of the bytes was never written.
    fn read(&self, at: usize, out: &mut [u8]) -> bool {
        match self {
            Allocation::Own { bytes, written } => {
                out.copy_from_slice(&bytes[at..at + out.len()]);
                written[at..at + out.len()].iter().all(|written| *written)
            }
            Allocation::Shared(shared) => {
                shared.read(at, out);
                true
            }
        }
    }
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::new(1 << 30)
    }
}

impl Memory {
    /// A device that has `limit` bytes.
    pub fn new(limit: usize) -> Memory {
        Memory { allocations: BTreeMap::new(), next: FIRST_ADDRESS, limit, used: 0 }
    }

    /// New memory, none of it written yet, at a multiple of 256; `None` if the device has not so much left.
    pub fn allocate(&mut self, bytes: usize) -> Option<u64> {
        if bytes > self.limit - self.used {
            return None;
        }
        let address = self.next;
        self.next = (address + bytes as u64 + GAP).next_multiple_of(ALIGNMENT);
        self.used += bytes;
        self.allocations.insert(address, Allocation::Own { bytes: vec![0; bytes], written: vec![false; bytes] });
        Some(address)
    }

    /// Puts memory that others reach too at an address that is nobody's here; false if the device has not so much left.
    pub fn put_shared(&mut self, address: u64, shared: Box<dyn SharedBytes>) -> bool {
        let fits = shared.len() <= self.limit - self.used;
        if fits {
            self.used += shared.len();
            self.allocations.insert(address, Allocation::Shared(shared));
        }
        fits
    }

    /// Gives memory back; false if no allocation begins there.
    pub fn free(&mut self, address: u64) -> bool {
        let allocation = self.allocations.remove(&address);
        self.used -= allocation.as_ref().map_or(0, Allocation::len);
        allocation.is_some()
    }

    /// Bytes that are not allocated.
    pub fn bytes_left(&self) -> usize {
        self.limit - self.used
    }

    /// Copies from the host.
    ///
    /// # Errors
    ///
    /// [`Cause::OutOfBounds`].
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Cause> {
        let (allocation, at) = self.find_mut(address, bytes.len())?;
        allocation.write(at, bytes);
        Ok(())
    }

    /// Sets every byte of a range.
    ///
    /// # Errors
    ///
    /// [`Cause::OutOfBounds`].
    pub fn fill(&mut self, address: u64, value: u8, bytes: usize) -> Result<(), Cause> {
        let (allocation, at) = self.find_mut(address, bytes)?;
        allocation.write(at, &vec![value; bytes]);
        Ok(())
    }

    /// Copies to the host.
    ///
    /// # Errors
    ///
    /// [`Cause::OutOfBounds`], or [`Cause::Unwritten`] if one of the bytes was never written.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Cause> {
        let (allocation, at) = self.find(address, out.len())?;
        if allocation.read(at, out) { Ok(()) } else { Err(Cause::Unwritten { address, bytes: out.len() }) }
    }

    /// Loads `size` bytes at each of `width` places, as a kernel does: all or none, aligned as one access.
    pub(crate) fn load(&self, address: u64, size: usize, width: usize) -> Result<[u64; 4], Cause> {
        let bytes = size * width;
        if !address.is_multiple_of(bytes as u64) {
            return Err(Cause::Misaligned { address, bytes });
        }
        let mut buffer = [0; 32];
        self.read(address, &mut buffer[..bytes])?;
        let mut values = [0; 4];
        for (value, bytes) in values.iter_mut().zip(buffer[..bytes].chunks_exact(size)) {
            *value = little_endian(bytes);
        }
        Ok(values)
    }

    pub(crate) fn store(&mut self, address: u64, size: usize, values: &[u64]) -> Result<(), Cause> {
        let bytes = size * values.len();
        if !address.is_multiple_of(bytes as u64) {
            return Err(Cause::Misaligned { address, bytes });
        }
        let mut buffer = [0; 32];
        for (bytes, value) in buffer.chunks_exact_mut(size).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        self.write(address, &buffer[..bytes])
    }

    fn find(&self, address: u64, bytes: usize) -> Result<(&Allocation, usize), Cause> {
        let outside = Cause::OutOfBounds { address, bytes };
        let Some((start, allocation)) = self.allocations.range(..=address).next_back() else { return Err(outside) };
        let at = (address - start) as usize;
        let inside = at.checked_add(bytes).is_some_and(|end| end <= allocation.len());
        if inside { Ok((allocation, at)) } else { Err(outside) }
    }

    fn find_mut(&mut self, address: u64, bytes: usize) -> Result<(&mut Allocation, usize), Cause> {
        let outside = Cause::OutOfBounds { address, bytes };
        let Some((start, allocation)) = self.allocations.range_mut(..=address).next_back() else { return Err(outside) };
        let at = (address - start) as usize;
        let inside = at.checked_add(bytes).is_some_and(|end| end <= allocation.len());
        if inside { Ok((allocation, at)) } else { Err(outside) }
    }
}

pub(crate) fn little_endian(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allocation_ends_where_it_ends() {
        let mut memory = Memory::new(100);
        let [first, second] = [40, 60].map(|bytes| memory.allocate(bytes).unwrap());
        assert_eq!((memory.allocate(1), memory.bytes_left()), (None, 0));
        memory.write(first, &[1; 40]).unwrap();
        assert_eq!(memory.write(first + 39, &[1; 2]), Err(Cause::OutOfBounds { address: first + 39, bytes: 2 }));
        assert_eq!(memory.load(first + 2, 4, 1), Err(Cause::Misaligned { address: first + 2, bytes: 4 }));
        assert_eq!(memory.load(first + 8, 4, 4), Err(Cause::Misaligned { address: first + 8, bytes: 16 }));
        assert_eq!(memory.load(second, 4, 1), Err(Cause::Unwritten { address: second, bytes: 4 }));
        memory.store(second, 4, &[7, 8]).unwrap();
        assert_eq!(memory.load(second, 4, 2).unwrap(), [7, 8, 0, 0]);
        assert!(memory.free(first) && !memory.free(first) && !memory.free(second + 1));
        assert_eq!(memory.load(first, 4, 1), Err(Cause::OutOfBounds { address: first, bytes: 4 }));
    }
}
