//! Replies: who waits for a chunk's parameters, when they may have them, and the wire copies they are sent from.
//!
//! Invariant: a wire copy is never written while anybody may still be reading it: it is a `SharedLease` until its last reader is
//! done.

use std::time::Duration;

use super::*;

/// A push that wants the parameters back.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingReply {
    pub worker: u16,
    pub clock: Clock,
}

/// A pull that waits for its version.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingPull {
    pub worker: u16,
    pub min_version: Version,
    pub expires: Option<Instant>,
}

impl ChunkState {
    /// Whether consistency lets this reply go.
    fn releases(&self, reply: &PendingReply) -> bool {
        let contributor = self.contributors.binary_search(&reply.worker).expect("only contributors ask");
        self.gate.released(contributor, reply.clock)
    }
}

impl Shard {
    pub(super) fn want_reply(&mut self, worker: u16, index: usize, note: &Note) {
        if note.flags.contains(NoteFlags::WANTS_REPLY) {
            self.chunks[index].replies.push(PendingReply { worker, clock: note.clock });
        }
    }

    /// A pull: minimum version in `version`, patience in milliseconds in `credit` (0: as long as it takes).
    pub(super) fn on_pull(&mut self, now: Instant, worker: u16, note: &Note) -> Result<()> {
        let index = self.own_chunk(worker, note.chunk)?;
        let contributor = &self.contributors[usize::from(worker)];
        let peer = contributor.peer;
        if note.flags.contains(NoteFlags::REPLY_AGAIN) {
            return self.on_reply_again(worker, index, note.clock);
        }
        if self.chunks[index].pulls.iter().any(|pull| pull.worker == worker) {
            return Err(protocol(
                peer,
                format!("a second pull of chunk {} before the first was answered", note.chunk.0),
            ));
        }
        let expires = match note.credit {
            0 => None,
            patience_ms => now.checked_add(Duration::from_millis(patience_ms)),
        };
        if let Some(expires) = expires {
            self.pull_deadline = Some(self.pull_deadline.map_or(expires, |least| least.min(expires)));
        }
        self.chunks[index].pulls.push(PendingPull { worker, min_version: note.version, expires });
        self.touch(index);
        Ok(())
    }

    /// Answers whoever may be answered.
    pub(super) fn answer(&mut self, index: usize) -> Turn {
        let chunk = &self.chunks[index];
        let reply_due = chunk.replies.iter().any(|reply| chunk.releases(reply));
        let pull_due = chunk.pulls.iter().any(|pull| pull.min_version <= chunk.version);
        if !reply_due && !pull_due {
            return Turn::Idle;
        }
        let fresh = chunk.published.as_ref().is_some_and(|(version, _)| *version == chunk.version);
        if !fresh {
            let Some(lease) = self.pool.pop() else { return Turn::Waiting };
            let contributions = self.spare.pop().unwrap_or_default();
            let (chunk, clock) = (self.chunks[index].id, self.clock_max);
            let work = Work::new(Task::Encode, chunk, clock);
            self.compute(index, Work { contributions, wire: Some(lease), ..work });
            return Turn::Progressed;
        }
        self.send_replies(index);
        self.send_pulls(index);
        Turn::Progressed
    }

    fn send_replies(&mut self, index: usize) {
        let mut next = 0;
        while next < self.chunks[index].replies.len() {
            let reply = self.chunks[index].replies[next];
            if self.chunks[index].releases(&reply) {
                self.chunks[index].replies.remove(next);
                self.send_parameters(index, reply.worker, reply.clock);
            } else {
                next += 1;
            }
        }
    }

    fn send_pulls(&mut self, index: usize) {
        let mut next = 0;
        while next < self.chunks[index].pulls.len() {
            let pull = self.chunks[index].pulls[next];
            if pull.min_version <= self.chunks[index].version {
                self.chunks[index].pulls.remove(next);
                self.send_parameters(index, pull.worker, self.clock_max);
            } else {
                next += 1;
            }
        }
    }

    fn send_parameters(&mut self, index: usize, worker: u16, clock: Clock) {
        let peer = self.contributors[usize::from(worker)].peer;
        let slot = self.parameter_slot(worker, index).expect("own_chunk refuses whoever has not attached");
        let credit = self.take_credit(worker);
        let chunk = &self.chunks[index];
        let (version, copy) = chunk.published.as_ref().expect("answer made sure of a fresh copy");
        let note = Note {
            chunk: chunk.id,
            clock,
            version: *version,
            length: slot.len,
            credit,
            ..Note::new(NoteKind::Parameters)
        };
        let payload = Some((copy.clone(), slot));
        self.post(peer, note, payload);
    }

    /// A new wire copy of the chunk.
    pub(super) fn publish(&mut self, index: usize, copy: SharedLease) {
        let chunk = &mut self.chunks[index];
        debug_assert!(copy.len() >= chunk.len as usize * self.config.parameter_dtype.size());
        chunk.published = Some((chunk.version, copy));
    }

    /// One reader of a wire copy is done; the last one brings it back to the pool.
    pub(super) fn retire(&mut self, copy: SharedLease) {
        if let Ok(lease) = copy.thaw() {
            self.pool.push(lease);
        }
    }
}
