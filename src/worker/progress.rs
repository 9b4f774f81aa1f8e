//! Who turns a worker's engine, and listens to the launcher: a thread of its own while the user computes, asleep when there is
//! nothing to do; or, where the job asks for it (`inline_progress`), the user's own thread in its calls. A caretaker then turns the
//! engine a few times a heartbeat, so that a worker that computes for long is not taken for dead.
//!
//! Invariant: commands are carried out in the order in which they were given, events are handed over in the order in which they
//! happened, and after a failure every wait of the user ends with it.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Command, Engine, Event};
use crate::{
    Error, Result,
    mem::Owner,
    session::{self, Change, Commands, PathCounts, Report, Reporter},
    transport::{Armed, Idle, Transport, Waiter, WakeHandle, Wakeup},
    types::{Clock, PeerId},
};

/// How long a broken path waits for the launcher's word.
const EXPLANATION_TIME: Duration = Duration::from_secs(1);

/// How a worker's part in the job has ended early.
#[derive(Clone, Debug)]
enum Failure {
    Preempted(Clock),
    Failed(String),
}

#[derive(Debug, Default)]
struct State {
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
    failure: Option<Failure>,
    /// Since when the program has waited; `None` while it computes.
    waiting: Option<Instant>,
    ending: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable once something has changed; there only if the user has asked for it.
    readable: OnceLock<EventFd>,
}

impl Shared {
    fn notify(&self) {
        self.changed.notify_all();
        if let Some(event) = self.readable.get() {
            let _ = event.write(1); // fails only when it is full, and then it is readable
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The user's end of an engine.
#[derive(Debug)]
pub(super) struct Progress {
    shared: Arc<Shared>,
    wake: WakeHandle,
    /// What the user's own thread turns; `None`: the thread does.
    inline: Option<Inline>,
    thread: Option<JoinHandle<()>>,
    owner: Owner,
}

struct Inline(Arc<Mutex<dyn Turn>>);

impl std::fmt::Debug for Inline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inline")
    }
}

impl Inline {
    fn once(&self, rest: Rest) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).once(rest);
    }
}

impl Progress {
    /// Starts the thread that turns the engine.
    pub fn start<T>(engine: Engine<T>, links: (Commands, Reporter), pace: Pace) -> Result<Progress>
    where
        T: Transport + Wakeup + Send + 'static,
    {
        let mut turner = Turner::new(engine, links, pace)?;
        let (shared, wake) = (turner.shared.clone(), turner.waiter.handle());
        let thread = spawn(move || while turner.once(Rest::Until(None)) {})?;
        Ok(Progress { shared, wake, inline: None, thread: Some(thread), owner: Owner::here() })
    }

    /// Leaves the engine to the user's thread, and starts the caretaker.
    pub fn inline<T>(engine: Engine<T>, links: (Commands, Reporter), pace: Pace) -> Result<Progress>
    where
        T: Transport + Wakeup + Send + 'static,
    {
        let turner = Turner::new(engine, links, pace)?;
        let (shared, wake) = (turner.shared.clone(), turner.waiter.handle());
        let turner = Arc::new(Mutex::new(turner));
        let inline: Arc<Mutex<dyn Turn>> = turner.clone();
        let watched = shared.clone();
        let care = move || {
            while !watched.lock().ending {
                std::thread::park_timeout(pace.again / 4);
                // Whoever holds it is turning it.
                if let Ok(mut turner) = turner.try_lock() {
                    turner.once(Rest::No);
                }
            }
        };
        Ok(Progress { shared, wake, inline: Some(Inline(inline)), thread: Some(spawn(care)?), owner: Owner::here() })
    }

    /// The program begins to wait, or goes on.
    pub fn set_waiting(&self, waits: bool) {
        let mut state = self.shared.lock();
        state.waiting = waits.then(|| state.waiting.unwrap_or_else(Instant::now));
    }

    /// Gives commands.
    pub fn command(&self, commands: impl IntoIterator<Item = Command>) {
        let mut state = self.shared.lock();
        let before = state.commands.len();
        state.commands.extend(commands);
        let are_new = state.commands.len() > before;
        drop(state);
        match &self.inline {
            Some(inline) if are_new => inline.once(Rest::No),
            None if are_new => self.wake.wake(),
            _ => {}
        }
    }

