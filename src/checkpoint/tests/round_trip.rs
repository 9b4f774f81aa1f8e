//! What is written is read, bit for bit, by this code and by others that know safetensors.
//!
//! Invariant: the expected values never pass through the code under test.

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::{model_disk::Hasty, *};

/// Any job: tensors, who declares them, shards, arrays that the optimizer keeps, bits (NaNs among them).
fn job() -> impl Strategy<Value = (Layout, u32, u64)> {
    let tensor = (prop::collection::vec(1u64..9, 0..3), 0u16..3, 1u8..4);
    (prop::collection::vec(tensor, 1..10), 1u32..4, 1u16..6, 0u32..3, any::<u64>()).prop_map(
        |(tensors, size, shards, moments, seed)| {
            let mut workers = vec![Vec::new(); 2];
            for (index, (shape, group, who)) in tensors.into_iter().enumerate() {
                let spec = TensorSpec::new(format!("层.{index}\"\\"), shape).group(group);
                (0..2).filter(|worker| who & (1 << worker) != 0).for_each(|worker| workers[worker].push(spec.clone()));
            }
            let options = LayoutOptions { chunk_elements: size * 16, shards };
            (Layout::build(&workers, options).unwrap(), moments, seed)
        },
    )
}

fn bits(seed: u64, chunk: u32, array: u32, len: u32) -> Vec<f32> {
    let mut state = seed ^ (u64::from(chunk) << 32) ^ u64::from(array);
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        f32::from_bits((state >> 32) as u32)
    };
    (0..len).map(|_| next()).collect()
}

fn contents(layout: &Layout, seed: u64, moments: u32, chunk: ChunkId) -> Contents {
    let array = |array: u32| match array <= moments {
        true => bits(seed, chunk.0, array, layout.chunk(chunk).len),
        false => Vec::new(),
    };
    let arrays = [array(0), array(1), array(2)];
    // Some tell of their contributors' clocks, some do not.
    let clocks = if seed.is_multiple_of(3) { vec![seed ^ 3, u64::from(chunk.0)] } else { Vec::new() };
    Contents { chunk, version: seed ^ 1, steps: seed ^ 2, clocks, arrays }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_job_comes_back_bit_for_bit((layout, moments, seed) in job(), clock in 0..=CLOCK_MAX, other_shards in 1u16..6) {
        let root = tempfile::tempdir().unwrap();
        begin(root.path()).unwrap();
        let mut written = Vec::new();
        for (shard, chunks) in layout.shards.iter().enumerate() {
            let contents: Vec<_> = chunks.iter().map(|chunk| contents(&layout, seed, moments, *chunk)).collect();
            let report = write_shard(root.path(), clock, ShardId(shard as u16), contents.iter().map(Contents::state)).unwrap();
            // The report travels to the launcher.
            written.push(serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap());
        }
        let manifest = Manifest::new(state(clock), &layout, written);
        prop_assert_eq!(&decode_manifest(&manifest.encode()).unwrap(), &manifest);
        let path = commit(root.path(), &manifest).unwrap();

        let checkpoint = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(checkpoint.manifest(), &manifest);
        for index in 0..layout.chunks.len() as u32 {
            let expected = contents(&layout, seed, moments, ChunkId(index));
            prop_assert!(expected.is(&checkpoint.chunk(ChunkId(index)).unwrap()));
        }
        let files: u64 = manifest.files.iter().map(|file| std::fs::metadata(path.join(&file.name)).unwrap().len()).sum();
        prop_assert_eq!(checkpoint.verify().unwrap(), files);

        // The same declarations on another number of servers.
        let declarations: Vec<Vec<TensorSpec>> = (0..2u16).map(|worker| {
            let own = layout.tensors.iter().filter(|tensor| tensor.contributors.contains(&worker));
            own.map(|tensor| tensor.spec.clone()).collect()
        }).collect();
        let options = LayoutOptions { shards: other_shards, ..layout.options };
        let other = Layout::build(&declarations, options).unwrap();
        checkpoint.matches(&other).unwrap();
        prop_assert!(checkpoint.same_contributors(&other));
    }
}

