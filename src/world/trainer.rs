//! A training program in the simulated world: it computes gradients in whatever order, pushes them, waits for parameters.
//!
//! Invariant: it uses the engine as a real program's worker handle does, and nothing else.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{At, Program, WorldOptions};
use crate::{
    Result,
    layout::{Layout, WorkerView},
    mem::{Lease, Region},
    session::{PathOptions, Paths},
    transport::sim::{SimNetwork, SimRandom, SimTransport},
    types::{ChunkId, Clock, Dtype, PeerId, Version},
    worker::{ClientConfig, Command, Engine, Event},
};

struct Chunk {
    id: ChunkId,
    gradient: Option<Lease>,
    parameters: Option<Lease>,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Begun in the place of another process: waits to be told its first clock.
    Joining,
    /// Waits to be attached, then pulls the first parameters.
    Starting,
    /// Gradients of the clock are being computed and pushed.
    Backward,
    /// Everything of the clock is pushed.
    Waiting,
    /// All clocks are done; waits for goodbyes.
    Finishing,
    Finished,
}

pub(super) struct Trainer {
    pub engine: Engine<SimTransport>,
    worker: u16,
    clock: Clock,
    clocks: Clock,
    separate_pull: bool,
    hasty: bool,
    /// In haste it asks for parameters all the same.
    asks_in_haste: bool,
    /// It sets the learning rate at clocks that this decides.
    sets_rates: Option<u64>,
    loss_scale: f32,
    aggregates: bool,
    /// From this clock until that one it is not of the job, as it was told.
    absent: Option<(Clock, Option<Clock>)>,
    chunks: Vec<Chunk>,
    /// Chunks whose gradient has not been pushed at this clock, in the order in which backward finishes them.
    backward: Vec<usize>,
    backward_at: Instant,
    phase: Phase,
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
}

impl Trainer {
    pub fn new(options: &WorldOptions, layout: &Arc<Layout>, network: &SimNetwork, worker: u16) -> Result<Trainer> {
        Trainer::with_paths(options, layout, network, worker, options.path_options())
    }

    /// Another process in the place of one that was lost.
    pub fn again(
        options: &WorldOptions,
        layout: &Arc<Layout>,
        network: &SimNetwork,
        worker: u16,
        life: u64,
        now: Instant,
    ) -> Result<Trainer> {
        let path_options = PathOptions { life, ..options.path_options() };
        let mut trainer = Trainer::with_paths(options, layout, network, worker, path_options)?;
        trainer.phase = Phase::Joining;
        trainer.engine.rejoin(now);
        Ok(trainer)
    }

    /// A process that has joined is told its first clock.
    pub fn begin_at(&mut self, clock: Clock) {
        self.phase = Phase::Starting;
        self.clock = clock;
        self.pull_all(clock);
    }

    fn with_paths(
        options: &WorldOptions,
        layout: &Arc<Layout>,
        network: &SimNetwork,
        worker: u16,
        path_options: PathOptions,
    ) -> Result<Trainer> {
        let me = PeerId::worker(worker);
        let view = WorkerView::new(layout, worker);
        let region = |name: &str| super::region(format!("{me}-{name}"));
        let bytes = view.elements as usize * 4;
        let (parameters, mut parameter_rest) = Region::allocate(bytes, &region("parameters"))?;
        let (gradients, mut gradient_rest) = Region::allocate(bytes, &region("gradients"))?;
        let mut chunks = Vec::new();
        for id in &view.chunks {
            let len = layout.chunk(*id).len as usize * 4;
            let (parameters, tail) = parameter_rest.split_at(len);
            parameter_rest = tail;
            let (gradient, tail) = gradient_rest.split_at(len);
            gradient_rest = tail;
            chunks.push(Chunk { id: *id, gradient: Some(gradient), parameters: Some(parameters), version: 0 });
        }
        let config = ClientConfig {
            worker,
            lanes: (0..options.servers).map(|shard| options.first_tenure(shard).primary).collect(),
            consistency: options.consistency,
            epoch: 0,
            gradient_dtype: Dtype::F32,
            parameter_dtype: Dtype::F32,
            has_copies: options.has_tenures(),
        };
        let paths = Paths::new(network.transport(me), path_options);
        Ok(Trainer {
            engine: Engine::new(config, layout.clone(), paths, &parameters, &gradients)?,
            worker,
            clock: 0,
            clocks: options.clocks_of(worker),
            separate_pull: options.separate_pull,
            hasty: options.hasty,
            asks_in_haste: options.elastic.is_active(),
            sets_rates: (options.sets_rates && worker == 0).then_some(options.seed),
            loss_scale: options.loss_scale.first(),
            aggregates: options.consistency.aggregates(),
            absent: options.elastic.told_of(worker),
            chunks,
            backward: Vec::new(),
            backward_at: Instant::now(),
            phase: Phase::Starting,
            commands: VecDeque::new(),
            events: VecDeque::new(),
        })
    }

