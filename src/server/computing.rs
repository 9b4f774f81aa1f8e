//! A shard's computations: those that wait for their turn, and those that its memory works on.
//!
//! Invariant: they are started in the order in which they came, as soon as there is room, and every one is recorded.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::{Memory, Progress, Task, Work};
use crate::{Result, observe::TaskKind, session::Recorder};

/// A shard's memory, and what is to be computed in it.
pub(super) struct Computing {
    pub memory: Memory,
    queue: VecDeque<Work>,
}

impl Computing {
    pub fn new(memory: Memory) -> Computing {
        Computing { memory, queue: VecDeque::new() }
    }

    /// One more computation.
    pub fn push(&mut self, work: Work) {
        self.queue.push_back(work);
    }

    /// How many wait for their turn.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is being computed, and nothing waits for its turn.
    pub fn is_settled(&self) -> bool {
        self.queue.is_empty() && self.memory.is_idle()
    }

    /// What a turn has done in which something came, or not.
    pub fn progress(&self, moved: bool) -> Progress {
        let can_start = !self.queue.is_empty() && self.memory.has_room();
        match can_start || self.memory.is_busy() {
            true => Progress::Busy,
            false if moved => Progress::Moved,
            false => Progress::Idle,
        }
    }

    /// Starts what there is room for.
    pub fn start(&mut self, mut recorder: Option<&mut Recorder>) -> Result<()> {
        while self.memory.has_room() {
            let Some(work) = self.queue.pop_front() else { break };
            if let Some(recorder) = &mut recorder {
                recorder.started(kind(work.task), work.chunk, work.clock);
            }
            self.memory.start(work)?;
        }
        Ok(())
    }

    /// See [`Memory::advance`].
    pub fn advance(&mut self, mut recorder: Option<&mut Recorder>) -> Result<Option<Work>> {
        let on_processor = self.memory.is_busy();
        let began = recorder.as_mut().filter(|_| on_processor).and_then(|recorder| recorder.tile());
        let work = self.memory.advance()?;
        if let Some(recorder) = recorder {
            recorder.tiled(began);
            if let Some(work) = &work {
                recorder.ended(kind(work.task), work.chunk, work.clock, on_processor);
            }
        }
        Ok(work)
    }
}

fn kind(task: Task) -> TaskKind {
    match task {
        Task::Step => TaskKind::Step,
        Task::Reduce => TaskKind::Reduce,
        Task::Apply => TaskKind::Apply,
        Task::Encode | Task::CopyOut(_) | Task::CopyIn(_) => TaskKind::Encode,
    }
}