    /// A descriptor that becomes readable when there are events to take or the worker's part in the job has ended. It is readable
    /// at first, and until [`Progress::rest`].
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where nobody but the user's thread would make it readable.
    pub fn fd(&self) -> Result<BorrowedFd<'_>> {
        if self.inline.is_some() {
            let text =
                "there is no descriptor to wait for under `inline_progress`: a worker's data move in its calls alone";
            return Err(Error::Config(text.into()));
        }
        if self.shared.readable.get().is_none() {
            let event = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|error| Error::os("eventfd", "a worker's completions", error))?;
            let _ = self.shared.readable.set(event); // only the user's thread sets it
        }
        Ok(self.shared.readable.get().expect("it was set above").as_fd())
    }

    /// Makes the descriptor wait for the next change; to be called before the events are taken, so that none is missed.
    pub fn rest(&self) {
        if let Some(event) = self.shared.readable.get() {
            let _ = event.read();
        }
    }

    /// Takes the events so far; waits for one, at most until `deadline`, if there is none. Empty after the deadline.
    ///
    /// # Errors
    ///
    /// Why the worker's part in the job has ended, once all events have been taken.
    pub fn events(&self, deadline: Instant, events: &mut VecDeque<Event>) -> Result<()> {
        let mut state = self.shared.lock();
        loop {
            if !state.events.is_empty() {
                events.append(&mut state.events);
                return Ok(());
            }
            match &state.failure {
                Some(Failure::Preempted(clock)) => return Err(Error::Preempted { clock: *clock }),
                Some(Failure::Failed(text)) => return Err(Error::JobFailed(text.clone())),
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if let Some(inline) = &self.inline {
                drop(state);
                inline.once(Rest::Until(Some(deadline)));
                state = self.shared.lock();
                continue;
            }
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            // A copy that fork has made: there is no such thread here, and the parent's may have held the lock.
            return std::mem::forget(self.thread.take());
        }
        self.shared.lock().ending = true;
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// The launcher's commands as something that wakes a sleeping thread.
struct Launcher(Commands);

impl Wakeup for Launcher {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn arm_wakeup(&mut self) -> Result<Armed> {
        Ok(Armed::Sleep) // the fd stays readable as long as there is a command
    }

    fn next_deadline(&self) -> Option<Instant> {
        None
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let handle = std::thread::Builder::new().name("gradwire".into()).spawn(run);
    handle.map_err(|error| Error::os("pthread_create", "the progress thread", error))
}

/// What to do when there was nothing to do.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Nothing: whoever turns has something else to do.
    No,
    /// Look again, or sleep until something happens, at most until then.
    Until(Option<Instant>),
}

/// An engine, whatever its transport.
trait Turn: Send {
    /// Does what can be done now, then rests; a failure is left where the user finds it. `false` when there is nothing more to turn.
    fn once(&mut self, rest: Rest) -> bool;
}

struct Turner<T> {
    shared: Arc<Shared>,
    engine: Engine<T>,
    waiter: Waiter,
    launcher: Launcher,
    reporter: Reporter,
    pace: Pace,
    idle: Idle,
    /// When the launcher was last told what is waited for; `None` if it has asked since.
    told: Option<Instant>,
    /// What the launcher has been told of the paths.
    counted: PathCounts,
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
}

/// When waits are reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// How long a wait may be before it is reported.
    pub warn: Duration,
    /// How often it is reported then.
    pub again: Duration,
}

impl<T: Transport + Wakeup + Send> Turn for Turner<T> {
    fn once(&mut self, rest: Rest) -> bool {
        let waiting = {
            let mut state = self.shared.lock();
            if state.ending || state.failure.is_some() {
                return false;
            }
            std::mem::swap(&mut self.commands, &mut state.commands);
            state.waiting
        };
        let Err(error) = self.turn(waiting, rest) else { return true };
        let failure = match error {
            Error::Preempted { clock } => Failure::Preempted(clock),
            error => {
                // If the launcher is gone, nobody is left to be told.
                let _ = self.reporter.report(Report::failure(&error));
                Failure::Failed(error.to_string())
            }
        };
        self.shared.lock().failure = Some(failure);
        self.shared.notify();
        false
    }
}

impl<T: Transport + Wakeup> Turner<T> {
    fn new(engine: Engine<T>, (commands, reporter): (Commands, Reporter), pace: Pace) -> Result<Turner<T>> {
        Ok(Turner {
            shared: Arc::new(Shared::default()),
            engine,
            waiter: Waiter::new()?,
            launcher: Launcher(commands),
            reporter,
            pace,
            idle: Idle::default(),
            told: Some(Instant::now()),
            counted: PathCounts::default(),
            commands: VecDeque::new(),
            events: VecDeque::new(),
        })
    }

    fn turn(&mut self, waiting: Option<Instant>, rest: Rest) -> Result<()> {
        self.obey()?;
        let now = Instant::now();
        let commanded = !self.commands.is_empty();
        let turned = self.engine.turn(now, &mut self.commands, &mut self.events);
        if !self.events.is_empty() {
            self.shared.lock().events.append(&mut self.events);
            self.shared.notify();
        }
        let moved = turned.map_err(|error| self.explain(error))?;
        self.engine.record(waiting, now);
        self.report_waits(waiting, now)?;
        self.report_paths()?;
        if moved || commanded {
            self.idle.busy(now);
            return Ok(());
        }
        let Rest::Until(latest) = rest else { return Ok(()) };
        if !self.idle.may_spin(now) {
            let until = [self.engine.next_deadline(), latest].into_iter().flatten().min();
            self.waiter.wait_from(now, &mut [self.engine.paths().transport(), &mut self.launcher], until)?;
        }
        Ok(())
    }

    /// Says what the program waits for, or that it computes: when the launcher asks, and while it has waited for too long.
    fn report_waits(&mut self, waiting: Option<Instant>, now: Instant) -> Result<()> {
        let since = waiting.map(|since| now.saturating_duration_since(since));
        let overdue = since.is_some_and(|since| since >= self.pace.warn);
        if self.told.is_some_and(|told| !overdue || now < told + self.pace.again) {
            return Ok(());
        }
        self.told = Some(now);
        let waits = since.map_or_else(Vec::new, |since| self.engine.waits(since, now));
        self.reporter.report(Report::Waits { lane: 0, waits })
    }

    /// Passes on what broken paths need of the launcher, and what became of them.
    fn report_paths(&mut self) -> Result<()> {
        let (paths, reporter) = (self.engine.paths(), &self.reporter);
        for proposal in paths.take_proposals() {
            reporter.report(Report::Rebuild { lane: 0, proposal })?;
        }
        let counts = paths.counts();
        if counts == self.counted {
            return Ok(());
        }
        self.counted = counts;
        reporter.report(Report::PathCounts { lane: 0, counts })
    }

    /// When a job ends early the servers go too, and a path may break before the launcher's word is here: it is waited for, since
    /// it says why.
    fn explain(&mut self, error: Error) -> Error {
        let until = Instant::now() + EXPLANATION_TIME;
        while Instant::now() < until {
            match self.obey() {
                Ok(()) => {}
                Err(Error::JobFailed(_)) => break, // our own report names the path that broke, and the launcher weighs both
                Err(ended) => return ended,
            }
            if self.waiter.wait(&mut [&mut self.launcher], Some(until)).is_err() {
                break;
            }
        }
        error
    }

    /// Follows the launcher.
    fn obey(&mut self) -> Result<()> {
        while let Some(command) = self.launcher.0.poll()? {
            match command {
                session::Command::Leave { clock } => return Err(Error::Preempted { clock }),
                session::Command::JobFailed { text } => return Err(Error::JobFailed(text)),
                session::Command::Stop { clock: None, reason, .. } => return Err(Error::JobFailed(reason)),
                session::Command::TellWaits => self.told = None,
                session::Command::Tenure { shard, tenure } => {
                    self.engine.set_tenure(shard, tenure.primary, Instant::now());
                }
                session::Command::Rebuild { proposal, .. } => {
                    self.engine.paths().proposed(proposal, Instant::now());
                }
                session::Command::Change { change: Some((clock, Change::Joins(worker))), .. }
                    if PeerId::worker(worker) == self.engine.me() =>
                {
                    self.shared.lock().events.push_back(Event::Begins(clock));
                    self.shared.notify();
                }
                session::Command::Change { change: Some((clock, Change::Leaves(worker))), .. }
                    if PeerId::worker(worker) == self.engine.me() =>
                {
                    self.engine.leave(clock);
                }
                // The servers' business: they hold the workers at the checkpoint's clock.
                session::Command::Stop { .. }
                | session::Command::Checkpoint { .. }
                | session::Command::Retire
                | session::Command::Prepare { .. }
                | session::Command::Change { .. }
                | session::Command::Gone { .. }
                | session::Command::End { .. } => {}
            }
        }
        Ok(())
    }
}

/// How long a worker waits for the lanes to be there.
pub(super) fn connect_time(config: &session::JobConfig) -> Duration {
    config.deadline().max(Duration::from_secs(30))
}
