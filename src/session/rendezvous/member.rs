//! A rank's end of the rendezvous: blocking calls for the start of the job, then commands to poll and reports to send from any
//! thread.
//!
//! Invariant: every blocking call has a deadline and names what it waited for; when the launcher is gone, every call and every
//! poll says so.

use std::{
    collections::VecDeque,
    io::Write,
    net::{IpAddr, Shutdown, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Address,
    line::{LINE_BYTES_MAX, LineBuffer, decode, encode},
    message::{Command, FromLauncher, Offer, Purpose, Report, ToLauncher, View},
    notify::Notify,
    peer::{Caller, Connection, clock_name, token_from_environment},
};
use crate::{
    Error, Result,
    layout::TensorSpec,
    mem::Owner,
    observe::monotonic_ns,
    session::{ClockOffset, JobConfig},
    types::{Rank, Role},
    wire::JobToken,
};

/// The launcher times every wait itself and names who is missing; we wait this much longer to hear it say so.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a report may take to leave when the launcher does not read.
const WRITE_TIME: Duration = Duration::from_secs(10);

/// Round trips by which a clock's offset is measured; the quickest counts.
const ROUND_TRIPS: usize = 8;

/// How long a leaving rank waits for the launcher to hang up.
const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// A seat in the job. It is left when the member and all its [`Reporter`]s have been dropped, so that a reporter can still tell
/// how the member's work ended; the launcher takes leaving for a failure unless [`Report::Finished`] was sent.
#[derive(Debug)]
pub struct Member {
    rank: Rank,
    config: JobConfig,
    again: bool,
    token: JobToken,
    address: Address,
    seat: Arc<Seat>,
    commands: Commands,
}

/// What keeps a rank in the job.
#[derive(Debug)]
struct Seat {
    link: Arc<Link>,
    reader: Option<JoinHandle<()>>,
    owner: Owner,
}

/// What the reader thread and all handles share.
#[derive(Debug)]
struct Link {
    stream: TcpStream,
    writer: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Answers to the blocking calls, in order.
    answers: VecDeque<FromLauncher>,
    subscribers: Vec<Arc<Subscriber>>,
    /// Commands heard so far that whoever subscribes later must hear too.
    past: Vec<Command>,
    /// Why nothing more will come.
    closed: Option<String>,
}

#[derive(Debug)]
struct Subscriber {
    commands: Mutex<VecDeque<Command>>,
    notify: Notify,
}

impl Link {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn send(&self, message: &ToLauncher) -> Result<()> {
        let line = encode(message);
        if line.len() > LINE_BYTES_MAX {
            return Err(Error::Config(format!(
                "a message of {} bytes to the launcher is too long: the limit is {LINE_BYTES_MAX}",
                line.len()
            )));
        }
        let _one_at_a_time = self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        (&self.stream).write_all(&line).map_err(|_| lost(&self.state().closed))
    }

    /// The reader thread: lines in, answers and commands out.
    fn read(&self, mut buffer: LineBuffer) {
        let why = loop {
            match next_message(&self.stream, &mut buffer) {
                Ok(FromLauncher::Command(command)) => self.hear(command),
                Ok(answer) => {
                    self.state().answers.push_back(answer);
                    self.changed.notify_all();
                }
                Err(why) => break why,
            }
        };
        let mut state = self.state();
        state.closed = Some(why);
        state.subscribers.iter().for_each(|subscriber| subscriber.notify.wake());
        self.changed.notify_all();
    }

    fn hear(&self, command: Command) {
        let mut state = self.state();
        for subscriber in &state.subscribers {
            // Under the lock, so that whoever finds the queue empty knows that the fd is not readable for a command's sake.
            let mut commands = subscriber.lock();
            // Whoever does not listen hears it once.
            if command != Command::TellWaits || commands.back() != Some(&command) {
                commands.push_back(command.clone());
            }
            subscriber.notify.wake();
        }
        // Every lane listens before the job runs, and no change is made before.
        let passes = matches!(
            command,
            Command::TellWaits
                | Command::Prepare { .. }
                | Command::Change { .. }
                | Command::Rebuild { .. }
                | Command::Gone { .. }
        );
        if let Command::Tenure { shard, .. } = &command {
            // Of each shard the present one is enough for whoever begins to listen later.
            state.past.retain(|past| !matches!(past, Command::Tenure { shard: of, .. } if of == shard));
        }
        if !passes {
            state.past.push(command);
        }
        self.changed.notify_all();
    }
}

impl Subscriber {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Command>> {
        self.commands.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn lost(closed: &Option<String>) -> Error {
    let why = closed.as_deref().unwrap_or("it no longer takes messages");
    Error::JobFailed(format!("the connection to the launcher was lost: {why}"))
}

pub(super) fn next_message(stream: &TcpStream, buffer: &mut LineBuffer) -> Result<FromLauncher, String> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        if let Some(line) = buffer.next_line(LINE_BYTES_MAX)? {
            return decode(&line);
        }
        match std::io::Read::read(&mut &*stream, &mut bytes) {
            Ok(0) => return Err("it hung up".into()),
            Ok(n) => buffer.extend(&bytes[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}

impl Member {
    /// Takes a seat in the job: this rank of the role, or any free one.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the launcher's reason (wrong token, duplicate rank, wrong version); [`Error::Os`] if it cannot be
    /// reached.
    pub fn join(address: &Address, token: &JobToken, role: Role, rank: Option<u16>) -> Result<Member> {
        let caller = Caller { purpose: Purpose::Join, role: Some(role), rank };
        let Connection { stream, mut buffer } = Connection::open(address, token, &caller)?;
        let option = |e| Error::os("setsockopt", address.to_string(), e);
        let welcome = next_message(&stream, &mut buffer);
        stream.set_read_timeout(None).map_err(option)?;
        stream.set_write_timeout(Some(WRITE_TIME)).map_err(option)?;
        let (rank, config, again) = match welcome {
            Ok(FromLauncher::Welcome { rank, config, again }) => (rank, *config, again),
            Ok(FromLauncher::Refused(why)) => return Err(Error::Refused { who: "the launcher".into(), why }),
            Ok(FromLauncher::Command(Command::JobFailed { text })) => return Err(Error::JobFailed(text)),
            Ok(_) => return Err(lost(&Some("it answered something else than a welcome".into()))),
            Err(why) => return Err(lost(&Some(why))),
        };
        let link = Arc::new(Link {
            stream,
            writer: Mutex::new(()),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let commands = Commands::subscribe(&link)?;
        let for_reader = Arc::clone(&link);
        let reader = std::thread::Builder::new()
            .name("rendezvous".into())
            .spawn(move || for_reader.read(buffer))
            .map_err(|e| Error::os("pthread_create", "the rendezvous reader", e))?;
        let seat = Arc::new(Seat { link, reader: Some(reader), owner: Owner::here() });
        Ok(Member { rank, config, again, token: token.clone(), address: address.clone(), seat, commands })
    }

    /// Takes the seat that the environment names: `GRADWIRE_RENDEZVOUS`, `GRADWIRE_ROLE` (worker if absent), `GRADWIRE_RANK` (any
    /// if absent), and the token in `GRADWIRE_TOKEN` or `GRADWIRE_TOKEN_FILE`.
    pub fn from_environment() -> Result<Member> {
        let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let address = variable("GRADWIRE_RENDEZVOUS").ok_or_else(|| {
            Error::Config("GRADWIRE_RENDEZVOUS is not set: start this program with `gradwire run … -- COMMAND`".into())
        })?;
        let role = match variable("GRADWIRE_ROLE").as_deref() {
            None | Some("worker") => Role::Worker,
            Some("server") => Role::Server,
            Some(other) => {
                return Err(Error::Config(format!("GRADWIRE_ROLE is `{other}`; it must be worker or server")));
            }
        };
        let rank = match variable("GRADWIRE_RANK") {
            None => None,
            Some(text) => {
                let wrong = |_| Error::Config(format!("GRADWIRE_RANK is `{text}`; it must be a number from 0"));
                Some(text.parse().map_err(wrong)?)
            }
        };
        Member::join(&address.parse()?, &token_from_environment()?, role, rank)
    }

    /// Who this process is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Whether another process has had this seat before, and the job runs already.
    pub fn comes_again(&self) -> bool {
        self.again
    }

    /// The job's settings.
    pub fn config(&self) -> &JobConfig {
        &self.config
    }

    /// Where the rendezvous is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The job's token, with which the data paths authenticate.
    pub fn token(&self) -> &JobToken {
        &self.token
    }

    /// The address by which this process reached the rendezvous: others that did so reach it by that too.
    pub fn local_ip(&self) -> Option<IpAddr> {
        self.seat.link.stream.local_addr().ok().map(|address| address.ip().to_canonical())
    }

    /// A worker says which tensors it has, and waits until all workers have.
    pub fn declare(&mut self, tensors: Vec<TensorSpec>) -> Result<View> {
        self.seat.link.send(&ToLauncher::Declare(tensors))?;
        self.view()
    }

    /// A server waits until all workers have declared.
    pub fn view(&mut self) -> Result<View> {
        // The ranks that have not even joined count too: nobody may be waited for longer than these together.
        let time = Duration::from_millis(self.config.join_ms + self.config.setup_ms) + PATIENCE;
        match self.answer("every worker's declaration", time)? {
            FromLauncher::View(packed) => packed.unpack().ok_or_else(|| unexpected("a view that contradicts itself")),
            other => Err(unexpected(&format!("{other:?}"))),
        }
    }

    /// Offers the ways to reach this rank's lanes and waits until every rank has; gives the offers made to this rank.
    pub fn exchange(&mut self, offers: Vec<Offer>) -> Result<Vec<Offer>> {
        self.seat.link.send(&ToLauncher::Offer(offers))?;
        match self.answer("every rank's endpoints", self.setup_time())? {
            FromLauncher::Offers(offers) => Ok(offers),
            other => Err(unexpected(&format!("{other:?}"))),
        }
    }

    /// Waits until every rank of the job has come to the barrier of this name.
    pub fn barrier(&mut self, name: &str) -> Result<()> {
        self.seat.link.send(&ToLauncher::Barrier(name.into()))?;
        match self.answer("every rank at a barrier", self.setup_time())? {
            FromLauncher::BarrierPassed(passed) if passed == name => Ok(()),
            other => Err(unexpected(&format!("{other:?}"))),
        }
    }

    /// How far this host's clock is from the launcher's, by the quickest of a few round trips; nothing if both read one clock. To be
    /// called when no other answer is awaited.
    pub fn clock_offset(&self) -> Result<ClockOffset> {
        let mut best: Option<ClockOffset> = None;
        for _ in 0..ROUND_TRIPS {
            let sent = monotonic_ns();
            self.seat.link.send(&ToLauncher::AskTime)?;
            match self.answer("the launcher's time", PATIENCE)? {
                FromLauncher::Time { clock, .. } if clock == clock_name() => return Ok(ClockOffset::default()),
                FromLauncher::Time { at_ns, .. } => {
                    let offset = ClockOffset::of_round_trip(sent, at_ns, monotonic_ns());
                    best = best.into_iter().chain([offset]).min_by_key(|offset| offset.error_ns);
                }
                other => return Err(unexpected(&format!("{other:?}"))),
            }
        }
        Ok(best.unwrap_or_default())
    }

    fn setup_time(&self) -> Duration {
        Duration::from_millis(self.config.setup_ms) + PATIENCE
    }

    fn answer(&self, awaited: &'static str, time: Duration) -> Result<FromLauncher> {
        let since = Instant::now();
        let mut state = self.seat.link.state();
        loop {
            if let Some(answer) = state.answers.pop_front() {
                return Ok(answer);
            }
            for command in &state.past {
                match command {
                    Command::JobFailed { text } => return Err(Error::JobFailed(text.clone())),
                    Command::Stop { reason, clock: None, .. } => return Err(Error::JobFailed(reason.clone())),
                    _ => {}
                }
            }
            if state.closed.is_some() {
                return Err(lost(&state.closed));
            }
            let Some(left) = time.checked_sub(since.elapsed()) else {
                let from = "the launcher".into();
                return Err(Error::Deadline { from, awaited, chunk: None, clock: None, waited: time });
            };
            let waited = self.seat.link.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// A handle to report with, for any thread.
    pub fn reporter(&self) -> Reporter {
        Reporter { rank: self.rank, seat: Arc::clone(&self.seat) }
    }

    /// The launcher's next command, if there is one. Never blocks.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] when the connection to the launcher is gone, after the last command has been given out.
    pub fn poll_command(&mut self) -> Result<Option<Command>> {
        self.commands.poll()
    }

    /// Becomes readable when `poll_command` has something to say.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.commands.fd()
    }

    /// A further stream of the launcher's commands, from the first one on, for another thread.
    pub fn commands(&self) -> Result<Commands> {
        Commands::subscribe(&self.seat.link)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            // A copy that fork has made: the connection is the parent's.
            return std::mem::forget(self.reader.take());
        }
        // The last report must arrive: a full shutdown with unread bytes about would reset the connection and lose it. So we end
        // our direction, and give the launcher a moment to end its own.
        let _ = self.link.stream.shutdown(Shutdown::Write);
        let state = self.link.state();
        let _ = self.link.changed.wait_timeout_while(state, FAREWELL_TIME, |state| state.closed.is_none());
        let _ = self.link.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

pub(super) fn unexpected(what: &str) -> Error {
    Error::JobFailed(format!("the launcher broke the rendezvous protocol: it answered {what}"))
}

/// A stream of the launcher's commands.
#[derive(Debug)]
pub struct Commands {
    link: Arc<Link>,
    subscriber: Arc<Subscriber>,
}

impl Commands {
    fn subscribe(link: &Arc<Link>) -> Result<Commands> {
        let subscriber = Arc::new(Subscriber { commands: Mutex::default(), notify: Notify::new()? });
        let mut state = link.state();
        subscriber.lock().extend(state.past.iter().cloned());
        if !state.past.is_empty() || state.closed.is_some() {
            subscriber.notify.wake();
        }
        state.subscribers.push(Arc::clone(&subscriber));
        Ok(Commands { link: Arc::clone(link), subscriber })
    }

    /// The next command, if there is one. Never blocks.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] when the connection to the launcher is gone, after the last command has been given out.
    pub fn poll(&self) -> Result<Option<Command>> {
        // Nothing to say costs no system call: event loops ask in every turn.
        let mut commands = self.subscriber.lock();
        if let Some(command) = commands.pop_front() {
            if commands.is_empty() {
                self.subscriber.notify.take();
                drop(commands);
                if self.link.state().closed.is_some() {
                    // The end of the connection is something to say too, and its wake-up may just have been taken.
                    self.subscriber.notify.wake();
                }
            }
            return Ok(Some(command));
        }
        drop(commands);
        let state = self.link.state();
        match &state.closed {
            Some(_) if self.subscriber.lock().is_empty() => Err(lost(&state.closed)),
            _ => Ok(None),
        }
    }

    /// Becomes readable when `poll` has something to say.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.subscriber.notify.as_fd()
    }
}

/// Sends reports to the launcher, from any thread.
#[derive(Clone, Debug)]
pub struct Reporter {
    rank: Rank,
    seat: Arc<Seat>,
}

impl Reporter {
    /// Who reports.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Sends a report.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] when the launcher is gone.
    pub fn report(&self, report: Report) -> Result<()> {
        self.seat.link.send(&ToLauncher::Report(report))
    }
}
