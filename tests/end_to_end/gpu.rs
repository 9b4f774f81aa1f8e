//! Servers that compute on a GPU, which here is soft CUDA (`tests/support/softcuda`): the same bits as on the processor, every
//! step a launch, checkpoints that go both ways, and what happens when a device fails.
//!
//! Invariant: no step is taken but by a launch that soft CUDA has logged.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use gradwire::{
    Consistency, Dtype,
    checkpoint::{Checkpoint, latest, list},
    launch::{Job, JobOptions},
    optim::{Clip, OptimizerConfig, OptimizerKind},
    session::{DeviceChoice, Fabric},
    transport::verbs::{VerbsOptions, VerbsTransport},
    types::PeerId,
    wire::{JobToken, handshake::Identity},
};

use crate::{
    bits::{same, simulated},
    fabrics::restrict,
    jobs::{adamw, digests, end, home, options, run, stored, with_variable},
    program::{STEPS, model},
};

/// Chunks that the model of these tests has: 3452 elements of which each has 256, and those that are cut short.
fn chunks(checkpoint: &Checkpoint) -> usize {
    checkpoint.manifest().layout.chunks.len()
}

/// The library that cargo has built for these tests.
fn soft_cuda() -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name("libgradwire_softcuda.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

/// Has the servers compute on soft CUDA, with these of its variables. What it logs goes to `log` in `home`.
fn on_gpu(options: &mut JobOptions, home: &Path, variables: &[(&str, &str)]) {
    options.config.device = DeviceChoice::Gpu(Vec::new());
    let mut line =
        format!("export GRADWIRE_CUDA_LIBRARY={} SOFTCUDA_LOG={}; ", soft_cuda().display(), log_of(home).display());
    for (name, value) in variables {
        line += &format!("export {name}='{value}'; ");
    }
    let command: Vec<_> = options.server_command.iter().map(|word| word.to_str().unwrap()).collect();
    line += &format!("exec {} \"$@\"", command.join(" "));
    options.server_command = ["sh", "-c", &line, "server"].map(std::ffi::OsString::from).to_vec();
}

fn log_of(home: &Path) -> PathBuf {
    home.join("softcuda.log")
}

/// How often each line stands in soft CUDA's log.
fn log(home: &Path) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(log_of(home)).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        *counts.entry(line.to_string()).or_default() += 1;
    }
    counts
}

fn launches(log: &BTreeMap<String, usize>, kernel: &str) -> usize {
    log.get(&format!("launch gradwire_{kernel}")).copied().unwrap_or(0)
}

/// Everything that a checkpoint holds of every chunk, as bits.
type Contents = Vec<(u64, u64, [Vec<u32>; 3])>;

fn contents(home: &Path) -> Contents {
    let checkpoint = latest(&home.join("checkpoints")).unwrap().checkpoint.expect("a checkpoint");
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    let chunk = |index: usize| {
        let data = checkpoint.chunk(gradwire::types::ChunkId(index as u32)).unwrap();
        (data.version, data.steps, [bits(data.master), bits(data.first), bits(data.second)])
    };
    (0..chunks(&checkpoint)).map(chunk).collect()
}

/// A job of `steps` steps, changed by `change`, on the processor or the GPU; what its checkpoint holds.
fn contents_of(
    steps: u64,
    change: &dyn Fn(&mut JobOptions),
    gpu: Option<&[(&str, &str)]>,
) -> (Contents, BTreeMap<String, usize>) {
    let home = home();
    let mut options = options(home.path(), "train");
    with_variable(&mut options, "WORKER_STEPS", steps);
    change(&mut options);
    if let Some(variables) = gpu {
        on_gpu(&mut options, home.path(), variables);
    }
    let workers = options.config.workers;
    let output = run(options);
    assert_eq!(digests(&output).len(), usize::from(workers), "{output}");
    (contents(home.path()), log(home.path()))
}

