//! Jobs as these tests start them, and what they leave.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use gradwire::{
    Consistency,
    checkpoint::Checkpoint,
    launch::{Job, JobOptions, Outcome, OutputTo},
    layout::{Layout, TensorSpec},
    optim::{GroupConfig, OptimizerConfig, OptimizerKind},
    session::JobConfig,
};

/// Long enough for a busy machine, short enough to notice a hang.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

pub fn adamw() -> OptimizerConfig {
    let group = GroupConfig { name: "other".into(), learning_rate: Some(0.02), weight_decay: Some(0.0) };
    let mut optimizer = OptimizerConfig::new(OptimizerKind::ADAMW, 0.01);
    optimizer.weight_decay = 0.1;
    optimizer.groups = vec![group];
    optimizer
}

/// Two servers and two workers, small chunks, a checkpoint at the end.
pub fn options(home: &Path, part: &str) -> JobOptions {
    let mut config = JobConfig {
        name: "test".into(),
        servers: 2,
        workers: 2,
        chunk_bytes: 1024,
        seed: 7,
        optimizer: adamw(),
        join_ms: 60_000,
        heartbeat_ms: 500,
        deadline_ms: 5_000,
        consistency: Consistency::Bsp,
        ..JobConfig::default()
    };
    config.checkpoint.dir = Some(home.join("checkpoints"));
    let program = std::env::current_exe().unwrap();
    let line =
        format!("WORKER_PART='{part}' exec {} --exact worker_process --nocapture --test-threads=1", program.display());
    let command = ["sh", "-c", &line].map(OsString::from).to_vec();
    let mut options = JobOptions::new(config, command, env!("CARGO_BIN_EXE_gradwire"));
    options.home = Some(home.into());
    options.output = OutputTo::Collect;
    options.grace = Duration::from_secs(1);
    options
}

/// Sets a variable of the workers.
pub fn with_variable(options: &mut JobOptions, name: &str, value: impl std::fmt::Display) {
    options.command[2] = format!("export {name}={value}; {}", options.command[2].to_str().unwrap()).into();
}

pub fn end(job: &mut Job) -> Outcome {
    job.wait_for(PATIENCE).unwrap_or_else(|| panic!("the job did not end; it has written:\n{}", job.output()))
}

/// Runs a job that must go well; what it wrote.
pub fn run(options: JobOptions) -> String {
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    job.output()
}

pub fn wait_for_text(job: &Job, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !job.output().contains(text) {
        assert!(Instant::now() < deadline, "waited in vain for: {text}\n{}", job.output());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The digests that the workers printed.
pub fn digests(output: &str) -> Vec<String> {
    let mut digests: Vec<String> = output
        .lines()
        .filter_map(|line| line.split_once("digest "))
        .map(|(_, digest)| digest.trim().to_string())
        .collect();
    digests.sort();
    digests
}

/// The bits of every tensor in the newest checkpoint.
pub fn stored(home: &Path, declarations: &[Vec<TensorSpec>]) -> BTreeMap<String, Vec<u32>> {
    let latest = gradwire::checkpoint::latest(&home.join("checkpoints")).unwrap();
    assert!(latest.passed_over.is_empty(), "{:?}", latest.passed_over);
    tensors(&latest.checkpoint.expect("a checkpoint"), declarations)
}

fn tensors(checkpoint: &Checkpoint, declarations: &[Vec<TensorSpec>]) -> BTreeMap<String, Vec<u32>> {
    let table = &checkpoint.manifest().layout;
    let options = gradwire::layout::LayoutOptions { chunk_elements: table.chunk_elements, shards: table.shards };
    let layout = Layout::build(declarations, options).unwrap();
    checkpoint.matches(&layout).unwrap();
    bits(&layout, |chunk| checkpoint.chunk(chunk).unwrap().master.to_vec())
}

/// The bits of every tensor, from its chunks.
pub fn bits(layout: &Layout, chunk: impl Fn(gradwire::types::ChunkId) -> Vec<f32>) -> BTreeMap<String, Vec<u32>> {
    let mut all = BTreeMap::new();
    for tensor in &layout.tensors {
        let mut values = Vec::new();
        for piece in layout.pieces(tensor) {
            let from = piece.chunk_start as usize;
            values.extend(chunk(piece.chunk)[from..from + piece.len as usize].iter().map(|value| value.to_bits()));
        }
        all.insert(tensor.spec.name.clone(), values);
    }
    all
}
