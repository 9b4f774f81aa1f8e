//! The event loop around a shard: completions in, effects out, computing in between, in tiles or on a GPU. It never sleeps and
//! reads no clock: whoever drives it (the shard's thread, or the simulator) says what time it is and decides when to wait.
//!
//! Invariant: every effect of the shard is carried out in order, and computing never keeps the transport waiting for longer than
//! a tile, or than it takes to hand jobs to a GPU.

mod members;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use members::Arrivals;

use super::{
    ChunkImage, ChunkView, Effect, LiveState, Memory, MirrorConfig, NotFinite, Shard, ShardConfig,
    computing::Computing, landing::Landing, room::Room,
};
use crate::{
    Error, Result,
    layout::Layout,
    mem::RegionOptions,
    observe::Queue,
    optim::{LearningRates, LiveChange},
    session::{Change, Claim, Paths, Tenure, WAITS_MAX, Wait},
    transport::{Completion, Endpoint, Transport, Wakeup, WorkRequest},
    types::{ChunkId, Clock, PeerId, Role, Version},
    wire::{Attachment, Note, NoteKind},
};

/// What a turn has done, and whether there is more to do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Call `turn` again.
    Busy,
    /// Something had come and has been dealt with.
    Moved,
    /// Nothing to do until a completion or a deadline.
    Idle,
}

/// The state of a shard between two clocks, copied for a checkpoint.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The clock.
    pub clock: Clock,
    /// The chunks, in shard order.
    pub chunks: Vec<ChunkImage>,
    /// By chunk: how many clocks of each contributor are in it; nothing under `bsp`, where these are the checkpoint's.
    pub clocks: Vec<Vec<Clock>>,
    /// The learning rates with their live changes.
    pub rates: LearningRates,
    /// What else has changed since the job began.
    pub live: LiveState,
}

/// One shard at work over a transport.
pub struct EventLoop<T> {
    paths: Paths<T>,
    shard: Shard,
    computing: Computing,
    landing: Landing,
    /// By worker: the fabric of its path, and what it was told of its slots.
    landings: BTreeMap<u16, (&'static str, Attachment)>,
    slots: u32,
    completions: Vec<Completion>,
    /// The clock whose state is to be copied as soon as there is memory for it; computing waits until then.
    wanted: Option<Clock>,
    /// What is being copied, but for the chunks.
    copying: Option<Snapshot>,
    /// The memory of a copy, unless it is in use: there is one, however slow the disk is.
    spare: Option<Vec<ChunkImage>>,
    snapshots: VecDeque<Snapshot>,
    me: PeerId,
    /// When something came or was computed last.
    moved_at: Option<Instant>,
    /// Workers whose paths are lost, and why.
    losses: Vec<(u16, String)>,
    /// How long a backup may be silent.
    suspicion: Duration,
    /// Workers of which something is awaited have paths to build that this lane has never had, and until when they may.
    arrivals: Arrivals,
}

impl<T: Transport> EventLoop<T> {
    /// Allocates and registers the shard's landing and reply memory.
    pub fn new(
        config: ShardConfig,
        layout: Arc<Layout>,
        mut memory: Memory,
        mut paths: Paths<T>,
        region: &RegionOptions,
        versions: Option<&[Version]>,
    ) -> Result<EventLoop<T>> {
        let room = Room::allocate(&config, &layout, &mut memory, &mut paths, region)?;
        EventLoop::in_room(room, config, layout, memory, paths, versions)
    }

    /// [`EventLoop::new`] with memory that is there already.
    pub(super) fn in_room(
        room: Room,
        config: ShardConfig,
        layout: Arc<Layout>,
        memory: Memory,
        mut paths: Paths<T>,
        versions: Option<&[Version]>,
    ) -> Result<EventLoop<T>> {
        let Room { landing, pool, sums } = room;
        let suspicion = config.mirror.as_ref().map_or(Duration::ZERO, |mirror| mirror.suspicion);
        if let Some(MirrorConfig { peer: Some(peer), is_paired, .. }) = config.mirror {
            paths.suspect_after(peer, suspicion);
            if !is_paired {
                paths.set_aside(peer); // it will come of its own accord
            }
        }
        Ok(EventLoop {
            me: config.me,
            suspicion,
            slots: config.slots,
            shard: Shard::new(config, layout, pool, sums, versions),
            paths,
            computing: Computing::new(memory),
            landing,
            landings: BTreeMap::new(),
            completions: Vec::new(),
            wanted: None,
            copying: None,
            spare: Some(Vec::new()),
            snapshots: VecDeque::new(),
            moved_at: None,
            losses: Vec::new(),
            arrivals: Arrivals::default(),
        })
    }