    /// Whether it has clocks before it.
    pub fn trains(&self) -> bool {
        !matches!(self.phase, Phase::Finishing | Phase::Finished)
    }

    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        let backward = (self.phase == Phase::Backward).then_some(self.backward_at);
        [self.engine.next_deadline(), backward].into_iter().flatten().min()
    }

    /// One turn of the program and its engine; whether the program got on, or what it found wrong.
    pub fn turn(
        &mut self,
        now: Instant,
        random: &mut SimRandom,
        program: &mut dyn Program,
    ) -> Result<Result<bool, String>> {
        self.backward(now, random, program);
        self.engine.turn(now, &mut self.commands, &mut self.events)?;
        let mut got_on = false;
        while let Some(event) = self.events.pop_front() {
            got_on = true;
            if let Err(wrong) = self.handle(event, program) {
                return Ok(Err(wrong));
            }
        }
        self.next_clock(now, random);
        Ok(Ok(got_on))
    }

    fn handle(&mut self, event: Event, program: &mut dyn Program) -> Result<(), String> {
        match event {
            Event::Attached if self.phase == Phase::Joining => {} // nothing is known yet
            Event::Attached => self.pull_all(0),
            Event::GradientSent { chunk, lease } => self.chunk(chunk).gradient = Some(lease),
            Event::Parameters { chunk, version, lease } => {
                let (clock, loss_scale) = (self.clock.wrapping_sub(self.started()), self.loss_scale);
                let at = At { worker: self.worker, clock, chunk, version, loss_scale };
                program.received(at, bytemuck::cast_slice(lease.bytes()))?;
                let chunk = self.chunk(chunk);
                chunk.version = version;
                chunk.parameters = Some(lease);
            }
            Event::LossScale(scale) => self.loss_scale = scale,
            Event::Finished => self.phase = Phase::Finished,
            Event::Begins(clock) => self.begin_at(clock),
            Event::Leaves(clock) => self.leave(clock),
        }
        Ok(())
    }

    /// Parameters that arrive while starting are those before the first clock.
    fn started(&self) -> Clock {
        u64::from(self.phase == Phase::Starting)
    }

    fn pull_all(&mut self, min_version: Version) {
        for chunk in &mut self.chunks {
            let into = chunk.parameters.take().expect("parameters are at home between clocks");
            self.commands.push_back(Command::Pull { chunk: chunk.id, min_version, patience: None, into });
        }
    }

    /// Backward finishes some more chunks.
    fn backward(&mut self, now: Instant, random: &mut SimRandom, program: &mut dyn Program) {
        while self.phase == Phase::Backward && now >= self.backward_at {
            let Some(index) = self.backward.pop() else {
                self.phase = Phase::Waiting;
                if self.leaves_in_haste() || self.is_out() {
                    self.finish();
                } else if self.separate_pull {
                    // A version counts clocks under `Aggregate` only.
                    let min_version = if self.aggregates { self.clock + 1 } else { 0 };
                    self.pull_all(min_version);
                }
                return;
            };
            let wants_reply = !self.separate_pull && (!self.leaves_in_haste() || self.asks_in_haste);
            let (worker, clock, loss_scale) = (self.worker, self.clock, self.loss_scale);
            let Chunk { id, gradient, parameters, version } = &mut self.chunks[index];
            let mut lease = gradient.take().expect("gradients are at home when a clock begins");
            let at = At { worker, clock, chunk: *id, version: *version, loss_scale };
            let values = bytemuck::cast_slice(parameters.as_ref().expect("as are parameters").bytes());
            let given = program.gradient(at, values, bytemuck::cast_slice_mut(lease.bytes_mut()));
            let reply = if wants_reply { parameters.take() } else { None };
            if !given {
                *gradient = Some(lease);
                self.commands.push_back(Command::Push { chunk: *id, clock, gradient: None, reply });
            } else {
                self.commands.push_back(Command::Push { chunk: *id, clock, gradient: Some(lease), reply });
            }
            if random.once_in(3) {
                self.backward_at = now + Duration::from_micros(random.below(20_000));
            }
        }
    }

    /// At its last clock, a program in haste finishes as soon as it has pushed.
    fn leaves_in_haste(&self) -> bool {
        let told = self.absent.filter(|(_, until)| until.is_none()).map_or(self.clocks, |(from, _)| from);
        self.hasty && self.clock + 1 == self.clocks.min(told)
    }

    /// Once everything is home, the next clock begins.
    fn next_clock(&mut self, now: Instant, random: &mut SimRandom) {
        let home = self.chunks.iter().all(|chunk| chunk.gradient.is_some() && chunk.parameters.is_some());
        match self.phase {
            Phase::Starting if home && self.may_begin() => self.go_on(now, random),
            Phase::Waiting if home => {
                self.clock += 1;
                self.go_on(now, random);
            }
            _ => {}
        }
    }

    /// The present clock begins, if there is one before it and it is of the job.
    fn go_on(&mut self, now: Instant, random: &mut SimRandom) {
        match self.absent.filter(|(from, _)| *from <= self.clock) {
            Some((_, Some(until))) if until < self.clocks => {
                self.absent = None;
                self.begin_at(until);
            }
            Some(_) => self.finish(),
            None if self.clock >= self.clocks => self.finish(),
            None => self.begin(now, random),
        }
    }

    /// It is of the job no more from a clock on, which it may have begun. Every other program has noticed only when it has pushed all
    /// of that clock.
    fn leave(&mut self, clock: Clock) {
        self.absent = Some((clock, None));
        let notices = self.phase == Phase::Waiting || self.phase == Phase::Backward && self.worker.is_multiple_of(2);
        if self.is_out() && notices {
            self.finish();
        }
    }

    fn is_out(&self) -> bool {
        self.absent.is_some_and(|(from, until)| from <= self.clock && until.is_none())
    }

    fn finish(&mut self) {
        self.phase = Phase::Finishing;
        self.commands.push_back(Command::Finish);
    }

    /// Whether the first parameters have been asked for and are all here.
    fn may_begin(&self) -> bool {
        let asked = self.commands.is_empty() && self.engine.is_attached() && !self.chunks.is_empty();
        asked && self.engine.awaited().is_none()
    }

    fn begin(&mut self, now: Instant, random: &mut SimRandom) {
        self.phase = Phase::Backward;
        self.backward = (0..self.chunks.len()).collect();
        for last in (1..self.backward.len()).rev() {
            self.backward.swap(last, random.below(last as u64 + 1) as usize);
        }
        self.backward_at = now + Duration::from_micros(random.below(5_000));
        // Dice of its own: the rates are the same, whatever else happens.
        if self.sets_rates.is_some_and(|seed| SimRandom::new(seed ^ self.clock << 16).once_in(3)) {
            let rate = 0.002 * (1 + self.clock % 7) as f64;
            self.commands.push_back(Command::SetLearningRate { rate, clock: self.clock });
        }
    }

    fn chunk(&mut self, id: ChunkId) -> &mut Chunk {
        self.chunks.iter_mut().find(|chunk| chunk.id == id).expect("an event about a chunk of ours")
    }
}
