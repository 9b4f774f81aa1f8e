//! Paths whose other end changes: of shards with two copies they move from one lane to the other, and peers may begin anew.
//!
//! Invariant: a slot that was open to one lane is opened to the other only after the first can write it no more.

use super::*;

impl<T: Transport> Paths<T> {
    /// Our end of a path ends, without a word to anybody; the other end may build it again. A path that has never been may be
    /// built by the other end from here on.
    pub fn set_aside(&mut self, peer: PeerId) {
        self.paths.entry(peer).or_insert_with(Path::begun);
        self.end(peer);
        let path = self.paths.get_mut(&peer).expect("just put there");
        self.rebuilding -= usize::from(matches!(path.stage, Stage::Rebuilding(_)));
        path.stage = Stage::Dormant;
        path.tries = 0;
    }

    /// Our end of a path ends for good as far as the present life of the other end goes; a later one may build the path.
    pub fn expel(&mut self, peer: PeerId) {
        self.set_aside(peer);
        let path = self.paths.get_mut(&peer).expect("just set aside");
        path.life = path.life.saturating_add(1);
        path.is_released = false;
    }

    /// Begins to build a path anew, whatever there was before.
    pub fn begin(&mut self, peer: PeerId, cause: &str, now: Instant) {
        self.set_aside(peer);
        self.retreat(peer, cause, now);
    }

    /// What was to come from `from` comes from `to` instead: the slots of the one go to the other, and the path to it is built.
    pub fn redirect(&mut self, from: PeerId, to: PeerId, now: Instant) {
        self.set_aside(from);
        self.set_aside(to);
        let held = {
            let path = self.paths.get_mut(&from).expect("just set aside");
            path.heir = Some(to);
            std::mem::take(&mut path.held)
        };
        // What comes back late from whoever was there before `from` goes on to `to`.
        self.paths.values_mut().filter(|path| path.heir == Some(from)).for_each(|path| path.heir = Some(to));
        let path = self.paths.get_mut(&to).expect("just set aside");
        path.heir = None;
        path.held.extend(held);
        self.retreat(to, &format!("it takes over from {from}"), now);
    }

    /// A peer counts as gone after a silence of so long, and a broken path to it is given up after that.
    pub fn suspect_after(&mut self, peer: PeerId, silence: Duration) {
        self.paths.entry(peer).or_insert_with(Path::begun).patience = Some(silence);
        self.liveness.suspect_after(peer, silence);
    }

    /// Slots have come back from a fence: to whoever gets them.
    pub(super) fn released(&mut self, peer: PeerId, slots: Vec<Lease>) {
        let Some(path) = self.paths.get_mut(&peer) else { return };
        path.hold(slots);
        if let Some(heir) = path.heir {
            let held = std::mem::take(&mut path.held);
            let heir = self.paths.get_mut(&heir).expect("made with the path's redirection");
            heir.held.extend(held);
        }
    }

    /// Whether slots that are to be opened to `peer` may still be written by another.
    pub(super) fn inherits_later(&self, peer: PeerId) -> bool {
        self.paths.values().any(|path| path.heir == Some(peer) && path.armed > 0)
    }
}
