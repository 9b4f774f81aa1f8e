//! The driver side of the GPUs through soft CUDA: memory, streams, the pipeline's wake-up, and what a driver can refuse.
//!
//! Invariant: the driver is one of the whole process and its faults come from the environment, so each test runs this program
//! again for itself alone.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use gradwire::{
    Error, OptimizerConfig, OptimizerKind,
    cuda::{Context, DeviceBuffer, Event, Stream, devices},
    layout::{Layout, LayoutOptions, TensorSpec},
    mem::{Region, RegionOptions},
    optim::{
        Pass, Reduction, StepArguments,
        gpu::{ChunkPlan, Gradient, Pipeline, PipelineOptions},
    },
    transport::{
        Transport,
        shm::{ShmOptions, ShmTransport},
        soft::{SoftOptions, SoftTransport},
        tcp::{TcpOptions, TcpTransport},
    },
    types::{Dtype, PeerId},
    wire::{JobToken, handshake::Identity},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Set in the program that a test starts for itself.
const INNER: &str = "CUDA_TEST_INNER";

/// Runs the test of this name again in a program of its own with soft CUDA and this environment; true where this already is that
/// program.
fn is_alone(test: &str, environment: &[(&str, &str)]) -> bool {
    if std::env::var(INNER).is_ok() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(&program);
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(INNER, "1");
    command.env("GRADWIRE_CUDA_LIBRARY", program.with_file_name("libgradwire_softcuda.so"));
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

#[test]
fn devices_are_described() {
    if is_alone("devices_are_described", &[("SOFTCUDA_DEVICES", "2"), ("SOFTCUDA_MEMORY", "4096")]) {
        let found = devices().unwrap();
        assert_eq!(found.iter().map(|info| info.ordinal).collect::<Vec<_>>(), [0, 1]);
        let second = &found[1];
        assert_eq!((second.memory_bytes, second.capability, second.multiprocessors), (4096, (7, 0), 2));
        assert_eq!((second.pci.as_deref(), second.numa_node), (Some("ffff:01:00.0"), None));
        assert_eq!(second.to_string(), "GPU 1 (gradwire soft CUDA)");
        let error = Context::open(2).unwrap_err().to_string();
        assert!(error.contains("no GPU 2") && error.contains("GPU 0") && error.contains("GPU 1"), "{error}");
        let context = Context::open(1).unwrap();
        assert!(context.needs_flush().unwrap());
        context.flush_direct_writes().unwrap();
    }
}

#[test]
fn memory_is_exported_with_the_allocation_that_holds_it_and_given_back() {
    if is_alone("memory_is_exported_with_the_allocation_that_holds_it_and_given_back", &[]) {
        let context = Context::open(0).unwrap();
        let free = context.free_bytes().unwrap();
        let buffer = DeviceBuffer::exportable(&context, 5000).unwrap();
        assert!(context.free_bytes().unwrap() < free);
        let (fd, offset) = buffer.dma_buf().expect("a descriptor");
        let size = nix::sys::stat::fstat(fd).unwrap().st_size;
        assert_eq!((offset, size), (0, 2 << 20), "of the whole allocation");
        let plain = DeviceBuffer::allocate(&context, 5000).unwrap();
        assert!(plain.dma_buf().is_none() && plain.len() == 5000);
        drop((buffer, plain));
        assert_eq!(context.free_bytes().unwrap(), free, "all of it came back");
    }
}

/// Each call on the way to an exported allocation fails in turn; what was made before it is given back, and ordinary memory serves.
#[test]
fn where_nothing_can_be_exported_ordinary_memory_serves() {
    const CALLS: [&str; 6] = [
        "cuMemGetAllocationGranularity",
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemGetHandleForAddressRange",
    ];
    if std::env::var(INNER).is_err() {
        for call in CALLS {
            let fault = format!("{call}:1=801");
            is_alone("where_nothing_can_be_exported_ordinary_memory_serves", &[("SOFTCUDA_FAIL", &fault)]);
        }
        return;
    }
    let context = Context::open(0).unwrap();
    let free = context.free_bytes().unwrap();
    let buffer = DeviceBuffer::exportable(&context, 5000).unwrap();
    assert!(buffer.dma_buf().is_none());
    assert_eq!(context.free_bytes().unwrap(), free - 5000, "nothing else is held");
    let next = DeviceBuffer::exportable(&context, 5000).unwrap();
    assert!(next.dma_buf().is_some(), "the fault was one");
    drop((buffer, next));
    assert_eq!(context.free_bytes().unwrap(), free);
}

#[test]
fn a_full_device_is_told_by_name_and_advice() {
    if is_alone("a_full_device_is_told_by_name_and_advice", &[("SOFTCUDA_MEMORY", "3000000")]) {
        let context = Context::open(0).unwrap();
        for allocate in [DeviceBuffer::allocate, DeviceBuffer::exportable] {
            let error = allocate(&context, 4_000_000).unwrap_err();
            assert!(matches!(error, Error::Gpu { call: "cuMemAlloc_v2", .. }), "{error:?}");
            let text = error.to_string();
            for part in ["GPU 0 (gradwire soft CUDA)", "CUDA_ERROR_OUT_OF_MEMORY (out of memory)", "chunk_bytes"] {
                assert!(text.contains(part), "no `{part}` in: {text}");
            }
        }
    }
}

#[test]
fn a_region_on_a_device_has_leases_without_bytes_and_is_refused_by_fabrics_of_the_host() {
    if is_alone("a_region_on_a_device_has_leases_without_bytes_and_is_refused_by_fabrics_of_the_host", &[]) {
        let context = Context::open(0).unwrap();
        let buffer = DeviceBuffer::exportable(&context, 8192).unwrap();
        let address = buffer.address();
        let (region, lease) = Region::on_device(buffer).unwrap();
        let range = region.device_range().expect("on a device");
        assert_eq!((range.address, range.len, range.dma_buf.map(|(_, offset)| offset)), (address, 8192, Some(0)));
        let (left, right) = lease.split_at(4096);
        assert_eq!((left.device_address(), right.device_address()), (Some(address), Some(address + 4096)));
        let shared = left.freeze();
        for touch in [&(|| right.bytes().len()) as &dyn Fn() -> usize, &|| shared.bytes().len()] {
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(touch)).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains("lies on a device"), "{text}");
        }
        let identity = || Identity { job: 1, token: JobToken::random().unwrap(), me: PeerId::worker(0), epoch: 0 };
        let fabrics: [(&str, Box<dyn Transport>); 3] = [
            ("tcp", Box::new(TcpTransport::new(TcpOptions::new(identity())).unwrap())),
            ("shm", Box::new(ShmTransport::new(ShmOptions::new(identity())).unwrap())),
            ("soft", Box::new(SoftTransport::new(SoftOptions::default()).unwrap())),
        ];
        for (name, mut fabric) in fabrics {
            let error = fabric.register(&region).unwrap_err().to_string();
            assert!(error.contains("device memory") && error.contains(&format!("fabric {name}")), "{error}");
        }
        assert!(region.pin(&context).unwrap_err().to_string().contains("need not be pinned"));
        let (host, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
        assert!(host.device_range().is_none() && lease.device_address().is_none());
        let pinned = host.pin(&context).unwrap();
        let error = host.pin(&context).unwrap_err().to_string();
        assert!(error.contains("cuMemHostRegister_v2 failed on GPU 0"), "{error}");
        drop(pinned);
        host.pin(&context).unwrap();
        // The memory goes with the last lease.
        let free = context.free_bytes().unwrap();
        drop((region, right));
        assert_eq!(context.free_bytes().unwrap(), free);
        drop(shared);
        assert!(context.free_bytes().unwrap() > free);
    }
}

