//! A shard that was taken over, and workers that leave one with two copies.
//!
//! Invariant: what the copy held counts no second time; a worker may go only when both copies have all that it gave and know that it
//! has finished.

use super::*;
use crate::server::replica::Inheritance;

impl Shard {
    /// Begins where another lane of this shard ended: with what a backup holds. Who is of the job at which clock is to be told then, and
    /// at last [`Shard::go_on`].
    pub fn inherit(&mut self, holds: &Inheritance) {
        let count = self.chunks.len();
        let start = self.config.start_clock;
        for (chunk, (clock, version)) in self.chunks.iter_mut().zip(holds.clocks.iter().zip(&holds.versions)) {
            chunk.version = *version;
            if *clock > start {
                chunk.gate.on_all_applied(*clock - 1);
            }
        }
        // A chunk whose sum is held is through with the positions of that clock too.
        let through: Vec<Clock> = holds.through().collect();
        let open = through.iter().enumerate().map(|(place, clock)| position(*clock, count, place));
        let base = open.min().unwrap_or(0);
        self.window = Window::new(self.config.slots, self.config.workers.into(), base);
        for (place, clock) in through.iter().enumerate() {
            let done = (start..*clock).rev().map(|clock| position(clock, count, place));
            self.inherited.extend(done.take_while(|position| *position > base));
        }
        for position in self.inherited.clone() {
            self.window.finish(position);
        }
        self.clock_max = holds.clocks.iter().copied().max().unwrap_or(start);
        self.clocks_pushed = holds.clocks_pushed.max(self.clock_max);
    }

    /// Goes on where another lane of this shard ended, now that it is known who is of the job: the workers that have finished.
    pub fn go_on(&mut self, holds: &Inheritance) -> Vec<u16> {
        for (contributor, finished) in self.contributors.iter_mut().zip(&holds.finished) {
            let is_here = contributor.membership.is_here();
            // Another process may have taken the seat since.
            let finished = is_here && *finished == Some(contributor.membership.joined_by());
            contributor.inherits = is_here;
            (contributor.finished, contributor.said_goodbye) = (finished, finished);
        }
        let slowest = holds.clocks.iter().copied().min().unwrap_or(self.config.start_clock);
        let furthest = holds.through().max().unwrap_or(self.config.start_clock);
        match self.config.mirror.as_ref().is_some_and(|mirror| mirror.moves) {
            true => self.checkpointing.go_on_from(holds.stores_next),
            false => self.checkpointing.begin_at(slowest, slowest == furthest && slowest > self.config.start_clock),
        }
        self.inherit_decisions(holds);
        self.count_behind();
        self.cancel_checkpoints_if_over();
        self.complete_open_positions();
        let workers = (0..self.config.workers).filter(|worker| self.contributors[usize::from(*worker)].finished);
        workers.collect()
    }

    /// The last process in a worker's seat is of the job no more: whether both copies had all that it gave.
    pub fn gave_all(&self, worker: u16, finished: Option<u64>) -> bool {
        finished == Some(self.contributors[usize::from(worker)].membership.joined_by())
    }

    /// Workers that have finished go; with two copies only once both have all that they gave and know that they have finished.
    pub(super) fn dismiss_finished(&mut self) {
        for worker in 0..self.config.workers {
            let base = self.window.base();
            let has_copies = self.mirror.is_some();
            let contributor = &mut self.contributors[usize::from(worker)];
            let stays = has_copies && (contributor.pushed > base || contributor.is_joining());
            if !contributor.finished || contributor.said_goodbye || contributor.is_leaving || stays {
                continue;
            }
            contributor.is_leaving = true;
            let joined_by = contributor.membership.joined_by();
            if !self.mirror_left(worker, joined_by) {
                self.dismiss(worker, joined_by);
            }
        }
    }

    /// A worker may go, if it is still the process that has said its farewell.
    pub(super) fn dismiss(&mut self, worker: u16, joined_by: u64) {
        let contributor = &mut self.contributors[usize::from(worker)];
        if !contributor.is_leaving || contributor.membership.joined_by() != joined_by {
            return; // it was lost before its farewell was held
        }
        contributor.said_goodbye = true;
        let peer = contributor.peer;
        self.post(peer, Note::new(NoteKind::Goodbye), None);
    }

    /// Whether all workers know that they may go, and nothing is on its way to the backup that somebody waits for.
    pub(super) fn has_parted_from_workers(&self) -> bool {
        let parted =
            |contributor: &Contributor| contributor.said_goodbye || self.is_over(contributor) && !contributor.finished;
        self.contributors.iter().all(parted) && self.is_held_by_backup()
    }
}
