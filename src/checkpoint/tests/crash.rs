//! A failure at every single operation: whatever happens, the newest complete checkpoint before it is still readable, and the
//! new one is there wholly or not at all.
//!
//! Invariant: the operations are counted by a run without a fault, so that a new one is covered the day it is added.

use std::collections::BTreeMap;

use super::{
    model_disk::{Fault, Hasty, ModelDisk, Survival},
    *,
};
use crate::checkpoint::{
    export::export_on,
    paths::{Stage, directory, list, rename},
    reader::Latest,
    writer::{abandon_on, prune_on},
};

/// A job's directory with complete checkpoints of some clocks, and a script that a fault interrupts.
struct Scene {
    before: &'static [Clock],
    script: fn(&dyn Disk, &Path, &Layout) -> Result<()>,
    /// The clocks that may be the newest readable one after the script was interrupted.
    allowed: &'static [Clock],
    /// Few chunks change from one checkpoint to the next, and only those are written.
    is_rare: bool,
    shards: u16,
}

const SCENES: [(&str, Scene); 9] = [
    (
        "the first",
        Scene {
            before: &[],
            script: |disk, dir, layout| write(disk, dir, layout, 1),
            allowed: &[1],
            is_rare: false,
            shards: 2,
        },
    ),
    (
        "one more",
        Scene {
            before: &[1, 2],
            script: |disk, dir, layout| write(disk, dir, layout, 3),
            allowed: &[2, 3],
            is_rare: false,
            shards: 2,
        },
    ),
    (
        "the same again",
        Scene {
            before: &[1, 2],
            script: |disk, dir, layout| write(disk, dir, layout, 2),
            allowed: &[2],
            is_rare: false,
            shards: 2,
        },
    ),
    (
        "after a crash in the same again",
        Scene {
            before: &[1, 2],
            script: |disk, dir, layout| {
                // The crash came between the two renames of a commit.
                let [complete, replaced] = [Stage::Complete, Stage::Replaced].map(|stage| directory(dir, 2, stage));
                rename(disk, &complete, &replaced)?;
                write(disk, dir, layout, 3)
            },
            allowed: &[2, 3],
            is_rare: false,
            shards: 2,
        },
    ),
    (
        "pruning",
        Scene {
            before: &[1, 2, 3],
            script: |disk, dir, _| prune_on(disk, dir, 1).map(drop),
            allowed: &[3],
            is_rare: false,
            shards: 2,
        },
    ),
    (
        "write and prune",
        Scene {
            before: &[1, 2],
            script: |disk, dir, layout| {
                write(disk, dir, layout, 3)?;
                prune_on(disk, dir, 1).map(drop)
            },
            allowed: &[2, 3],
            is_rare: false,
            shards: 2,
        },
    ),
    ("changes", Scene { before: &[1, 2], script: rare, allowed: &[2, 3], is_rare: true, shards: 2 }),
    (
        "changes, of files that are linked to already",
        Scene {
            before: &[4, 5, 6],
            script: |disk, dir, layout| write_rare(disk, dir, layout, 7).map(drop),
            allowed: &[6, 7],
            is_rare: true,
            shards: 1,
        },
    ),
    (
        "changes, after the checkpoint before the last was pruned",
        Scene {
            before: &[1, 2],
            script: |disk, dir, layout| {
                rare(disk, dir, layout)?;
                prune_on(disk, dir, 1).map(drop)
            },
            allowed: &[2, 3],
            is_rare: true,
            shards: 1,
        },
    ),
];

fn rare(disk: &dyn Disk, dir: &Path, layout: &Layout) -> Result<()> {
    write_rare(disk, dir, layout, 3).map(drop)
}

fn write(disk: &dyn Disk, dir: &Path, layout: &Layout, clock: Clock) -> Result<()> {
    write_all(disk, dir, layout, clock, 2).map(drop)
}

