//! The engine of a worker: the client's protocol joined to a transport. It never sleeps and reads no clock; the worker's threads
//! or the simulator drive it.
//!
//! Invariant: every effect of the client is carried out in order; commands take effect in the order in which they were given.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Awaited, Client, ClientConfig, Effect, Event};
use crate::{
    Error, Result,
    layout::Layout,
    mem::{Lease, Region},
    observe::Queue,
    session::{Paths, WAITS_MAX, Wait},
    transport::{Completion, Endpoint, MemoryRegion, Transport},
    types::{ChunkId, Clock, PeerId, ShardId, Version},
};

/// What the user of a worker asks for.
#[derive(Debug)]
pub enum Command {
    /// See [`Client::push`].
    Push {
        /// Which chunk.
        chunk: ChunkId,
        /// The clock it belongs to.
        clock: Clock,
        /// The gradient; `None`: absent.
        gradient: Option<Lease>,
        /// Where the new parameters go, if they are wanted.
        reply: Option<Lease>,
    },
    /// See [`Client::pull`].
    Pull {
        /// Which chunk.
        chunk: ChunkId,
        /// At least this version.
        min_version: Version,
        /// How long the server may wait for it.
        patience: Option<Duration>,
        /// Where the parameters go.
        into: Lease,
    },
    /// See [`Client::set_learning_rate`].
    SetLearningRate {
        /// The new rate.
        rate: f64,
        /// The first clock that uses it.
        clock: Clock,
    },
    /// See [`Client::finish`].
    Finish,
}

impl Command {
    /// Payload that it sends, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Command::Push { gradient: Some(gradient), .. } => gradient.len(),
            _ => 0,
        }
    }
}

/// A worker's protocol over a transport.
pub struct Engine<T> {
    paths: Paths<T>,
    client: Client,
    me: PeerId,
    parameters: MemoryRegion,
    completions: Vec<Completion>,
}

impl<T: Transport> Engine<T> {
    /// Registers the worker's two flat buffers. The lease over all of `parameters` must begin at the region's start.
    pub fn new(
        config: ClientConfig,
        layout: Arc<Layout>,
        mut paths: Paths<T>,
        parameters: &Region,
        gradients: &Region,
    ) -> Result<Engine<T>> {
        let me = PeerId::worker(config.worker);
        let parameters = paths.register(parameters)?;
        paths.register(gradients)?;
        Ok(Engine { paths, client: Client::new(config, layout), me, parameters, completions: Vec::new() })
    }

    /// This worker.
    pub fn me(&self) -> PeerId {
        self.me
    }

    /// The transport and what belongs to it.
    pub fn paths(&mut self) -> &mut Paths<T> {
        &mut self.paths
    }

    /// Begins the path to a lane.
    pub fn connect(&mut self, lane: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        self.paths.connect(lane, remote, deadline)?;
        let fabric = self.paths.fabric(lane);
        if self.parameters.rkey(fabric) == 0 {
            return Err(Error::Config(format!(
                "{} has its gradients and parameters in a GPU's memory, which {fabric}, over which it reaches {lane}, does not: use \
                 --transport verbs alone, or keep them in the host's memory",
                self.me
            )));
        }
        Ok(())
    }

    /// Begins the paths to all lanes of a job that runs already, in the place of a process that was lost.
    pub fn rejoin(&mut self, now: Instant) {
        for lane in self.client.lanes().collect::<Vec<_>>() {
            self.paths.begin(lane, "the process before this one was lost", now);
        }
    }

    /// See [`Client::leave`].
    pub fn leave(&mut self, clock: Clock) {
        self.client.leave(clock);
    }

    /// The store's word on who serves a shard: if it is another lane than before, everything is sent to that one.
    pub fn set_tenure(&mut self, shard: ShardId, primary: PeerId, now: Instant) {
        let before = self.client.lane_of(shard);
        if before != primary && !self.client.has_parted(before) {
            self.client.redirect(before, primary);
            self.paths.redirect(before, primary, now);
        }
    }

    /// Whether every lane has said where gradients land.
    pub fn is_attached(&self) -> bool {
        self.client.is_attached()
    }

    /// The first thing that this worker waits for.
    pub fn awaited(&self) -> Option<Awaited> {
        self.client.awaited(None)
    }

    /// What this worker waits for, of each lane one thing; its program has waited for `since`.
    pub fn waits(&self, since: Duration, now: Instant) -> Vec<Wait> {
        let waits = self.client.waits().into_iter().take(WAITS_MAX);
        waits.map(|(of, owed, chunk, clock)| self.paths.wait(of, owed, (chunk, clock), since, now)).collect()
    }

