//! From arrivals to steps: which contributions make an update, when it may be computed, and what follows from it.
//!
//! Invariant: steps of a chunk are taken in clock order, each exactly once, and landing slots are armed again only after the
//! computation that reads them has come back.

use super::*;

/// `Immediate`: what one worker said of a chunk at a clock; no contribution if it was absent.
#[derive(Debug)]
pub(super) struct Arrival {
    pub worker: u16,
    clock: Clock,
    position: u64,
    contribution: Option<Contribution>,
}

impl Shard {
    pub(super) fn on_push(&mut self, worker: u16, note: &Note, lease: Lease) -> Result<()> {
        let peer = self.contributors[usize::from(worker)].peer;
        let index = self.own_chunk(worker, note.chunk)?;
        let position = self.position_of(worker, index, note.clock)?;
        let bytes = self.chunks[index].len as usize * self.config.gradient_dtype.size();
        if note.length as usize != bytes {
            return Err(protocol(peer, format!("{} bytes for a chunk of {bytes}", note.length)));
        }
        if !self.lands_in(worker, position, &lease) {
            return Err(protocol(peer, format!("chunk {} landed in a slot that is not its own", note.chunk.0)));
        }
        if note.weight == 0 {
            return Err(protocol(peer, "a contribution of weight 0"));
        }
        let contribution = Contribution { worker, weight: note.weight, lease };
        self.on_arrival(worker, index, position, note, Some(contribution))
    }

    pub(super) fn on_absent(&mut self, worker: u16, note: &Note) -> Result<()> {
        let index = self.own_chunk(worker, note.chunk)?;
        let position = self.position_of(worker, index, note.clock)?;
        self.on_arrival(worker, index, position, note, None)
    }

    fn on_arrival(
        &mut self,
        worker: u16,
        index: usize,
        position: u64,
        note: &Note,
        contribution: Option<Contribution>,
    ) -> Result<()> {
        let is_inherited = self.inherited.contains(&position);
        if is_inherited || !self.contributors[usize::from(worker)].membership.takes(note.clock) {
            // It counts as received, and no more.
            let peer = self.contributors[usize::from(worker)].peer;
            self.effects.extend(contribution.map(|landed| Effect::Arm { peer, slot: landed.lease }));
            self.want_reply(worker, index, note);
            self.touch(index);
            return Ok(());
        }
        self.record(worker, position)?;
        let contributor = &mut self.contributors[usize::from(worker)];
        contributor.pushed = contributor.pushed.max(position + 1);
        self.clocks_pushed = self.clocks_pushed.max(note.clock + 1);
        self.want_reply(worker, index, note);
        self.note_contribution(worker, note.flags.contains(NoteFlags::WANTS_REPLY));
        if self.config.consistency.aggregates() {
            let cell = self.window.slot(position) * usize::from(self.config.workers) + usize::from(worker);
            debug_assert!(self.landed[cell].is_none(), "the window lets a slot be used once");
            self.landed[cell] = contribution;
            self.complete_if_all_here(position);
        } else {
            self.chunks[index].arrived.push_back(Arrival { worker, clock: note.clock, position, contribution });
            self.touch(index);
        }
        Ok(())
    }

    /// Queues the step of an open position once every contributor has pushed, been absent, or finished for good.
    fn complete_if_all_here(&mut self, position: u64) {
        let slot = self.window.slot(position);
        let index = (position % self.chunks.len() as u64) as usize;
        let clock = position / self.chunks.len() as u64;
        let here = |worker: &u16| {
            let contributor = &self.contributors[usize::from(*worker)];
            self.window.has(position, (*worker).into()) || !contributor.is_awaited(clock)
        };
        if self.queued[slot] || self.window.is_finished(position) || !self.chunks[index].contributors.iter().all(here) {
            return;
        }
        self.queued[slot] = true;
        self.chunks[index].complete.push_back(position);
        self.touch(index);
    }

    /// Workers that have finished complete positions by their absence. When all that have a part in this shard have, only clocks
    /// to which somebody pushed are completed (whole ones, since in two steps one chunk waits for the others): otherwise empty
    /// positions would complete for ever.
    pub(super) fn complete_open_positions(&mut self) {
        let all_stay = self.contributors.iter().all(Contributor::stays);
        if !self.config.consistency.aggregates() || all_stay || self.chunks.is_empty() {
            return;
        }
        let all_finished =
            self.contributors.iter().all(|contributor| self.is_over(contributor) || contributor.own == 0);
        for position in self.window.base()..self.window.end() {
            let begun = || position / (self.chunks.len() as u64) < self.clocks_pushed;
            if !all_finished || begun() {
                self.complete_if_all_here(position);
            }
        }
    }

    /// Starts the chunk's next computation if there is one.
    pub(super) fn start_next(&mut self, index: usize) -> Turn {
        if let Some(reduced) = self.chunks[index].reduced {
            // Before the decision there is nothing to do; the decision touches every chunk.
            return if self.is_decided(reduced.clock) { self.start_apply(index, reduced) } else { Turn::Idle };
        }
        if self.config.consistency.aggregates() { self.start_aggregate(index) } else { self.start_immediate(index) }
    }

