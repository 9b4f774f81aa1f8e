//! A checkpoint of each format version, written once and kept in tests/data: whatever this code becomes, it reads those.
//!
//! Invariant: tests/data/checkpoint-v<N> is never written again; another version gets a directory beside it.

use super::{model_disk::Hasty, *};

fn stored() -> PathBuf {
    stored_as(1)
}

fn stored_as(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/checkpoint-v{version}/clock-000000000007"))
}

/// What version 3 is for: files of older checkpoints.
fn write_newest(dir: &Path) -> PathBuf {
    let layout = small_layout(1);
    for clock in [5, 6] {
        write_rare(&Hasty, dir, &layout, clock).unwrap();
    }
    write_rare(&Hasty, dir, &layout, 7).unwrap()
}

#[test]
fn version_3_is_read_and_written_as_it_was() {
    let checkpoint = Checkpoint::open(&stored_as(3)).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!(manifest.format_version(), 3);
    let files: Vec<_> = manifest.files.iter().map(|file| (file.shard.0, file.since)).collect();
    assert_eq!(files, [(0, None), (0, Some(5))]);
    let stale: Vec<bool> = manifest.files[1].chunks.iter().map(|entry| entry.is_stale).collect();
    assert_eq!(stale.iter().filter(|stale| **stale).count(), 1, "{stale:?}");
    checkpoint.verify().unwrap();
    for (chunk, last) in [(0, 7u64), (1, 4), (2, 0)] {
        let data = checkpoint.chunk(ChunkId(chunk)).unwrap();
        assert_eq!((data.version, data.steps), (7, last * 2));
        assert_eq!(data.master[1], last as f32 + chunk as f32 * 0.125 - 65536.0);
    }
    let root = tempfile::tempdir().unwrap();
    let path = write_newest(root.path());
    for file in &manifest.files {
        let [now, then] = [&path, &stored_as(3)].map(|dir| std::fs::read(dir.join(&file.name)).unwrap());
        assert_eq!(now, then, "{}", file.name);
    }
    let mut now = Checkpoint::open(&path).unwrap().manifest().clone();
    now.gradwire = manifest.gradwire.clone();
    assert_eq!(now.encode(), std::fs::read(stored_as(3).join("manifest.json")).unwrap());
}

/// What version 2 is for: contributors that are not equally far.
fn write_with_clocks(dir: &Path) -> PathBuf {
    let layout = small_layout(2);
    let state = JobState { consistency: Consistency::Asp, ..state(7) };
    let contents =
        |chunk: ChunkId| Contents { clocks: vec![7 + u64::from(chunk.0), 9], ..Contents::at(&layout, 7, chunk, 2) };
    write_contents(&Hasty, dir, &layout, state, contents).unwrap()
}

#[test]
fn version_2_is_read_and_written_as_it_was() {
    let checkpoint = Checkpoint::open(&stored_as(2)).unwrap();
    assert_eq!(checkpoint.manifest().format_version(), 2);
    checkpoint.verify().unwrap();
    for chunk in 0..3 {
        let data = checkpoint.chunk(ChunkId(chunk)).unwrap();
        assert_eq!((data.version, data.steps, data.clocks), (7, 14, &[7 + u64::from(chunk), 9][..]));
        assert_eq!(data.master[1], 7.0 + chunk as f32 * 0.125 - 65536.0);
    }
    let root = tempfile::tempdir().unwrap();
    let mut now = Checkpoint::open(&write_with_clocks(root.path())).unwrap().manifest().clone();
    now.gradwire = checkpoint.manifest().gradwire.clone();
    assert_eq!(now.encode(), std::fs::read(stored_as(2).join("manifest.json")).unwrap());
    // The same in a text that says it is of version 1.
    let text = String::from_utf8(now.encode()).unwrap().replace("\"format_version\":2", "\"format_version\":1");
    let object = &text[..text.find(",\"sha256\"").unwrap()];
    let refused = decode_manifest(&seal_manifest(format!("{object}}}").as_bytes())).unwrap_err();
    assert!(refused.contains("clocks"), "{refused}");
}

/// Says what the stored checkpoint holds without asking today's layout or codec.
#[test]
fn version_1_is_read_as_it_was_written() {
    let checkpoint = Checkpoint::open(&stored()).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!((manifest.format_version(), manifest.gradwire.as_str()), (1, "0.1.0"));
    assert_eq!(manifest.state, state(7));
    assert_eq!((manifest.layout.chunk_elements, manifest.layout.shards, manifest.layout.elements), (32, 2, 80));
    let tensor = |name: &str, shape: &[u64], init, group, start| TensorEntry {
        name: name.into(),
        shape: shape.into(),
        init,
        group,
        start,
        contributors: vec![0, 1],
    };
    let tensors = [
        tensor("embedding.weight", &[5, 7], Init::Normal(0.02), 0, 0),
        tensor("bias", &[3], Init::Zeros, 1, 48),
        tensor("scale", &[], Init::Constant(1.0), 0, 64),
    ];
    assert_eq!(manifest.layout.tensors, tensors);
    assert_eq!(manifest.layout.chunks, [(0, 32), (32, 32), (64, 16)]);
    let held: Vec<Vec<u32>> =
        manifest.files.iter().map(|file| file.chunks.iter().map(|entry| entry.chunk.0).collect()).collect();
    assert_eq!(held, [vec![2, 0], vec![1]]);
    for (chunk, len) in [(0, 32), (1, 32), (2, 16)] {
        let data = checkpoint.chunk(ChunkId(chunk)).unwrap();
        assert_eq!((data.version, data.steps), (7, 14));
        for (array, found) in [data.master, data.first, data.second].into_iter().enumerate() {
            // 7 (the clock) + chunk / 8 + 1024 x array - 65536 x index
            let expected: Vec<f32> = (0..len)
                .map(|index| 7.0 + chunk as f32 * 0.125 + array as f32 * 1024.0 - index as f32 * 65536.0)
                .collect();
            assert_eq!(found, expected, "chunk {chunk}, array {array}");
        }
    }
    assert_eq!(checkpoint.verify().unwrap(), manifest.files.iter().map(|file| file.bytes).sum::<u64>());
}

/// The same state gives the same bytes as long as the version is 1, but for the name of the program that wrote them.
#[test]
fn version_1_is_written_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let path = write_all(&Hasty, root.path(), &small_layout(2), 7, 2).unwrap();
    for name in ["shard-00000.safetensors", "shard-00001.safetensors"] {
        assert_eq!(std::fs::read(path.join(name)).unwrap(), std::fs::read(stored().join(name)).unwrap(), "{name}");
    }
    let [mut now, then] = [path, stored()].map(|path| Checkpoint::open(&path).unwrap().manifest().clone());
    now.gradwire = then.gradwire;
    assert_eq!(now.encode(), std::fs::read(stored().join("manifest.json")).unwrap());
}

/// Wrote tests/data/checkpoint-v1, and would write that of a later version: `GRADWIRE_STORE=tests/data/checkpoint-vN cargo
/// test --lib stored -- --ignored`.
#[test]
#[ignore = "writes the stored checkpoint of a new format version"]
fn store_a_checkpoint() {
    let dir = std::env::var("GRADWIRE_STORE").expect("GRADWIRE_STORE names the directory to write to");
    write_newest(Path::new(&dir));
}
