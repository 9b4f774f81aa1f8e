//! The event loop around a backup, and how it becomes that of a shard.
//!
//! Everything that serving needs is allocated when the standby begins, so that taking over is a matter of paths alone.
//!
//! Invariant: it takes over only after its end of the path from the primary has been fenced and everything that had come is part of
//! its state; nothing lands after that.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use super::{Backup, BackupEffect};
use crate::{
    Error, Result,
    layout::Layout,
    mem::{Lease, RegionOptions},
    optim::LiveChange,
    server::{
        ChunkView, EventLoop, Memory, Progress, ShardConfig, computing::Computing, landing::slots,
        memory::elements_max, room::Room,
    },
    session::{Change, Claim, Paths, Proposal, Tenure},
    transport::{Completion, Endpoint, MemoryRegion, Transport, Wakeup},
    types::{ChunkId, Clock, Dtype, Epoch, PeerId, Role, ShardId, Version},
    wire::Attachment,
};

/// What a standby begins with.
#[derive(Clone, Debug)]
pub struct StandbyOptions {
    /// How it will serve, should it take over.
    pub shard: ShardConfig,
    /// How memory is allocated.
    pub region: RegionOptions,
    /// The tenure under which it begins.
    pub tenure: Tenure,
    /// Whether it begins with what the primary has: both are at the job's beginning.
    pub is_first: bool,
    /// Workers with which the job begins: the seats of the others are empty at first.
    pub workers: u16,
}

/// A backup at work over a transport.
pub struct Standby<T> {
    paths: Paths<T>,
    backup: Backup,
    computing: Computing,
    room: Room,
    layout: Arc<Layout>,
    options: StandbyOptions,
    landing: MemoryRegion,
    /// Landing slots, until the path is there for the first time.
    slots: Vec<Lease>,
    attachment: Attachment,
    completions: Vec<Completion>,
    epoch: Epoch,
    /// It has everything that workers have been told of, as far as the store knows.
    is_paired: bool,
    /// The path from the primary is fenced for good, and why.
    lost: Option<String>,
    claim: Option<Claim>,
    /// The primary has said that nothing more will come.
    is_dismissed: bool,
    /// By number: changes that the launcher has told of. The primary may not have heard of the last ones, and tells of no change of who is of
    /// the job.
    changes: BTreeMap<u64, (Clock, Change)>,
    /// Offers of those who knew earlier than this lane that it has taken over.
    early: BTreeMap<PeerId, Proposal>,
}

impl<T: Transport> Standby<T> {
    /// Allocates and registers all that it needs.
    pub fn new(
        options: StandbyOptions,
        layout: Arc<Layout>,
        mut memory: Memory,
        mut paths: Paths<T>,
        versions: Option<&[Version]>,
    ) -> Result<Standby<T>> {
        let shard = &options.shard;
        let mirror = shard.mirror.as_ref().ok_or_else(|| Error::Config("a backup needs a primary".into()))?;
        let primary = options.tenure.primary;
        paths.suspect_after(primary, mirror.suspicion);
        memory.expect_gradients(Dtype::F32);
        let room = Room::allocate(shard, &layout, &mut memory, &mut paths, &options.region)?;
        let slot_bytes = (4 * elements_max(&layout, shard.shard)).max(64);
        let count = mirror.slots as usize;
        let (landing, slots) = slots("replica", (count, slot_bytes), &options.region, &mut paths)?;
        let landing = landing.expect("a mirror has slots");
        let backup = Backup::new(primary, shard, layout.clone(), versions, options.is_first);
        let attachment =
            Attachment { rkey: 0, offset: 0, slot_bytes: slot_bytes as u32, slots: mirror.slots, credit: 0 };
        Ok(Standby {
            epoch: options.tenure.epoch,
            is_paired: options.is_first,
            paths,
            backup,
            computing: Computing::new(memory),
            room,
            layout,
            options,
            landing,
            slots,
            attachment,
            completions: Vec::new(),
            lost: None,
            claim: None,
            is_dismissed: false,
            changes: BTreeMap::new(),
            early: BTreeMap::new(),
        })
    }

