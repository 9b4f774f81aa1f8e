//! The thread that starts a job's processes and sees them to their end.
//!
//! Invariant: the first failure is told by its cause, not by what followed from it; every way out of `run` passes `clear_up`.
#![forbid(unsafe_code)]

mod losses;
mod telling;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use nix::sys::signal;
use tracing::{debug, warn};

use super::{
    EXIT_PREEMPTED, EXIT_WITHOUT_WORKERS,
    cause::{self, Exit, Sight},
    directory::JobDirectory,
    fleet::{Context, Fleet},
    job::{JobOptions, Outcome, Signal},
    keeper::Keeper,
    pipes::SharedSink,
    remote::Word,
    sweep,
    timeline::Timeline,
};
use crate::{
    Result,
    session::{Notice, Order, Rendezvous},
    transport::PathChoice,
    types::{Clock, Rank, Role},
    wire::JobToken,
};

/// How long after the first sign of a failure others are gathered, so that the cause can be told from its consequences.
const SETTLE_TIME: Duration = Duration::from_millis(300);

/// The same if all that was seen is a connection's end: the process' own end is about to be seen.
const SETTLE_TIME_LOST: Duration = Duration::from_millis(1000);

/// How long ranks may take to end by themselves when they have been told why the job fails.
const HEED_TIME: Duration = Duration::from_millis(500);

/// How long what a job has left behind is looked for at its end.
const SWEEP_TIME: Duration = Duration::from_secs(5);

/// What the supervisor hears.
#[derive(Debug)]
pub(super) enum Event {
    Notice(Notice),
    Exited(Rank, Exit),
    /// What the agent on a host says.
    Host(usize, Word),
    Signal(Signal),
    Kill(Rank, signal::Signal),
}

/// Why the job ends.
#[derive(Debug, PartialEq)]
enum End {
    /// All workers are done.
    Finished,
    Failed(cause::Cause),
    /// With a checkpoint, as soon as it is complete; the number of the signal that asked for it.
    Preempted(i32),
    /// By a signal, at once.
    Interrupted(i32),
}

/// A job that is ending: how, and when patience ends.
#[derive(Debug)]
struct Ending {
    end: End,
    terminate_at: Option<Instant>,
    kill_at: Option<Instant>,
}

pub(super) struct Supervisor {
    options: JobOptions,
    directory: JobDirectory,
    rendezvous: Rendezvous,
    token: JobToken,
    events: Receiver<Event>,
    processes: Fleet,
    sights: Vec<Sight>,
    settle_at: Option<Instant>,
    ending: Option<Ending>,
    joined: BTreeSet<Rank>,
    lost: BTreeSet<Rank>,
    running: bool,
    paths: BTreeMap<Rank, Vec<PathChoice>>,
    told_fallback: bool,
    summaries: BTreeMap<Rank, serde_json::Value>,
    not_finite: (u64, Option<String>),
    checkpoint: Option<u64>,
    stopped_with_checkpoint: bool,
    timeline: Timeline,
    losses: losses::Losses,
}

impl Supervisor {
    pub fn new(
        options: JobOptions,
        directory: JobDirectory,
        (rendezvous, token): (Rendezvous, JobToken),
        (events_out, events): (Sender<Event>, Receiver<Event>),
        sink: SharedSink,
    ) -> Supervisor {
        let mark = sweep::mark(&options.config.name, options.config.instance);
        Supervisor {
            options,
            directory,
            rendezvous,
            token,
            events,
            processes: Fleet::new(mark, events_out, sink),
            sights: Vec::new(),
            settle_at: None,
            ending: None,
            joined: BTreeSet::new(),
            lost: BTreeSet::new(),
            running: false,
            paths: BTreeMap::new(),
            told_fallback: false,
            summaries: BTreeMap::new(),
            not_finite: (0, None),
            checkpoint: None,
            stopped_with_checkpoint: false,
            timeline: Timeline::default(),
            losses: losses::Losses::default(),
        }
    }

