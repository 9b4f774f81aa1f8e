//! The thread that writes a shard's part of checkpoints, one after the other, and reports each to the launcher.
//!
//! Invariant: a snapshot's memory goes back to its lane once its file is on the disk, or could not be written.
#![forbid(unsafe_code)]

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use serde_json::json;

use super::{ChunkImage, Snapshot};
use crate::{
    Error, Result,
    checkpoint::{self, ChunkState, Stored},
    layout::Layout,
    session::{Report, Reporter},
    transport::WakeHandle,
    types::{Clock, ShardId},
};

/// The lane's end of the thread.
pub(super) struct Writer {
    snapshots: Sender<Snapshot>,
    stored: Receiver<Vec<ChunkImage>>,
    /// Snapshots whose memory has not come back.
    open: Cell<usize>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    /// Starts the thread; `wake` tells the lane that memory has come back. `incremental`: what has not changed is not written again.
    pub fn new(
        (dir, incremental): (PathBuf, bool),
        shard: ShardId,
        layout: Arc<Layout>,
        reporter: Reporter,
        wake: WakeHandle,
    ) -> Writer {
        let (snapshots, incoming) = channel();
        let (back, stored) = channel();
        let write = move || {
            let mut part = Part { dir: &dir, shard, layout: &layout, reporter: &reporter, incremental, before: None };
            part.write_all(&incoming, |chunks| {
                // Fails only where the lane is gone.
                let _ = back.send(chunks);
                wake.wake();
            })
        };
        let name = format!("checkpoint-{}", shard.0);
        let thread = std::thread::Builder::new().name(name).spawn(write).expect("a thread for checkpoints");
        Writer { snapshots, stored, open: Cell::new(0), thread }
    }

    /// Has a snapshot written.
    pub fn write(&self, snapshot: Snapshot) {
        // The thread ends early only when the launcher is gone, which the lane learns from its commands.
        if self.snapshots.send(snapshot).is_ok() {
            self.open.set(self.open.get() + 1);
        }
    }

    /// Memory that has come back.
    pub fn take_stored(&self) -> Option<Vec<ChunkImage>> {
        let chunks = self.stored.try_recv().ok()?;
        self.open.set(self.open.get() - 1);
        Some(chunks)
    }

    /// Waits until all that was given has been dealt with, and lets its memory go.
    pub fn settle(&self) {
        while self.open.get() > 0 && self.stored.recv().is_ok() {
            self.open.set(self.open.get() - 1);
        }
    }

    /// Waits until everything is on the disk.
    pub fn join(self) -> Result<()> {
        drop(self.snapshots);
        self.thread.join().unwrap_or_else(|_| Err(Error::JobFailed("the checkpoint thread panicked".into())))
    }
}

/// Whose files are written, and who is told.
struct Part<'a> {
    dir: &'a Path,
    shard: ShardId,
    layout: &'a Layout,
    reporter: &'a Reporter,
    incremental: bool,
    /// What was stored last.
    before: Option<Stored>,
}

impl Part<'_> {
    fn write_all(&mut self, incoming: &Receiver<Snapshot>, give_back: impl Fn(Vec<ChunkImage>)) -> Result<()> {
        let mut stored: Option<Clock> = None;
        while let Ok(snapshot) = incoming.recv() {
            // The end may come at a clock that has been stored already.
            if stored != Some(snapshot.clock) {
                stored = Some(snapshot.clock);
                self.write(&snapshot)?;
            }
            give_back(snapshot.chunks);
        }
        Ok(())
    }

    fn write(&mut self, snapshot: &Snapshot) -> Result<()> {
        let Part { dir, shard, .. } = *self;
        let Snapshot { clock, chunks, clocks, rates, live } = snapshot;
        debug_assert!(chunks.iter().all(|image| self.layout.chunk(image.chunk).shard == shard));
        let states = chunks.iter().zip(clocks).map(|(image, clocks)| ChunkState {
            chunk: image.chunk,
            version: image.version,
            steps: image.steps,
            clocks,
            master: &image.master,
            first: &image.first,
            second: &image.second,
        });
        let written = match self.before.take().filter(|_| self.incremental) {
            Some(before) => checkpoint::write_changes(dir, *clock, shard, &states.collect::<Vec<_>>(), &before),
            None => checkpoint::write_shard(dir, *clock, shard, states).map(|file| vec![file]),
        };
        let info = match &written {
            Ok(files) => json!({ "files": files, "learning_rate": rates, "live": live }),
            // Training goes on; whoever asked for the checkpoint learns why there is none.
            Err(error) => json!({ "error": error.to_string() }),
        };
        self.before = written.ok().map(|files| Stored { clock: *clock, files });
        self.reporter.report(Report::CheckpointWritten { shard, clock: *clock, info })
    }
}