#[test]
fn shard_files_are_ordinary_safetensors_with_aligned_data() {
    let layout = small_layout(2);
    let root = tempfile::tempdir().unwrap();
    let path = write_all(&Hasty, root.path(), &layout, 5, 2).unwrap();
    let mut chunks = 0;
    for shard in 0..2u16 {
        let bytes = std::fs::read(path.join(format!("shard-0000{shard}.safetensors"))).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((8 + header) % 64, 0);
        let metadata = metadata.metadata().clone().unwrap();
        assert_eq!((metadata["clock"].as_str(), metadata["shard"].parse()), ("5", Ok(shard)));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), layout.shards[usize::from(shard)].len() * 3);
        for chunk in &layout.shards[usize::from(shard)] {
            for (array, name) in ["master", "first", "second"].into_iter().enumerate() {
                let tensor = file.tensor(&format!("chunk.{}.{name}", chunk.0)).unwrap();
                let len = layout.chunk(*chunk).len;
                assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[len as usize][..]));
                let expected: Vec<u8> =
                    (0..len).flat_map(|index| value(5, *chunk, array as u32, index).to_le_bytes()).collect();
                assert_eq!(tensor.data(), expected);
                let at = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
                assert_eq!(at % 64, 0, "chunk {} {name} lies at {at}", chunk.0);
            }
            chunks += 1;
        }
    }
    assert_eq!(chunks, layout.chunks.len());
}

#[test]
fn a_job_that_differs_is_told_how() {
    let root = tempfile::tempdir().unwrap();
    let layout = small_layout(2);
    let path = write_all(&Hasty, root.path(), &layout, 5, 0).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let specs: Vec<_> = layout.tensors.iter().map(|tensor| tensor.spec.clone()).collect();
    let said = |specs: &[TensorSpec], workers: usize, chunk_elements: u32| {
        let declarations = vec![specs.to_vec(); workers];
        let layout = Layout::build(&declarations, LayoutOptions { chunk_elements, shards: 3 }).unwrap();
        checkpoint.matches(&layout).map(|()| checkpoint.same_contributors(&layout)).map_err(|error| error.to_string())
    };
    assert_eq!(said(&specs, 2, 32), Ok(true));
    assert_eq!(said(&specs, 3, 32), Ok(false));
    let with = |index: usize, spec: TensorSpec| {
        let mut specs = specs.clone();
        specs[index] = spec;
        said(&specs, 2, 32).unwrap_err()
    };
    let assert_names = |error: String, parts: &[&str]| {
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} does not name {part}"));
    };
    let shape = with(0, TensorSpec::new("embedding.weight", [7, 5]));
    assert_names(shape, &["`embedding.weight`", "[5, 7]", "[7, 5]", "clock-000000000005"]);
    assert_names(with(1, TensorSpec::new("bias", [3])), &["`bias`", "group 1", "group 0"]);
    assert_names(with(1, TensorSpec::new("other", [3])), &["`bias`", "[3]", "does not declare"]);
    assert_names(said(&specs[..2], 2, 32).unwrap_err(), &["`scale`", "does not declare"]);
    let more = [specs.clone(), vec![TensorSpec::new("more", [2])]].concat();
    assert_names(said(&more, 2, 32).unwrap_err(), &["no tensor `more`", "[2]"]);
    let swapped = [specs[1].clone(), specs[0].clone(), specs[2].clone()];
    assert_names(said(&swapped, 2, 32).unwrap_err(), &["`embedding.weight`", "`bias`", "same order"]);
    assert_names(said(&specs, 2, 48).unwrap_err(), &["chunks of 32", "asks for 48"]);
    // The same tensors and chunk size, but worker 1 no longer shares the last two, which therefore get chunks of their own.
    let layout = Layout::build(&[specs.clone(), specs[..1].to_vec()], LayoutOptions { chunk_elements: 32, shards: 2 });
    assert_names(checkpoint.matches(&layout.unwrap()).unwrap_err().to_string(), &["other chunks", "other workers"]);
}

