//! Calls that we make: dialling, the caller's half of the handshake, and trying again until the deadline.
//!
//! Invariant: a call ends as an authenticated connection, as a refusal that trying again cannot change, or at its deadline with
//! the last thing that went wrong in its text.
#![forbid(unsafe_code)]

use std::{
    io::{self, IoSlice, Read},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::socket;
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
    addresses: Vec<SocketAddr>,
    turn: usize,
    deadline: Instant,
    pause: Duration,
    stage: Stage,
    last_defect: String,
    has_warned: bool,
}

#[derive(Debug)]
enum Stage {
    Resting { until: Instant },
    Trying { stream: TcpStream, token: Token, handshake: Box<Calling>, give_up: Instant },
}

/// What became of a call.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Nothing yet.
    Pending,
    /// It is answered: a connection that is watched under a token.
    Open(TcpStream, Token),
    /// It never will be.
    Ended(String),
}

impl Call {
    pub(super) fn new(
        (peer, incarnation): (PeerId, u32),
        addresses: Vec<SocketAddr>,
        now: Instant,
        deadline: Instant,
    ) -> Call {
        assert!(!addresses.is_empty(), "an endpoint without address is expected, not called");
        let stage = Stage::Resting { until: now };
        let last_defect = "no try was made".into();
        Call {
            peer,
            incarnation,
            addresses,
            turn: 0,
            deadline,
            pause: PAUSE_MIN,
            stage,
            last_defect,
            has_warned: false,
        }
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
            let reason = format!("no connection before the deadline; the last try of {}", self.last_defect);
            return Ok(Outcome::Ended(reason));
        }
        match &self.stage {
            Stage::Resting { until } if now >= *until => self.dial(now, poller, index)?,
            // Once our hello is out the listener may count us as connected: from then on only its answer or the deadline counts.
            Stage::Trying { stream, give_up, handshake, .. } if now >= *give_up && !handshake.has_answered() => {
                let defect = match stream.peer_addr() {
                    Ok(_) => "the listener does not speak",
                    Err(_) => "nobody answers; is this port open from here (--ports)?",
                };
                if !std::mem::replace(&mut self.has_warned, true) {
                    let seconds = TRY_MAX.as_secs();
                    tracing::warn!(peer = %self.peer, address = %self.addresses[self.turn], "no connection in {seconds} s: {defect}");
                }
                self.fail(now, poller, defect);
            }
            _ => {}
        }
        Ok(Outcome::Pending)
    }

    /// The socket under `token` has something to say.
    pub(super) fn readable(
        &mut self,
        token: Token,
        now: Instant,
        poller: &mut Poller,
        identity: &Identity,
    ) -> Result<Outcome> {
        let Stage::Trying { stream, token: ours, handshake, .. } = &mut self.stage else { return Ok(Outcome::Pending) };
        if *ours != token {
            return Ok(Outcome::Pending);
        }
        loop {
            let told = match stream.read(handshake.space()) {
                Ok(0) => Err("it hung up during the handshake".to_string()),
                Ok(count) => match handshake.received(count, identity) {
                    Ok(told) => Ok(told),
                    Err(HandshakeError::Refused(why)) if why.is_passing() => Err(format!("it refused: {why}")),
                    Err(error) => return Ok(self.give_up(poller, error)),
                },
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Outcome::Pending),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => Err(e.to_string()),
            };
            let defect = match told {
                Ok(Told::More) => continue,
                Ok(Told::Answer(hello)) => match socket::send(stream, &[IoSlice::new(&hello)]) {
                    Ok(Some(count)) if count == hello.len() => continue,
                    Ok(_) => "it leaves no room for a hello".to_string(),
                    Err(e) => e.to_string(),
                },
                Ok(Told::Accepted) => return Ok(self.opened()),
                Err(defect) => defect,
            };
            self.fail(now, poller, &defect);
            return Ok(Outcome::Pending);
        }
    }

    /// Ends a try in progress.
    pub(super) fn hang_up(&self, poller: &Poller) {
        if let Stage::Trying { stream, .. } = &self.stage {
            poller.remove(stream);
            socket::end(stream);
        }
    }

    fn dial(&mut self, now: Instant, poller: &mut Poller, index: usize) -> Result<()> {
        let stream = match socket::call(self.addresses[self.turn]) {
            Ok(stream) => stream,
            Err(e) => {
                self.fail(now, poller, &e.to_string());
                return Ok(());
            }
        };
        let token = poller.add(&stream, Kind::Path, index)?;
        let handshake = Box::new(Calling::begin(self.peer, self.incarnation, random_bytes()?));
        self.stage = Stage::Trying { stream, token, handshake, give_up: now + TRY_MAX };
        Ok(())
    }

    /// Notes why this try failed and goes on to the next address, after a pause if all have had their turn.
    fn fail(&mut self, now: Instant, poller: &Poller, defect: &str) {
        self.hang_up(poller);
        self.last_defect = format!("{}: {defect}", self.addresses[self.turn]);
        self.turn = (self.turn + 1) % self.addresses.len();
        let mut until = now;
        if self.turn == 0 {
            until += self.pause;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
        self.stage = Stage::Resting { until };
    }

    fn give_up(&mut self, poller: &Poller, error: HandshakeError) -> Outcome {
        if let (HandshakeError::Version { .. }, Stage::Trying { stream, .. }) = (&error, &self.stage) {
            // So that the listener's log has the difference of versions as well; whether it gets there changes nothing for us.
            let _ = socket::send(stream, &[IoSlice::new(&Calling::farewell())]);
        }
        self.hang_up(poller);
        self.stage = Stage::Resting { until: self.deadline };
        Outcome::Ended(format!("{}: {error}", self.addresses[self.turn]))
    }

    fn opened(&mut self) -> Outcome {
        match std::mem::replace(&mut self.stage, Stage::Resting { until: self.deadline }) {
            Stage::Trying { stream, token, .. } => Outcome::Open(stream, token),
            Stage::Resting { .. } => unreachable!("only a try in progress is answered"),
        }
    }
}
