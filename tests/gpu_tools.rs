//! `gradwire gpu check` and `gradwire gpu bench` over soft CUDA: they run to their end, and the check notices a wrong bit.
//!
//! Invariant: no figure is looked at but for being a number; what soft CUDA measures means nothing.

use std::{path::PathBuf, process::Command};

fn soft_cuda() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libgradwire_softcuda.so")
}

fn gradwire(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
    command.arg("gpu").args(arguments).env("GRADWIRE_CUDA_LIBRARY", soft_cuda());
    command
}

#[test]
fn the_check_compares_every_combination_and_whole_jobs() {
    let output = gradwire(&["check", "--json"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["kernels"]["combinations"], 6 * 3 * 3, "{found}");
    // Three wire copies and at least the parameters, of some five thousand elements each.
    assert!(found["kernels"]["elements"].as_u64().unwrap() > 54 * 4 * 5000, "{found}");
    assert_eq!((&found["jobs"], &found["device"]), (&3.into(), &"GPU 0 (gradwire soft CUDA)".into()));
}

#[test]
fn the_check_fails_with_the_device() {
    let output = gradwire(&["check"]).env("SOFTCUDA_FAIL", "cuLaunchKernel:40=719!").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cuLaunchKernel failed on GPU 0"), "{text}");
    let output = gradwire(&["check", "--device", "3"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no GPU 3"));
}

#[test]
fn the_benchmark_tells_every_kernel_and_its_ceiling() {
    let arguments = ["bench", "--bytes", "512,1024", "--batch", "3", "--repetitions", "3", "--times", "2", "--json"];
    let output = gradwire(&arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<serde_json::Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // 22 kernels on two sizes and a batch, AdamW with and without a wire copy on two, a launch, and two staged formats on two.
    assert_eq!(rows.len(), 22 * 3 + 4 + 1 + 4);
    for row in &rows {
        for number in ["seconds", "bytes_per_s", "ceiling_bytes_per_s", "share"] {
            assert!(row[number].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    let stepped = rows.iter().filter(|row| row["parameters_per_s"].is_number()).count();
    assert_eq!(stepped, 15 * 3 + 4 + 4);
    let mut only =
        gradwire(&["bench", "--bytes", "256", "--times", "1", "--only", "fold", "--kernels", "kernels/gradwire.ptx"]);
    let only = String::from_utf8(only.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap().stdout).unwrap();
    assert_eq!(only.matches("gradwire_").count(), 2, "{only}");
    let plain =
        gradwire(&["bench", "--bytes", "256", "--batch", "1", "--repetitions", "1", "--times", "1"]).output().unwrap();
    assert!(String::from_utf8_lossy(&plain.stdout).contains("staged push-pull"), "{plain:?}");
}