#[test]
fn a_commit_names_the_shard_that_is_missing() {
    let layout = small_layout(2);
    let root = tempfile::tempdir().unwrap();
    begin(root.path()).unwrap();
    let mut written = Vec::new();
    for (shard, chunks) in layout.shards.iter().enumerate() {
        let contents: Vec<_> = chunks.iter().map(|chunk| Contents::at(&layout, 1, *chunk, 0)).collect();
        let states = contents.iter().map(Contents::state);
        written.push(write_shard(root.path(), 1, ShardId(shard as u16), states).unwrap());
    }
    let said = |written: Vec<ShardWritten>| {
        let manifest = Manifest::new(state(1), &layout, written);
        commit(root.path(), &manifest).unwrap_err().to_string()
    };
    let first = written[1].chunks[0].chunk.0;
    assert!(said(written[..1].to_vec()).contains(&format!("no file holds chunk {first}")));
    assert!(said(vec![written[0].clone(); 2]).contains("file 1 is `shard-00000.safetensors`"));
    let mut moved = written.clone();
    let chunk = moved[1].chunks.pop().unwrap();
    assert!(said(moved.clone()).contains(&format!("no file holds chunk {}", chunk.chunk.0)));
    moved[1].chunks.extend([chunk.clone(), chunk]);
    assert!(said(moved).contains("listed before"));
    let mut longer = written.clone();
    longer[1].bytes += 1;
    assert!(said(longer).contains("shard 1 wrote"));
    std::fs::remove_file(root.path().join("clock-000000000001.writing/shard-00001.safetensors")).unwrap();
    let error = said(written);
    assert!(error.contains("shard-00001") && error.contains("share"), "{error}");
    assert!(latest(root.path()).unwrap().checkpoint.is_none());
}

#[test]
fn a_shard_without_chunks_has_no_file() {
    let tensors = vec![TensorSpec::new("w", [4, 4])];
    let layout = Layout::build(&[tensors], LayoutOptions { chunk_elements: 32, shards: 2 }).unwrap();
    let root = tempfile::tempdir().unwrap();
    begin(root.path()).unwrap();
    let full = layout.shards.iter().position(|chunks| !chunks.is_empty()).unwrap();
    let contents = Contents::at(&layout, 1, layout.shards[full][0], 0);
    let written = write_shard(root.path(), 1, ShardId(full as u16), std::iter::once(contents.state())).unwrap();
    let path = commit(root.path(), &Manifest::new(state(1), &layout, vec![written])).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.chunk(contents.state().chunk).unwrap().master, contents.state().master);
}

/// The bug: JSON has no infinity, so such a checkpoint was complete and could never be opened.
#[test]
fn what_could_not_be_read_again_is_not_committed() {
    let tensors = vec![TensorSpec::new("w", [2]).init(Init::Constant(f32::INFINITY))];
    let layout = Layout::build(&[tensors], LayoutOptions { chunk_elements: 16, shards: 1 }).unwrap();
    let root = tempfile::tempdir().unwrap();
    let error = write_all(&Hasty, root.path(), &layout, 1, 0).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
    assert!(latest(root.path()).unwrap().checkpoint.is_none());
}

#[test]
fn pruning_keeps_the_newest_readable_ones() {
    let layout = small_layout(1);
    let root = tempfile::tempdir().unwrap();
    for clock in 1..=5 {
        write_all(&Hasty, root.path(), &layout, clock, 0).unwrap();
    }
    std::fs::write(root.path().join("notes.txt"), b"the user's").unwrap();
    std::fs::create_dir(root.path().join("clock-1")).unwrap();
    std::fs::write(root.path().join("clock-000000000004/manifest.json"), b"{}").unwrap();
    let removed = prune(root.path(), 2).unwrap();
    assert_eq!(removed, [2, 1].map(|clock| root.path().join(format!("clock-{clock:012}"))));
    let mut left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["clock-000000000003", "clock-000000000004", "clock-000000000005", "clock-1", "notes.txt"]);
    assert!(prune(root.path(), 0).unwrap_err().to_string().contains("at least one"));
    assert_eq!(prune(root.path(), 7).unwrap(), Vec::<PathBuf>::new());
}
