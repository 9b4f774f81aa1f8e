//! When a shard is stored: at every N-th clock, on demand, and before a stop.
//!
//! Under `Aggregate` no step of the checkpoint's clock or a later one starts before the state has been stored, so that it is
//! exactly the state between two clocks. Under `Immediate` it is stored when the slowest worker has reached the clock; faster
//! ones may be ahead by the bound.
//!
//! Invariant: a snapshot is asked for only while nothing is being computed, and nothing starts until it has been taken.

use super::*;

#[derive(Debug, Default)]
pub(super) struct Checkpointing {
    every: Option<u64>,
    /// The next clock of the periodic checkpoint.
    periodic: Option<Clock>,
    /// The clock of a checkpoint asked for.
    requested: Option<Clock>,
    /// The clock at which the job stops: nothing of it or later is applied.
    stop: Option<Clock>,
    /// Chunks that have not reached the next clock to be stored.
    behind: usize,
    /// Of this clock a snapshot has been asked for and not been taken yet.
    taking: Option<Clock>,
}

impl Checkpointing {
    pub fn new(every: Option<u64>, start: Clock, chunks: usize) -> Checkpointing {
        let every = every.filter(|every| *every > 0);
        let periodic = every.map(|every| (start / every + 1) * every);
        Checkpointing { every, periodic, behind: chunks, ..Checkpointing::default() }
    }

    /// A shard was taken over whose slowest chunk is at `clock`. If none is further (and the job did not begin there) it may be that
    /// the state of this clock was to be stored and has not been.
    pub fn begin_at(&mut self, clock: Clock, may_store: bool) {
        let again = |every: u64| if may_store { clock.div_ceil(every) } else { clock / every + 1 };
        self.periodic = self.every.map(|every| again(every) * every);
    }

    /// A shard has moved here, and whoever served it before has stored all periodic checkpoints before this clock.
    pub fn go_on_from(&mut self, clock: Clock) {
        self.periodic = self.every.filter(|_| clock > 0).map(|_| clock);
    }

    /// The next clock of the periodic checkpoint of which no snapshot has been asked for; 0 if there is none.
    pub fn stores_next(&self) -> Clock {
        match (self.periodic, self.every) {
            (Some(periodic), Some(every)) if self.taking == Some(periodic) => periodic + every,
            (periodic, _) => periodic.unwrap_or(0),
        }
    }

    /// The clock to be stored next.
    fn next(&self) -> Option<Clock> {
        self.periodic.into_iter().chain(self.requested).min()
    }

    /// Whether a step of `clock` must wait.
    pub fn holds(&self, clock: Clock) -> bool {
        self.next().is_some_and(|next| clock >= next) || self.stop.is_some_and(|stop| clock >= stop)
    }

    /// Whether everything must wait: all chunks have reached the clock, and the state is about to be stored. `clock_max` is how
    /// far anybody has got: a shard whose workers have all finished has not thereby reached every clock to come.
    pub fn holds_all(&self, clock_max: Clock) -> bool {
        self.taking.is_some() || (self.behind == 0 && self.next().is_some_and(|next| next <= clock_max))
    }

    /// No worker is left: the state at the end is stored by whoever ends the job, and nothing waits any more.
    pub fn cancel(&mut self) {
        (self.every, self.periodic, self.requested, self.stop) = (None, None, None, None);
    }
}

impl Shard {
    /// Asks for a checkpoint at `clock`, after which nothing more is applied if `stop` says so.
    ///
    /// # Errors
    ///
    /// The first clock that is still possible, if `clock` has passed here.
    pub fn request_checkpoint(&mut self, clock: Clock, stop: bool) -> Result<(), Clock> {
        let possible = self.clock_max + u64::from(self.computing > 0 || self.checkpointing.taking.is_some());
        if clock < possible {
            return Err(possible);
        }
        self.checkpointing.requested = Some(clock);
        if stop {
            self.checkpointing.stop = Some(clock);
        }
        self.count_behind();
        // An earlier request that came too late elsewhere may have held chunks that may go on now.
        (0..self.chunks.len()).for_each(|index| self.touch(index));
        Ok(())
    }

    /// By chunk, in shard order: how many clocks of each contributor are in it; nothing where all are as far as the chunk is.
    pub fn stored_clocks(&self) -> Vec<Vec<Clock>> {
        let aggregates = self.config.consistency.aggregates();
        let clocks = |chunk: &ChunkState| if aggregates { Vec::new() } else { chunk.gate.clocks().to_vec() };
        self.chunks.iter().map(clocks).collect()
    }

    /// Goes on from a checkpoint in which more of some workers was than of others; what they push again of that is passed over.
    pub fn resume_clocks(&mut self, clocks: &[Vec<Clock>]) {
        for (chunk, clocks) in self.chunks.iter_mut().zip(clocks) {
            chunk.gate.resume(clocks);
            self.clock_max = clocks.iter().copied().fold(self.clock_max, Clock::max);
        }
        self.count_behind();
    }

    /// The state of `clock` is being copied: computing may go on.
    pub fn handle_snapshotted(&mut self, clock: Clock) {
        let checkpointing = &mut self.checkpointing;
        checkpointing.taking = None;
        checkpointing.requested = checkpointing.requested.filter(|requested| *requested > clock);
        checkpointing.periodic = checkpointing.every.map(|every| (clock / every + 1) * every);
        self.count_behind();
        (0..self.chunks.len()).for_each(|index| self.touch(index));
    }

    pub(super) fn count_behind(&mut self) {
        let next = self.checkpointing.next().unwrap_or(Clock::MAX);
        self.checkpointing.behind = self.chunks.iter().filter(|chunk| chunk.gate.slowest() < next).count();
    }

    /// A chunk's slowest contributor went from `before` clocks to what its gate says now.
    pub(super) fn note_progress(&mut self, index: usize, before: Clock) {
        if let Some(next) = self.checkpointing.next() {
            let after = self.chunks[index].gate.slowest();
            self.checkpointing.behind -= usize::from(before < next && after >= next);
        }
    }

    /// Whether a checkpoint is asked for at a clock that this shard will not reach, since all that have a part in it have
    /// finished while others go on: what it has is the state of that clock too.
    fn is_deserted(&self) -> bool {
        let mut workers = self.contributors.iter();
        self.checkpointing.requested.is_some()
            && !self.chunks.is_empty()
            && self.dirty.is_empty()
            && !self.owes_steps()
            && workers.clone().all(|contributor| self.is_over(contributor) || contributor.own == 0)
            && workers.any(|contributor| !self.is_over(contributor))
    }

    pub(super) fn advance_checkpoint(&mut self) {
        let due = self.checkpointing.holds_all(self.clock_max) || self.is_deserted();
        if !due || self.checkpointing.taking.is_some() || self.computing > 0 || self.is_handing_over() {
            return;
        }
        if let Some(clock) = self.checkpointing.next() {
            self.checkpointing.taking = Some(clock);
            self.effects.push_back(Effect::Snapshot { clock });
        }
    }
}