    fn start_aggregate(&mut self, index: usize) -> Turn {
        let clock = self.chunks[index].gate.slowest();
        let position = position(clock, self.chunks.len(), index);
        let Some(at) = self.chunks[index].complete.iter().position(|complete| *complete == position) else {
            return Turn::Idle;
        };
        if self.checkpointing.holds(clock) || self.is_held(clock) {
            return Turn::Idle; // touched again when the checkpoint has been taken, or the change been settled
        }
        let workers = usize::from(self.config.workers);
        let first = self.window.slot(position) * workers;
        let given = self.landed[first..first + workers].iter().any(Option::is_some);
        let fused = !self.config.two_step && !self.is_mirrored(index);
        if given && (fused && self.pool.is_empty() || !self.has_room_for_sum(index)) {
            return Turn::Waiting;
        }
        self.chunks[index].complete.remove(at);
        self.note_lacking(index, clock, position);
        if !given {
            self.skip(index, clock, position);
            return Turn::Progressed;
        }
        let mut contributions = self.spare.pop().unwrap_or_default();
        contributions.extend(self.landed[first..first + workers].iter_mut().filter_map(Option::take));
        let weight = self.divisor(index, clock, &contributions);
        let (task, wire) = if fused { (Task::Step, self.pool.pop()) } else { (Task::Reduce, None) };
        let scale = if fused { Decision::taken(self.loss_scale).scale } else { 1.0 };
        let sum = self.take_room_for_sum(index);
        let work = Work::new(task, self.chunks[index].id, clock);
        self.compute(index, Work { position, contributions, weight, wire, sum, scale, ..work });
        Turn::Progressed
    }

    /// The mean's divisor: a contributor that is absent gave a gradient of zero and counts all the same, if it is of the job.
    fn divisor(&self, index: usize, clock: Clock, contributions: &[Contribution]) -> u32 {
        let absent = self.members(index, clock).count() - contributions.len();
        contributions.iter().map(|contribution| u32::from(contribution.weight)).sum::<u32>() + absent as u32
    }

    fn start_immediate(&mut self, index: usize) -> Turn {
        let held = self.held.map_or(Clock::MAX, |(_, from)| from);
        let chunk = &mut self.chunks[index];
        let in_turn = |arrival: &Arrival| {
            let contributor = chunk.contributors.binary_search(&arrival.worker).expect("checked by own_chunk");
            chunk.gate.clock_of(contributor) >= arrival.clock && arrival.clock < held
        };
        let Some(at) = chunk.arrived.iter().position(in_turn) else { return Turn::Idle };
        // Parameters of f32 may be read where they lie: the step needs another place for them then.
        let makes_copy = self.config.parameter_dtype == Dtype::F32 && chunk.arrived[at].contribution.is_some();
        if makes_copy && self.pool.is_empty() {
            return Turn::Waiting;
        }
        let arrival = chunk.arrived.remove(at).expect("just found");
        let (clock, position) = (arrival.clock, arrival.position);
        let contributor = chunk.contributors.binary_search(&arrival.worker).expect("checked by own_chunk");
        if clock < chunk.gate.clock_of(contributor) {
            // It is in the checkpoint that the job went on from: whoever was ahead then pushes the same once more.
            let peer = self.contributors[usize::from(arrival.worker)].peer;
            self.effects.extend(arrival.contribution.map(|landed| Effect::Arm { peer, slot: landed.lease }));
            self.retire_finished(index);
            self.finish_position(arrival.worker, position);
            return Turn::Progressed;
        }
        let Some(contribution) = arrival.contribution else {
            self.applied(index, arrival.worker, clock);
            self.retire_finished(index);
            self.finish_position(arrival.worker, position);
            return Turn::Progressed;
        };
        let chunk = chunk.id;
        let weight = contribution.weight.into();
        let mut contributions = self.spare.pop().unwrap_or_default();
        contributions.push(contribution);
        let scale = Decision::taken(self.loss_scale).scale;
        let wire = self.pool.pop_if(|_| makes_copy);
        self.compute(
            index,
            Work { position, contributions, weight, wire, scale, ..Work::new(Task::Step, chunk, clock) },
        );
        Turn::Progressed
    }

    pub(super) fn start_apply(&mut self, index: usize, Reduced { clock, weight, .. }: Reduced) -> Turn {
        if weight == 0 || self.decision.skips {
            self.chunks[index].reduced = None;
            self.pass_clock(index, clock);
            self.fill();
            return Turn::Progressed;
        }
        let Some(lease) = self.pool.pop() else { return Turn::Waiting };
        let contributions = self.spare.pop().unwrap_or_default();
        let work = Work::new(Task::Apply, self.chunks[index].id, clock);
        self.compute(index, Work { contributions, weight, wire: Some(lease), scale: self.decision.scale, ..work });
        Turn::Progressed
    }

    pub(super) fn compute(&mut self, index: usize, mut work: Work) {
        if work.wire.is_some() {
            work.published = self.chunks[index].published.take().map(|(_, copy)| copy);
        }
        self.chunks[index].busy = true;
        self.computing += 1;
        self.effects.push_back(Effect::Compute(work));
    }