impl Scene {
    /// Plays the scene with a fault. Returns the disk, its root, and what the script said.
    fn play(&self, layout: &Layout, fault: Fault) -> (ModelDisk, tempfile::TempDir, Result<()>) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("checkpoints");
        let disk = ModelDisk::new(root.path(), Fault::None);
        for clock in self.before {
            let whole = || write(&disk, &dir, layout, *clock);
            if self.is_rare { write_rare(&disk, &dir, layout, *clock).map(drop) } else { whole() }.unwrap();
        }
        disk.arm(fault);
        let said = (self.script)(&disk, &dir, layout);
        (disk, root, said)
    }

    /// What is found later: a readable checkpoint of an allowed clock, right in every bit; with the next write, all is well.
    fn judge(&self, root: &Path, layout: &Layout, done: bool, what: &str) {
        let dir = root.join("checkpoints");
        let Latest { checkpoint, passed_over } = latest(&dir).unwrap();
        let found = checkpoint.map(|checkpoint| {
            let clock = checkpoint.clock();
            assert!(self.allowed.contains(&clock), "{what}: found clock {clock}");
            assert!(!done || Some(&clock) == self.allowed.last(), "{what}: succeeded, and found clock {clock}");
            self.assert_right(&checkpoint, layout, clock);
            clock
        });
        if found.is_none() {
            assert!(self.before.is_empty() && !done, "{what}: found none, passed over {passed_over:?}");
        }
        self.all_complete_are_whole(&dir, layout, what);
        let next =
            if self.is_rare { write_rare(&Hasty, &dir, layout, 9).map(drop) } else { write(&Hasty, &dir, layout, 9) };
        next.unwrap();
        let whole = self.all_complete_are_whole(&dir, layout, what);
        let expected: Vec<_> = [9].into_iter().chain(found).collect();
        assert!(whole.starts_with(&expected), "{what}: {found:?} was found, and after the next write {whole:?}");
        let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_str().unwrap().contains('.')), "{what}: the next write left {left:?}");
    }

    fn assert_right(&self, checkpoint: &Checkpoint, layout: &Layout, clock: Clock) {
        match self.is_rare {
            true => assert_holds(checkpoint, layout, clock, |chunk| Contents::rare(layout, clock, chunk)),
            false => assert_is(checkpoint, layout, clock, 2),
        }
    }

    /// Asserts that every name of digits alone is that of a whole checkpoint. Returns their clocks, newest first.
    fn all_complete_are_whole(&self, dir: &Path, layout: &Layout, what: &str) -> Vec<Clock> {
        let complete = list(dir).unwrap().into_iter().filter(|(_, stage)| *stage == Stage::Complete);
        complete
            .map(|(clock, stage)| {
                let opened = Checkpoint::open(&directory(dir, clock, stage));
                self.assert_right(&opened.unwrap_or_else(|error| panic!("{what}: {error}")), layout, clock);
                clock
            })
            .collect()
    }
}

#[test]
fn a_crash_at_every_operation_loses_no_older_checkpoint() {
    for (name, scene) in SCENES {
        let layout = small_layout(scene.shards);
        let (disk, _root, said) = scene.play(&layout, Fault::None);
        said.unwrap();
        let operations = disk.operations();
        assert!(operations > 4, "{name} has only {operations} operations");
        for at in 0..=operations {
            let (disk, _root, said) = scene.play(&layout, Fault::Crash(at));
            let survivals = (0..6).map(Survival::Some).chain([Survival::Nothing, Survival::Everything]);
            for survival in survivals {
                let after = tempfile::tempdir().unwrap();
                disk.restart(survival, after.path());
                let what = format!("{name}, crash at {at} of {operations}, {survival:?} survives");
                scene.judge(after.path(), &layout, said.is_ok(), &what);
            }
        }
    }
}

