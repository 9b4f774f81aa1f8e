//! A checkpoint as servers write it, and its ceiling: the same number of bytes in as many files, written from one end to the
//! other and synced, in the same folder.
//!
//! Invariant: what was written for a measurement is gone when it is over.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Instant,
};

use super::Measured;
use crate::{
    Error, Result,
    checkpoint::{self, ChunkState, JobState, Manifest},
    consistency::Consistency,
    layout::{ALIGNMENT, Layout, LayoutOptions, TensorSpec},
    mem::{Lease, Region, RegionOptions},
    observe::Usage,
    optim::OptimizerConfig,
    types::{Clock, ShardId},
};

/// Bytes of one write of the ceiling: large enough that calls cost nothing, and a multiple of every disk's block.
const WRITE_BYTES: usize = 4 << 20;

/// What a file's length and address must be multiples of to pass the page cache by.
const BLOCK: u64 = 4096;

/// A folder of this benchmark's own, removed with all that is in it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one in `parent`.
    ///
    /// # Errors
    ///
    /// [`Error::File`].
    pub fn new(parent: &Path) -> Result<Scratch> {
        let path = parent.join(format!("gradwire-bench-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| Error::file("create", &path, error))?;
        Ok(Scratch(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whoever runs a benchmark sees what is left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn took(start: Instant, used: Usage, bytes: u64) -> Measured {
    let elapsed_ns = start.elapsed().as_nanos() as u64;
    Measured {
        bytes,
        rounds: 1,
        rounds_all: 1,
        elapsed_ns,
        cpu_ns: Usage::now().since(used).cpu_ns,
        latency_ns_p50: elapsed_ns,
        latency_ns_p99: elapsed_ns,
        latency_ns_p999: elapsed_ns,
    }
}

/// The state of a model in the servers' memory.
pub struct State {
    layout: Layout,
    optimizer: OptimizerConfig,
    consistency: Consistency,
    /// One value of each array for every element; shards read their own ranges.
    arrays: Vec<Vec<f32>>,
}

impl State {
    /// State of about `bytes` (parameters and the optimizer's arrays, in f32) on `servers` servers with a shard each.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is less than a parameter for each server.
    pub fn new(bytes: u64, servers: u16, chunk_elements: u32, optimizer: OptimizerConfig) -> Result<State> {
        let arrays = 1 + optimizer.kind.state_slots();
        let elements = bytes / (4 * arrays as u64) / ALIGNMENT * ALIGNMENT;
        let chunk_elements = u64::from(chunk_elements).min((elements / u64::from(servers)).next_multiple_of(ALIGNMENT));
        if elements < u64::from(servers) * ALIGNMENT {
            return Err(Error::Config(format!("--bytes {bytes}: that is no chunk for each of {servers} servers")));
        }
        let options = LayoutOptions { chunk_elements: chunk_elements as u32, shards: servers };
        let layout = Layout::build(&[vec![TensorSpec::new("model", [elements])]], options)?;
        let value = |i: usize| (i % 1021) as f32 * 1e-3;
        let arrays = (0..arrays).map(|_| (0..elements as usize).map(value).collect()).collect();
        Ok(State { layout, optimizer, consistency: Consistency::Bsp, arrays })
    }

    /// Writes it as the checkpoint of `clock` in `dir`: every shard by a thread, as by so many servers, then the manifest. The
    /// bytes that count are those of the files.
    ///
    /// # Errors
    ///
    /// [`Error::File`], [`Error::Checkpoint`].
    pub fn write(&self, dir: &Path, clock: Clock) -> Result<Measured> {
        let (start, used) = (Instant::now(), Usage::now());
        checkpoint::begin(dir)?;
        let shard = |number: usize| {
            let states = self.layout.shards[number].iter().map(|id| {
                let chunk = self.layout.chunk(*id);
                let range = chunk.start as usize..chunk.start as usize + chunk.len as usize;
                let array = |number: usize| self.arrays.get(number).map_or(&[][..], |array| &array[range.clone()]);
                let (master, first, second) = (array(0), array(1), array(2));
                ChunkState { chunk: *id, version: 1, steps: 1, clocks: &[], master, first, second }
            });
            checkpoint::write_shard(dir, clock, ShardId(number as u16), states)
        };
        let files = std::thread::scope(|scope| {
            let running: Vec<_> =
                (0..self.layout.shards.len()).map(|number| scope.spawn(move || shard(number))).collect();
            let lost = |_| Error::JobFailed("a thread of the benchmark panicked".into());
            running.into_iter().map(|thread| thread.join().map_err(lost)?).collect::<Result<Vec<_>>>()
        })?;
        let bytes = files.iter().map(|file| file.bytes).sum();
        let json =
            |value: std::result::Result<serde_json::Value, serde_json::Error>| value.expect("numbers under text keys");
        let state = JobState {
            job: "bench".into(),
            clock,
            epoch: 0,
            consistency: self.consistency,
            seed: 0,
            optimizer: json(serde_json::to_value(&self.optimizer)),
            learning_rate: json(serde_json::to_value(self.optimizer.learning_rates())),
            live: serde_json::Value::Null,
        };
        checkpoint::commit(dir, &Manifest::new(state, &self.layout, files))?;
        Ok(took(start, used, bytes))
    }
}

/// The ceiling: `files` files of `bytes` together, each written from one end to the other by a thread and synced, then the folder
/// synced. With `direct` past the page cache, each file rounded up to whole blocks.
///
/// # Errors
///
/// [`Error::File`] naming the call; that of opening if the file system knows no direct writes.
pub fn plain_write(dir: &Path, bytes: u64, files: u16, direct: bool) -> Result<Measured> {
    let share = bytes.div_ceil(files.max(1).into());
    let buffers = (0..files.max(1)).map(|_| buffer()).collect::<Result<Vec<Lease>>>()?;
    let (start, used) = (Instant::now(), Usage::now());
    std::thread::scope(|scope| {
        let write = |(number, buffer): (usize, Lease)| {
            let path = dir.join(format!("plain-{number}"));
            scope.spawn(move || write_file(&path, buffer.bytes(), share, direct))
        };
        let running: Vec<_> = buffers.into_iter().enumerate().map(write).collect();
        let lost = |_| Error::JobFailed("a thread of the benchmark panicked".into());
        running.into_iter().try_for_each(|thread| thread.join().map_err(lost)?)
    })?;
    let sync = File::open(dir).and_then(|folder| folder.sync_all());
    sync.map_err(|error| Error::file("sync", dir, error))?;
    Ok(took(start, used, share * u64::from(files.max(1))))
}

/// Page-aligned, as direct writes want it.
fn buffer() -> Result<Lease> {
    let options = RegionOptions { name: "bench".into(), prefault: true, ..RegionOptions::default() };
    let (_, mut lease) = Region::allocate(WRITE_BYTES, &options)?;
    lease.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
    Ok(lease)
}

fn write_file(path: &Path, buffer: &[u8], bytes: u64, direct: bool) -> Result<()> {
    let failed = |call: &'static str| move |error: std::io::Error| Error::file(call, path, error);
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path);
    let mut file = opened.map_err(failed("open"))?;
    let mut left = if direct { bytes.next_multiple_of(BLOCK) } else { bytes };
    while left > 0 {
        let count = (buffer.len() as u64).min(left) as usize;
        file.write_all(&buffer[..count]).map_err(failed("write"))?;
        left -= count as u64;
    }
    file.sync_all().map_err(failed("sync"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::OptimizerKind;

    #[test]
    fn what_is_written_is_a_checkpoint_of_the_whole_state() {
        let folder = tempfile::tempdir().unwrap();
        let optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3);
        let state = State::new(1_200_000, 2, 4096, optimizer).unwrap();
        let scratch = Scratch::new(folder.path()).unwrap();
        let measured = state.write(scratch.path(), 7).unwrap();
        let found = checkpoint::find(scratch.path()).unwrap().checkpoint.unwrap();
        assert_eq!((found.clock(), found.manifest().files.len()), (7, 2));
        // 100,000 elements in three arrays, and two headers.
        assert!((1_200_000..1_210_000).contains(&measured.bytes), "{measured:?}");
        let plain = plain_write(scratch.path(), measured.bytes, 2, false).unwrap();
        assert_eq!(plain.bytes, measured.bytes.next_multiple_of(2));
        let lens: u64 = (0..2).map(|i| fs::metadata(scratch.path().join(format!("plain-{i}"))).unwrap().len()).sum();
        assert_eq!(lens, plain.bytes);
        drop(scratch);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(State::new(64, 2, 4096, OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3)).is_err());
    }
}
