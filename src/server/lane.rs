//! A shard's thread: pinned to its core, it turns the event loop, sleeps when there is nothing to do, follows the launcher's
//! commands and hands snapshots to a writer.
//!
//! Invariant: nothing here blocks for longer than the event loop's next deadline; files are written by another thread.

use std::{
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{EventLoop, LanePart, NotFinite, Progress, Replica, Standing, node::Plan, writer::Writer};
use crate::{
    Error, Result,
    session::{Command, Commands, Offer, PathCounts, Report, Reporter},
    transport::{Armed, Fabrics, Idle, Waiter, WakeHandle, Wakeup},
    types::{Clock, PeerId, ShardId},
};

/// How often a shard reports how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How long workers may take to leave before the servers do.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// How a lane ended without an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// With the job.
    Done,
    /// What it had is of no use: the lane is to begin anew, as a backup that has nothing, if it is to follow at all.
    BeginsAnew,
    /// It cannot follow, and has nothing yet that anybody counts on.
    Declines(String),
}

/// What follows from a command.
enum Obeyed {
    Stays,
    Leaves,
    BeginsAnew,
}

/// What a lane's thread works with.
pub(super) struct Lane {
    plan: Arc<Plan>,
    shard: ShardId,
    lane: u16,
    replica: Replica<Fabrics>,
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
    /// Whether it has been said that training waits for the disk.
    told_disk: bool,
    /// When the launcher was last told what is waited for; `None` if it has asked since.
    told: Option<Instant>,
}

