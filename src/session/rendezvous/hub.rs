//! The launcher's end of the rendezvous: one thread, one poll, the state machine in the middle.
//!
//! Invariant: a caller that has not proved itself costs at most a few kilobytes and a few seconds, and there are only so many of
//! them; what it sends reaches no state of the job.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read},
    net::TcpListener,
    os::fd::AsFd,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{info, warn};

use super::{
    VERSION, auth,
    connection::{Connection, Stage},
    handle::{NoticeSink, Order, RendezvousOptions},
    line::{LINE_BYTES_MAX, LineBuffer, STRANGER_BYTES_MAX, decode, encode},
    message::{Admission, Answer, Challenge, FromLauncher, Purpose},
    notice::Notice,
    notify::Notify,
    peer::{clock_name, host_name, keep_alive},
    recorder::Recorder,
    roster::{ConnectionId, Effect, Roster},
    swaps::Swaps,
};
use crate::{
    Result,
    observe::monotonic_ns,
    session::{JobConfig, memory_available},
    wire::JobToken,
};

/// Callers that have not proved themselves, at once; when one more comes, the oldest goes.
const STRANGERS_MAX: usize = 64;

/// How long a caller may take to prove itself.
const STRANGER_TIME: Duration = Duration::from_secs(5);

/// Control connections at once.
const CONTROLS_MAX: usize = 16;

/// Bytes that may wait for a caller that does not read: a view and the offers, with room.
const OUTGOING_BYTES_MAX: usize = 4 * LINE_BYTES_MAX;

/// Refusals that are logged one by one; after them silence, lest a port scanner fill the disk.
const REFUSALS_LOGGED_MAX: u32 = 200;

/// How long the last messages may take to leave when the rendezvous ends.
const FAREWELL_TIME: Duration = Duration::from_millis(500);

pub(super) struct Hub {
    listener: TcpListener,
    token: JobToken,
    roster: Roster,
    connections: BTreeMap<ConnectionId, Connection>,
    next_id: ConnectionId,
    refusals: u32,
    notify: Arc<Notify>,
    orders: Receiver<Order>,
    swaps: Swaps,
    on_notice: NoticeSink,
    recorder: Recorder,
    closing: Option<Instant>,
}

impl Hub {
    /// What answers at this port, is given orders here, and is woken by that.
    pub fn new(
        config: JobConfig,
        token: JobToken,
        options: RendezvousOptions,
        (listener, orders, notify): (TcpListener, Receiver<Order>, Arc<Notify>),
    ) -> Result<Hub> {
        let mut roster = Roster::new(config, options.reserved, Instant::now());
        if let Some(bytes) = memory_available() {
            roster.limit_memory(host_name(), bytes);
        }
        Ok(Hub {
            listener,
            token,
            roster,
            connections: BTreeMap::new(),
            next_id: 0,
            refusals: 0,
            swaps: Swaps::start(options.tenures, Arc::clone(&notify))?,
            recorder: Recorder::start(options.on_checkpoint, Arc::clone(&notify))?,
            notify,
            orders,
            on_notice: options.on_notice,
            closing: None,
        })
    }

    /// Serves until it has been told to close.
    pub fn run(&mut self) {
        loop {
            let now = Instant::now();
            let flushed = self.connections.values().all(|connection| connection.outgoing.is_empty());
            if self.recorder.is_idle() && self.closing.is_some_and(|until| flushed || until <= now) {
                return;
            }
            let ready = self.wait(now);
            self.take_orders();
            if ready.listener && self.closing.is_none() {
                self.accept();
            }
            for id in ready.readable {
                self.read(id);
            }
            self.handle_timeouts(Instant::now());
            self.carry_out();
            self.write();
        }
    }

    /// Sleeps until something can be done.
    fn wait(&self, now: Instant) -> Ready {
        let mut fds = vec![
            PollFd::new(self.notify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        for connection in self.connections.values() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !matches!(connection.stage, Stage::Leaving { .. }));
            flags.set(PollFlags::POLLOUT, !connection.outgoing.is_empty());
            fds.push(PollFd::new(connection.stream.as_fd(), flags));
        }
        let stages = self.connections.values().filter_map(|connection| match connection.stage {
            Stage::Stranger { until, .. } | Stage::Leaving { until } => Some(until),
            _ => None,
        });
        let closing = self.closing.filter(|_| self.recorder.is_idle());
        let deadline = stages.chain(self.roster.next_deadline()).chain(closing).min();
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            // Rounded up, so that the deadline has passed when we wake.
            let wait = deadline.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        // An interrupted poll is a poll that found nothing.
        let _ = poll(&mut fds, timeout);
        self.notify.take();
        let woken = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let readable = self.connections.keys().zip(&fds[2..]).filter(|(_, fd)| woken(fd)).map(|(id, _)| *id);
        Ready { listener: woken(&fds[1]), readable: readable.collect() }
    }