    /// A computation is done.
    pub fn handle_computed(&mut self, mut work: Work) {
        let index = self.layout.chunk(work.chunk).position as usize;
        self.computing -= 1;
        self.chunks[index].busy = false;
        let copy = work.published.take();
        self.pool.extend(work.wire.take());
        if let Some(before) = work.before.take() {
            self.retire(before);
        }
        let worker = work.contributions.first().map_or(0, |contribution| contribution.worker);
        for contribution in work.contributions.drain(..) {
            let peer = self.contributors[usize::from(contribution.worker)].peer;
            self.effects.push_back(Effect::Arm { peer, slot: contribution.lease });
        }
        self.spare.push(std::mem::take(&mut work.contributions));
        match work.task {
            Task::Step if !self.config.consistency.aggregates() => {
                self.chunks[index].version += 1;
                if let Some(copy) = copy {
                    self.publish(index, copy);
                }
                self.applied(index, worker, work.clock);
                self.finish_position(worker, work.position);
            }
            Task::Step => {
                self.chunks[index].version += 1;
                self.publish(index, copy.expect("an aggregate step has a wire copy"));
                self.finish_clock(index, work.clock);
                self.finish_position(worker, work.position);
            }
            Task::Reduce => {
                let is_held = self.mirror_sum(index, work.position, (work.clock, work.weight), work.sum.take());
                let squared_norm = work.squared_norm.unwrap_or(0.0);
                self.reduced(index, Reduced { clock: work.clock, weight: work.weight, squared_norm });
                if !is_held {
                    self.finish_position(worker, work.position);
                }
            }
            Task::Apply => {
                self.chunks[index].reduced = None;
                self.chunks[index].version += 1;
                self.publish(index, copy.expect("apply has a wire copy"));
                self.finish_clock(index, work.clock);
            }
            Task::Encode => self.publish(index, copy.expect("encode has a wire copy")),
            Task::CopyOut(part) => self.copied_out(index, work, part),
            Task::CopyIn(_) => unreachable!("only a backup takes in state"),
        }
        self.retire_finished(index);
        self.touch(index);
        self.fill();
    }

    /// A position to which nobody gave anything: no step, but a clock has passed.
    fn skip(&mut self, index: usize, clock: Clock, position: u64) {
        let is_held = self.mirror_sum(index, position, (clock, 0), None);
        if self.config.two_step {
            self.reduced(index, Reduced { clock, weight: 0, squared_norm: 0.0 });
        } else {
            self.pass_clock(index, clock);
        }
        if !is_held {
            self.finish_position(0, position);
        }
    }

    fn pass_clock(&mut self, index: usize, clock: Clock) {
        let chunk = &mut self.chunks[index];
        chunk.version += 1;
        if let Some((version, _)) = &mut chunk.published {
            *version += 1;
        }
        self.finish_clock(index, clock);
    }

    /// Every contributor's update of `clock` is in the chunk.
    fn finish_clock(&mut self, index: usize, clock: Clock) {
        let gate = &mut self.chunks[index].gate;
        let before = gate.slowest();
        gate.on_all_applied(clock);
        self.clock_max = self.clock_max.max(clock + 1);
        self.note_progress(index, before);
    }

    /// `Immediate`: one worker's update of `clock` is in the chunk.
    fn applied(&mut self, index: usize, worker: u16, clock: Clock) {
        let chunk = &mut self.chunks[index];
        let contributor = chunk.contributors.binary_search(&worker).expect("checked by own_chunk");
        let before = chunk.gate.slowest();
        chunk.gate.on_applied(contributor, clock);
        self.clock_max = self.clock_max.max(clock + 1);
        self.note_progress(index, before);
    }

    /// `Immediate`: workers that have finished, and of which nothing is left to be applied, hold nobody back any more.
    pub(super) fn retire_finished(&mut self, index: usize) {
        if self.config.consistency.aggregates() || self.chunks[index].busy {
            return;
        }
        let chunk = &mut self.chunks[index];
        let before = chunk.gate.slowest();
        for (contributor, worker) in chunk.contributors.iter().enumerate() {
            let finished = self.contributors[usize::from(*worker)].finished;
            if finished && !chunk.arrived.iter().any(|arrival| arrival.worker == *worker) {
                chunk.gate.on_finished(contributor);
            }
        }
        self.note_progress(index, before);
    }

    /// Two-step: a chunk's contributions lie in its accumulator. When those of all chunks do, and it has been decided what
    /// becomes of the step, all may be applied.
    fn reduced(&mut self, index: usize, reduced: Reduced) {
        self.chunks[index].reduced = Some(reduced);
        if !matches!(self.deciding, Deciding::Nothing) {
            return self.measure(index);
        }
        if self.mirror.is_some() {
            return; // no chunk waits for another
        }
        self.reduced += 1;
        if self.reduced == self.chunks.len() {
            self.reduced = 0;
            self.on_decision(reduced.clock, Decision::taken(self.loss_scale));
        }
    }
}