    /// The transport and what belongs to it.
    pub fn paths(&mut self) -> &mut Paths<T> {
        &mut self.paths
    }

    /// What wakes whoever sleeps while there is nothing to do.
    pub fn wakeups(&mut self) -> (&mut dyn Wakeup, Option<&mut dyn Wakeup>)
    where
        T: Wakeup,
    {
        (self.paths.transport(), self.computing.memory.wakeup())
    }

    /// Something changes from a clock on.
    pub fn keep_change(&mut self, number: u64, clock: Clock, change: Change) {
        self.changes.insert(number, (clock, change));
    }

    /// All are asked to prepare a change. Of a worker that is of the job no more nothing comes after that: what it has offered is void.
    pub fn prepare_change(&mut self, change: Change) {
        if let Change::Lost(worker) | Change::Opens(worker) = change {
            self.early.remove(&PeerId::worker(worker));
        }
    }

    /// What of the changed settings that were told is not known to this copy. Whoever served had begun nothing of their clocks then.
    fn unheard(&self) -> Vec<(Clock, LiveChange)> {
        let holds = self.backup.holds();
        let begun = holds.through().max().unwrap_or(0);
        let limits = holds.decided.iter().flat_map(|decided| &decided.limits);
        let limits: Vec<Clock> = limits.map(|(clock, _)| *clock).collect();
        let rates: Vec<_> = self.computing.memory.rates().changes().collect();
        let is_known = |clock: Clock, of: fn(&LiveChange) -> bool| {
            rates.iter().any(|(known, change)| *known == clock && of(change))
        };
        let lacking = |(clock, change): (Clock, LiveChange)| {
            let learning_rate =
                change.learning_rate.filter(|_| !is_known(clock, |known| known.learning_rate.is_some()));
            let weight_decay = change.weight_decay.filter(|_| !is_known(clock, |known| known.weight_decay.is_some()));
            let clip_norm = change.clip_norm.filter(|_| !limits.contains(&clock));
            (clock, LiveChange { learning_rate, weight_decay, clip_norm, ..change })
        };
        let settings = self.changes.values().filter_map(|(clock, change)| match change {
            Change::Settings(change) if *clock >= begun => Some((*clock, *change)),
            _ => None,
        });
        settings.map(lacking).collect()
    }

    /// Another lane serves another shard: should this one take over, it decides with that one.
    pub fn set_lane(&mut self, shard: ShardId, lane: PeerId) {
        let decision = self.options.shard.decision.as_mut();
        let known = decision.and_then(|decision| decision.lanes.get_mut(usize::from(shard.0)));
        known.into_iter().for_each(|known| *known = lane);
    }

    /// Begins the path to the primary, as everybody begins theirs.
    pub fn connect(&mut self, remote: &Endpoint, deadline: Instant) -> Result<()> {
        self.paths.connect(self.backup.primary(), remote, deadline)
    }

    /// Begins the path to a primary that has been there for longer.
    pub fn join(&mut self, now: Instant) {
        self.paths.begin(self.backup.primary(), "a new backup", now);
    }

    /// An offer for a path has come.
    pub fn proposed(&mut self, proposal: Proposal, now: Instant) {
        // Whoever has lost its primary hears nothing more of it: a path that it builds again is one to whoever serves.
        if proposal.peer.rank.role == Role::Worker || self.lost.is_some() {
            let kept = self.early.get(&proposal.peer);
            if kept.is_none_or(|kept| (kept.life, kept.generation) <= (proposal.life, proposal.generation)) {
                self.early.insert(proposal.peer, proposal);
            }
        } else {
            self.paths.proposed(proposal, now);
        }
    }

