//! A worker's path has been rebuilt: what it was owed over the old one is forgotten, and asked for again; what it sent is counted.
//!
//! Invariant: a reply is owed at most once, to a request that came over the path that is there.

use super::*;

impl Shard {
    /// Another path to `worker` is there: tells it how many of its notes have come, and forgets what it had asked for. It is then to
    /// be told where it may write ([`Shard::attach`]).
    pub fn resume(&mut self, worker: u16) {
        for chunk in &mut self.chunks {
            chunk.replies.retain(|reply| reply.worker != worker);
            chunk.pulls.retain(|pull| pull.worker != worker);
        }
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.parameters = None;
        let (peer, received, inherits) = (contributor.peer, contributor.received, contributor.inherits);
        let everything = contributor.said_goodbye;
        self.recall(peer);
        let resume = Note { credit: received, ..Note::new(NoteKind::Resume) };
        // Another lane counted what this one has; here counting begins anew.
        let base = if everything { u64::MAX } else { self.window.base() };
        let note = if inherits { Note { version: base, flags: NoteFlags::INHERITED, ..resume } } else { resume };
        self.post(peer, note, None);
    }

    /// Takes back what was to be sent over an older path and has not been: on this one it would come out of turn.
    pub(super) fn recall(&mut self, peer: PeerId) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Post(request) if request.peer == peer => {
                    self.handle_sent(request.id, request.payload.map(|(copy, _)| copy))
                }
                other => self.effects.push_back(other),
            }
        }
    }

    /// What has finished may not have heard that it may go.
    pub(super) fn repeat_goodbye(&mut self, worker: u16) {
        let contributor = &self.contributors[usize::from(worker)];
        if contributor.said_goodbye {
            self.post(contributor.peer, Note::new(NoteKind::Goodbye), None);
        }
    }

    /// A worker awaits the reply to its push of `clock`, which the path that broke did not bring.
    pub(super) fn on_reply_again(&mut self, worker: u16, index: usize, clock: Clock) -> Result<()> {
        let peer = self.contributors[usize::from(worker)].peer;
        let chunk = &mut self.chunks[index];
        if chunk.replies.iter().any(|reply| reply.worker == worker && reply.clock == clock) {
            return Err(protocol(
                peer,
                format!("a second request for the reply to chunk {} of clock {clock}", chunk.id.0),
            ));
        }
        chunk.replies.push(PendingReply { worker, clock });
        self.touch(index);
        Ok(())
    }
}