#[test]
fn fifty_steps_on_gpus_give_the_simulators_bits_and_every_step_is_a_launch() {
    let all = vec![model(); 2];
    let expected = simulated(all.clone(), false);
    for (two_step, late) in [(false, "0"), (true, "0"), (false, "1")] {
        let home = home();
        let mut options = options(home.path(), "train");
        options.config.two_step = two_step;
        // Not a clock's worth of slots, so that the window matters.
        options.config.landing_bytes = 2 * 1024 * 3;
        on_gpu(&mut options, home.path(), &[("SOFTCUDA_LATE", late)]);
        let output = run(options);
        let digests = digests(&output);
        assert!(digests.len() == 2 && digests[0] == digests[1], "{output}");
        same(&expected, &stored(home.path(), &all), &format!("soft CUDA, two steps: {two_step}, late: {late}"));
        let log = log(home.path());
        let steps = contents(home.path()).len() * STEPS as usize;
        let (fused, reduced) = if two_step { (0, steps) } else { (steps, 0) };
        // The second half of a step in two is the f32 kernel too.
        assert_eq!((launches(&log, "adam_f32"), launches(&log, "reduce_f32")), (fused + reduced, reduced), "{log:?}");
        assert!(!log.keys().any(|line| line.starts_with("pageable")), "copies that the processor waits for: {log:?}");
    }
}

/// Where there is an RDMA device, which reaches soft CUDA's memory as it would a card's: gradients land there, and where all workers
/// are reached so parameters leave from there; elsewhere it says so, and is a failure where `GRADWIRE_TEST_RDMA` is set.
#[test]
fn verbs_write_into_the_memory_of_gpus_and_give_the_processors_bits() {
    let identity = Identity { job: 1, token: JobToken::random().unwrap(), me: PeerId::worker(0), epoch: 0 };
    if let Err(absence) = VerbsTransport::new(VerbsOptions::new(identity)) {
        assert!(std::env::var_os("GRADWIRE_TEST_RDMA").is_none(), "GRADWIRE_TEST_RDMA is set: {absence}");
        println!("NOT RUN, no RDMA device reaches a GPU's memory here: {absence}");
        return;
    }
    const STEPS: u64 = 3;
    let (expected, _) = contents_of(STEPS, &|_| {}, None);
    let flushes = |log: &BTreeMap<String, usize>| log.get("flush").copied().unwrap_or(0);
    let all = expected.len() * STEPS as usize;
    // Every worker over verbs; one of two; none, since the servers are told not to; and from the workers' own GPUs, by Rust and by C.
    for (index, count) in [(0, all), (1, all), (2, 0), (3, all), (4, all)] {
        let change = |options: &mut JobOptions| {
            options.config.transports = vec![Fabric::Verbs, Fabric::Tcp];
            options.config.gpu_direct = index != 2;
            match index {
                0 => options.config.transports = vec![Fabric::Verbs],
                3 | 4 => {
                    options.config.transports = vec![Fabric::Verbs];
                    workers_on_gpu(options);
                    if index == 4 {
                        with_variable(options, "WORKER_BY_C", 1);
                    }
                }
                1 => restrict(options, "worker", 1, "tcp"),
                _ => {}
            }
        };
        let (found, log) = contents_of(STEPS, &change, Some(&[]));
        assert!(found == expected, "run {index} gave other bits");
        // Workers on a GPU flush too, and log elsewhere.
        assert_eq!(flushes(&log), count, "steps with gradients that had landed on the GPU, run {index}: {log:?}");
    }
}

fn workers_on_gpu(options: &mut JobOptions) {
    with_variable(options, "WORKER_ON_GPU", 1);
    with_variable(options, "GRADWIRE_CUDA_LIBRARY", soft_cuda().display());
}

#[test]
fn a_worker_on_a_gpu_is_refused_by_fabrics_that_do_not_reach_it() {
    for by in ["WORKER_BY_RUST", "WORKER_BY_C"] {
        let home = home();
        let mut options = options(home.path(), "train");
        options.config.transports = vec![Fabric::Tcp];
        workers_on_gpu(&mut options);
        with_variable(&mut options, by, 1);
        let mut job = Job::start(options).unwrap();
        let outcome = end(&mut job);
        assert_ne!(outcome.code, 0);
        let told = format!("{:?} {}", outcome.reason, job.output());
        assert!(told.contains("device memory, which the fabric tcp cannot reach"), "{told}");
        assert_eq!(told.contains("GwInvalid gw_connect_on_gpu: "), by == "WORKER_BY_C", "{told}");
    }
}

