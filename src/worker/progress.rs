//! Who turns a worker's engine, and listens to the launcher: while the program computes, a thread of its own, asleep when there is
//! nothing to do; while the program waits, the program's own thread, for whom nobody has to be woken then. The other one stays away
//! meanwhile: handing over costs more than a small message takes on its way.
//!
//! Invariant: commands are carried out in the order in which they were given, events are handed over in the order in which they
//! happened, and after a failure every wait of the user ends with it. One turns at a time, and as long as the job runs there is
//! always one who will: the program until it has what it waits for, the thread at most [`LINGER_MAX`] later.

#[cfg(test)]
mod tests;
mod turner;

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, TryLockError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use turner::{Turn, Turner};

use super::{Command, Engine, Event};
use crate::{
    Error, Result,
    mem::Owner,
    session::{self, Commands, Reporter},
    transport::{Transport, WakeHandle, Wakeup},
    types::Clock,
};

/// How long the thread stays away after the program has waited: a program that soon waits again is not disturbed. A gradient that is
/// given in this time, with a backward pass still to come, leaves so much later.
const LINGER: Duration = Duration::from_micros(500);

/// The same for a program that waits again and again: looking whether it still does takes a core from somebody.
const LINGER_MAX: Duration = Duration::from_millis(4);

/// How often the thread looks, during a long wait of the program, whether it has missed the wait's end (it never should).
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Commands with more bytes than that are never carried out by the program itself before it waits: it has something else to do.
const AT_ONCE: usize = 16 << 10;

/// How a worker's part in the job has ended early.
#[derive(Clone, Debug)]
enum Failure {
    Preempted(Clock),
    Failed(String),
}

/// Who turns the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Program,
    Thread,
}

#[derive(Debug, Default)]
struct State {
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
    failure: Option<Failure>,
    /// Since when the program has waited; `None` while it computes.
    waiting: Option<Instant>,
    ending: bool,
    /// Goes up when the program begins to turn the engine, and when it stops: odd while it does.
    shift: u64,
    /// The shift in which the thread turns. If the present one is another the thread stays away.
    of_thread: u64,
    /// The thread is to be told when the present shift ends.
    wants_word: bool,
}

impl State {
    /// Whether the engine is the thread's to turn.
    fn is_of_thread(&self) -> bool {
        self.shift == self.of_thread
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// For the thread while it stays away: a long wait of the program is over, or everything is.
    over: Condvar,
    /// Readable once something has changed; there only if the user has asked for it.
    readable: OnceLock<EventFd>,
}

/// What somebody who has the engine may do with it.
enum Entry {
    /// Turn it. The program waits since then.
    Turn(Option<Instant>),
    /// Leave it to the program.
    Leave,
    /// There is nothing more to turn.
    Over,
}

impl Shared {
    /// Begins a turn: takes over the commands.
    fn enter(&self, who: Who, commands: &mut VecDeque<Command>) -> Entry {
        let mut state = self.lock();
        if state.ending || state.failure.is_some() {
            return Entry::Over;
        }
        if who == Who::Thread && !state.is_of_thread() {
            return Entry::Leave;
        }
        std::mem::swap(commands, &mut state.commands);
        Entry::Turn(state.waiting)
    }

