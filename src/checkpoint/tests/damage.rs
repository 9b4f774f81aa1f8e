//! Truncated, corrupted, foreign and missing files: each refused with what is wrong and where, and the checkpoint before is
//! still found.
//!
//! Invariant: the damage is done to copies that are complete and right without it (each test opens them first).

use std::fs;

use proptest::prelude::*;
use serde_json::Value;

use super::{model_disk::Hasty, *};

const FILES: [&str; 3] = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"];

/// A directory with the checkpoints of clocks 1 and 2.
fn two() -> (tempfile::TempDir, Layout, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let layout = small_layout(2);
    write_all(&Hasty, root.path(), &layout, 1, 2).unwrap();
    let newest = write_all(&Hasty, root.path(), &layout, 2, 2).unwrap();
    Checkpoint::open(&newest).unwrap().verify().unwrap();
    (root, layout, newest)
}

fn verified(path: &Path) -> Result<u64> {
    Checkpoint::open(path)?.verify()
}

/// Replaces a file as another program would: the old bytes stay for whoever has them mapped.
fn replace(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

#[test]
fn truncation_at_every_length_is_refused() {
    let (root, layout, newest) = two();
    for name in FILES {
        let path = newest.join(name);
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            replace(&path, &whole[..len]);
            let error = Checkpoint::open(&newest).map(drop).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("older checkpoint"), "{name} cut to {len}: {error}");
            if len % 97 == 0 {
                let found = latest(root.path()).unwrap();
                assert_is(&found.checkpoint.unwrap(), &layout, 1, 2);
                assert!(found.passed_over[0].path == newest && found.passed_over[0].why.to_string() == error);
            }
        }
        replace(&path, &[whole.as_slice(), b"\n"].concat());
        assert!(Checkpoint::open(&newest).is_err(), "{name} with a byte more");
        replace(&path, &whole);
    }
    verified(&newest).unwrap();
}

#[test]
fn a_change_of_any_byte_is_refused() {
    let (root, layout, newest) = two();
    for name in FILES {
        let path = newest.join(name);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= [1u8, 0x80, 0xff, 0x20][at % 4];
            replace(&path, &bytes);
            let error = verified(&newest).unwrap_err().to_string();
            assert!(error.contains(name), "{name} changed at {at}: {error}");
        }
        // The last change was in the data (or in the manifest's sum): only a whole reading of the shards finds it.
        let found = latest_where(root.path(), |checkpoint| checkpoint.verify().map(drop)).unwrap();
        assert_is(&found.checkpoint.unwrap(), &layout, 1, 2);
        assert_eq!(found.passed_over.len(), 1);
        replace(&path, &whole);
    }
    verified(&newest).unwrap();
}

#[test]
fn a_changed_parameter_is_never_handed_out() {
    let (_root, layout, newest) = two();
    let victim = layout.shards[1][0];
    let path = newest.join(FILES[2]);
    let mut bytes = fs::read(&path).unwrap();
    let (data, _) = decode_header(&bytes).unwrap();
    bytes[data + 4] ^= 1;
    replace(&path, &bytes);
    let checkpoint = Checkpoint::open(&newest).unwrap();
    let error = checkpoint.chunk(victim).unwrap_err().to_string();
    assert!(error.contains(&format!("chunk {}", victim.0)) && error.contains("CRC-32C"), "{error}");
    for chunk in (0..layout.chunks.len() as u32).map(ChunkId).filter(|chunk| *chunk != victim) {
        assert!(Contents::at(&layout, 2, chunk, 2).is(&checkpoint.chunk(chunk).unwrap()));
    }
    let beyond = checkpoint.chunk(ChunkId(99)).unwrap_err().to_string();
    assert!(beyond.contains("chunk 99"), "{beyond}");
    let out = newest.join("export");
    assert!(export(&checkpoint, &out).unwrap_err().to_string().contains(&error) && !out.exists());
}

