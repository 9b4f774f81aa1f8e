//! Parameters in and out of ordinary safetensors files, checked with other readers and writers of that format.
//!
//! Invariant: the other side of each test is not our code.

use std::{fs, process::Command};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{model_disk::Hasty, *};

/// What the exported tensor must hold, by the layout's own account of where its pieces lie.
fn expected(layout: &Layout, name: &str, clock: Clock) -> Vec<u8> {
    let pieces = layout.pieces(layout.tensor(name).unwrap());
    let values = pieces
        .flat_map(|piece| (0..piece.len).map(move |index| value(clock, piece.chunk, 0, piece.chunk_start + index)));
    values.flat_map(f32::to_le_bytes).collect()
}

fn exported(layout: &Layout, dir: &Path) -> PathBuf {
    let path = write_all(&Hasty, &dir.join("checkpoints"), layout, 3, 2).unwrap();
    let out = dir.join("model.safetensors");
    let bytes = export(&Checkpoint::open(&path).unwrap(), &out).unwrap();
    assert_eq!(bytes, fs::metadata(&out).unwrap().len());
    out
}

#[test]
fn an_export_holds_every_tensor_by_name_and_shape() {
    let layout = small_layout(3);
    let root = tempfile::tempdir().unwrap();
    let bytes = fs::read(exported(&layout, root.path())).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), layout.tensors.len());
    for tensor in &layout.tensors {
        let found = file.tensor(&tensor.spec.name).unwrap();
        assert_eq!(found.dtype(), Dtype::F32);
        assert!(found.shape().iter().map(|dimension| *dimension as u64).eq(tensor.spec.shape.iter().copied()));
        assert_eq!(found.data(), expected(&layout, &tensor.spec.name, 3));
    }
}