    /// Does what can be done now.
    ///
    /// # Errors
    ///
    /// What the transport fails with, or the device.
    pub fn turn(&mut self, now: Instant) -> Result<Progress> {
        let mut completions = std::mem::take(&mut self.completions);
        self.paths.poll(now, &mut completions)?;
        let mut moved = false;
        for completion in completions.drain(..) {
            moved |= matches!(completion, Completion::Arrived { .. });
            self.handle(completion)?;
        }
        self.completions = completions;
        self.carry_out()?;
        moved |= self.compute()?;
        self.carry_out()?;
        self.paths.flush()?;
        Ok(self.computing.progress(moved))
    }

    /// When `turn` wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.paths.next_deadline()
    }

    /// What is to be asked of the store, once all that has come is part of the state.
    pub fn take_claim(&mut self) -> Option<Claim> {
        if self.is_settled() { self.claim.take() } else { None }
    }

    /// Whether nothing is being computed, and nothing waits for it.
    pub fn is_settled(&self) -> bool {
        self.backup.is_settled() && self.computing.is_settled()
    }

    /// The primary has said goodbye.
    pub fn is_dismissed(&self) -> bool {
        self.is_dismissed
    }

    /// Whether this copy has everything that workers have been told of, and is there to take over.
    pub fn is_paired(&self) -> bool {
        self.is_paired
    }

    /// Whether it has lost its primary before it had everything.
    pub fn is_useless(&self) -> bool {
        (self.lost.is_some() || self.backup.is_refused()) && !self.is_paired
    }

    /// A chunk's state where it lies; `None` while something is computed.
    pub fn view(&self, chunk: ChunkId) -> Option<ChunkView<'_>> {
        let place = self.layout.chunk(chunk).position as usize;
        self.computing.memory.view(chunk, self.backup.holds().clocks[place])
    }

    /// Its primary.
    pub fn primary(&self) -> PeerId {
        self.backup.primary()
    }

    /// The primary is gone: nothing of it is taken in any more, and the store is asked.
    pub fn lose_primary(&mut self, why: &str) {
        if self.lost.is_some() {
            return;
        }
        self.paths.set_aside(self.backup.primary());
        self.backup.detach();
        self.lost = Some(why.into());
        self.claim = self.is_paired.then_some(self.succession());
    }

    /// Whether the shard moves here: this lane serves as soon as it has everything.
    fn moves(&self) -> bool {
        self.options.shard.mirror.as_ref().is_some_and(|mirror| mirror.moves)
    }

    fn succession(&self) -> Claim {
        if self.moves() { Claim::Succeed } else { Claim::TakeOver }
    }

    /// The store's word. `true` if this copy is of no use any more: another lane serves, or this one is not counted on.
    pub fn set_tenure(&mut self, tenure: Tenure) -> bool {
        if tenure.epoch < self.epoch {
            return false;
        }
        self.epoch = tenure.epoch;
        if tenure.primary != self.backup.primary() {
            return false; // it is this lane's turn: see `take_over`
        }
        if tenure.other != Some(self.options.shard.me) {
            return true;
        }
        // What the store says may be said of a backup that was there before this one.
        let is_paired = tenure.is_paired && self.backup.is_whole();
        let was_paired = std::mem::replace(&mut self.is_paired, is_paired);
        if self.is_paired && self.lost.is_some() {
            self.claim = Some(self.succession());
        } else if self.is_paired && self.moves() {
            self.lose_primary("the shard moves here");
        }
        !self.is_paired && (was_paired || self.lost.is_some())
    }

    /// Whether it has everything, and has lost its primary.
    pub fn has_claimed(&self) -> bool {
        self.lost.is_some() && self.is_settled()
    }

    /// Becomes the event loop of the shard, under a tenure that says so.
    pub fn take_over(mut self, now: Instant) -> Result<EventLoop<T>> {
        debug_assert!(self.is_settled() && self.lost.is_some(), "the store was asked after that");
        self.set_lane(self.options.shard.shard, self.options.shard.me);
        let unheard = self.unheard();
        let mut config = self.options.shard;
        self.computing.memory.expect_gradients(config.gradient_dtype);
        if let Some(mirror) = &mut config.mirror {
            mirror.is_paired = false;
            mirror.peer = Some(self.backup.primary()).filter(|_| !mirror.moves);
        }
        let holds = self.backup.holds().clone();
        let versions = Some(holds.versions.as_slice());
        let mut serving =
            EventLoop::in_room(self.room, config, self.layout, self.computing.memory, self.paths, versions)?;
        serving.inherit(&holds, self.options.workers, &self.changes);
        unheard.into_iter().try_for_each(|(clock, change)| serving.change_from(clock, change))?;
        for (_, proposal) in self.early {
            serving.paths().proposed(proposal, now);
        }
        Ok(serving)
    }

    fn handle(&mut self, completion: Completion) -> Result<()> {
        match completion {
            Completion::Connected { peer } if peer == self.backup.primary() => self.attach(peer),
            Completion::Arrived { from, note, lease } => {
                if note.kind == crate::wire::NoteKind::Goodbye {
                    self.is_dismissed = true;
                    self.paths.release(from);
                    return Ok(());
                }
                if let Err(error) = self.backup.handle_arrived(from, note, lease) {
                    return self.broken(from, &error);
                }
                Ok(())
            }
            Completion::Broken { peer, error } => self.broken(peer, &error),
            Completion::Connected { .. } | Completion::Sent { .. } | Completion::Failed { .. } => Ok(()),
            Completion::Released { .. } => Ok(()),
        }
    }

    fn attach(&mut self, peer: PeerId) -> Result<()> {
        let fabric = self.paths.fabric(peer);
        let slots = std::mem::take(&mut self.slots);
        if let Some(first) = slots.first() {
            let rkey = self.landing.rkey(fabric);
            self.attachment = Attachment { rkey, offset: first.offset() as u64, ..self.attachment };
        }
        slots.into_iter().try_for_each(|slot| self.paths.arm(peer, slot))?;
        self.attachment.rkey = self.landing.rkey(fabric);
        self.backup.attach(self.attachment);
        Ok(())
    }

    fn broken(&mut self, peer: PeerId, error: &Error) -> Result<()> {
        if peer != self.backup.primary() || self.is_dismissed {
            return Ok(());
        }
        self.lose_primary(&error.to_string());
        Ok(())
    }

    fn carry_out(&mut self) -> Result<()> {
        while let Some(effect) = self.backup.poll_effect() {
            match effect {
                BackupEffect::Arm(slot) => self.paths.arm(self.backup.primary(), slot)?,
                BackupEffect::Post(request) => self.paths.post(request),
                BackupEffect::Compute(work) => self.computing.push(work),
                BackupEffect::Change(clock, change) => self.change_from(clock, change)?,
            }
        }
        Ok(())
    }

    /// What the shard goes by changes from a clock on that has not begun.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for values that the job cannot take.
    pub fn change_from(&mut self, clock: Clock, change: LiveChange) -> Result<()> {
        let done = self.backup.holds().clocks.iter().copied().min().unwrap_or(0);
        if let Some(rate) = change.learning_rate {
            self.computing.memory.set_learning_rate(rate, clock, done)?;
        }
        if let Some(decay) = change.weight_decay {
            self.computing.memory.set_weight_decay(decay, clock, done)?;
        }
        if let Some(limit) = change.clip_norm {
            self.backup.limit_norm(limit, clock);
        }
        Ok(())
    }

    fn compute(&mut self) -> Result<bool> {
        self.computing.start(self.paths.recorder())?;
        let mut ended = false;
        while let Some(work) = self.computing.advance(self.paths.recorder())? {
            self.backup.handle_computed(work)?;
            // Whose gradient it was is for the primary to say.
            while self.computing.memory.take_not_finite().is_some() {}
            ended = true;
        }
        Ok(ended)
    }
}