    /// Carries out commands and does what can be done now; events are appended. `true` if something had come.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] or [`Error::Protocol`] with what was awaited, when a lane is lost before it has said goodbye.
    pub fn turn(
        &mut self,
        now: Instant,
        commands: &mut VecDeque<Command>,
        events: &mut VecDeque<Event>,
    ) -> Result<bool> {
        for command in commands.drain(..) {
            self.command(command);
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.paths.poll(now, &mut completions)?;
        let mut moved = false;
        for completion in completions.drain(..) {
            moved |= matches!(completion, Completion::Arrived { .. });
            self.handle(completion)?;
        }
        self.completions = completions;
        self.carry_out()?;
        while let Some(event) = self.client.poll_event() {
            events.push_back(event);
        }
        Ok(moved)
    }

    /// Carries out commands and looks at nothing else: the next turn does.
    ///
    /// # Errors
    ///
    /// As [`turn`](Engine::turn).
    pub fn begin(&mut self, commands: &mut VecDeque<Command>) -> Result<()> {
        for command in commands.drain(..) {
            self.command(command);
        }
        self.carry_out()
    }

    fn carry_out(&mut self) -> Result<()> {
        while let Some(effect) = self.client.poll_effect() {
            match effect {
                Effect::Arm { peer, slot } => {
                    self.paths.arm(peer, slot)?;
                }
                Effect::Post(request) => self.paths.post(request),
            }
        }
        self.paths.flush()
    }

    /// When `turn` wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.paths.next_deadline().into_iter().chain(self.paths.next_sample()).min()
    }

    /// Tells the recorder, if there is one, since when the program waits, and looks at the gauges if it is time to.
    pub fn record(&mut self, program_waits: Option<Instant>, now: Instant) {
        let backlog = self.paths.backlog();
        let Some(recorder) = self.paths.recorder() else { return };
        recorder.program_waits(program_waits);
        let Some(meter) = recorder.sample(now) else { return };
        meter.queue(Queue::Posts).set(backlog as u64);
        meter.queue(Queue::Turns).set(self.client.turns().map(|(_, waiting, _)| waiting).sum());
        for (lane, _, room) in self.client.turns() {
            if let Some(peer) = recorder.peer(lane) {
                peer.credit.set(room);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Push { chunk, clock, gradient: Some(gradient), reply } => {
                self.client.push(chunk, clock, gradient, reply);
            }
            Command::Push { chunk, clock, gradient: None, reply } => self.client.absent(chunk, clock, reply),
            Command::Pull { chunk, min_version, patience, into } => {
                self.client.pull(chunk, min_version, patience, into);
            }
            Command::SetLearningRate { rate, clock } => self.client.set_learning_rate(rate, clock),
            Command::Finish => self.client.finish(),
        }
    }

    fn handle(&mut self, completion: Completion) -> Result<()> {
        match completion {
            Completion::Connected { peer } => {
                self.client.attach(peer, self.parameters.rkey(self.paths.fabric(peer)), 0);
                Ok(())
            }
            Completion::Sent { id, source } => {
                self.client.handle_sent(id, source);
                Ok(())
            }
            Completion::Failed { id, source, error } => {
                self.client.handle_sent(id, source);
                // A broken path's `Broken` follows and says more; anything else would be waited for in vain.
                if matches!(error, Error::Broken { .. }) { Ok(()) } else { Err(error) }
            }
            Completion::Released { .. } => Ok(()), // the paths keep them
            Completion::Arrived { from, note, lease } => {
                if let Err(error) = self.client.handle_arrived(from, note, lease) {
                    self.paths.fence(from);
                    return self.lost(from, error);
                }
                if let Some((lane, count)) = self.client.take_resent()
                    && let Some(meter) = self.paths.recorder().and_then(|recorder| recorder.peer(lane))
                {
                    meter.resent.add(count);
                }
                if self.client.has_parted(from) {
                    self.paths.release(from);
                }
                Ok(())
            }
            Completion::Broken { peer, error } => self.lost(peer, error),
        }
    }

    /// A lane's path is gone: harmless after its goodbye, the end of the job otherwise.
    fn lost(&mut self, peer: PeerId, error: Error) -> Result<()> {
        if self.client.has_parted(peer) {
            return Ok(());
        }
        let awaited = match self.client.awaited(Some(peer)) {
            Some(Awaited { chunk, clock: Some(clock), .. }) => {
                format!(" ({} waits for chunk {} of clock {clock})", self.me, chunk.0)
            }
            Some(Awaited { chunk, .. }) => format!(" ({} waits for a pull of chunk {})", self.me, chunk.0),
            None => String::new(),
        };
        let reason = match error {
            Error::Broken { reason, .. } => reason,
            other => other.to_string(),
        };
        Err(Error::Broken { peer, reason: format!("{reason}{awaited}") })
    }
}
