//! Checkpoints in which only what has changed is written: what they hold, what they cost, and what becomes of them when the others go.
//!
//! Invariant: what a checkpoint holds is held against the contents of that clock, never against another checkpoint.

use super::{
    model_disk::{Fault, Hasty, ModelDisk},
    *,
};
use crate::checkpoint::{paths, writer::prune_on};

/// Chunks of a model that learns rarely: chunk 0 at every clock, one in eight of the others in turn.
const CHUNKS: u32 = 64;

fn wide_layout() -> Layout {
    let tensors = vec![TensorSpec::new("rows", [u64::from(CHUNKS), 256])];
    Layout::build(&[tensors], LayoutOptions { chunk_elements: 256, shards: 1 }).unwrap()
}

fn learns(layout: &Layout, clock: Clock, chunk: ChunkId) -> Contents {
    let since = if chunk.0 == 0 { 0 } else { (clock + 8 - u64::from(chunk.0) % 8) % 8 };
    Contents { version: clock, ..Contents::at(layout, clock.saturating_sub(since), chunk, 2) }
}

fn write(disk: &dyn Disk, dir: &Path, layout: &Layout, clock: Clock, before: &mut Option<Stored>) {
    begin_on(disk, dir).unwrap();
    let contents: Vec<_> = layout.shards[0].iter().map(|chunk| learns(layout, clock, *chunk)).collect();
    let states: Vec<_> = contents.iter().map(Contents::state).collect();
    let files = match before.take() {
        Some(before) => write_changes_on(disk, dir, clock, ShardId(0), &states, &before).unwrap(),
        None => vec![write_shard_on(disk, dir, clock, ShardId(0), states.into_iter()).unwrap()],
    };
    commit_on(disk, dir, &Manifest::new(state(clock), layout, files.clone())).unwrap();
    *before = Some(Stored { clock, files });
}

/// What is written is a small part of the state, no checkpoint takes more than twice what it holds, and each is whole by itself:
/// pruning takes nothing from those that stay.
#[test]
fn what_has_not_changed_is_not_written_again() {
    let layout = wide_layout();
    let root = tempfile::tempdir().unwrap();
    let mut before = None;
    let (mut written, mut full, mut most_files) = (0, 0, 0);
    for clock in 1..=60 {
        write(&Hasty, root.path(), &layout, clock, &mut before);
        let files = &before.as_ref().unwrap().files;
        let bytes = |linked: bool| {
            files.iter().filter(|file| file.since.is_some() == linked).map(|file| file.bytes).sum::<u64>()
        };
        full = full.max(bytes(false));
        written += bytes(false);
        most_files = most_files.max(files.len());
        let headers = 40 * 1024;
        assert!(bytes(true) + bytes(false) <= 2 * full + headers, "clock {clock}: {}", bytes(true) + bytes(false));
        let pruned = prune_on(&Hasty, root.path(), 3).unwrap();
        assert_eq!(pruned.len(), usize::from(clock > 3));
        for (path, opened) in list(root.path()).unwrap() {
            let opened = opened.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let then = opened.clock();
            assert_holds(&opened, &layout, then, |chunk| learns(&layout, then, chunk));
            assert_eq!(opened.manifest().format_version(), if then == 1 { 1 } else { 3 });
        }
    }
    println!("60 checkpoints of {full} bytes: {written} bytes written, at most {most_files} files");
    assert!(written * 3 < 60 * full, "{written} bytes of {}", 60 * full);
    assert!(most_files > 3 && most_files <= 32, "{most_files} files");
}

/// Nothing has changed: no file of its own, and the state of the new clock all the same.
#[test]
fn a_checkpoint_of_which_nothing_has_changed_is_links_alone() {
    let (layout, root) = (small_layout(2), tempfile::tempdir().unwrap());
    let contents = |clock| move |chunk| Contents { version: clock, ..Contents::at(&small_layout(2), 4, chunk, 2) };
    write_contents(&Hasty, root.path(), &layout, state(5), contents(5)).unwrap();
    let mut files = Vec::new();
    for (shard, chunks) in (0..).map(ShardId).zip(&layout.shards) {
        let contents: Vec<_> = chunks.iter().map(|chunk| contents(6)(*chunk)).collect();
        let states: Vec<_> = contents.iter().map(Contents::state).collect();
        let before = stored_before(root.path(), shard).unwrap();
        files.extend(write_changes_on(&Hasty, root.path(), 6, shard, &states, &before).unwrap());
    }
    assert!(files.iter().all(|file| file.since == Some(5)), "{files:?}");
    let path = commit_on(&Hasty, root.path(), &Manifest::new(state(6), &layout, files)).unwrap();
    prune_on(&Hasty, root.path(), 1).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_holds(&checkpoint, &layout, 6, contents(6));
    let names = paths::files(&path).unwrap();
    assert_eq!(
        names,
        ["manifest.json", "shard-00000.clock-000000000005.safetensors", "shard-00001.clock-000000000005.safetensors"]
    );
}