fn one_chunk(elements: u64) -> Layout {
    let declaration = vec![vec![TensorSpec::new("a", [elements])]];
    Layout::build(&declaration, LayoutOptions { chunk_elements: 1 << 16, shards: 1 }).unwrap()
}

fn pipeline(context: &Context, elements: u32) -> Pipeline {
    let options = PipelineOptions {
        chunks: vec![elements],
        state_slots: 0,
        has_accumulator: false,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        contributions_max: 2,
        spans_max: 1,
        patience: Duration::from_secs(60),
        region: RegionOptions::default(),
    };
    Pipeline::new(context, options).unwrap()
}

fn is_readable(pipeline: &Pipeline, patience_ms: i32) -> bool {
    let mut fds = [PollFd::new(pipeline.fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(patience_ms).unwrap()).unwrap() == 1
}

/// A step of two contributions: the descriptor wakes the sleeper, four jobs of one chunk at once go through, and the leases come back.
#[test]
fn jobs_overlap_wake_the_sleeper_and_give_their_leases_back() {
    if is_alone("jobs_overlap_wake_the_sleeper_and_give_their_leases_back", &[("SOFTCUDA_LATE", "2")]) {
        const ELEMENTS: u32 = 1000;
        let context = Context::open(0).unwrap();
        let layout = one_chunk(ELEMENTS.into());
        let config = OptimizerConfig::new(OptimizerKind::SGD, 0.5);
        let (spans, rates) = (&layout.chunks[0].spans, config.learning_rates());
        let mut pipeline = pipeline(&context, layout.chunks[0].len);
        let elements = layout.chunks[0].len as usize;
        let (region, lease) = Region::allocate(12 * elements * 4, &RegionOptions::default()).unwrap();
        pipeline.pin(&region).unwrap();
        let ones = vec![1.0; elements];
        pipeline.store(0, [&ones, &[], &[]]).unwrap();
        let mut pieces = lease.chunks(elements * 4).into_iter();
        for step in 1..=4u64 {
            let mut give = |value: f32| {
                let mut lease = pieces.next().unwrap();
                bytemuck::cast_slice_mut(lease.bytes_mut()).fill(value);
                lease
            };
            let landed = vec![give(step as f32), give(3.0 * step as f32)];
            let wire = give(f32::NAN);
            let (pass, reduction) = (Pass::Fused, Reduction::Mean);
            let arguments =
                StepArguments { pass, step, clock: 0, total_weight: 2, reduction, scale: 1.0, measures: false };
            let plan = ChunkPlan { spans, config: &config, rates: &rates, arguments, scale: 1.0 };
            assert!(pipeline.has_room());
            pipeline.update(0, &plan, Gradient::Landed(landed), Some(wire)).unwrap();
        }
        assert!(!pipeline.has_room() && !pipeline.is_idle());
        let mut expected = 1.0;
        let mut waits = 0;
        let deadline = Instant::now() + Duration::from_secs(60);
        for step in 1..=4u64 {
            let done = loop {
                assert!(Instant::now() < deadline, "nothing woke the sleeper");
                if let Some(done) = pipeline.poll().unwrap() {
                    break done;
                }
                if !pipeline.arm().unwrap() {
                    waits += 1;
                    assert!(is_readable(&pipeline, 20_000), "step {step} is done, and nobody says so");
                }
            };
            expected -= 0.5 * (2.0 * step as f32);
            assert_eq!(done.contributions.len(), 2);
            let first: &[f32] = bytemuck::cast_slice(done.contributions[0].bytes());
            assert_eq!(first[0], step as f32, "in the order in which they were given");
            let wire = done.wire.expect("asked for");
            assert!(
                bytemuck::cast_slice::<u8, f32>(wire.bytes()).iter().all(|value| *value == expected),
                "step {step}"
            );
        }
        assert!(waits > 0, "late work was never waited for");
        assert!(pipeline.is_idle() && pipeline.poll().unwrap().is_none());
        pipeline.fetch(0).unwrap();
        let arrays = loop {
            if let Some(done) = pipeline.poll().unwrap() {
                break done.arrays.expect("fetched");
            }
            assert!(Instant::now() < deadline);
        };
        assert!(arrays[0].iter().all(|value| *value == expected) && arrays[1].is_empty() && arrays[2].is_empty());
    }
}

/// A step whose gradients somebody else has written into the device's memory, as a NIC does, and whose wire copy leaves from there.
#[test]
fn what_has_landed_on_the_device_is_flushed_and_read_there() {
    let name = "what_has_landed_on_the_device_is_flushed_and_read_there";
    if std::env::var(INNER).is_err() {
        is_alone(name, &[]);
        is_alone(name, &[("SOFTCUDA_FAIL", "cuFlushGPUDirectRDMAWrites:1=801"), ("FLUSH_FAILS", "1")]);
        return;
    }
    const ELEMENTS: u32 = 1001;
    let context = Context::open(0).unwrap();
    let layout = one_chunk(ELEMENTS.into());
    let config = OptimizerConfig::new(OptimizerKind::SGD, 0.5);
    let (spans, rates) = (&layout.chunks[0].spans, config.learning_rates());
    let mut pipeline = pipeline(&context, layout.chunks[0].len);
    let elements = layout.chunks[0].len as usize;
    pipeline.store(0, [&vec![1.0; elements], &[], &[]]).unwrap();
    let (region, lease) = pipeline.shared((1 + 3 * elements) * 4).unwrap();
    // No array begins at a multiple of 16.
    let (_, lease) = lease.split_at(4);
    let (dma_buf, offset) = region.device_range().unwrap().dma_buf.expect("soft CUDA exports it");
    assert_eq!(offset, 0);
    // SAFETY: nobody else touches the file while a job has it.
    let mut nic =
        unsafe { memmap2::MmapMut::map_mut(&std::fs::File::from(dma_buf.try_clone_to_owned().unwrap())) }.unwrap();
    let arrays = 4..(1 + 3 * elements) * 4;
    let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut nic[arrays.clone()]);
    for (index, value) in floats[..2 * elements].iter_mut().enumerate() {
        *value = index as f32;
    }
    let mut pieces = lease.chunks(elements * 4).into_iter();
    let mut give = || pieces.next().unwrap();
    let (landed, wire) = (vec![give(), give()], give());
    assert!(landed.iter().all(|lease| lease.device_address().unwrap() % 16 != 0));
    let (pass, reduction) = (Pass::Fused, Reduction::Mean);
    let arguments = StepArguments { pass, step: 1, clock: 0, total_weight: 2, reduction, scale: 1.0, measures: false };
    let plan = ChunkPlan { spans, config: &config, rates: &rates, arguments, scale: 1.0 };
    let begun = pipeline.update(0, &plan, Gradient::Landed(landed), Some(wire));
    if std::env::var("FLUSH_FAILS").is_ok() {
        let error = begun.unwrap_err().to_string();
        assert!(error.contains("cuFlushGPUDirectRDMAWrites failed on GPU 0"), "{error}");
        return;
    }
    begun.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let done = loop {
        assert!(Instant::now() < deadline);
        if let Some(done) = pipeline.poll().unwrap() {
            break done;
        }
    };
    let floats: &[f32] = bytemuck::cast_slice(&nic[arrays]);
    for index in 0..elements {
        let expected = 1.0 - 0.5 * ((index + index + elements) as f32 * 0.5);
        assert_eq!(floats[2 * elements + index], expected, "element {index}");
    }
    let second = pipeline.read(&done.contributions[1], 8).unwrap();
    assert_eq!(bytemuck::pod_read_unaligned::<[f32; 2]>(&second), [elements as f32, (elements + 1) as f32]);
}

