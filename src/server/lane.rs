//! A shard's thread: pinned to its core, it turns the event loop, sleeps when there is nothing to do, follows the launcher's
//! commands and hands snapshots to a writer.
//!
//! Invariant: nothing here blocks for longer than the event loop's next deadline; files are written by another thread.

use std::{
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{EventLoop, NotFinite, Progress, Snapshot, node::Plan};
use crate::{
    Error, Result,
    checkpoint::{self, ChunkState},
    layout::Layout,
    session::{Command, Commands, Offer, PathCounts, Report, Reporter},
    transport::{Armed, Fabrics, Idle, Waiter, Wakeup},
    types::{Clock, PeerId, ShardId},
};

/// How often a shard reports how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How long workers may take to leave before the servers do.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// What a lane's thread works with.
pub(super) struct Lane {
    plan: Arc<Plan>,
    shard: ShardId,
    lane: u16,
    event_loop: EventLoop<Fabrics>,
    reporter: Reporter,
    commands: CommandWakeup,
    writer: Option<Writer>,
    /// The end of the job, once it is in sight: its clock, and whether the state is to be stored.
    end: Option<(Clock, bool)>,
    /// The checkpoint with which the job ends is complete: workers are given until then to leave first.
    leaving: Option<(Clock, Instant)>,
    reported: (Instant, Clock),
    /// What the launcher has been told of the paths.
    counted: PathCounts,
    /// When the launcher was last told what is waited for; `None` if it has asked since.
    told: Option<Instant>,
}

/// The launcher's commands as something that wakes a sleeping thread.
struct CommandWakeup(Commands);

impl Wakeup for CommandWakeup {
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

impl Lane {
    /// A lane whose event loop is ready to be connected.
    pub fn new(
        plan: Arc<Plan>,
        shard: ShardId,
        event_loop: EventLoop<Fabrics>,
        reporter: Reporter,
        commands: Commands,
    ) -> Lane {
        let writer =
            plan.checkpoint_dir.clone().map(|dir| Writer::new(dir, shard, plan.layout.clone(), reporter.clone()));
        let reported = (Instant::now(), plan.start_clock);
        Lane {
            lane: shard.0 % plan.shards_per_server,
            plan,
            shard,
            event_loop,
            reporter,
            commands: CommandWakeup(commands),
            writer,
            end: None,
            leaving: None,
            told: Some(reported.0),
            counted: PathCounts::default(),
            reported,
        }
    }

    /// What each worker, and each lane with which this one decides, needs to reach this lane.
    pub fn offers(&mut self, me: PeerId) -> Result<Vec<Offer>> {
        let decision = self.plan.decision();
        let lanes = decision.iter().flat_map(|decision| decision.peers(&self.plan.layout, self.shard));
        let peers = (0..self.plan.workers).map(PeerId::worker).chain(lanes);
        peers.map(|peer| Ok((me, peer, self.event_loop.paths().offer(peer)?))).collect()
    }

    /// Serves until the job ends.
    pub fn run(mut self, offers: Vec<Offer>) -> Result<()> {
        let deadline = Instant::now() + self.plan.connect_time;
        for (peer, _, endpoint) in offers {
            self.event_loop.connect(peer, &endpoint, deadline)?;
        }
        self.event_loop.paths().note_fallbacks();
        let waiter = Waiter::new()?;
        let mut idle = Idle::default();
        loop {
            while let Some(command) = self.commands.0.poll()? {
                if self.obey(command)? {
                    return Ok(());
                }
            }
            let now = Instant::now();
            let progress = match (self.event_loop.turn(now), self.leaving) {
                (Ok(_), Some((clock, until))) if now >= until => return Err(Error::Preempted { clock }),
                (Err(_), Some((clock, _))) => return Err(Error::Preempted { clock }),
                (turned, _) => turned?,
            };
            self.store_snapshots();
            while let Some(NotFinite { clock, worker, tensor }) = self.event_loop.take_not_finite() {
                self.reporter.report(Report::NotFinite { clock, worker, tensor })?;
            }
            self.report_progress(now)?;
            self.report_paths()?;
            self.report_waits(now)?;
            if self.event_loop.is_done() && self.end.is_some() {
                return self.finish();
            }
            if progress != Progress::Idle {
                idle.busy(now);
            } else if !idle.may_spin(now) {
                let until = self.next_deadline();
                match self.event_loop.wakeups() {
                    (transport, None) => waiter.wait_from(now, &mut [transport, &mut self.commands], until)?,
                    (transport, Some(device)) => {
                        waiter.wait_from(now, &mut [transport, &mut self.commands, device], until)?
                    }
                };
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let (when, clock) = self.reported;
        let progress = (self.event_loop.shard().clock_done() > clock).then_some(when + PROGRESS_EVERY);
        let leaving = self.leaving.map(|(_, until)| until);
        self.event_loop.next_deadline().into_iter().chain(progress).chain(leaving).min()
    }

    /// Follows a command; `true` if it is to leave at once.
    fn obey(&mut self, command: Command) -> Result<bool> {
        match command {
            Command::Checkpoint { clock } => self.request_checkpoint(clock, false)?,
            Command::Stop { checkpoint: true, clock: Some(clock), .. } => self.request_checkpoint(clock, true)?,
            Command::Stop { .. } => return Ok(true),
            Command::Leave { clock } => self.leaving = Some((clock, Instant::now() + LEAVE_TIME)),
            Command::TellWaits => self.told = None,
            Command::Prepare { number, clock } => {
                let from = self.event_loop.prepare_change(number, clock);
                self.reporter.report(Report::Prepared { number, lane: self.lane, from })?;
            }
            Command::Change { number, change } => self.event_loop.settle_change(number, change)?,
            Command::Rebuild { lane, proposal } if lane == self.lane => {
                self.event_loop.paths().proposed(proposal, Instant::now());
            }
            Command::Rebuild { .. } => {} // another lane's
            Command::Tenure { .. } | Command::Gone { .. } => {}
            Command::End { clock, checkpoint } => self.end = Some((clock, checkpoint)),
            Command::JobFailed { text } => return Err(Error::JobFailed(text)),
        }
        Ok(false)
    }

    fn request_checkpoint(&mut self, clock: Clock, stop: bool) -> Result<()> {
        match self.event_loop.request_checkpoint(clock, stop) {
            Ok(()) => Ok(()),
            Err(reached) => self.reporter.report(Report::CheckpointLate { clock, reached }),
        }
    }

    fn store_snapshots(&mut self) {
        while let Some(snapshot) = self.event_loop.take_snapshot() {
            match &self.writer {
                Some(writer) => writer.write(snapshot),
                None => tracing::warn!("shard {} has no directory for its checkpoint", self.shard.0),
            }
        }
    }

    fn report_progress(&mut self, now: Instant) -> Result<()> {
        let (when, before) = self.reported;
        let clock = self.event_loop.shard().clock_done();
        if clock > before && now >= when + PROGRESS_EVERY {
            self.reported = (now, clock);
            self.reporter.report(Report::Progress { clock })?;
            self.reporter.report(Report::sent())?;
        }
        Ok(())
    }

    /// Passes on what broken paths need of the launcher, and what became of them.
    fn report_paths(&mut self) -> Result<()> {
        let (lane, reporter) = (self.lane, &self.reporter);
        let paths = self.event_loop.paths();
        for proposal in paths.take_proposals() {
            reporter.report(Report::Rebuild { lane, proposal })?;
        }
        let counts = paths.counts();
        if counts == self.counted {
            return Ok(());
        }
        self.counted = counts;
        reporter.report(Report::PathCounts { lane, counts })
    }

    /// Says what is waited for: when the launcher asks, and with every heartbeat while nothing has moved for too long.
    fn report_waits(&mut self, now: Instant) -> Result<()> {
        let still = self.event_loop.stillness(now) >= self.plan.warn;
        let due = |told: Instant| still && now >= told + self.plan.heartbeat;
        if !self.told.is_none_or(due) {
            return Ok(());
        }
        let asked = self.told.replace(now).is_none();
        let waits = self.event_loop.waits(now);
        let lane = self.lane;
        if asked || !waits.is_empty() { self.reporter.report(Report::Waits { lane, waits }) } else { Ok(()) }
    }

    /// All workers have finished and everything has been applied.
    fn finish(mut self) -> Result<()> {
        if let Some((clock, true)) = self.end
            && let Some(writer) = &self.writer
            && self.event_loop.shard().versions().next().is_some()
        {
            writer.write(self.event_loop.snapshot(clock)?);
        }
        match self.writer.take() {
            Some(writer) => writer.join(),
            None => Ok(()),
        }
    }
}

/// Writes a shard's part of checkpoints, one after the other, and reports each to the launcher.
struct Writer {
    snapshots: Sender<Snapshot>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    fn new(dir: PathBuf, shard: ShardId, layout: Arc<Layout>, reporter: Reporter) -> Writer {
        let (snapshots, incoming) = channel();
        let write = move || write_all(&dir, shard, &layout, &reporter, &incoming);
        let name = format!("checkpoint-{}", shard.0);
        let thread = std::thread::Builder::new().name(name).spawn(write).expect("a thread for checkpoints");
        Writer { snapshots, thread }
    }

    fn write(&self, snapshot: Snapshot) {
        // The thread ends early only when the launcher is gone, which the lane learns from its commands.
        let _ = self.snapshots.send(snapshot);
    }

    /// Waits until everything is on the disk.
    fn join(self) -> Result<()> {
        drop(self.snapshots);
        self.thread.join().unwrap_or_else(|_| Err(Error::JobFailed("the checkpoint thread panicked".into())))
    }
}

fn write_all(
    dir: &std::path::Path,
    shard: ShardId,
    layout: &Layout,
    reporter: &Reporter,
    incoming: &Receiver<Snapshot>,
) -> Result<()> {
    let mut stored: Option<Clock> = None;
    while let Ok(snapshot) = incoming.recv() {
        let Snapshot { clock, chunks, rates, live } = snapshot;
        if stored == Some(clock) {
            continue; // the end came at a clock that had been stored already
        }
        debug_assert!(chunks.iter().all(|image| layout.chunk(image.chunk).shard == shard));
        let states = chunks.iter().map(|image| ChunkState {
            chunk: image.chunk,
            version: image.version,
            steps: image.steps,
            master: &image.master,
            first: &image.first,
            second: &image.second,
        });
        let info = match checkpoint::write_shard(dir, clock, shard, states) {
            Ok(file) => json!({ "file": file, "learning_rate": rates, "live": live }),
            // Training goes on; whoever asked for the checkpoint learns why there is none.
            Err(error) => json!({ "error": error.to_string() }),
        };
        stored = Some(clock);
        reporter.report(Report::CheckpointWritten { shard, clock, info })?;
    }
    Ok(())
}