    /// The transport and what belongs to it.
    pub fn paths(&mut self) -> &mut Paths<T> {
        &mut self.paths
    }

    /// What wakes whoever sleeps while there is nothing to do: the transport, and a GPU's completions.
    pub fn wakeups(&mut self) -> (&mut dyn Wakeup, Option<&mut dyn Wakeup>)
    where
        T: Wakeup,
    {
        (self.paths.transport(), self.computing.memory.wakeup())
    }

    /// The protocol's state, to be looked at.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// See [`Shard::resume_clocks`].
    pub fn resume_clocks(&mut self, clocks: &[Vec<Clock>]) {
        self.shard.resume_clocks(clocks);
    }

    /// Begins the path to a worker, or to another shard's lane.
    pub fn connect(&mut self, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<()> {
        self.paths.connect(peer, remote, deadline)
    }

    /// Does what can be done now.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] or [`Error::Protocol`] with what was awaited, when a worker is lost before it has finished;
    /// [`Error::Gpu`] when the shard's device fails.
    pub fn turn(&mut self, now: Instant) -> Result<Progress> {
        let mut completions = std::mem::take(&mut self.completions);
        self.paths.poll(now, &mut completions)?;
        let mut moved = false;
        for completion in completions.drain(..) {
            moved |= matches!(completion, Completion::Arrived { .. });
            self.handle(now, completion)?;
        }
        self.completions = completions;
        self.shard.handle_timeout(now);
        self.miss_workers(now)?;
        self.carry_out()?;
        moved |= self.compute()?;
        self.carry_out()?;
        self.paths.flush()?;
        if moved || self.moved_at.is_none() {
            self.moved_at = Some(now);
        }
        let progress = self.computing.progress(moved);
        if let Some(recorder) = self.paths.recorder() {
            recorder.idles(progress == Progress::Idle, now);
            self.sample(now);
        }
        Ok(progress)
    }

    /// How long nothing has come and nothing has been computed.
    pub fn stillness(&self, now: Instant) -> Duration {
        self.moved_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    /// What the shard waits for, since it moved last.
    pub fn waits(&self, now: Instant) -> Vec<Wait> {
        let since = self.stillness(now);
        let lacking = self.shard.waits().into_iter().take(WAITS_MAX);
        lacking.map(|(of, owed, chunk, clock)| self.paths.wait(of, owed, (chunk, clock), since, now)).collect()
    }

    /// When `turn` wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let (sample, arrivals) = (self.paths.next_sample(), self.arrivals.until());
        [self.paths.next_deadline(), self.shard.next_deadline(), sample, arrivals].into_iter().flatten().min()
    }

    /// Whether every worker has finished and everything has been applied.
    pub fn is_done(&self) -> bool {
        self.shard.is_done() && self.computing.is_settled() && self.wanted.is_none()
    }

    /// See [`Shard::request_checkpoint`].
    pub fn request_checkpoint(&mut self, clock: Clock, stop: bool) -> Result<(), Clock> {
        self.shard.request_checkpoint(clock, stop)
    }

    /// A change that was prepared takes effect from a clock on, or, without one, is given up.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for values that the job cannot take; whoever asks for a change has checked them.
    pub fn settle_change(&mut self, number: u64, change: Option<(Clock, Change)>) -> Result<()> {
        match change {
            Some((clock, Change::Settings(change))) => self.change_from(clock, change)?,
            Some((clock, change)) => self.turn_member(number, clock, change),
            None => {}
        }
        self.shard.settle_change(number);
        Ok(())
    }

    /// What the shard goes by changes from a clock on that has not begun.
    ///
    /// # Errors
    ///
    /// As [`EventLoop::settle_change`].
    pub fn change_from(&mut self, clock: Clock, change: LiveChange) -> Result<()> {
        let done = self.shard.clock_done();
        if let Some(rate) = change.learning_rate {
            self.computing.memory.set_learning_rate(rate, clock, done)?;
        }
        if let Some(decay) = change.weight_decay {
            self.computing.memory.set_weight_decay(decay, clock, done)?;
        }
        if let Some(limit) = change.clip_norm {
            self.shard.limit_norm(limit, clock);
        }
        if let Some(bound) = change.staleness {
            self.shard.bound_staleness(bound, clock);
        }
        self.shard.mirror_change(clock, change);
        Ok(())
    }

    /// The backup is gone: nobody is told anything more before the store has said that this lane serves alone.
    pub fn lose_backup(&mut self) {
        let Some(backup) = self.shard.backup() else { return };
        self.paths.set_aside(backup);
        self.shard.lose_backup();
    }

    /// The job ends: the backup, if there is one, may go.
    pub fn dismiss_backup(&mut self) -> Result<()> {
        let Some(peer) = self.shard.backup() else { return Ok(()) };
        let note = Note::new(NoteKind::Goodbye);
        self.paths.post(WorkRequest { id: 0, peer, note, payload: None });
        self.paths.flush()
    }

    /// What is to be asked of the store.
    pub fn take_claim(&mut self) -> Option<Claim> {
        self.shard.take_claim(self.wanted.is_some() || self.copying.is_some() || self.spare.is_none())
    }

    /// The store's word, of a tenure by which this lane serves: who follows, and whether that one counts. `is_new`: it is another one than
    /// before.
    pub fn set_tenure(&mut self, tenure: Tenure, is_new: bool) {
        self.shard.set_paired(tenure.is_paired, is_new);
        let before = self.shard.backup();
        if before == tenure.other {
            return;
        }
        before.into_iter().for_each(|before| self.paths.set_aside(before));
        self.shard.set_backup(tenure.other);
        if let Some(peer) = tenure.other {
            self.paths.set_aside(peer); // it will come of its own accord
            self.paths.suspect_after(peer, self.suspicion);
        }
    }

    /// The oldest snapshot that nobody has taken.
    pub fn take_snapshot(&mut self) -> Option<Snapshot> {
        self.snapshots.pop_front()
    }

    /// A snapshot has been stored: its memory is there for the next.
    pub fn handle_stored(&mut self, chunks: Vec<ChunkImage>) {
        self.spare = Some(chunks);
    }

    /// Whether a snapshot waits for the one before it to be stored.
    pub fn waits_for_disk(&self) -> bool {
        self.wanted.is_some() && self.spare.is_none() && self.copying.is_none()
    }

    /// See [`Memory::take_not_finite`].
    pub fn take_not_finite(&mut self) -> Option<NotFinite> {
        self.computing.memory.take_not_finite()
    }

    /// The state as it is now, copied while the caller waits; for a loop that is done and copies nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] when the shard's device fails.
    pub fn snapshot(&mut self, clock: Clock) -> Result<Snapshot> {
        let chunks = self.computing.memory.images(self.shard.versions())?;
        Ok(Snapshot { chunks, ..self.without_chunks(clock) })
    }

    /// A chunk's state where it lies; `None` while something is computed.
    pub fn view(&self, chunk: ChunkId) -> Option<ChunkView<'_>> {
        self.computing.memory.view(chunk, self.shard.clock_of(chunk))
    }

