//! One turn of a worker's engine, whoever makes it, and what the launcher wants of the worker.
//!
//! Invariant: a failure is left where every later wait of the program finds it, and is told to the launcher.

use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Entry, Failure, Pace, Shared, Who};
use crate::{
    Error, Result,
    session::{self, Change, Commands, PathCounts, Report, Reporter},
    transport::{Armed, Idle, Transport, Waiter, WakeHandle, Wakeup},
    types::PeerId,
    worker::{Command, Engine, Event},
};

/// How long a broken path waits for the launcher's word.
const EXPLANATION_TIME: Duration = Duration::from_secs(1);

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

/// An engine, whatever its transport.
pub(super) trait Turn: Send {
    /// Does what can be done now; where there was nothing, looks again or sleeps until something happens, at most until `latest`. A
    /// failure is left where the program finds it. `false` when there is nothing more to turn. The thread does nothing while it is
    /// the program's turn.
    fn once(&mut self, who: Who, latest: Option<Instant>) -> bool;

    /// Carries out what the program has just asked for, and no more: it has something else to do. A failure is left as above.
    fn begin(&mut self);
}

pub(super) struct Turner<T> {
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

impl<T: Transport + Wakeup + Send> Turn for Turner<T> {
    fn once(&mut self, who: Who, latest: Option<Instant>) -> bool {
        let waiting = match self.shared.enter(who, &mut self.commands) {
            Entry::Turn(waiting) => waiting,
            Entry::Leave => return true,
            Entry::Over => return false,
        };
        let turned = self.turn(waiting, latest);
        self.leave(turned)
    }

    fn begin(&mut self) {
        if let Entry::Turn(_) = self.shared.enter(Who::Program, &mut self.commands) {
            let begun = self.engine.begin(&mut self.commands).map_err(|error| self.explain(error));
            self.leave(begun);
        }
    }
}

impl<T: Transport + Wakeup> Turner<T> {
    pub(super) fn new(
        shared: Arc<Shared>,
        engine: Engine<T>,
        (commands, reporter): (Commands, Reporter),
        pace: Pace,
    ) -> Result<Turner<T>> {
        Ok(Turner {
            shared,
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

    /// Ends a rest.
    pub(super) fn wake_handle(&self) -> WakeHandle {
        self.waiter.handle()
    }

    /// Leaves a failure, if this is one, to the program.
    fn leave(&mut self, result: Result<()>) -> bool {
        let Err(error) = result else { return true };
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

    fn turn(&mut self, waiting: Option<Instant>, latest: Option<Instant>) -> Result<()> {
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