/// A pipeline that is dropped while jobs are under way ends them first, so that nobody writes into memory that was given back.
#[test]
fn a_pipeline_that_is_dropped_ends_its_jobs_first() {
    if is_alone("a_pipeline_that_is_dropped_ends_its_jobs_first", &[("SOFTCUDA_LATE", "5")]) {
        let context = Context::open(0).unwrap();
        let free = context.free_bytes().unwrap();
        let layout = one_chunk(500);
        let mut pipeline = pipeline(&context, layout.chunks[0].len);
        let elements = layout.chunks[0].len as usize;
        pipeline.store(0, [&vec![2.0; elements], &[], &[]]).unwrap();
        let (region, lease) = Region::allocate(elements * 4, &RegionOptions::default()).unwrap();
        pipeline.pin(&region).unwrap();
        pipeline.encode(0, lease).unwrap();
        drop(pipeline);
        assert_eq!(context.free_bytes().unwrap(), free, "all memory came back");
        region.pin(&context).expect("it was unpinned");
    }
}

#[test]
fn streams_wait_for_events_and_events_tell() {
    if is_alone("streams_wait_for_events_and_events_tell", &[("SOFTCUDA_LATE", "20")]) {
        let context = Context::open(0).unwrap();
        let (one, other) = (Stream::new(&context).unwrap(), Stream::new(&context).unwrap());
        let event = Event::new(&context).unwrap();
        assert!(event.has_happened().unwrap(), "one that was never recorded holds nobody up");
        let buffer = DeviceBuffer::allocate(&context, 64).unwrap();
        // SAFETY: the buffer is this test's, and lives until both streams are done.
        unsafe { one.fill(buffer.address(), 7, 64) }.unwrap();
        one.record(&event).unwrap();
        other.wait(&event).unwrap();
        assert!(!event.has_happened().unwrap());
        other.synchronize().unwrap();
        assert!(event.has_happened().unwrap(), "who waits for an event has its work done");
        let (begin, end) = (Event::timed(&context).unwrap(), Event::timed(&context).unwrap());
        one.record(&begin).unwrap();
        one.record(&end).unwrap();
        one.synchronize().unwrap();
        assert!(end.seconds_since(&begin).unwrap() > 0.0);
    }
}

#[test]
fn a_context_that_was_lost_says_so_at_every_call_and_nothing_panics() {
    let environment = [("SOFTCUDA_FAIL", "cuEventCreate:1=719!")];
    if is_alone("a_context_that_was_lost_says_so_at_every_call_and_nothing_panics", &environment) {
        let context = Context::open(0).unwrap();
        let buffer = DeviceBuffer::allocate(&context, 64).unwrap();
        let stream = Stream::new(&context).unwrap();
        let error = Event::new(&context).err().unwrap().to_string();
        assert!(error.contains("cuEventCreate failed on GPU 0") && error.contains("last checkpoint"), "{error}");
        assert!(stream.synchronize().is_err() && DeviceBuffer::allocate(&context, 1).is_err());
        drop((stream, buffer, context));
    }
}