    fn handle(&mut self, now: Instant, completion: Completion) -> Result<()> {
        match completion {
            Completion::Connected { peer } => self.attach(peer),
            Completion::Sent { id, source } => {
                self.shard.handle_sent(id, source);
                Ok(())
            }
            Completion::Failed { id, source, error } => {
                self.shard.handle_sent(id, source);
                // A broken path's `Broken` follows and says more; anything else would be waited for in vain.
                if matches!(error, Error::Broken { .. }) { Ok(()) } else { Err(error) }
            }
            Completion::Released { .. } => Ok(()), // the paths keep them
            Completion::Arrived { from, note, lease } => {
                if let Err(error) = self.shard.handle_arrived(now, from, note, lease) {
                    self.paths.fence(from);
                    return self.lost(from, error);
                }
                if self.shard.has_parted(from) {
                    self.paths.release(from);
                }
                Ok(())
            }
            Completion::Broken { peer, error } => self.lost(peer, error),
        }
    }

    /// A worker is connected, for the first time or again: its landing slots are opened and it is told of them. Another shard is told
    /// what it may lack.
    fn attach(&mut self, peer: PeerId) -> Result<()> {
        let is_rebuilt = self.paths.generation(peer) > 0;
        if self.shard.backup() == Some(peer) {
            self.shard.detach_backup(); // until it has said what it has
            return Ok(());
        }
        if peer.rank.role == Role::Server {
            self.shard.meet_lane(peer);
            return Ok(());
        }
        let worker = peer.rank.index;
        if is_rebuilt {
            self.shard.resume(worker);
        }
        let fabric = self.paths.fabric(peer);
        let landing = match self.landings.get(&worker) {
            None => self.open(peer, fabric)?,
            // Slots that nobody is reading were armed again with the path.
            Some((before, landing)) if *before == fabric => *landing,
            Some((before, _)) => {
                let reason = format!("it was rebuilt over {fabric}, and its slots were registered for {before}");
                return Err(Error::Broken { peer, reason });
            }
        };
        self.landings.insert(worker, (fabric, landing));
        self.shard.attach(worker, landing);
        Ok(())
    }