    fn notify(&self) {
        if let Some(event) = self.readable.get() {
            let _ = event.write(1); // fails only when it is full, and then it is readable
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The thread stays away until the program has not turned for [`LINGER`]; the longer the program waits in short turns, the
    /// longer. `false` when there is nothing more to turn.
    fn await_turn(&self) -> bool {
        let mut state = self.lock();
        let mut time = LINGER;
        while !state.ending && state.failure.is_none() {
            if state.is_of_thread() {
                return true;
            }
            let before = state.shift;
            let most = if state.wants_word { LOOK_AGAIN } else { time };
            state = match self.over.wait_timeout(state, most) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
            let (is_same, turns) = (state.shift == before, before % 2 == 1);
            time = if is_same || state.wants_word { LINGER } else { (2 * time).min(LINGER_MAX) };
            state.wants_word = is_same && turns;
            if is_same && !turns {
                state.of_thread = before;
            }
        }
        false
    }
}

/// The user's end of an engine.
pub(super) struct Progress {
    shared: Arc<Shared>,
    turner: Arc<Mutex<dyn Turn>>,
    wake: WakeHandle,
    thread: Option<JoinHandle<()>>,
    owner: Owner,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Progress {
    /// Starts the thread that turns the engine while the program does not.
    pub fn start<T>(engine: Engine<T>, links: (Commands, Reporter), pace: Pace) -> Result<Progress>
    where
        T: Transport + Wakeup + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let turner = Turner::new(shared.clone(), engine, links, pace)?;
        let wake = turner.wake_handle();
        Progress::with(shared, Arc::new(Mutex::new(turner)), wake)
    }

    fn with(shared: Arc<Shared>, turner: Arc<Mutex<dyn Turn>>, wake: WakeHandle) -> Result<Progress> {
        let (ours, engine) = (shared.clone(), turner.clone());
        let run = move || while ours.await_turn() && lock(&engine).once(Who::Thread, None) {};
        let thread = std::thread::Builder::new().name("gradwire".into()).spawn(run);
        let thread = thread.map_err(|error| Error::os("pthread_create", "the progress thread", error))?;
        Ok(Progress { shared, turner, wake, thread: Some(thread), owner: Owner::here() })
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
        if state.commands.len() == before {
            return;
        }
        if state.is_of_thread() {
            drop(state);
            return self.wake.wake();
        }
        // The program has just waited, and is likely to again: then, or when the thread comes, the rest is carried out.
        let bytes: usize = state.commands.iter().map(Command::bytes).sum();
        drop(state);
        if bytes <= AT_ONCE
            && let Ok(mut turner) = self.turner.try_lock()
        {
            turner.begin();
        }
    }

    /// A descriptor that becomes readable when there are events to take or the worker's part in the job has ended. It is readable
    /// at first, and until [`Progress::rest`].
    ///
    /// # Errors
    ///
    /// [`Error::Os`] where the process has no descriptor left.
    pub fn fd(&self) -> Result<BorrowedFd<'_>> {
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

    /// What a wait needs for as long as it lasts.
    pub fn shift(&self) -> Shift {
        Shift(self.shared.clone())
    }

    /// Takes the events so far; turns the engine until there is one, at most until `deadline`, if there is none. Empty after the
    /// deadline. Until `shift` is dropped the engine is the program's to turn, if it has turned it once.
    ///
    /// # Errors
    ///
    /// Why the worker's part in the job has ended, once all events have been taken.
    pub fn events(&self, _shift: &Shift, deadline: Instant, events: &mut VecDeque<Event>) -> Result<()> {
        loop {
            {
                let mut state = self.shared.lock();
                if !state.events.is_empty() {
                    events.append(&mut state.events);
                    return Ok(());
                }
                match &state.failure {
                    Some(Failure::Preempted(clock)) => return Err(Error::Preempted { clock: *clock }),
                    Some(Failure::Failed(text)) => return Err(Error::JobFailed(text.clone())),
                    None if Instant::now() >= deadline => return Ok(()),
                    None => {}
                }
                state.shift |= 1;
            }
            self.engine().once(Who::Program, Some(deadline));
        }
    }

    /// The engine, for the program; the thread, if it has it, is asked to let go.
    fn engine(&self) -> MutexGuard<'_, dyn Turn + 'static> {
        match self.turner.try_lock() {
            Ok(turner) => turner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.wake.wake();
                lock(&self.turner)
            }
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
        self.shared.over.notify_all();
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(turner: &Mutex<dyn Turn>) -> MutexGuard<'_, dyn Turn + 'static> {
    turner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A wait of the program, in which it may turn the engine.
pub(super) struct Shift(Arc<Shared>);

impl Drop for Shift {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if state.shift.is_multiple_of(2) {
            return; // it never had to
        }
        state.shift += 1;
        let wants_word = state.wants_word;
        drop(state);
        if wants_word {
            self.0.over.notify_all();
        }
    }
}

/// When waits are reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// How long a wait may be before it is reported.
    pub warn: Duration,
    /// How often it is reported then.
    pub again: Duration,
}

/// How long a worker waits for the lanes to be there.
pub(super) fn connect_time(config: &session::JobConfig) -> Duration {
    config.deadline().max(Duration::from_secs(30))
}
