//! Calls that we make: the caller's half of the handshake, and trying again until the deadline.
//!
//! Invariant: a call ends as an authenticated connection, as a refusal that trying again cannot change, or at its deadline with
//! the last thing that went wrong in its text; nothing is said to a listener of another user.
#![forbid(unsafe_code)]

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::socket::{self, Owner};
use crate::{
    Result,
    transport::poller::{Kind, Poller, Token},
    types::PeerId,
    wire::{
        handshake::{Calling, HandshakeError, Identity, Told},
        random_bytes,
    },
};

/// The first pause between two tries; each is twice as long as the one before.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// How long a try may take until the listener has said its first word.
const TRY_MAX: Duration = Duration::from_secs(5);

/// A call in progress.
#[derive(Debug)]
pub(super) struct Call {
    peer: PeerId,
    /// Of the path, in the listener's offer.
    incarnation: u32,
    /// The listener's abstract name.
    name: String,
    pub(super) deadline: Instant,
    pause: Duration,
    stage: Stage,
    last_defect: String,
}

#[derive(Debug)]
enum Stage {
    Resting { until: Instant },
    Trying { socket: OwnedFd, owner: Owner, token: Token, handshake: Box<Calling>, give_up: Instant },
}

/// What became of a call.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Nothing yet.
    Pending,
    /// It is answered: a connection that is watched under a token.
    Open(OwnedFd, Owner, Token),
    /// It never will be.
    Ended(String),
}

impl Call {
    pub(super) fn new((peer, incarnation): (PeerId, u32), name: String, now: Instant, deadline: Instant) -> Call {
        let stage = Stage::Resting { until: now };
        Call { peer, incarnation, name, deadline, pause: PAUSE_MIN, stage, last_defect: "no try was made".into() }
    }

    /// When [`Call::tick`] has something to do.
    pub(super) fn next_deadline(&self) -> Instant {
        match &self.stage {
            Stage::Resting { until } => self.deadline.min(*until),
            Stage::Trying { give_up, .. } => self.deadline.min(*give_up),
        }
    }

    /// What time alone brings about: the next try, the end of a slow one, the end of it all.
    pub(super) fn tick(&mut self, now: Instant, poller: &mut Poller, index: usize) -> Result<Outcome> {
        if now >= self.deadline {
            let reason = format!("no connection before the deadline; the last try: {}", self.last_defect);
            return Ok(Outcome::Ended(reason));
        }
        match &self.stage {
            Stage::Resting { until } if now >= *until => self.dial(now, poller, index)?,
            // Once our hello is out the listener may count us as connected: from then on only its answer or the deadline counts.
            Stage::Trying { give_up, handshake, .. } if now >= *give_up && !handshake.has_answered() => {
                self.fail(now, poller, "the listener does not speak".into());
            }
            _ => {}
        }
        Ok(Outcome::Pending)
    }

    /// The socket under `token` has something to say.
    pub(super) fn readable(&mut self, token: Token, now: Instant, poller: &mut Poller, identity: &Identity) -> Outcome {
        let Stage::Trying { socket, token: ours, handshake, .. } = &mut self.stage else { return Outcome::Pending };
        if *ours != token {
            return Outcome::Pending;
        }
        loop {
            let told = match socket::receive_bytes(socket, handshake.space()) {
                Ok(Some(0)) => Err("it hung up during the handshake".to_string()),
                Ok(Some(count)) => match handshake.received(count, identity) {
                    Ok(told) => Ok(told),
                    Err(HandshakeError::Refused(why)) if why.is_passing() => Err(format!("it refused: {why}")),
                    Err(error) => return self.give_up(poller, error),
                },
                Ok(None) => return Outcome::Pending,
                Err(e) => Err(e.to_string()),
            };
            let defect = match told {
                Ok(Told::More) => continue,
                Ok(Told::Answer(hello)) => match socket::send_bytes(socket, &hello) {
                    Ok(true) => continue,
                    Ok(false) => "it leaves no room for a hello".to_string(),
                    Err(e) => e.to_string(),
                },
                Ok(Told::Accepted) => return self.opened(),
                Err(defect) => defect,
            };
            self.fail(now, poller, defect);
            return Outcome::Pending;
        }
    }

    /// Ends a try in progress.
    pub(super) fn hang_up(&self, poller: &Poller) {
        if let Stage::Trying { socket, .. } = &self.stage {
            poller.remove(socket);
            socket::end(socket);
        }
    }

    fn dial(&mut self, now: Instant, poller: &mut Poller, index: usize) -> Result<()> {
        let called = socket::call(&self.name).map_err(|e| e.to_string());
        let (socket, owner) = match called.and_then(|socket| Ok((socket::owner(&socket)?, socket))) {
            Ok((owner, socket)) => (socket, owner),
            Err(defect) => {
                self.fail(now, poller, defect);
                return Ok(());
            }
        };
        let token = poller.add(&socket, Kind::Path, index)?;
        let handshake = Box::new(Calling::begin(self.peer, self.incarnation, random_bytes()?));
        self.stage = Stage::Trying { socket, owner, token, handshake, give_up: now + TRY_MAX };
        Ok(())
    }

    /// Notes why this try failed; the next one is made after a pause.
    fn fail(&mut self, now: Instant, poller: &Poller, defect: String) {
        self.hang_up(poller);
        self.last_defect = defect;
        self.stage = Stage::Resting { until: now + self.pause };
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn give_up(&mut self, poller: &Poller, error: HandshakeError) -> Outcome {
        if let (HandshakeError::Version { .. }, Stage::Trying { socket, .. }) = (&error, &self.stage) {
            // So that the listener's log has the difference of versions as well; whether it gets there changes nothing for us.
            let _ = socket::send_bytes(socket, &Calling::farewell());
        }
        self.hang_up(poller);
        self.stage = Stage::Resting { until: self.deadline };
        Outcome::Ended(error.to_string())
    }

    fn opened(&mut self) -> Outcome {
        match std::mem::replace(&mut self.stage, Stage::Resting { until: self.deadline }) {
            Stage::Trying { socket, owner, token, .. } => Outcome::Open(socket, owner, token),
            Stage::Resting { .. } => unreachable!("only a try in progress is answered"),
        }
    }
}