/// A chunk that has another sum under the same count of steps has changed: a run that was given up may have left such.
#[test]
fn a_chunk_is_linked_to_only_if_its_bytes_are_the_same() {
    let (layout, root) = (small_layout(1), tempfile::tempdir().unwrap());
    write_contents(&Hasty, root.path(), &layout, state(5), |chunk| Contents::at(&layout, 4, chunk, 2)).unwrap();
    let mut contents: Vec<_> = layout.shards[0].iter().map(|chunk| Contents::at(&layout, 4, *chunk, 2)).collect();
    contents[1].arrays[2][3] += 1.0;
    let states: Vec<_> = contents.iter().map(Contents::state).collect();
    let before = stored_before(root.path(), ShardId(0)).unwrap();
    let files = write_changes_on(&Hasty, root.path(), 6, ShardId(0), &states, &before).unwrap();
    let own: Vec<ChunkId> = files[0].chunks.iter().map(|entry| entry.chunk).collect();
    assert_eq!((files.len(), files[0].since, own), (2, None, vec![contents[1].chunk]));
}

/// The checkpoint before was given up, or pruned, or is just getting its name.
#[test]
fn a_shard_is_written_whole_where_the_files_before_are_gone() {
    let (layout, root) = (small_layout(1), tempfile::tempdir().unwrap());
    let path = write_rare(&Hasty, root.path(), &layout, 1).unwrap();
    let before = stored_before(root.path(), ShardId(0)).unwrap();
    let contents: Vec<_> = layout.shards[0].iter().map(|chunk| Contents::rare(&layout, 2, *chunk)).collect();
    let states: Vec<_> = contents.iter().map(Contents::state).collect();
    let writing = paths::directory(root.path(), 1, paths::Stage::Writing);
    std::fs::rename(&path, &writing).unwrap();
    let linked = write_changes_on(&Hasty, root.path(), 2, ShardId(0), &states, &before).unwrap();
    assert!(linked.iter().any(|file| file.since == Some(1)), "{linked:?}");
    std::fs::remove_dir_all(&writing).unwrap();
    let whole = write_changes_on(&Hasty, root.path(), 2, ShardId(0), &states, &before).unwrap();
    assert!(whole.len() == 1 && whole[0].since.is_none() && whole[0].chunks.len() == 3, "{whole:?}");
}

/// A program that knows no links is not misled, and no manifest says of a file what cannot be.
#[test]
fn links_are_of_format_version_3() {
    let (layout, root) = (small_layout(1), tempfile::tempdir().unwrap());
    let disk = ModelDisk::new(root.path(), Fault::None);
    let dir = root.path().join("checkpoints");
    write_rare(&disk, &dir, &layout, 1).unwrap();
    let path = write_rare(&disk, &dir, &layout, 2).unwrap();
    let text = std::fs::read_to_string(path.join("manifest.json")).unwrap();
    let object = &text[..text.find(",\"sha256\"").unwrap()];
    let refused = |from: &str, to: &str, why: &str| {
        assert!(object.contains(from), "{object}");
        let text = seal_manifest(format!("{}}}", object.replacen(from, to, 1)).as_bytes());
        let said = decode_manifest(&text).unwrap_err();
        assert!(said.contains(why), "{said}");
    };
    refused("\"format_version\":3", "\"format_version\":2", "names files of older checkpoints");
    refused("\"since\":1", "\"since\":2", "its file 1 is");
    refused(",\"is_stale\":true", "", "listed before");
    refused("shard-00000.clock-000000000001", "../shard-00000", "its file 1 is");
}