#[test]
fn every_optimizer_and_wire_format_gives_the_processors_bits() {
    let kinds = [
        OptimizerKind::SGD,
        OptimizerKind::Sgd { momentum: 0.9, nesterov: false },
        OptimizerKind::Sgd { momentum: 0.9, nesterov: true },
        OptimizerKind::ADAM,
        OptimizerKind::ADAMW,
        OptimizerKind::Adagrad { epsilon: 1e-10, initial_accumulator: 0.1 },
    ];
    for (index, kind) in kinds.into_iter().enumerate() {
        let wire = [(Dtype::F32, Dtype::F32), (Dtype::Bf16, Dtype::Bf16), (Dtype::F16, Dtype::F32)][index % 3];
        let change = |options: &mut JobOptions| {
            // Of three, the order in which they are summed shows.
            options.config.workers = 3;
            options.config.optimizer = OptimizerConfig { kind, ..adamw() };
            (options.config.gradient_dtype, options.config.parameter_dtype) = wire;
            options.config.two_step = index % 2 == 1;
        };
        let (expected, _) = contents_of(4, &change, None);
        let (found, log) = contents_of(4, &change, Some(&[]));
        assert!(expected == found, "{kind:?} {wire:?}");
        assert!(log.keys().any(|line| line.starts_with("launch")), "{log:?}");
    }
}

/// The factor of a clip by norm is computed on the host, between two launches.
#[test]
fn clipping_by_value_and_by_norm_gives_the_processors_bits() {
    for two_step in [false, true] {
        let change = |options: &mut JobOptions| {
            options.config.optimizer.clip = Clip { per_value: Some(0.8), per_chunk_norm: Some(5.0), global_norm: None };
            options.config.two_step = two_step;
        };
        let (expected, _) = contents_of(4, &change, None);
        let (found, log) = contents_of(4, &change, Some(&[("SOFTCUDA_LATE", "1")]));
        assert!(expected == found, "two steps: {two_step}");
        assert_eq!(launches(&log, "norm"), 4 * expected.len());
        assert!(expected != contents_of(4, &|_| (), None).0, "nothing was clipped");
    }
}

/// The decision about a step, between two launches, and made of norms that the device has measured.
#[test]
fn clipping_by_the_global_norm_gives_the_processors_bits() {
    let change = |options: &mut JobOptions| {
        options.config.optimizer.clip = Clip { global_norm: Some(3.0), ..Clip::default() };
        options.config.skip_nonfinite = true;
    };
    let (expected, _) = contents_of(4, &change, None);
    let (found, log) = contents_of(4, &change, Some(&[("SOFTCUDA_LATE", "1")]));
    assert!(expected == found);
    assert_eq!(launches(&log, "norm"), 4 * expected.len());
    assert!(expected != contents_of(4, &|_| (), None).0, "nothing was clipped");
}

#[test]
fn stale_and_asynchronous_training_runs_on_gpus() {
    for consistency in [Consistency::Ssp { bound: 3 }, Consistency::Asp] {
        let home = home();
        let mut options = options(home.path(), "slow");
        options.config.consistency = consistency;
        with_variable(&mut options, "WORKER_STEPS", 12);
        on_gpu(&mut options, home.path(), &[("SOFTCUDA_LATE", "1")]);
        let output = run(options);
        assert_eq!(digests(&output).len(), 2, "{consistency}: {output}");
        // Every push of every worker is a step of its own.
        let contents = contents(home.path());
        assert_eq!(launches(&log(home.path()), "adam_f32"), 2 * 12 * contents.len(), "{consistency}");
        assert!(contents.iter().all(|(version, steps, _)| (*version, *steps) == (24, 24)), "{consistency}");
    }
}

