//! A model that was trained and stored: listed, verified, exported for other tools, and trained further from a stored clock.
//!
//! The jobs are real ones, started from the command line; the workers are `examples/linear`.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use gradwire::{checkpoint::Checkpoint, types::ChunkId};
use safetensors::{Dtype, SafeTensors};

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Rows and columns of the example's matrix.
const N: usize = 10;

fn home() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

/// The example's executable beside this test's. `cargo test` does not build it, and one from before may be old.
fn linear() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let profile = own.parent().and_then(Path::parent).unwrap();
    let path = profile.join("examples/linear");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--example", "linear", "--target-dir"]).arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "{path:?} cannot be built");
    path
}

fn gradwire(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(GRADWIRE);
    command.args(arguments).env("GRADWIRE_HOME", home).current_dir(home).stdin(Stdio::null());
    command.output().unwrap()
}

fn succeed(home: &Path, arguments: &[&str]) -> String {
    let output = gradwire(home, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {err}{out}");
    out.into_owned()
}

/// Trains with momentum, so that there is state to be carried over.
fn train(home: &Path, settings: &[&str]) {
    let linear = linear();
    let mut arguments = vec!["run", "-s", "2", "-n", "2", "--optimizer", "sgd", "--lr", "0.01"];
    // A chunk is less than the matrix, so that both servers have a part of it.
    arguments.extend(["--set", "optimizer.momentum=0.9", "--set", "chunk_bytes=256", "--set", "checkpoint.keep=10"]);
    arguments.extend(settings);
    arguments.extend(["--", linear.to_str().unwrap()]);
    succeed(home, &arguments);
}

/// The exported matrix, bit by bit.
fn exported(home: &Path, checkpoint: &str, file: &str) -> Vec<u32> {
    let said = succeed(home, &["checkpoint", "export", checkpoint, file]);
    assert!(said.contains("1 tensors"), "{said}");
    let bytes = std::fs::read(home.join(file)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["w"]);
    let tensor = file.tensor("w").unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[N, N][..]));
    tensor.data().chunks_exact(4).map(|value| u32::from_le_bytes(value.try_into().unwrap())).collect()
}

#[test]
fn a_stored_model_is_exported_and_trained_further_with_the_same_bits() {
    let home = home();
    let home = home.path();
    train(home, &["--checkpoint-dir", "whole", "--checkpoint-every", "100"]);
    let middle = exported(home, "whole/clock-000000000100", "middle.safetensors");
    let end = exported(home, "whole", "end.safetensors");
    assert_ne!(middle, end, "nothing was learnt after clock 100: the comparison below would say nothing");

    // What is exported is what the shards hold, and it does what the example set out to learn.
    let checkpoint = Checkpoint::open(&home.join("whole/clock-000000001000")).unwrap();
    let chunks = 0..checkpoint.manifest().layout.chunks.len() as u32;
    let held: Vec<u32> =
        chunks.flat_map(|id| checkpoint.chunk(ChunkId(id)).unwrap().master.to_vec()).map(f32::to_bits).collect();
    assert_eq!(held[..N * N], end);
    assert!(checkpoint.manifest().files.len() == 2, "both servers have a part");
    // The example's inputs lie in a plane, so it is not the matrix itself that is found but what it makes of such inputs.
    for step in 1000..1010 {
        let x: Vec<f32> = (0..N).map(|i| ((step * 7 + i * 3) as f32).sin()).collect();
        for column in 0..N {
            let error = |row: usize| x[row] * (f32::from_bits(end[row * N + column]) - (row + column) as f32 * 0.1);
            let error: f32 = (0..N).map(error).sum();
            assert!(error.abs() < 0.01, "column {column} is off by {error}");
        }
    }

    // From clock 100 on, with one server instead of two.
    let mut resumed = vec!["--resume", "whole/clock-000000000100", "--checkpoint-dir", "further"];
    resumed.extend(["--set", "servers=1"]);
    let linear = linear();
    let mut arguments = vec!["run", "-n", "2", "--optimizer", "sgd", "--lr", "0.01"];
    arguments.extend(["--set", "optimizer.momentum=0.9", "--set", "chunk_bytes=256"]);
    arguments.extend(&resumed);
    arguments.extend(["--", linear.to_str().unwrap()]);
    succeed(home, &arguments);
    assert_eq!(exported(home, "further", "further.safetensors"), end, "resumed");

    // And one that was never stored on its way.
    train(home, &["--checkpoint-dir", "undisturbed"]);
    assert_eq!(exported(home, "undisturbed", "undisturbed.safetensors"), end, "undisturbed");
}

#[test]
fn what_is_stored_is_listed_and_verified_and_damage_is_told() {
    let home = home();
    let home = home.path();
    train(home, &["--checkpoint-dir", "ckpt", "--checkpoint-every", "500"]);
    let list = succeed(home, &["checkpoint", "list", "ckpt", "--json"]);
    let listed: Vec<serde_json::Value> = list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let usable = listed.iter().filter(|entry| entry["unusable"].is_null());
    let clocks: Vec<u64> = usable.map(|entry| entry["clock"].as_u64().unwrap()).collect();
    assert_eq!(clocks, [1000, 500], "{list}");
    assert!(succeed(home, &["checkpoint", "verify", "ckpt"]).contains("clock-000000001000: every sum of"));

    let shard = home.join("ckpt/clock-000000001000/shard-00000.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    for arguments in [["verify", "ckpt"].as_slice(), &["export", "ckpt", "model.safetensors"]] {
        let output = gradwire(home, &[&["checkpoint"], arguments].concat());
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && err.contains("shard-00000.safetensors") && err.contains("damaged"),
            "{err}"
        );
    }
    assert!(!home.join("model.safetensors").exists(), "a damaged checkpoint was exported");

    // Shortened it cannot even be opened: the one before it is taken, and that is said.
    std::fs::write(&shard, &bytes[..last]).unwrap();
    let output = gradwire(home, &["checkpoint", "export", "ckpt", "model.safetensors"]);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("of clock 500,") && err.contains("passing over"), "{out}{err}");
    let output = gradwire(home, &["checkpoint", "verify", "nowhere"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no complete checkpoint here"), "{output:?}");
}