    /// Runs the job to its end.
    pub fn run(mut self) -> Outcome {
        let keeper = match self.start() {
            Ok(keeper) => Some(keeper),
            Err(e) => {
                self.see(Sight::General(e.to_string()));
                None
            }
        };
        while !self.is_over() {
            let now = Instant::now();
            let wait = self.next_deadline().map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(now));
            match self.events.recv_timeout(wait) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("we hold a sender ourselves"),
            }
            self.handle_timeouts(Instant::now());
        }
        self.clear_up(keeper)
    }

    fn start(&mut self) -> Result<Keeper> {
        let keeper = Keeper::start(&self.options.executable, self.processes.mark(), self.directory.path())?;
        let context = Context {
            directory: &self.directory,
            token: &self.token,
            listening: self.rendezvous.listening(),
            may_lose: |_| false,
        };
        if let Err(e) = self.processes.start(&self.options, &context) {
            self.see(Sight::General(e.to_string()));
        }
        Ok(keeper)
    }

    /// What an agent on another host says.
    fn host(&mut self, index: usize, word: Word) {
        let context = Context {
            directory: &self.directory,
            token: &self.token,
            listening: self.rendezvous.listening(),
            may_lose: self.losable(),
        };
        match self.processes.heard(index, word, &self.options, &context) {
            Ok(exited) => exited.into_iter().for_each(|(rank, exit)| self.exited(rank, exit)),
            Err(e) => self.see(Sight::General(e.to_string())),
        }
    }

    fn is_over(&self) -> bool {
        let gone =
            |rank: &Rank| !self.joined.contains(rank) || self.summaries.contains_key(rank) || self.lost.contains(rank);
        let by_hand_gone = || self.options.by_hand.iter().all(gone);
        match &self.ending {
            Some(Ending { end: End::Finished | End::Preempted(_), .. }) => {
                self.settle_at.is_none() && self.processes.all_exited() && by_hand_gone()
            }
            Some(_) => self.processes.all_exited(),
            None => false,
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let ending = self.ending.as_ref().and_then(|ending| ending.terminate_at.or(ending.kill_at));
        self.settle_at.into_iter().chain(ending).chain(self.processes.next_deadline()).chain(self.next_restart()).min()
    }

    fn handle(&mut self, event: Event) {
        debug!(?event, "supervisor");
        match event {
            Event::Notice(notice) => self.notice(notice),
            Event::Exited(rank, exit) => self.exited(rank, exit),
            Event::Host(index, word) => self.host(index, word),
            Event::Signal(signal) => self.signal(signal),
            Event::Kill(rank, signal) => self.processes.signal(rank, signal),
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Joined(rank) => {
                self.joined.insert(rank);
                self.check_unjoined();
            }
            Notice::Running => self.running = true,
            Notice::Paths { rank, paths } => {
                self.tell_fallback(rank, &paths);
                self.paths.insert(rank, paths);
            }
            Notice::Waiting(verdict) => {
                self.processes.say(&format!("gradwire: job {}: {verdict}", self.options.config.name));
            }
            Notice::Timeline { rank, part } => self.timeline.add(rank, *part),
            Notice::Changed { clock, change } => {
                self.tell(&format!("{change} from clock {clock} on"));
                self.member_turned(clock, change);
            }
            Notice::Wanted(rank) => self.wanted(rank),
            Notice::Deserted => self.see(Sight::General("no worker is left".into())),
            Notice::NotFinite { clock, worker, tensor, count } => self.not_finite(clock, worker, &tensor, count),
            Notice::Failed { rank, text, elsewhere } => self.see(Sight::Reported { rank, text, elsewhere }),
            Notice::Gone(departure) => self.gone(*departure),
            Notice::CopiesLost { shard, servers } => self.copies_lost(shard, servers),
            Notice::Tenure { shard, tenure, alone } => self.tenure(shard, tenure, &alone),
            Notice::Scaling { servers, moves } => {
                self.tell(&format!("it is to have {servers} servers: {moves} shards move"))
            }
            Notice::Moved { shard, from, to } => {
                self.tell(&format!("shard {} has moved from {from} to {to}", shard.0));
            }
            Notice::Scaled { servers, .. } => self.tell(&format!("it has {servers} servers")),
            Notice::ScaleFailed(text) | Notice::Lacked(text) => self.tell(&text),
            Notice::Retired(rank) => self.retired(rank),
            Notice::StoreUnavailable(why) => self.store_unavailable(&why),
            // Of a rank that we started, its exit tells more, and when the job is ending it was told to leave.
            Notice::Lost(rank) => {
                self.lost.insert(rank);
                if self.ending.is_none() {
                    self.see(Sight::Lost(rank));
                    self.check_deserted(rank);
                }
            }
            Notice::Finished { rank, summary } => {
                self.summaries.insert(rank, summary);
                self.look_at_end_of(rank);
                self.check_finished();
            }
            Notice::TimedOut(text) | Notice::Refused(text) => self.see(Sight::General(text)),
            Notice::Checkpoint { clock, stopping } => {
                self.checkpoint = Some(clock);
                self.stopped_with_checkpoint |= stopping;
                if let Some(ending) = self.ending.as_mut().filter(|_| stopping) {
                    // From here on the ranks have nothing more to do but to leave.
                    ending.terminate_at = Some(Instant::now() + self.options.config.deadline());
                }
            }
            Notice::CheckpointFailed(text) => match self.ending {
                Some(Ending { end: End::Preempted(_), .. }) => {
                    self.see(Sight::General(format!("the checkpoint before the end failed: {text}")));
                }
                _ => warn!("a checkpoint failed: {text}"),
            },
        }
    }

    fn exited(&mut self, rank: Rank, exit: Exit) {
        self.processes.reap(rank, exit);
        let well = match rank.role {
            Role::Worker => exit == Exit::Code(0),
            // A server may leave once no worker will push any more.
            Role::Server => {
                let is_let_go = self.ending.is_some() || self.workers_reported() || self.losses.is_retired(rank);
                exit == Exit::Code(0) && is_let_go
            }
        };
        match (&self.ending, well) {
            (_, true) if !self.awaits_end_of(rank) => {
                self.check_deserted(rank);
                self.check_unjoined();
                self.check_finished();
            }
            // A worker that is stopped with a checkpoint ends as its program sees fit.
            (Some(Ending { end: End::Preempted(_), .. }), _)
                if rank.role == Role::Worker && matches!(exit, Exit::Code(_)) || self.stopped_with_checkpoint => {}
            _ if self.is_backed(rank) => self.backed_exited(rank, exit),
            _ => self.see(Sight::Exited(rank, exit)),
        }
    }

    fn workers(&self) -> impl Iterator<Item = Rank> + use<> {
        let first = (0..self.options.config.workers).map(Rank::worker);
        first.chain(self.losses.added.clone())
    }

    fn workers_reported(&self) -> bool {
        self.workers().all(|rank| self.summaries.contains_key(&rank) || self.has_departed(rank))
    }

    /// A worker's program that ends well, yet without having finished: its peers notice a broken path and can tell no more.
    fn check_deserted(&mut self, rank: Rank) {
        let left = self.lost.contains(&rank) && rank.role == Role::Worker && !self.has_departed(rank);
        if let (Some(exit @ Exit::Code(0)), true, None) = (self.processes.exit(rank), left, &self.ending) {
            self.see(Sight::Exited(rank, exit));
        }
    }

    /// A worker that ends without ever joining is an ordinary command if all do so; beside one that joined it is a mistake for
    /// which the others would wait in vain.
    fn check_unjoined(&mut self) {
        if self.ending.is_some() || !self.workers().any(|rank| self.joined.contains(&rank)) {
            return;
        }
        let ended = |rank: &Rank| !self.joined.contains(rank) && self.processes.exit(*rank).is_some();
        let left_out = |rank: &Rank| ended(rank) && !self.has_departed(*rank);
        if let Some(rank) = self.workers().find(left_out) {
            self.see(Sight::General(format!("{rank} ended before it joined the job")));
        }
    }

    pub(super) fn check_finished(&mut self) {
        let is_elsewhere = |rank: &Rank| self.options.by_hand.contains(rank) || !self.processes.has_started(*rank);
        let done = |rank: Rank| match is_elsewhere(&rank) && !self.has_departed(rank) {
            true => self.summaries.contains_key(&rank),
            false => {
                let through = !self.joined.contains(&rank) || self.summaries.contains_key(&rank);
                self.has_departed(rank) || self.processes.exit(rank).is_some() && through
            }
        };
        // Workers may be through before the clock at which a preemption was to stop them.
        let outrun = matches!(&self.ending, Some(Ending { end: End::Preempted(_), .. })) && self.workers_reported();
        if (self.ending.is_some() && !outrun) || !self.workers().all(done) {
            return;
        }
        if !self.workers_reported() {
            self.rendezvous.order(Order::Stop("all workers have ended".into()));
        }
        self.end_departed();
        self.end(End::Finished, self.patience());
    }

    /// How long servers may take to write what they have to write and to leave.
    fn patience(&self) -> Duration {
        match self.options.config.checkpoint.dir.is_some() && self.running {
            true => Duration::from_millis(self.options.config.setup_ms),
            false => self.options.config.deadline(),
        }
    }

    /// Something went wrong, or looks so.
    pub(super) fn see(&mut self, sight: Sight) {
        if matches!(&self.ending, Some(Ending { end: End::Failed(_) | End::Interrupted(_), .. })) {
            return;
        }
        let wait = if matches!(sight, Sight::Lost(_)) { SETTLE_TIME_LOST } else { SETTLE_TIME };
        self.sights.push(sight);
        self.settle(wait);
    }

    /// Gathers what is seen for a while, then looks for the cause.
    fn settle(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.settle_at = Some(self.settle_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn signal(&mut self, signal: Signal) {
        let again = self.ending.is_some();
        match signal {
            Signal::Preempt(_) if !again && self.running && self.options.config.checkpoint.dir.is_some() => {
                let Signal::Preempt(number) = signal else { return };
                self.rendezvous.order(Order::CheckpointAndStop("the job is preempted".into()));
                self.end(End::Preempted(number), self.patience());
            }
            Signal::Interrupt | Signal::Preempt(_) => {
                let number = match signal {
                    Signal::Preempt(number) => number,
                    Signal::Interrupt => signal::Signal::SIGINT as i32,
                };
                self.rendezvous.order(Order::Stop("the job was interrupted".into()));
                if let Ok(signal) = signal::Signal::try_from(number) {
                    self.processes.signal_all(signal);
                }
                match &mut self.ending {
                    // A second one ends what the first one began.
                    Some(ending) => ending.terminate_at = Some(Instant::now()),
                    None => self.end(End::Interrupted(number), self.options.grace),
                }
            }
        }
    }

    /// The job begins to end; after `patience` by force.
    fn end(&mut self, end: End, patience: Duration) {
        self.ending = Some(Ending { end, terminate_at: Some(Instant::now() + patience), kill_at: None });
    }

    fn handle_timeouts(&mut self, now: Instant) {
        if let Some(text) = self.processes.check_reached(now) {
            self.see(Sight::General(text));
        }
        if self.settle_at.is_some_and(|at| at <= now) {
            self.settle_at = None;
            self.tell_copies_lost();
            if let Some(cause) = cause::find(&self.sights) {
                self.rendezvous.order(Order::Fail(cause.text.clone()));
                self.end(End::Failed(cause), HEED_TIME);
            }
        }
        self.restart(now);
        let Some(ending) = &mut self.ending else { return };
        if ending.terminate_at.is_some_and(|at| at <= now) {
            ending.terminate_at = None;
            ending.kill_at = Some(now + self.options.grace);
            if ending.end == End::Finished {
                let late = self.processes.alive().map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ");
                let text = format!("{late} did not end when all workers had; it was ended by force");
                ending.end = End::Failed(cause::Cause { text, code: 1 });
            }
            self.processes.signal_all(signal::Signal::SIGTERM);
        } else if ending.kill_at.is_some_and(|at| at <= now) {
            ending.kill_at = Some(now + self.options.grace);
            self.processes.signal_all(signal::Signal::SIGKILL);
        }
    }

    /// Leaves nothing behind and says how it went.
    fn clear_up(mut self, keeper: Option<Keeper>) -> Outcome {
        let left = self.processes.clear_up(SWEEP_TIME);
        if left > 0 {
            warn!("{left} processes of the job could not be killed");
        }
        drop(self.rendezvous); // which completes the last checkpoint first
        let last = self.events.try_iter().filter_map(|event| match event {
            Event::Notice(Notice::Checkpoint { clock, .. }) => Some(clock),
            _ => None,
        });
        self.checkpoint = last.last().or(self.checkpoint);
        if let Some(path) = &self.options.timeline
            && let Err(error) = self.timeline.write(path, &self.options.config.name)
        {
            warn!("the timeline is lost: {error}");
        }
        self.directory.remove();
        if let Some(keeper) = keeper {
            keeper.dismiss();
        }
        let missing = self.losses.missing;
        let (code, reason) = match self.ending.map(|ending| ending.end) {
            Some(End::Finished) if !missing.is_empty() => (EXIT_WITHOUT_WORKERS, None),
            None | Some(End::Finished) => (0, None),
            Some(End::Failed(cause)) => (cause.code, Some(cause.text)),
            Some(End::Preempted(_)) if self.stopped_with_checkpoint => {
                let clock = self.checkpoint.unwrap_or_default();
                (
                    EXIT_PREEMPTED,
                    Some(format!("preempted; the checkpoint of clock {clock} is complete, go on with --resume")),
                )
            }
            Some(End::Preempted(number)) => {
                (shell_code(number), Some("ended by a signal before its checkpoint was complete".into()))
            }
            Some(End::Interrupted(number)) => (shell_code(number), Some("ended by a signal".into())),
        };
        let mut paths = BTreeMap::new();
        for choice in self.paths.into_values().flatten() {
            *paths.entry(choice.fabric).or_default() += 1;
        }
        Outcome {
            code,
            reason,
            checkpoint: self.checkpoint,
            paths,
            not_finite: self.not_finite,
            missing,
            summaries: self.summaries,
        }
    }
}

fn shell_code(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(1)
}