/// One worker and no staleness: what each push does is known, so its bits are the processor's.
#[test]
fn an_asynchronous_job_of_one_worker_gives_the_processors_bits() {
    let change = |options: &mut JobOptions| {
        options.config.workers = 1;
        options.config.consistency = Consistency::Asp;
    };
    let contents_of_one = |gpu: bool| {
        let home = home();
        let mut options = options(home.path(), "train");
        with_variable(&mut options, "WORKER_STEPS", 6);
        change(&mut options);
        if gpu {
            on_gpu(&mut options, home.path(), &[]);
        }
        run(options);
        contents(home.path())
    };
    assert!(contents_of_one(true) == contents_of_one(false));
}

#[test]
fn a_checkpoint_goes_from_gpu_to_processor_and_back_without_a_bit_lost() {
    let all = vec![model(); 2];
    let expected = simulated(all.clone(), false);
    for first_on_gpu in [true, false] {
        let home = home();
        let part = |steps: u64, gpu: bool, resume: bool| {
            let mut options = options(home.path(), "train");
            with_variable(&mut options, "WORKER_STEPS", steps);
            options.config.checkpoint.every = Some(10);
            options.config.resume = resume.then(|| home.path().join("checkpoints"));
            if gpu {
                on_gpu(&mut options, home.path(), &[("SOFTCUDA_LATE", "1")]);
            }
            run(options)
        };
        part(23, first_on_gpu, false);
        let output = part(STEPS, !first_on_gpu, true);
        assert!(output.contains("training from clock 23"), "{output}");
        same(&expected, &stored(home.path(), &all), &format!("first on the GPU: {first_on_gpu}"));
    }
}

/// Several devices, several shards of a process: each shard on its own.
/// Steps follow while a checkpoint's state is still being copied from the device: what is about to change is copied first.
#[test]
fn a_gpu_stores_every_step_as_it_was_while_it_takes_the_next_ones() {
    const STEPS: u64 = 20;
    let undisturbed = crate::every_step::Undisturbed::new("train", STEPS);
    for two_step in [false, true] {
        let home = home();
        let mut options = options(home.path(), "train");
        (options.config.two_step, options.config.checkpoint.keep) = (two_step, 100);
        options.config.checkpoint.every = Some(1);
        with_variable(&mut options, "WORKER_STEPS", STEPS);
        on_gpu(&mut options, home.path(), &[("SOFTCUDA_LATE", "1")]);
        run(options);
        let mut stored = 0;
        for (_, opened) in list(&home.path().join("checkpoints")).unwrap() {
            undisturbed.assert_same(&opened.unwrap());
            stored += 1;
        }
        assert_eq!(stored, STEPS);
    }
}

#[test]
fn a_process_drives_several_gpus() {
    let expected = simulated(vec![model(); 2], false);
    let home = home();
    let mut options = options(home.path(), "train");
    (options.config.servers, options.config.shards_per_server) = (1, 2);
    on_gpu(&mut options, home.path(), &[("SOFTCUDA_DEVICES", "3"), ("GRADWIRE_LOG", "info")]);
    options.config.device = DeviceChoice::Gpu(vec![2, 1]);
    let output = run(options);
    assert!(output.contains("shard 0 computes on GPU 2") && output.contains("shard 1 computes on GPU 1"), "{output}");
    same(&expected, &stored(home.path(), &vec![model(); 2]), "one server, two GPUs");
}

/// Runs a job that must fail, and not by waiting: why it says it did.
fn failing(change: impl Fn(&mut JobOptions, &Path)) -> String {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.checkpoint.every = Some(4);
    change(&mut options, home.path());
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.clone().unwrap_or_default();
    assert_ne!(outcome.code, 0, "{reason}\n{}", job.output());
    drop(job);
    // An older checkpoint is whole, and goes on to the same end on the processor.
    if let Some(clock) = outcome.checkpoint {
        let mut options = crate::jobs::options(home.path(), "train");
        options.config.resume = Some(home.path().join("checkpoints"));
        let output = run(options);
        assert!(output.contains(&format!("training from clock {clock}")), "{output}");
        let all = vec![model(); 2];
        same(&simulated(all.clone(), false), &stored(home.path(), &all), "resumed after a failure");
    }
    reason
}

