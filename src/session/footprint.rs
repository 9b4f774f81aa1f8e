//! What a job takes of memory, as sums: the server allocates by them, the rendezvous refuses by them, and `gradwire plan` prints
//! them.
//!
//! Invariant: these are the bytes that a rank allocates for its data, before they are rounded up to pages; whoever allocates takes
//! the number of slots from here.
#![forbid(unsafe_code)]

use std::path::Path;

use serde::Serialize;

use super::{DeviceChoice, JobConfig};
use crate::{
    Error, Result,
    layout::{ALIGNMENT, Layout, WorkerView},
    optim::ChunkStep,
    types::{Dtype, Rank, Role, ShardId},
};

/// Fewest landing slots that a worker can work with: one that is being read, one that is being written.
const SLOTS_MIN: u64 = 2;

/// What of a shard decides its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShardShape {
    /// Elements of all its chunks.
    pub elements: u64,
    /// How many chunks.
    pub chunks: u64,
    /// Elements of the largest.
    pub chunk_elements_max: u64,
}

/// The memory of one shard, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardMemory {
    /// Master parameters in f32; where replies are sent from them, a place of the largest chunk's size for each.
    pub master: u64,
    /// The optimizer's arrays in f32.
    pub state: u64,
    /// What gradients are summed into where that is a pass of its own.
    pub accumulator: u64,
    /// Wire copies: two a chunk, all of the largest chunk's size; one where replies are sent from the master parameters.
    pub replies: u64,
    /// Landing slots of all workers, all of the largest chunk's size.
    pub landing: u64,
    /// Slots for what the other copy of the shard sends, where there are two.
    pub replica: u64,
    /// The copy of parameters and state that a checkpoint is written from, in a job that has checkpoints; from the first one on.
    pub snapshot: u64,
    /// Landing slots of each worker.
    pub slots: u32,
}

impl ShardShape {
    /// A shard of a layout.
    pub fn of(layout: &Layout, shard: ShardId) -> ShardShape {
        let lens = || layout.shards[usize::from(shard.0)].iter().map(|id| u64::from(layout.chunk(*id).len));
        ShardShape {
            elements: lens().sum(),
            chunks: lens().count() as u64,
            chunk_elements_max: lens().max().unwrap_or(0),
        }
    }

    /// The largest shard of a model of so many parameters in one tensor that all workers have.
    pub fn even(parameters: u64, config: &JobConfig) -> ShardShape {
        let elements = parameters.next_multiple_of(ALIGNMENT);
        let chunk = (config.chunk_bytes / 4).min(elements);
        let chunks = elements.div_ceil(chunk.max(1)).div_ceil(u64::from(config.shard_count()));
        ShardShape { elements: elements.min(chunks * chunk), chunks, chunk_elements_max: chunk }
    }
}

impl ShardMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.master + self.state + self.accumulator + self.replies + self.landing + self.replica + self.snapshot
    }

    /// What of it lies in the host's memory for certain: of a shard on a GPU only what peers write and read.
    pub fn on_host(&self, device: &DeviceChoice) -> u64 {
        match device {
            DeviceChoice::Cpu => self.total(),
            _ => self.replies + self.landing + self.snapshot,
        }
    }
}

impl JobConfig {
    /// Landing slots of each worker on a shard: what the budget for landing memory gives, at least 2, at most a clock's worth.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with the sum, if there is no room for 2.
    pub fn slots(&self, shape: &ShardShape) -> Result<u32> {
        let chunk = (shape.chunk_elements_max * self.gradient_dtype.size() as u64).max(1);
        let budget = self.landing_bytes / u64::from(self.lanes_per_server());
        let seats = u64::from(self.seats());
        let fits = budget / (seats * chunk);
        if fits < SLOTS_MIN {
            return Err(Error::Config(format!(
                "landing memory of {budget} bytes a shard has no room for {SLOTS_MIN} slots x {} workers x {chunk} bytes a chunk \
                 = {} bytes: raise landing_bytes or lower chunk_bytes",
                seats,
                SLOTS_MIN * seats * chunk
            )));
        }
        Ok(fits.min(shape.chunks.max(SLOTS_MIN)).min(u64::from(u32::MAX)) as u32)
    }