#[test]
fn python_reads_an_export_and_a_shard() {
    let python = std::env::var("GRADWIRE_PYTHON").unwrap_or("python3".into());
    if !Command::new(&python).args(["-c", "import safetensors"]).output().is_ok_and(|output| output.status.success()) {
        println!("skipped: {python} cannot import safetensors (set GRADWIRE_PYTHON to one that can)");
        return;
    }
    let layout = small_layout(1);
    let root = tempfile::tempdir().unwrap();
    let out = exported(&layout, root.path());
    let script = "import sys, safetensors\n\
                  for name, t in sorted(safetensors.deserialize(open(sys.argv[1], 'rb').read())):\n    \
                  print(name, t['dtype'], list(t['shape']), bytes(t['data']).hex())";
    let said = |file: &Path| {
        let output = Command::new(&python).args(["-c", script]).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let line = |name: &str, shape: &str| format!("{name} F32 {shape} {}\n", hex(expected(&layout, name, 3)));
    let lines = [line("bias", "[3]"), line("embedding.weight", "[5, 7]"), line("scale", "[]")];
    assert_eq!(said(&out), lines.concat());
    let shard = said(&root.path().join("checkpoints/clock-000000000003/shard-00000.safetensors"));
    assert_eq!(shard.lines().count(), layout.chunks.len() * 3);
    assert!(shard.contains("chunk.0.second F32 [32] "));
}

#[test]
fn a_tensor_named_like_the_metadata_is_not_exported() {
    let tensors = vec![TensorSpec::new("__metadata__", [2])];
    let layout = Layout::build(&[tensors], LayoutOptions { chunk_elements: 16, shards: 1 }).unwrap();
    let root = tempfile::tempdir().unwrap();
    let path = write_all(&Hasty, root.path(), &layout, 1, 0).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(export(&checkpoint, &root.path().join("out")).unwrap_err().to_string().contains("__metadata__"));
    assert!(export(&checkpoint, Path::new("/")).unwrap_err().to_string().contains("does not name a file"));
}

/// A file as another tool writes it, with a tensor in each format; `odd` moves the data to odd addresses.
fn foreign(dir: &Path, odd: bool) -> PathBuf {
    let floats: [f32; 6] = [0.0, -1.5, 1e30, f32::MIN_POSITIVE, 65504.0, -0.0];
    let f32s: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
    let bf16s: Vec<u8> = floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let f16s: Vec<u8> = floats.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let views = [
        (Dtype::F32, "w.f32", &f32s),
        (Dtype::BF16, "w.bf16", &bf16s),
        (Dtype::F16, "w.f16", &f16s),
        (Dtype::I32, "w.i32", &f32s),
    ];
    let tensors = views.map(|(dtype, name, data)| (name, TensorView::new(dtype, vec![2, 3], data).unwrap()));
    let mut bytes = safetensors::serialize(tensors, None).unwrap();
    if odd {
        let len = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        bytes.insert(8 + len as usize, b' ');
        bytes[..8].copy_from_slice(&(len + 1).to_le_bytes());
    }
    let path = dir.join("init.safetensors");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn initial_parameters_come_in_any_float_format_and_in_parts() {
    for odd in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let initial = InitialParameters::open(&foreign(root.path(), odd)).unwrap();
        let read = |name: &str, range: std::ops::Range<u64>| {
            let mut out = vec![f32::NAN; (range.end - range.start) as usize];
            initial.fill(name, &[2, 3], range, &mut out).unwrap();
            out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(read("w.f32", 0..6), bits(&[0.0, -1.5, 1e30, f32::MIN_POSITIVE, 65504.0, -0.0]));
        assert_eq!(read("w.f32", 1..3), bits(&[-1.5, 1e30]));
        assert_eq!(read("w.f32", 6..6), bits(&[]));
        // 1e30 is 0x7149f2ca and 65504 is 0x477fe000: both round up to the next 16 bits.
        let expected = [0.0, -1.5, f32::from_bits(0x714a_0000), f32::MIN_POSITIVE, 65536.0, -0.0];
        assert_eq!(read("w.bf16", 0..6), bits(&expected));
        assert_eq!(read("w.f16", 0..6), bits(&[0.0, -1.5, f32::INFINITY, 0.0, 65504.0, -0.0]));
    }
}

#[test]
fn initial_parameters_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = foreign(root.path(), false);
    let initial = InitialParameters::open(&path).unwrap();
    let mut names = initial.names();
    names.sort();
    assert_eq!(names, ["w.bf16", "w.f16", "w.f32", "w.i32"]);
    let said = |name: &str, shape: &[u64]| initial.check(name, shape).unwrap_err().to_string();
    initial.check("w.f16", &[2, 3]).unwrap();
    assert!(said("w.f33", &[2, 3]).contains("no tensor `w.f33`") && said("w.f33", &[2, 3]).contains("`w.f32`"));
    for shape in [&[3, 2][..], &[6], &[2, 3, 1]] {
        let error = said("w.f32", shape);
        assert!(error.contains("[2, 3]") && error.contains(&format!("{shape:?}")), "{error}");
    }
    assert!(said("w.i32", &[2, 3]).contains("I32"));
    let mut untouched = [7.0; 6];
    initial.fill("w.i32", &[2, 3], 0..6, &mut untouched).unwrap_err();
    assert_eq!(untouched, [7.0; 6]);
    let whole = fs::read(&path).unwrap();
    let cut = root.path().join("cut");
    for len in 0..whole.len() {
        fs::write(&cut, &whole[..len]).unwrap();
        let error = InitialParameters::open(&cut).unwrap_err().to_string();
        assert!(error.contains("cut"), "{error}");
    }
    assert!(InitialParameters::open(&root.path().join("none")).unwrap_err().to_string().contains("none"));
}

#[test]
fn an_export_is_a_start_for_another_job() {
    let layout = small_layout(2);
    let root = tempfile::tempdir().unwrap();
    let initial = InitialParameters::open(&exported(&layout, root.path())).unwrap();
    for tensor in &layout.tensors {
        let mut out = vec![0.0; tensor.len as usize];
        initial.fill(&tensor.spec.name, &tensor.spec.shape, 0..tensor.len, &mut out).unwrap();
        assert_eq!(bytemuck::cast_slice::<_, u8>(&out), expected(&layout, &tensor.spec.name, 3));
    }
}
