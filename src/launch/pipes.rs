//! What ranks write: their pipes are read into pieces, which go wherever the output of this process' ranks goes.
//!
//! Invariant: everything that was written before a rank's end is given to the sink.
#![forbid(unsafe_code)]

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use nix::poll::{PollFd, PollFlags, poll};

use super::output::{Piece, Splitter, Stream};
use crate::types::Rank;

/// After so long without more bytes a line that is not whole is shown.
const IDLE_MS: u16 = 200;

/// Where output goes: a screen, or the launcher on another host.
pub(super) trait Sink: Send {
    /// A piece of a rank's output.
    fn print(&mut self, rank: Rank, stream: Stream, piece: Piece, now: Instant);
    /// A line of this process' own.
    fn say(&mut self, text: &str);
    /// Nothing more will come.
    fn finish(&mut self);
}

/// A sink that several threads write to.
pub(super) type SharedSink = Arc<Mutex<dyn Sink>>;

pub(super) fn lock(sink: &SharedSink) -> MutexGuard<'_, dyn Sink + 'static> {
    sink.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// One pipe of a rank.
pub(super) struct Source {
    stream: Stream,
    pipe: Box<dyn Pipe>,
    splitter: Splitter,
}

pub(super) trait Pipe: Read + AsFd + Send {}
impl<P: Read + AsFd + Send> Pipe for P {}

impl Source {
    pub fn new(stream: Stream, pipe: impl Pipe + 'static) -> Source {
        Source { stream, pipe: Box::new(pipe), splitter: Splitter::default() }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Reads a rank's pipes until both have ended, or until told to stop and nothing more is in them.
pub(super) fn read_all(rank: Rank, mut sources: Vec<Source>, sink: &SharedSink, stop: &AtomicBool) {
    let print = |stream, piece: Piece| lock(sink).print(rank, stream, piece, Instant::now());
    let mut bytes = vec![0; 64 << 10];
    while !sources.is_empty() {
        let stopping = stop.load(Ordering::Relaxed);
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|source| PollFd::new(source.fd(), PollFlags::POLLIN)).collect();
        let quiet = matches!(poll(&mut fds, IDLE_MS), Ok(0));
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        if quiet && stopping {
            break;
        }
        let mut ready = ready.into_iter();
        sources.retain_mut(|source| {
            if !ready.next().unwrap_or(false) {
                source.splitter.idle().filter(|_| quiet).into_iter().for_each(|piece| print(source.stream, piece));
                return true;
            }
            match source.pipe.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    source.splitter.feed(&bytes[..n]).into_iter().for_each(|piece| print(source.stream, piece));
                    true
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => true,
                _ => {
                    source.splitter.end().into_iter().for_each(|piece| print(source.stream, piece));
                    false
                }
            }
        });
    }
    for mut source in sources {
        source.splitter.end().into_iter().for_each(|piece| print(source.stream, piece));
    }
}