#[test]
fn an_error_at_every_operation_loses_no_older_checkpoint() {
    let mut kinds = BTreeMap::new();
    for (name, scene) in SCENES {
        let layout = small_layout(scene.shards);
        let (disk, _root, said) = scene.play(&layout, Fault::None);
        said.unwrap();
        for at in 0..disk.operations() {
            let (disk, root, said) = scene.play(&layout, Fault::Error(at));
            let hit = disk.hit();
            assert_eq!(hit.len(), 1, "{name}, error at {at}: it hit nothing");
            *kinds.entry(hit[0]).or_insert(0) += 1;
            // Only what was replaced already may stay behind without a word.
            assert!(
                said.is_err() || ["remove_file", "remove_dir"].contains(&hit[0]),
                "{name}, error at {at}: {hit:?} is unheard"
            );
            if let Err(error) = &said {
                assert!(error.to_string().contains("injected error"), "{name}, error at {at}: {error}");
            }
            scene.judge(root.path(), &layout, said.is_ok(), &format!("{name}, error at {at}"));
        }
    }
    println!("errors injected: {kinds:?}");
    let all = ["create", "create_dir", "link", "remove_dir", "remove_file", "rename", "sync", "sync_dir", "write"];
    assert!(kinds.keys().eq(all.iter()), "{kinds:?}");
}

/// What a failed write had left kept the room of the next one, on a disk that was full for that very reason.
#[test]
fn an_error_at_every_operation_leaves_nothing_after_it_was_given_up() {
    let layout = small_layout(2);
    for scene in [&SCENES[1].1, &SCENES[6].1] {
        let (disk, _root, said) = scene.play(&layout, Fault::None);
        said.unwrap();
        let mut failed = 0;
        for at in 0..disk.operations() {
            let (disk, root, said) = scene.play(&layout, Fault::Error(at));
            let dir = root.path().join("checkpoints");
            if said.is_err() {
                failed += 1;
                abandon_on(&disk, &dir, 3).unwrap();
            }
            let found = list(&dir).unwrap();
            assert!(found.iter().all(|(_, stage)| *stage == Stage::Complete), "error at {at}: {found:?}");
            assert!(found.starts_with(&[(3, Stage::Complete)]) || found.len() == 2, "error at {at}: {found:?}");
        }
        assert_eq!(failed, disk.operations());
    }
}

/// A test of the tests above: on a disk that only pretends to sync, they find that a checkpoint was lost.
#[test]
fn a_sync_that_does_nothing_would_be_noticed() {
    let layout = small_layout(2);
    let lies = [Fault::FileSyncLies, Fault::DirectorySyncLies];
    for (lie, scene) in lies.into_iter().flat_map(|lie| [(lie, &SCENES[1].1), (lie, &SCENES[6].1)]) {
        let (disk, _root, said) = scene.play(&layout, lie);
        said.unwrap();
        let after = tempfile::tempdir().unwrap();
        disk.restart(Survival::Nothing, after.path());
        let judged = std::panic::catch_unwind(|| scene.judge(after.path(), &layout, true, "lies"));
        assert!(judged.is_err(), "{lie:?} was not noticed");
    }
}

#[test]
fn a_failed_export_leaves_the_old_file_and_no_other() {
    let layout = small_layout(1);
    let root = tempfile::tempdir().unwrap();
    let path = write_all(&Hasty, root.path(), &layout, 1, 0).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut failures = 0;
    loop {
        let target = tempfile::tempdir().unwrap();
        let out = target.path().join("model.safetensors");
        std::fs::write(&out, b"old").unwrap();
        let disk = ModelDisk::new(target.path(), Fault::Error(failures));
        let said = export_on(&disk, &checkpoint, &out);
        let names: Vec<_> = std::fs::read_dir(target.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["model.safetensors"], "error at {failures}");
        let bytes = std::fs::read(&out).unwrap();
        match said {
            Ok(length) => break assert_eq!(bytes.len() as u64, length),
            Err(_) => assert!(bytes == b"old" || decode_header(&bytes).is_ok(), "error at {failures}"),
        }
        failures += 1;
    }
    assert!(failures >= 6, "only {failures} operations could fail");
}
