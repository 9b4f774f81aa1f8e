//! Checkpoints are completed on a thread of their own: a disk may take its time, and the ranks' heartbeats are read meanwhile.
//!
//! Invariant: every checkpoint that was begun is answered once, in the order of beginning.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use serde_json::Value;

use super::{handle::CheckpointSink, notify::Notify};
use crate::{Error, Result, layout::Layout, types::Clock};

/// A checkpoint whose parts are all on the disk.
struct Complete {
    clock: Clock,
    parts: Vec<Value>,
    layout: Arc<Layout>,
}

/// The checkpoints that are being completed.
pub(super) struct Recorder {
    /// Closed at the end.
    begun: Option<Sender<Complete>>,
    ended: Receiver<(Clock, Result<(), String>)>,
    open: usize,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Starts the thread; it ends with the handle.
    pub fn start(mut sink: CheckpointSink, notify: Arc<Notify>) -> Result<Recorder> {
        let (begun, begun_in) = channel::<Complete>();
        let (ended_out, ended) = channel();
        let serve = move || {
            while let Ok(Complete { clock, parts, layout }) = begun_in.recv() {
                let outcome = sink(clock, parts, &layout).map_err(|error| error.to_string());
                // Fails only where nobody waits for it any more.
                let _ = ended_out.send((clock, outcome));
                notify.wake();
            }
        };
        let thread = std::thread::Builder::new().name("checkpoints".into()).spawn(serve);
        let thread = thread.map_err(|e| Error::os("pthread_create", "the checkpoints", e))?;
        Ok(Recorder { begun: Some(begun), ended, open: 0, thread: Some(thread) })
    }

    /// Completes a checkpoint.
    pub fn begin(&mut self, clock: Clock, parts: Vec<Value>, layout: Arc<Layout>) {
        if let Some(begun) = &self.begun
            && begun.send(Complete { clock, parts, layout }).is_ok()
        {
            self.open += 1;
        }
    }

    /// What became of the next.
    pub fn poll(&mut self) -> Option<(Clock, Result<(), String>)> {
        let ended = self.ended.try_recv().ok()?;
        self.open -= 1;
        Some(ended)
    }

    /// Whether none is under way.
    pub fn is_idle(&self) -> bool {
        self.open == 0
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.begun.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