#[test]
fn missing_and_foreign_files_are_refused() {
    let (root, _layout, newest) = two();
    let older = root.path().join("clock-000000000001");
    let said = || verified(&newest).unwrap_err().to_string();
    for name in FILES {
        let whole = fs::read(newest.join(name)).unwrap();
        fs::remove_file(newest.join(name)).unwrap();
        let missing = if name == FILES[0] { "has no manifest.json" } else { "is missing" };
        assert!(said().contains(missing) && said().contains("older"), "{}", said());
        fs::create_dir(newest.join(name)).unwrap();
        assert!(said().contains("is not a file"), "{}", said());
        fs::remove_dir(newest.join(name)).unwrap();
        // The same file of the checkpoint before has the same length.
        replace(&newest.join(name), &fs::read(older.join(name)).unwrap());
        assert!(said().contains("shard-0000"), "{}", said());
        for foreign in [&b"PK\x03\x04 something else"[..], b"", b"{}", b"\x10\0\0\0\0\0\0\0{\"a\":1}        "] {
            replace(&newest.join(name), foreign);
            assert!(said().contains(name), "{}", said());
        }
        replace(&newest.join(name), &whole);
        verified(&newest).unwrap();
    }
    let parent = verified(root.path()).unwrap_err().to_string();
    assert!(parent.contains("directory of checkpoints") && parent.contains("clock-000000000002"), "{parent}");
    assert!(verified(&root.path().join("none")).unwrap_err().to_string().contains("is not a directory"));
    let none = latest(&root.path().join("none")).unwrap();
    assert!(none.checkpoint.is_none() && none.passed_over.is_empty());
}

#[test]
fn the_two_halves_of_two_checkpoints_are_no_checkpoint() {
    // Same job, same clock, same lengths, other contents: as after a restore from two backups.
    let (root, layout, newest) = two();
    let other = tempfile::tempdir().unwrap();
    begin(other.path()).unwrap();
    let mut contents: Vec<_> = layout.shards[0].iter().map(|chunk| Contents::at(&layout, 2, *chunk, 2)).collect();
    contents[0].arrays[0][0] += 1.0;
    write_shard(other.path(), 2, ShardId(0), contents.iter().map(Contents::state)).unwrap();
    let foreign = fs::read(other.path().join("clock-000000000002.writing").join(FILES[1])).unwrap();
    assert_eq!(foreign.len() as u64, fs::metadata(newest.join(FILES[1])).unwrap().len());
    replace(&newest.join(FILES[1]), &foreign);
    let error = verified(&newest).unwrap_err().to_string();
    assert!(error.contains(FILES[1]) && error.contains("CRC-32C"), "{error}");
    drop(root);
}

#[test]
fn other_versions_and_other_formats_are_named() {
    let (_root, _layout, newest) = two();
    let text = fs::read(newest.join(FILES[0])).unwrap();
    let whole: Value = serde_json::from_slice(&text).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut value = whole.clone();
        value.as_object_mut().unwrap().remove("sha256");
        change(&mut value);
        decode_manifest(&seal_manifest(&serde_json::to_vec(&value).unwrap()))
    };
    with(&|_| {}).unwrap();
    let newer = with(&|value| value["format_version"] = 4.into()).unwrap_err();
    assert!(newer.contains("version 4") && newer.contains("up to version 3") && newer.contains("newer"), "{newer}");
    assert!(with(&|value| value["format_version"] = 0.into()).is_err());
    assert!(with(&|value| value["format"] = "other".into()).unwrap_err().contains("not the manifest of a gradwire"));
    assert!(with(&|value| value["surprise"] = 1.into()).unwrap_err().contains("surprise"));
    assert!(decode_manifest(b"{\"a\": 1}").unwrap_err().contains("not the manifest of a gradwire"));
    assert!(decode_manifest(b"").unwrap_err().contains("truncated"));
    // A newer version may end otherwise than ours.
    let unsealed = b"{\"format\": \"gradwire-checkpoint\", \"format_version\": 4}";
    assert!(decode_manifest(unsealed).unwrap_err().contains("version 4"));
}

/// What a liar with the right sum might write in place of a number.
const NUMBERS: [u64; 12] =
    [0, 1, 2, 3, 15, 16, 1 << 16, u32::MAX as u64, 1 << 32, 1 << 62, i64::MAX as u64 - 15, u64::MAX];