    /// Opens a worker's landing slots.
    fn open(&mut self, peer: PeerId, fabric: &str) -> Result<Attachment> {
        let (rkey, slots) = self.landing.take(peer.rank.index, fabric);
        let first = slots.first().expect("a window has at least one slot");
        let (offset, slot_bytes) = (first.offset() as u64, first.len() as u32);
        slots.into_iter().try_for_each(|slot| self.paths.arm(peer, slot))?;
        Ok(Attachment { rkey, offset, slot_bytes, slots: self.slots, credit: 0 })
    }

    fn carry_out(&mut self) -> Result<()> {
        self.begin_snapshot()?;
        while let Some(effect) = self.shard.poll_effect() {
            match effect {
                Effect::Arm { peer, slot } => {
                    self.paths.arm(peer, slot)?;
                }
                Effect::Post(request) => self.paths.post(request),
                Effect::Compute(work) => self.computing.push(work),
                Effect::Snapshot { clock } => {
                    self.wanted = Some(clock);
                    self.begin_snapshot()?;
                }
                Effect::SetLearningRate { rate, clock } => {
                    self.computing.memory.set_learning_rate(rate, clock, self.shard.clock_done())?;
                    self.shard.mirror_change(clock, LiveChange { learning_rate: Some(rate), ..LiveChange::default() });
                }
                Effect::TellChanges => {
                    for (clock, change) in self.computing.memory.rates().changes() {
                        self.shard.mirror_change(clock, change);
                    }
                    for (clock, limit) in self.shard.live_state().clip_norm {
                        self.shard.mirror_change(clock, LiveChange { clip_norm: Some(limit), ..LiveChange::default() });
                    }
                    self.shard.begin_copying();
                }
            }
        }
        Ok(())
    }

    /// Starts what there is room for and takes back what has ended; on the processor one tile. Whether anything has ended.
    fn compute(&mut self) -> Result<bool> {
        self.computing.start(self.paths.recorder())?;
        let mut ended = false;
        while let Some(work) = self.computing.advance(self.paths.recorder())? {
            self.shard.handle_computed(work);
            ended = true;
        }
        Ok(self.finish_snapshot() || ended)
    }

    /// Looks at the gauges, if it is time to.
    fn sample(&mut self, now: Instant) {
        let (backlog, queued) = (self.paths.backlog(), self.computing.queued());
        let Some(recorder) = self.paths.recorder() else { return };
        let Some(meter) = recorder.sample(now) else { return };
        let figures = self.shard.figures();
        meter.clock.set(self.shard.clock_done());
        meter.staleness.set(figures.staleness);
        meter.queue(Queue::Posts).set(backlog as u64);
        meter.queue(Queue::Computations).set(queued as u64);
        meter.queue(Queue::Landed).set(figures.landed);
        meter.queue(Queue::Replies).set(figures.replies);
        meter.loss_scale.set(self.shard.loss_scale().to_bits().into());
        meter.skipped.add(figures.skipped.saturating_sub(meter.skipped.value()));
        for (worker, room) in self.shard.rooms() {
            if let Some(peer) = recorder.peer(worker) {
                peer.credit.set(room);
            }
        }
    }

    fn without_chunks(&self, clock: Clock) -> Snapshot {
        let (rates, live) = (self.computing.memory.rates().clone(), self.shard.live_state());
        Snapshot { clock, chunks: Vec::new(), clocks: self.shard.stored_clocks(), rates, live }
    }

    /// Begins the copy that is wanted, if there is memory for it. From then on computing goes on.
    fn begin_snapshot(&mut self) -> Result<()> {
        let Some(clock) = self.wanted.filter(|_| self.copying.is_none()) else { return Ok(()) };
        let Some(spare) = self.spare.take() else { return Ok(()) };
        self.wanted = None;
        self.computing.memory.begin_images(self.shard.versions(), spare)?;
        self.copying = Some(self.without_chunks(clock));
        self.shard.handle_snapshotted(clock);
        Ok(())
    }

    /// Hands out the snapshot that was begun, if all of it is there.
    fn finish_snapshot(&mut self) -> bool {
        if self.copying.is_none() {
            return false;
        }
        let Some(chunks) = self.computing.memory.take_images() else { return false };
        let begun = self.copying.take().expect("looked at above");
        self.snapshots.push_back(Snapshot { chunks, ..begun });
        true
    }
}