#[test]
fn a_device_that_fails_ends_the_job_by_name_and_older_checkpoints_are_whole() {
    let cases = [
        ("cuMemAlloc_v2:1=2", "CUDA_ERROR_OUT_OF_MEMORY", "cuMemAlloc_v2"),
        ("cuMemHostRegister_v2:2=2", "CUDA_ERROR_OUT_OF_MEMORY", "cuMemHostRegister_v2"),
        ("cuModuleLoadData:1=218", "CUDA_ERROR_INVALID_PTX", "cuModuleLoadData"),
        ("cuLaunchKernel:200=719!", "resume the job from its last checkpoint", "cuLaunchKernel"),
        ("cuMemcpyHtoDAsync_v2:900=700", "CUDA_ERROR_ILLEGAL_ADDRESS", "cuMemcpyHtoDAsync_v2"),
        ("cuMemcpyDtoHAsync_v2:201=719", "CUDA_ERROR_LAUNCH_FAILED", "cuMemcpyDtoHAsync_v2"),
        ("cuEventQuery:300=999!", "CUDA error 999", "cuEventQuery"),
    ];
    for (fault, what, call) in cases {
        let reason = failing(|options, home| {
            on_gpu(options, home, &[("SOFTCUDA_FAIL", fault), ("SOFTCUDA_LATE", "1")]);
        });
        for part in ["server", "GPU 0 (gradwire soft CUDA)", what, call] {
            assert!(reason.contains(part), "{fault}: no `{part}` in: {reason}");
        }
    }
}

#[test]
fn a_card_that_is_too_small_says_what_must_fit() {
    let reason = failing(|options, home| on_gpu(options, home, &[("SOFTCUDA_MEMORY", "20000")]));
    for part in ["server", "GPU 0", "CUDA_ERROR_OUT_OF_MEMORY", "must fit", "--device cpu"] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
}

/// A device that never ends a step, and is never waited for in vain: not in the loop, and not when it is let go.
#[test]
fn a_device_that_hangs_is_given_up() {
    let reason = failing(|options, home| {
        on_gpu(options, home, &[("SOFTCUDA_LATE", "10000000")]);
        options.config.gpu_ms = 1_500;
    });
    for part in ["server", "GPU 0", "has not ended", "hangs"] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
}

#[test]
fn a_gpu_that_is_not_there_is_refused_and_auto_takes_the_processor_aloud() {
    let reason = failing(|options, home| on_gpu(options, home, &[("SOFTCUDA_DEVICES", "0")]));
    for part in ["server", "`device` is gpu", "CUDA_ERROR_NO_DEVICE", "set it to cpu"] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
    let reason = failing(|options, home| on_gpu(options, home, &[("GRADWIRE_CUDA_LIBRARY", "libnowhere.so")]));
    assert!(reason.contains("libnowhere.so cannot be loaded"), "{reason}");
    let reason = failing(|options, home| {
        on_gpu(options, home, &[]);
        options.config.device = DeviceChoice::Gpu(vec![0, 5]);
    });
    assert!(reason.contains("there is no GPU 5") && reason.contains("GPU 0 (gradwire soft CUDA)"), "{reason}");
    for (devices, says, kernels) in
        [("0", "computes on the processor (`device` is auto)", 0), ("1", "computes on GPU 0", 1)]
    {
        let home = home();
        let mut options = options(home.path(), "train");
        with_variable(&mut options, "WORKER_STEPS", 2);
        on_gpu(&mut options, home.path(), &[("SOFTCUDA_DEVICES", devices)]);
        options.config.device = DeviceChoice::Auto;
        let output = run(options);
        assert!(output.contains(says), "{output}");
        assert_eq!(usize::from(launches(&log(home.path()), "adam_f32") > 0), kernels);
    }
}
