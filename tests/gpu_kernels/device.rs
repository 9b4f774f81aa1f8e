//! A device of the interpreter: arrays in its memory, and batches launched on it.

use std::sync::{Arc, LazyLock};

use gradwire::{
    optim::gpu::{Batch, PTX},
    types::Dtype,
};
use gradwire_ptx::{Fault, Function, Launch, Memory, Module};

/// The committed PTX, parsed once.
pub static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(PTX).expect("the interpreter knows our PTX"));

/// Far above what the largest case here takes (some 10 million).
const INSTRUCTIONS_MAX: u64 = 200_000_000;

#[derive(Default)]
pub struct Device {
    pub memory: Memory,
}

/// An array in device memory whose last byte is the last of its allocation, and whose first is `lead` bytes after the
/// allocation's first: nobody may touch the lead, and nobody can touch what comes after.
#[derive(Clone, Copy, Debug)]
pub struct Array {
    pub address: u64,
    pub bytes: usize,
    lead: usize,
}

impl Device {
    /// An array that nobody has written.
    pub fn reserve(&mut self, bytes: usize, lead: usize) -> Array {
        let base = self.memory.allocate(lead + bytes).expect("the tests' arrays fit");
        Array { address: base + lead as u64, bytes, lead }
    }

    pub fn upload(&mut self, bytes: &[u8], lead: usize) -> Array {
        let array = self.reserve(bytes.len(), lead);
        self.memory.write(array.address, bytes).unwrap();
        array
    }

    pub fn upload_f32(&mut self, values: &[f32], lead: usize) -> Array {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.upload(&bytes, lead)
    }

    /// What an array holds.
    pub fn download(&self, array: Array) -> Vec<u8> {
        self.read(array).expect("a kernel writes all of what it is to write, and nothing else")
    }

    /// The same, or what a kernel did wrong: bytes that it did not write, or bytes that it wrote before the array's first.
    pub fn read(&self, array: Array) -> Result<Vec<u8>, String> {
        if (1..=array.lead as u64).any(|before| self.memory.read(array.address - before, &mut [0]).is_ok()) {
            return Err(format!("written before the first byte at {:#x}", array.address));
        }
        let mut bytes = vec![0; array.bytes];
        self.memory.read(array.address, &mut bytes).map_err(|cause| cause.to_string())?;
        Ok(bytes)
    }

    /// Runs a batch on as many blocks as it would have on a card with this many multiprocessors.
    pub fn run(&mut self, batch: &Batch, multiprocessors: u32) -> Result<u64, Fault> {
        let name = batch.launch(0, multiprocessors).name;
        self.run_function(MODULE.function(name).expect("the PTX has every kernel"), batch, multiprocessors)
    }

    /// The same with another function in the kernel's place.
    pub fn run_function(
        &mut self,
        function: &Arc<Function>,
        batch: &Batch,
        multiprocessors: u32,
    ) -> Result<u64, Fault> {
        let mut table = vec![0; batch.table_len()];
        batch.write_table(&mut table);
        let table = self.upload(&table, 0).address;
        let launch = batch.launch(table, multiprocessors);
        assert_eq!(function.name(), launch.name);
        let arguments = [launch.table, u64::from(launch.segments), u64::from(launch.tiles)];
        let shape = Launch { grid: launch.grid, block: launch.block, instructions_max: INSTRUCTIONS_MAX };
        Ok(function.launch(&mut self.memory, shape, &arguments)?.instructions)
    }
}

pub fn f32_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Elements of a wire format as the bits of f32, every NaN as one.
pub fn classes(dtype: Dtype, bytes: &[u8]) -> Vec<u32> {
    let values = (0..bytes.len() / dtype.size()).map(|index| gradwire::optim::oracle::decode(dtype, bytes, index));
    values.map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}