    fn take_orders(&mut self) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Checkpoint => {
                    if let Err(text) = self.roster.request_checkpoint(None, None) {
                        (self.on_notice)(Notice::CheckpointFailed(text));
                    }
                }
                Order::CheckpointAndStop(reason) => {
                    if let Err(text) = self.roster.request_checkpoint(Some(reason.clone()), None) {
                        (self.on_notice)(Notice::CheckpointFailed(text));
                        self.roster.stop(reason);
                    }
                }
                Order::Stop(reason) => self.roster.stop(reason),
                Order::Fail(text) => self.roster.fail(text),
                Order::Gone(rank, how) => self.roster.gone(rank, Some(how)),
                Order::NotStarted(rank, why) => self.roster.missed(rank, &why),
                Order::MetricsAt(address) => self.roster.set_metrics(address),
                Order::Close => self.closing = self.closing.or(Some(Instant::now() + FAREWELL_TIME)),
            }
        }
        while let Some((swap, outcome)) = self.swaps.poll() {
            self.roster.swapped(swap, outcome);
        }
        while let Some((clock, outcome)) = self.recorder.poll() {
            self.roster.checkpoint_recorded(clock, outcome);
        }
        self.carry_out();
    }

    fn accept(&mut self) {
        // A failed accept concerns one caller (it hung up) or passes (no descriptors left); either way the others go on.
        while let Ok((stream, from)) = self.listener.accept() {
            let Ok(nonce) = auth::nonce() else { return };
            if stream.set_nonblocking(true).is_err() || stream.set_nodelay(true).is_err() {
                continue;
            }
            let _ = keep_alive(&stream);
            self.evict_stranger();
            let challenge = Challenge { gradwire: "rendezvous".into(), version: VERSION.into(), nonce: nonce.clone() };
            let connection = Connection {
                stream,
                from,
                stage: Stage::Stranger { nonce, until: Instant::now() + STRANGER_TIME },
                incoming: LineBuffer::default(),
                outgoing: encode(&challenge),
            };
            self.connections.insert(self.next_id, connection);
            self.next_id += 1;
        }
    }

    /// Makes room for one more caller that has not proved itself.
    fn evict_stranger(&mut self) {
        let transient = |c: &Connection| matches!(c.stage, Stage::Stranger { .. } | Stage::Leaving { .. });
        let mut strangers = self.connections.iter().filter(|(_, c)| transient(c)).map(|(id, _)| *id);
        let oldest = strangers.next();
        if strangers.count() + 1 >= STRANGERS_MAX
            && let Some(oldest) = oldest
        {
            self.connections.remove(&oldest);
        }
    }

    fn read(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if matches!(connection.stage, Stage::Leaving { .. }) {
            return;
        }
        let mut bytes = [0; 16 << 10];
        let space = match connection.stage {
            Stage::Stranger { .. } => STRANGER_BYTES_MAX,
            _ => bytes.len(),
        };
        match connection.stream.read(&mut bytes[..space]) {
            Ok(0) => return self.drop_connection(id),
            Ok(n) => connection.incoming.extend(&bytes[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(_) => return self.drop_connection(id),
        }
        while let Some(connection) = self.connections.get_mut(&id) {
            let limit = match connection.stage {
                Stage::Stranger { .. } => STRANGER_BYTES_MAX,
                Stage::Leaving { .. } => return,
                _ => LINE_BYTES_MAX,
            };
            match connection.incoming.next_line(limit) {
                Ok(Some(line)) => self.line(id, &line),
                Ok(None) => return,
                Err(text) => return self.misspoken(id, text),
            }
        }
    }

    fn line(&mut self, id: ConnectionId, line: &[u8]) {
        let Some(connection) = self.connections.get(&id) else { return };
        match &connection.stage {
            Stage::Stranger { nonce, .. } => match self.admit(nonce, line) {
                Ok(answer) => self.welcome(id, answer),
                Err(text) => self.misspoken(id, text),
            },
            Stage::Leaving { .. } => {}
            Stage::Seated(_) | Stage::Control => match decode(line) {
                Ok(message) => self.roster.handle(id, message, Instant::now()),
                Err(text) => self.misspoken(id, text),
            },
        }
    }

    /// The caller's answer if it has proved itself; else what to tell it.
    fn admit(&self, nonce: &str, line: &[u8]) -> Result<Answer, String> {
        #[derive(serde::Deserialize)]
        struct Version {
            version: String,
        }
        // The version is looked at first and alone: another version's answer may look different in all else.
        let strange = |_| "this is a gradwire rendezvous and that was no answer to its challenge".to_string();
        let Version { version } = decode(line).map_err(strange)?;
        if version != VERSION {
            return Err(format!(
                "the launcher speaks version {VERSION} and the caller {version:.32}; use the same gradwire on both sides"
            ));
        }
        let answer: Answer = decode(line).map_err(strange)?;
        if answer.mac.is_empty() {
            return Err("no token: set GRADWIRE_TOKEN or GRADWIRE_TOKEN_FILE to this job's token".into());
        }
        if !auth::caller_holds(&self.token, nonce, &answer) {
            return Err("wrong token: it belongs to another job, or to another run of this one".into());
        }
        Ok(answer)
    }

    /// Gives a proved caller what it came for.
    fn welcome(&mut self, id: ConnectionId, answer: Answer) {
        let controls = self.connections.values().filter(|c| matches!(c.stage, Stage::Control)).count();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Stage::Stranger { nonce, .. } = &connection.stage else { return };
        let proof = Admission::Accepted(auth::launcher_mac(&self.token, nonce, &answer.nonce));
        connection.outgoing.extend(encode(&proof));
        match (answer.purpose, answer.role) {
            (Purpose::Control, _) if controls < CONTROLS_MAX => connection.stage = Stage::Control,
            (Purpose::Control, _) => self.refuse(id, "too many control connections; try again".into()),
            (Purpose::Join, None) => self.refuse(id, "who joins must say whether as server or as worker".into()),
            (Purpose::Join, Some(role)) => match self.roster.join(id, role, answer.rank, (answer.host, answer.pid)) {
                Ok(rank) => {
                    info!(%rank, pid = answer.pid, from = %connection.from, "joined");
                    connection.stage = Stage::Seated(rank);
                }
                Err(text) => self.refuse(id, text),
            },
        }
    }

    /// A caller said what it may not say. A rank's slip is the job's affair, a stranger's is its own.
    fn misspoken(&mut self, id: ConnectionId, text: String) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.stage {
            Stage::Seated(rank) => {
                connection.stage = Stage::Leaving { until: Instant::now() + STRANGER_TIME };
                self.roster.protocol_failure(rank, text);
            }
            Stage::Stranger { .. } => {
                connection.outgoing.extend(encode(&Admission::Refused(text.clone())));
                self.leave(id, &text);
            }
            _ => self.refuse(id, text),
        }
    }

    /// Refuses a caller that has proved itself.
    fn refuse(&mut self, id: ConnectionId, text: String) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.outgoing.extend(encode(&FromLauncher::Refused(text.clone())));
            self.leave(id, &text);
        }
    }

    fn leave(&mut self, id: ConnectionId, text: &str) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.stage = Stage::Leaving { until: Instant::now() + STRANGER_TIME };
        self.refusals = self.refusals.saturating_add(1);
        match self.refusals {
            n if n < REFUSALS_LOGGED_MAX => warn!("refused a caller from {}: {text}", connection.from),
            REFUSALS_LOGGED_MAX => {
                warn!("refused a caller from {}: {text}; further refusals are not logged", connection.from)
            }
            _ => {}
        }
    }

    fn handle_timeouts(&mut self, now: Instant) {
        let late: Vec<(ConnectionId, bool)> = self
            .connections
            .iter()
            .filter_map(|(id, connection)| match connection.stage {
                Stage::Stranger { until, .. } if until <= now => Some((*id, true)),
                Stage::Leaving { until } if until <= now => Some((*id, false)),
                _ => None,
            })
            .collect();
        for (id, stranger) in late {
            if stranger {
                self.misspoken(id, format!("no proof of the token within {} s", STRANGER_TIME.as_secs()));
            } else {
                self.drop_connection(id);
            }
        }
        self.roster.handle_timeout(now);
    }

    /// Does what the state machine wants done.
    fn carry_out(&mut self) {
        while let Some(effect) = self.roster.poll_effect() {
            match effect {
                Effect::Send { to, message } => {
                    let line = encode(&message);
                    for id in to {
                        self.connections.entry(id).and_modify(|connection| connection.outgoing.extend(&line));
                    }
                }
                Effect::Notice(notice) => (self.on_notice)(notice),
                Effect::Swap(swap) => self.swaps.begin(swap),
                Effect::HangUp(id) => drop(self.connections.remove(&id)),
                Effect::Time { to } => {
                    let time = encode(&FromLauncher::Time { at_ns: monotonic_ns(), clock: clock_name() });
                    self.connections.entry(to).and_modify(|connection| connection.outgoing.extend(&time));
                }
                Effect::Record { clock, parts } => {
                    if let Some(layout) = self.roster.layout() {
                        self.recorder.begin(clock, parts, layout);
                    }
                }
            }
        }
    }

    fn write(&mut self) {
        let mut gone = Vec::new();
        for (id, connection) in &mut self.connections {
            if connection.flush().is_err() || connection.outgoing.len() > OUTGOING_BYTES_MAX {
                gone.push(*id);
            } else if connection.outgoing.is_empty() && matches!(connection.stage, Stage::Leaving { .. }) {
                connection.hang_up();
                gone.push(*id);
            }
        }
        gone.into_iter().for_each(|id| self.drop_connection(id));
        self.carry_out();
    }

    fn drop_connection(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
        self.roster.lost(id);
    }
}

/// What a wait has found.
struct Ready {
    listener: bool,
    readable: Vec<ConnectionId>,
}
