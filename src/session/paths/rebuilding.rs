//! How a path that broke is rebuilt, step by step; `session/rebuild.rs` says in which order, and why.
//!
//! Invariant: what is not up is fenced, and its slots are held here or withheld by the transport.

use super::*;

impl<T: Transport> Paths<T> {
    /// The other end offers itself for a path that is to be rebuilt.
    pub fn proposed(&mut self, proposal: Proposal, now: Instant) {
        let Proposal { peer, generation, life, endpoint } = proposal;
        let Some(path) = self.paths.get_mut(&peer) else { return };
        let is_reborn = life > path.life;
        if matches!(path.stage, Stage::Ended) || life < path.life || (!is_reborn && generation < path.generation) {
            return; // too late
        }
        path.life = life;
        if path.heir.is_some() {
            return; // whoever serves in its place is spoken to, until it serves again
        }
        if is_reborn && generation <= path.generation {
            // It knows of no path between us, and begins where we are.
            return self.retreat(peer, "the other end has begun anew", now);
        }
        if generation > path.generation {
            // It has fenced its end of whatever we still hold to be the path.
            self.retreat(peer, "the other end found it broken", now);
            let path = self.paths.get_mut(&peer).expect("looked up above");
            path.generation = generation;
        }
        let path = self.paths.get_mut(&peer).expect("looked up above");
        if let Stage::Rebuilding(rebuilding) = &mut path.stage {
            rebuilding.remote = Some(endpoint);
        }
    }

    /// Offers that are to reach other ends through the rendezvous.
    pub fn take_proposals(&mut self) -> std::vec::Drain<'_, Proposal> {
        self.proposals.drain(..)
    }

    /// A path ended at the transport, or is to end because of what came over it.
    pub(super) fn broken(&mut self, peer: PeerId, error: Error, now: Instant) -> Option<Completion> {
        let path = self.paths.entry(peer).or_insert_with(Path::begun);
        let reason = match &error {
            Error::Broken { reason, .. } => reason.clone(),
            other => other.to_string(),
        };
        match &mut path.stage {
            Stage::Up if path.is_released => {
                self.end(peer);
                self.paths.get_mut(&peer).expect("looked up above").stage = Stage::Dormant;
                Some(Completion::Broken { peer, error })
            }
            Stage::Up if !path.patience.unwrap_or(self.options.rebuild).is_zero() => {
                self.retreat(peer, &reason, now);
                None
            }
            Stage::Rebuilding(rebuilding) if rebuilding.connecting => {
                rebuilding.defect = Some(reason);
                self.retreat(peer, "", now);
                None
            }
            Stage::Rebuilding(_) | Stage::Dormant | Stage::Ended => None,
            Stage::Begun | Stage::Up => {
                self.give_up(peer);
                Some(Completion::Broken { peer, error })
            }
        }
    }

    /// Fences our side of a path, or of a try to rebuild it, and turns to its next generation.
    pub(super) fn retreat(&mut self, peer: PeerId, cause: &str, now: Instant) {
        self.end(peer);
        let path = self.paths.get_mut(&peer).expect("a path to fence");
        path.generation += 1;
        path.tries += 1;
        let pause = now + path.pause();
        let until = now + path.patience.unwrap_or(self.options.rebuild);
        if let Stage::Rebuilding(rebuilding) = &mut path.stage {
            let Rebuilding { offered, remote, connecting, .. } = &mut **rebuilding;
            (*offered, *remote, *connecting) = (false, None, false);
            rebuilding.pause = pause;
            return;
        }
        self.rebuilding += 1;
        tracing::debug!("the path to {peer} broke: {cause}; it is being rebuilt");
        path.stage = Stage::Rebuilding(Box::new(Rebuilding {
            cause: cause.into(),
            defect: None,
            since: now,
            until,
            polled: now,
            pause,
            offered: false,
            remote: None,
            connecting: false,
        }));
    }

    /// Nothing more comes or goes on a path; its slots are held.
    pub(super) fn end(&mut self, peer: PeerId) {
        self.liveness.forget(peer);
        let slots = self.transport.fence(peer);
        self.released(peer, slots);
        for request in self.waiting.remove(&peer).into_iter().flatten() {
            self.fail(request);
        }
    }

    /// Takes the next step of every path that is being rebuilt, or gives it up.
    pub(super) fn rebuild(&mut self, now: Instant, completions: &mut Vec<Completion>) {
        let peers: Vec<PeerId> = self.paths.keys().copied().collect();
        for peer in peers {
            let path = self.paths.get_mut(&peer).expect("a key of the map");
            let patience = path.patience.unwrap_or(self.options.rebuild);
            let Stage::Rebuilding(rebuilding) = &mut path.stage else { continue };
            rebuilding.forgive_absence(patience, now);
            if now >= rebuilding.until || path.tries > TRIES_MAX {
                let tried = match &rebuilding.defect {
                    Some(defect) => format!("the last try: {defect}"),
                    None if rebuilding.offered => "the other end did not answer".into(),
                    None => "the other end may still be writing on it".into(),
                };
                let took = now.saturating_duration_since(rebuilding.since).as_secs_f64();
                let reason = format!("{}; it could not be rebuilt within {took:.1} s ({tried})", rebuilding.cause);
                self.give_up(peer);
                completions.push(Completion::Broken { peer, error: Error::Broken { peer, reason } });
                continue;
            }
            // A slot that the fence withholds may still be written: no offer before it is back.
            if path.armed > 0 || now < rebuilding.pause || self.inherits_later(peer) {
                continue;
            }
            if let Err(error) = self.advance(peer, now) {
                let path = self.paths.get_mut(&peer).expect("looked up above");
                if let Stage::Rebuilding(rebuilding) = &mut path.stage {
                    rebuilding.defect = Some(error.to_string());
                }
                self.retreat(peer, "", now);
            }
        }
    }

    fn advance(&mut self, peer: PeerId, now: Instant) -> Result<()> {
        let path = self.paths.get_mut(&peer).expect("a path that is being rebuilt");
        let Stage::Rebuilding(rebuilding) = &mut path.stage else { return Ok(()) };
        if !rebuilding.offered {
            let endpoint = self.transport.offer(peer)?;
            rebuilding.offered = true;
            let (generation, life) = (path.generation, self.options.life);
            self.proposals.push(Proposal { peer, generation, life, endpoint });
        }
        if let Some(remote) = rebuilding.remote.as_ref().filter(|_| !rebuilding.connecting) {
            // Half of what is left, so that another try fits in.
            let deadline = now + rebuilding.until.saturating_duration_since(now) / 2;
            self.transport.connect(peer, remote, deadline)?;
            rebuilding.connecting = true;
        }
        Ok(())
    }
}