/// The launcher's commands as something that wakes a sleeping thread.
pub(super) struct CommandWakeup(pub Commands);

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
    /// A lane that is ready to be connected.
    pub fn new(
        plan: Arc<Plan>,
        (me, shard): (PeerId, ShardId),
        replica: Replica<Fabrics>,
        reporter: Reporter,
        commands: Commands,
    ) -> Lane {
        let reported = (Instant::now(), plan.start_clock);
        Lane {
            lane: me.lane,
            plan,
            shard,
            replica,
            reporter,
            commands: CommandWakeup(commands),
            writer: None,
            end: None,
            leaving: None,
            told_disk: false,
            told: Some(reported.0),
            counted: PathCounts::default(),
            reported,
        }
    }

    /// What each worker, and each lane with which this one has to do, needs to reach this lane; a lane that follows has to do with its
    /// primary alone.
    pub fn offers(&mut self, me: PeerId) -> Result<Vec<Offer>> {
        let peers: Vec<PeerId> = match self.replica.part() {
            LanePart::Following(standby) => vec![standby.primary()],
            LanePart::Serving(event_loop) => {
                let decision = self.plan.decision();
                let lanes = decision.iter().flat_map(|decision| decision.peers(&self.plan.layout, self.shard));
                let workers = (0..self.plan.workers).map(PeerId::worker);
                workers.chain(lanes).chain(event_loop.shard().backup()).collect()
            }
        };
        peers.into_iter().map(|peer| Ok((me, peer, self.replica.paths().offer(peer)?))).collect()
    }

    /// Connects to those who have offered.
    pub fn connect(&mut self, offers: Vec<Offer>) -> Result<()> {
        let deadline = Instant::now() + self.plan.connect_time;
        for (peer, _, endpoint) in offers {
            self.replica.paths().connect(peer, &endpoint, deadline)?;
        }
        self.replica.paths().note_fallbacks();
        Ok(())
    }

    /// Serves, or follows, until the job ends or what this lane has is of no use.
    pub fn run(mut self) -> Result<Ended> {
        let waiter = Waiter::new()?;
        self.writer = self.plan.checkpoint_dir.clone().map(|dir| self.writer(dir, waiter.handle()));
        let mut idle = Idle::default();
        loop {
            while let Some(command) = self.commands.0.poll()? {
                match self.obey(command)? {
                    Obeyed::Stays => {}
                    Obeyed::Leaves => return Ok(Ended::Done),
                    Obeyed::BeginsAnew => return Ok(Ended::BeginsAnew),
                }
            }
            self.take_stored();
            let now = Instant::now();
            let progress = match (self.replica.turn(now), self.leaving) {
                (Ok(_), Some((clock, until))) if now >= until => return Err(Error::Preempted { clock }),
                (Err(_), Some((clock, _))) => return Err(Error::Preempted { clock }),
                (turned, _) => turned?,
            };
            self.store_snapshots();
            while let Some(found) = self.replica.serves().and_then(EventLoop::take_not_finite) {
                let NotFinite { clock, worker, tensor } = found;
                self.reporter.report(Report::NotFinite { clock, worker, tensor })?;
            }
            if self.replica.is_useless() {
                return Ok(Ended::BeginsAnew);
            }
            if let Some((epoch, claim)) = self.replica.take_claim(now) {
                let (lane, shard) = (self.lane, self.shard);
                self.reporter.report(Report::Claim { lane, shard, epoch, claim })?;
            }
            self.report_progress(now)?;
            self.report_members()?;
            self.report_paths()?;
            self.report_waits(now)?;
            if self.end.is_some() && self.is_over() {
                return self.finish();
            }
            if progress != Progress::Idle {
                idle.busy(now);
            } else if !idle.may_spin(now) {
                let until = self.next_deadline();
                match self.replica.wakeups() {
                    (transport, None) => waiter.wait_from(now, &mut [transport, &mut self.commands], until)?,
                    (transport, Some(device)) => {
                        waiter.wait_from(now, &mut [transport, &mut self.commands, device], until)?
                    }
                };
            }
        }
    }

    /// Whether all workers have finished and everything has been applied, or the lane that serves needs this one no more.
    fn is_over(&mut self) -> bool {
        match self.replica.part() {
            // Whoever serves next stores what is to be stored at the end.
            LanePart::Serving(event_loop) => event_loop.is_done() && !event_loop.shard().is_handing_over(),
            LanePart::Following(standby) => standby.is_dismissed() || !standby.is_paired(),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let (when, clock) = self.reported;
        let served = self.replica.served();
        let progress = served.filter(|serving| serving.shard().clock_done() > clock).map(|_| when + PROGRESS_EVERY);
        let leaving = self.leaving.map(|(_, until)| until);
        self.replica.next_deadline().into_iter().chain(progress).chain(leaving).min()
    }

    /// Follows a command.
    fn obey(&mut self, command: Command) -> Result<Obeyed> {
        match command {
            Command::Checkpoint { clock } => self.request_checkpoint(clock, false)?,
            Command::Stop { checkpoint: true, clock: Some(clock), .. } => self.request_checkpoint(clock, true)?,
            Command::Stop { .. } => return Ok(Obeyed::Leaves),
            Command::Leave { clock } => self.leaving = Some((clock, Instant::now() + LEAVE_TIME)),
            Command::TellWaits => self.told = None,
            Command::Prepare { number, clock, change } => {
                if let Some(from) = self.replica.prepare_change(number, clock, change) {
                    self.reporter.report(Report::Prepared { number, lane: self.lane, from })?;
                }
            }
            Command::Change { number, change } => {
                self.replica.settle_change(number, change)?;
            }
            Command::Rebuild { lane, proposal } if lane == self.lane => {
                self.replica.proposed(proposal, Instant::now());
            }
            Command::Rebuild { .. } => {} // another lane's
            Command::Tenure { shard, tenure } if shard == self.shard && self.plan.has_tenures => {
                match self.replica.set_tenure(tenure, Instant::now())? {
                    Standing::Stays => {}
                    Standing::Serves => tracing::warn!("shard {} is served here from now on", shard.0),
                    Standing::BeginsAnew => return Ok(Obeyed::BeginsAnew),
                }
            }
            Command::Gone { rank } => self.replica.handle_gone(rank),
            Command::Tenure { shard, tenure } => self.replica.set_lane(shard, tenure.primary, Instant::now()),
            Command::Retire => {} // the process', once it has no lane
            Command::End { clock, checkpoint } => self.end = Some((clock, checkpoint)),
            Command::JobFailed { text } => return Err(Error::JobFailed(text)),
        }
        Ok(Obeyed::Stays)
    }

    fn request_checkpoint(&mut self, clock: Clock, stop: bool) -> Result<()> {
        match self.replica.serves().map(|serving| serving.request_checkpoint(clock, stop)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(reached)) => self.reporter.report(Report::CheckpointLate { clock, reached }),
        }
    }

    fn writer(&self, dir: PathBuf, wake: WakeHandle) -> Writer {
        let incremental = self.plan.config.checkpoint.incremental;
        Writer::new((dir, incremental), self.shard, self.plan.layout.clone(), self.reporter.clone(), wake)
    }

    /// Takes back the memory of snapshots that are on the disk, or could not be written.
    fn take_stored(&mut self) {
        while let Some(chunks) = self.writer.as_ref().and_then(Writer::take_stored) {
            if let Some(serving) = self.replica.serves() {
                serving.handle_stored(chunks);
            }
        }
        let waits = self.replica.served().is_some_and(EventLoop::waits_for_disk);
        if waits && !std::mem::replace(&mut self.told_disk, true) {
            let shard = self.shard.0;
            tracing::warn!("shard {shard} waits for its last checkpoint to be written before it can take the next");
        }
    }

    fn store_snapshots(&mut self) {
        while let Some(snapshot) = self.replica.serves().and_then(EventLoop::take_snapshot) {
            match &self.writer {
                Some(writer) => writer.write(snapshot),
                None => tracing::warn!("shard {} has no directory for its checkpoint", self.shard.0),
            }
        }
    }

    fn report_progress(&mut self, now: Instant) -> Result<()> {
        let (when, before) = self.reported;
        let Some(clock) = self.replica.served().map(|serving| serving.shard().clock_done()) else { return Ok(()) };
        if clock > before && now >= when + PROGRESS_EVERY {
            self.reported = (now, clock);
            self.reporter.report(Report::Progress { clock })?;
            self.reporter.report(Report::sent())?;
        }
        Ok(())
    }

    /// Says whose paths are lost, and what of them steps had to do without.
    fn report_members(&mut self) -> Result<()> {
        let Some(serving) = self.replica.serves() else { return Ok(()) };
        let lacked = serving.take_lacked();
        for (worker, text) in serving.take_losses() {
            self.reporter.report(Report::WorkerLost { lane: self.lane, worker, text })?;
        }
        for same in lacked.chunk_by(|one, other| (one.0, one.2) == (other.0, other.2)) {
            let ((worker, _, clock), chunks) = (same[0], same.len() as u64);
            self.reporter.report(Report::Lacked { worker, clock, chunks })?;
        }
        Ok(())
    }

    /// Passes on what broken paths need of the launcher, and what became of them.
    fn report_paths(&mut self) -> Result<()> {
        let (lane, reporter) = (self.lane, &self.reporter);
        let paths = self.replica.paths();
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
        let still = self.replica.stillness(now) >= self.plan.warn;
        let due = |told: Instant| still && now >= told + self.plan.heartbeat;
        if !self.told.is_none_or(due) {
            return Ok(());
        }
        let asked = self.told.replace(now).is_none();
        let waits = self.replica.served().map(|serving| serving.waits(now)).unwrap_or_default();
        let lane = self.lane;
        if asked || !waits.is_empty() { self.reporter.report(Report::Waits { lane, waits }) } else { Ok(()) }
    }

    /// The end: whoever serves stores what is to be stored, and lets its backup go.
    fn finish(mut self) -> Result<Ended> {
        let writes = self.end.is_some_and(|(_, checkpoint)| checkpoint);
        if let Some(serving) = self.replica.serves()
            && let (Some((clock, _)), Some(writer)) = (self.end.filter(|_| writes), &self.writer)
            && serving.shard().versions().next().is_some()
        {
            writer.settle(); // lest there be two copies of the state
            writer.write(serving.snapshot(clock)?);
        }
        let written = self.writer.take().map_or(Ok(()), Writer::join);
        if let Some(serving) = self.replica.serves() {
            serving.dismiss_backup()?;
        }
        written.map(|()| Ended::Done)
    }
}