    /// The memory of a shard.
    ///
    /// # Errors
    ///
    /// As [`JobConfig::slots`].
    pub fn shard_memory(&self, shape: &ShardShape) -> Result<ShardMemory> {
        let slots = self.slots(shape)?;
        let accumulates = self.accumulates() || ChunkStep::needs_accumulator(&self.optimizer);
        let array = 4 * shape.elements;
        let state = array * self.optimizer.kind.state_slots() as u64;
        let [gradient, parameter] =
            [self.gradient_dtype, self.parameter_dtype].map(|dtype| shape.chunk_elements_max * dtype.size() as u64);
        // On the processor parameters in f32 are sent from where they lie.
        let (master, copies) = match (self.parameter_dtype, &self.device) {
            (Dtype::F32, DeviceChoice::Cpu) => (shape.chunks * parameter, shape.chunks),
            _ => (array, 2 * shape.chunks),
        };
        Ok(ShardMemory {
            master,
            state,
            accumulator: if accumulates { array } else { 0 },
            replies: copies.max(1) * parameter,
            landing: u64::from(self.seats()) * u64::from(slots) * gradient,
            // For what is sent, and for what comes: a lane does one of the two and is ready for the other.
            replica: 2 * u64::from(self.replica_slots()) * 4 * shape.chunk_elements_max,
            snapshot: if self.checkpoint.dir.is_some() { array + state } else { 0 },
            slots,
        })
    }

    /// The memory of a worker that has so many elements: its gradients and its parameters.
    pub fn worker_memory(&self, elements: u64) -> u64 {
        elements * (self.gradient_dtype.size() + self.parameter_dtype.size()) as u64
    }

    /// The memory of one rank.
    ///
    /// # Errors
    ///
    /// As [`JobConfig::slots`].
    pub fn rank_memory(&self, layout: &Layout, rank: Rank) -> Result<u64> {
        match rank.role {
            Role::Worker => Ok(self.worker_memory(WorkerView::new(layout, rank.index).elements)),
            Role::Server => {
                let shards = self.first_lanes(rank).into_iter().map(|lane| self.shard_of(lane));
                shards.map(|shard| Ok(self.shard_memory(&ShardShape::of(layout, shard))?.on_host(&self.device))).sum()
            }
        }
    }

    /// Refuses a job whose ranks on one host take more memory than there is.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with the sums; as [`JobConfig::slots`].
    pub fn check_memory(&self, layout: &Layout, ranks: impl Iterator<Item = Rank>, available: u64) -> Result<()> {
        let (mut servers, mut workers) = ((0, 0), (0, 0));
        for rank in ranks {
            let (count, bytes) = if rank.role == Role::Server { &mut servers } else { &mut workers };
            *count += 1;
            *bytes += self.rank_memory(layout, rank)?;
        }
        if servers.1 + workers.1 <= available {
            return Ok(());
        }
        let first = self.shard_memory(&ShardShape::of(layout, ShardId(0)))?;
        Err(Error::Config(format!(
            "the job does not fit into this host's memory: {} servers take {} bytes and {} workers {}, together {}, and {available} \
             are available; shard 0 has {} for master parameters, {} for optimizer state, {} for sums, {} for replies and {} for {} \
             landing slots of each of {} workers{}{}: use more hosts, or lower landing_bytes",
            servers.0,
            servers.1,
            workers.0,
            workers.1,
            servers.1 + workers.1,
            first.master,
            first.state,
            first.accumulator,
            first.replies,
            first.landing,
            first.slots,
            self.seats(),
            if self.has_replicas() { ", and every shard is held twice" } else { "" },
            match first.snapshot {
                0 => String::new(),
                bytes => format!(", and {bytes} to write checkpoints from"),
            }
        )))
    }
}

/// The memory that this host has to give to new processes: what the kernel believes to be available, or the limit of this
/// process' control group where that is less; `None` if neither can be read.
pub fn memory_available() -> Option<u64> {
    let free = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_of(&text));
    let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?.to_string();
        let file = Path::new("/sys/fs/cgroup").join(path).join("memory.max");
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    });
    free.into_iter().chain(group).min()
}

fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layout::TensorSpec,
        optim::{OptimizerConfig, OptimizerKind},
    };

    fn config() -> JobConfig {
        JobConfig {
            workers: 2,
            servers: 2,
            shards_per_server: 2,
            chunk_bytes: 4096,
            landing_bytes: 2 * 2 * 3 * 2048,
            gradient_dtype: Dtype::Bf16,
            parameter_dtype: Dtype::Bf16,
            optimizer: OptimizerConfig::new(OptimizerKind::ADAMW, 1e-3),
            ..JobConfig::default()
        }
    }

    /// Ten chunks of 1024 elements and one of 16, dealt to four shards: three on the first.
    fn layout(config: &JobConfig) -> Layout {
        config.layout(&vec![vec![TensorSpec::new("t", [10_256])]; 2]).unwrap()
    }

    #[test]
    fn the_sums_are_those_of_the_parts() {
        let config = config();
        let layout = layout(&config);
        let shape = ShardShape::of(&layout, ShardId(0));
        assert_eq!(shape, ShardShape { elements: 3072, chunks: 3, chunk_elements_max: 1024 });
        let memory = config.shard_memory(&shape).unwrap();
        let wanted = ShardMemory {
            master: 12_288,
            state: 24_576,
            accumulator: 0,
            replies: 6 * 2048,
            landing: 2 * 3 * 2048,
            replica: 0,
            snapshot: 0,
            slots: 3,
        };
        assert_eq!((memory, memory.total()), (wanted, 12_288 + 24_576 + 12_288 + 12_288));
        assert_eq!(config.worker_memory(10_256), 10_256 * 4);
        // Parameters in f32 are sent from where they lie, and a chunk has one place more.
        let plain = JobConfig { parameter_dtype: Dtype::F32, ..config.clone() };
        let places = ShardMemory { master: 3 * 4096, replies: 3 * 4096, ..memory };
        assert_eq!(plain.shard_memory(&shape).unwrap(), places);
        let on_gpu = JobConfig { device: DeviceChoice::Auto, ..plain };
        assert_eq!(on_gpu.shard_memory(&shape).unwrap(), ShardMemory { replies: 6 * 4096, ..memory });
        let two_step = JobConfig { two_step: true, ..config.clone() };
        assert_eq!(two_step.shard_memory(&shape).unwrap().accumulator, 12_288);
        let mut stored = config.clone();
        stored.checkpoint.dir = Some("/checkpoints".into());
        assert_eq!(stored.shard_memory(&shape).unwrap(), ShardMemory { snapshot: 12_288 + 24_576, ..memory });
        let gpu = DeviceChoice::Gpu(Vec::new());
        assert_eq!(stored.shard_memory(&shape).unwrap().on_host(&gpu), memory.on_host(&gpu) + 12_288 + 24_576);
        let decided = JobConfig { skip_nonfinite: true, ..config.clone() };
        assert_eq!(decided.shard_memory(&shape).unwrap().accumulator, 12_288);
        assert_eq!(memory.on_host(&DeviceChoice::Cpu), memory.total());
        assert_eq!(memory.on_host(&DeviceChoice::Gpu(Vec::new())), 12_288 + 12_288);
        assert_eq!(config.rank_memory(&layout, Rank::worker(1)).unwrap(), 41_024);
        let of_shards: u64 = [0, 1]
            .map(|shard| config.shard_memory(&ShardShape::of(&layout, ShardId(shard))).unwrap().total())
            .iter()
            .sum();
        assert_eq!(config.rank_memory(&layout, Rank::server(0)).unwrap(), of_shards);
    }

    #[test]
    fn a_second_copy_is_a_whole_shard_and_its_slots() {
        let one = JobConfig { two_step: true, landing_bytes: 1 << 20, ..config() };
        let two = JobConfig { replicas: 2, two_step: false, landing_bytes: 2 << 20, ..one.clone() };
        two.validate().unwrap();
        let layout = layout(&one);
        let rank = |config: &JobConfig, server| config.rank_memory(&layout, Rank::server(server)).unwrap();
        // Slots of 1024 elements in f32 for what is sent and for what comes, for each of four lanes.
        assert_eq!(rank(&two, 0), rank(&one, 0) + rank(&one, 1) + 4 * 2 * 8 * 4096);
        assert_eq!(rank(&two, 0), rank(&two, 1));
    }

    #[test]
    fn a_plan_without_a_layout_agrees_with_the_largest_shard() {
        for parameters in [1, 16, 1000, 1024, 10_256, 1 << 20] {
            let config = config();
            let layout = config.layout(&vec![vec![TensorSpec::new("t", [parameters])]; 2]).unwrap();
            let shapes = (0..4).map(|shard| ShardShape::of(&layout, ShardId(shard)));
            let largest = shapes.max_by_key(|shape| (shape.chunks, shape.elements)).unwrap();
            let even = ShardShape::even(parameters, &config);
            assert_eq!(even.chunks, largest.chunks, "{parameters}");
            assert!(even.elements >= largest.elements && even.elements - largest.elements < 1024, "{parameters}");
            assert_eq!(even.chunk_elements_max, largest.chunk_elements_max, "{parameters}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_sums() {
        let config = config();
        let layout = layout(&config);
        let shape = ShardShape::of(&layout, ShardId(0));
        let tight = JobConfig { landing_bytes: 2 * 2 * 2 * 2048 - 1, ..config.clone() };
        let text = tight.slots(&shape).unwrap_err().to_string();
        assert!(text.contains("2 slots x 2 workers x 2048 bytes a chunk = 8192"), "{text}");
        let all: u64 = config.ranks().map(|rank| config.rank_memory(&layout, rank).unwrap()).sum();
        config.check_memory(&layout, config.ranks(), all).unwrap();
        let text = config.check_memory(&layout, config.ranks(), all - 1).unwrap_err().to_string();
        assert!(text.contains(&all.to_string()) && text.contains("24576 for optimizer state"), "{text}");
        config.check_memory(&layout, config.ranks().take(3), all - 1).unwrap();
    }

    #[test]
    fn the_kernel_says_what_is_available() {
        assert_eq!(available_of("MemTotal:  9 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(available_of("MemTotal:  9 kB\n"), None);
        assert!(memory_available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