/// Changes the `at`-th value within (numbers, arrays, texts) to another of its kind. Returns false if there are fewer.
fn mutate(value: &mut Value, at: &mut usize, how: usize) -> bool {
    let hit = *at == 0;
    *at = at.wrapping_sub(1);
    if hit {
        match value {
            Value::Number(_) => *value = NUMBERS[how % NUMBERS.len()].into(),
            Value::Array(items) if items.is_empty() => items.push(how.into()),
            Value::Array(items) => match how % 4 {
                0 => drop(items.pop()),
                1 => items.push(items[0].clone()),
                2 => items.reverse(),
                _ => items.clear(),
            },
            Value::String(text) => *text = ["", "../../etc/passwd", "shard-00001.safetensors", "\0"][how % 4].into(),
            other => *other = Value::Null,
        }
        return true;
    }
    match value {
        Value::Array(items) => items.iter_mut().any(|item| mutate(item, at, how)),
        Value::Object(members) => members.values_mut().any(|member| mutate(member, at, how)),
        _ => false,
    }
}

#[test]
fn manifests_with_a_right_sum_and_wrong_contents_do_no_harm() {
    let (root, layout, newest) = two();
    let mut whole: Value = serde_json::from_slice(&fs::read(newest.join(FILES[0])).unwrap()).unwrap();
    whole.as_object_mut().unwrap().remove("sha256");
    let (mut refused, mut accepted, mut at) = (0, 0, 0);
    'positions: loop {
        for how in 0..NUMBERS.len() {
            let mut value = whole.clone();
            if !mutate(&mut value, &mut { at }, how) {
                break 'positions;
            }
            let text = seal_manifest(&serde_json::to_vec(&value).unwrap());
            replace(&newest.join(FILES[0]), &text);
            match Checkpoint::open(&newest) {
                Ok(checkpoint) => {
                    // A lie about the job's settings cannot be seen; one about places or sums must be.
                    accepted += 1;
                    let _ = checkpoint.matches(&layout);
                    let _ = checkpoint.verify();
                    (0..5).for_each(|chunk| drop(checkpoint.chunk(ChunkId(chunk))));
                    let _ = export(&checkpoint, &root.path().join("out"));
                }
                Err(_) => refused += 1,
            }
        }
        at += 1;
    }
    assert!(refused > 500 && accepted > 50, "{refused} refused, {accepted} accepted");
}

proptest! {
    #[test]
    fn random_bytes_are_no_manifest_and_no_header(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode_manifest(&bytes).is_err());
        prop_assert!(decode_manifest(&seal_manifest(&bytes)).is_err());
        if let Ok((data, metadata)) = decode_header(&bytes) {
            prop_assert_eq!(data + metadata.data_len(), bytes.len());
        }
    }

    #[test]
    fn many_flipped_bits_are_refused(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..40), which in 0usize..3) {
        let (_root, _layout, newest) = two();
        let whole = fs::read(newest.join(FILES[which])).unwrap();
        let mut bytes = whole.clone();
        flips.iter().for_each(|(at, bit)| bytes[at.index(whole.len())] ^= 1 << bit);
        prop_assume!(bytes != whole);
        replace(&newest.join(FILES[which]), &bytes);
        prop_assert!(verified(&newest).is_err());
    }
}

/// The bug: nine tensors of 2^61 bytes made the safetensors crate's sum of offsets overflow, a panic in debug builds.
#[test]
fn headers_whose_offsets_overflow_are_refused() {
    let step = 1u64 << 61;
    let entries: Vec<String> = (0..7)
        .map(|index| {
            let (start, end) = (index * step, (index + 1) * step);
            format!("\"t{index}\":{{\"dtype\":\"U8\",\"shape\":[{step}],\"data_offsets\":[{start},{end}]}}")
        })
        .chain([format!(
            "\"t7\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
            step - 1,
            7 * step,
            u64::MAX
        )])
        .collect();
    let json = format!("{{{}}}", entries.join(","));
    let file = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    let error = decode_header(&file).unwrap_err();
    assert!(error.contains("beyond its end"), "{error}");
}
