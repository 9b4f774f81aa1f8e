//! The rendezvous as a state machine: who has joined, what they have declared and offered, where they wait, who is missing.
//!
//! Invariant: no I/O and no clock in here; time is an argument. A refusal changes nothing: the job goes on as if the caller had
//! never come.

mod barriers;
mod changing;
mod ending;
mod members;
mod missing;
mod ordering;
mod paths;
mod scaling;
mod standing;
mod storing;
mod tenures;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

pub use members::WorkerTurn;

use super::{
    checkpoints::Checkpoints,
    message::{Command, Control, FromLauncher, Offer, PackedView, RankStatus, Report, Status, ToLauncher},
    names,
    notice::Notice,
    seconds,
    swaps::Swapping,
    waiting::Waiting,
};
use crate::{
    layout::{Layout, TensorSpec},
    session::{Changes, JobConfig, PathCounts, Proposal, Tenure},
    transport::PathChoice,
    types::{Clock, PeerId, Rank, Role},
};

/// A connection of the launcher's, numbered in the order in which they came.
pub(super) type ConnectionId = u64;

/// Barriers that may be open at once; each holds a name and a set of ranks.
const BARRIERS_MAX: usize = 64;

/// What the state machine wants done.
#[derive(Debug)]
pub(super) enum Effect {
    /// Send this to each of these.
    Send { to: Vec<ConnectionId>, message: FromLauncher },
    /// Tell this one the time.
    Time { to: ConnectionId },
    /// Tell the launcher.
    Notice(Notice),
    /// Ask the store of tenures, then call `swapped`.
    Swap(Swapping),
    /// This one is of the job no more.
    HangUp(ConnectionId),
    /// A checkpoint's parts are all there: have the manifest written, then call `checkpoint_recorded`.
    Record { clock: Clock, parts: Vec<serde_json::Value> },
}

#[derive(Debug, Default)]
struct Seat {
    connection: Option<ConnectionId>,
    taken: bool,
    host: String,
    pid: u32,
    declared: Option<Vec<TensorSpec>>,
    offered: Option<Vec<Offer>>,
    clock: Option<Clock>,
    paths: Vec<PathChoice>,
    /// By lane.
    path_counts: BTreeMap<u16, PathCounts>,
    metrics: Option<SocketAddr>,
    sent: BTreeMap<String, u64>,
    reported: Option<Instant>,
    finished: bool,
    presence: Presence,
}

impl Seat {
    /// A seat as the job begins; nobody is waited for to take one that is vacant.
    fn new(is_vacant: bool) -> Seat {
        match is_vacant {
            true => Seat { taken: true, presence: Presence::Gone, ..Seat::default() },
            false => Seat::default(),
        }
    }
}

/// How a rank of a job comes and goes that goes on without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Presence {
    /// There since the beginning.
    #[default]
    First,
    /// Gone, or not there yet; another process may take the seat.
    Gone,
    /// Another process, which waits until nobody takes it for the one before.
    Waiting,
    /// Another process, which has been shown the job.
    Admitted,
}

/// A set of ranks that wait for one another.
#[derive(Debug)]
struct Gathering {
    here: BTreeSet<Rank>,
    since: Instant,
}

/// The state of the rendezvous.
#[derive(Debug)]
pub(super) struct Roster {
    config: JobConfig,
    /// Ranks whose processes the launcher starts itself: "any rank" never means one of these.
    reserved: BTreeSet<Rank>,
    seats: BTreeMap<Rank, Seat>,
    by_connection: BTreeMap<ConnectionId, Rank>,
    started: Instant,
    declaring: Option<Gathering>,
    offering: Option<Gathering>,
    running: bool,
    barriers: BTreeMap<String, Gathering>,
    /// The last clock at which a gradient was not finite, and how many there were.
    not_finite: (Option<Clock>, u64),
    checkpoints: Checkpoints,
    waiting: Waiting,
    changes: Changes,
    members: members::Members,
    /// Who asked for the change that is being made.
    changing_for: Option<ConnectionId>,
    /// When the first worker was seen.
    first_worker: Option<Instant>,
    /// When a wait of the job's beginning was looked at last.
    warned: Option<Instant>,
    layout: Option<Arc<Layout>>,
    /// A host and the bytes of memory that it has to give.
    room: Option<(String, u64)>,
    /// When any rank of the running job was heard last, and when all were asked since.
    heard: Option<Instant>,
    asked: Option<Instant>,
    /// Where the launcher's metrics are read.
    metrics: Option<SocketAddr>,
    ended: bool,
    /// The servers have been told how to end.
    dismissed: bool,
    /// Nobody is to go on without anybody any more.
    over: bool,
    view: Option<PackedView>,
    /// By shard; empty where each stays where it is.
    tenures: Vec<Tenure>,
    scale: scaling::Scale,
    /// The store's last answer was that it cannot be used.
    store_failed: bool,
    effects: VecDeque<Effect>,
}

impl Roster {
    pub fn new(config: JobConfig, reserved: BTreeSet<Rank>, now: Instant) -> Roster {
        let seats = config.ranks().map(|rank| (rank, Seat::new(config.is_vacant(rank)))).collect();
        let tenures = tenures::first(&config);
        let checkpoints = Checkpoints::new(config.shard_count(), config.has_tenures());
        Roster {
            waiting: Waiting::new(&config),
            changes: Changes::new(config.shard_count() as usize),
            members: members::Members::default(),
            changing_for: None,
            warned: None,
            first_worker: None,
            config,
            reserved,
            seats,
            by_connection: BTreeMap::new(),
            started: now,
            declaring: None,
            offering: None,
            running: false,
            barriers: BTreeMap::new(),
            not_finite: (None, 0),
            checkpoints,
            layout: None,
            room: None,
            heard: None,
            asked: None,
            metrics: None,
            ended: false,
            dismissed: false,
            over: false,
            view: None,
            tenures,
            scale: scaling::Scale::default(),
            store_failed: false,
            effects: VecDeque::new(),
        }
    }

    /// Refuses a job whose ranks on `host` take more than `bytes` of memory there.
    pub fn limit_memory(&mut self, host: String, bytes: u64) {
        self.room = Some((host, bytes));
    }

    /// The launcher's metrics are read here.
    pub fn set_metrics(&mut self, address: SocketAddr) {
        self.metrics = Some(address);
    }

    /// What is to be done next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// An authenticated caller wants a seat. The error is the refusal's text.
    pub fn join(
        &mut self,
        connection: ConnectionId,
        role: Role,
        index: Option<u16>,
        (host, pid): (String, u32),
    ) -> Result<Rank, String> {
        if self.ended {
            return Err("the job is ending".into());
        }
        let rank = match index {
            Some(index) => Rank { role, index },
            None => self.free_seat(role)?,
        };
        let count = self.config.ranks_of(role);
        let Some(seat) = self.seats.get_mut(&rank) else {
            return Err(format!("there is no {rank}: this job has {count} of that role, counted from 0"));
        };
        let again = seat.presence == Presence::Gone;
        if seat.taken && !again {
            return Err(format!(
                "{rank} has joined already (process {} on {}); every rank joins once",
                seat.pid, seat.host
            ));
        }
        *seat = Seat { connection: Some(connection), taken: true, host, pid, ..Seat::default() };
        if again {
            seat.presence = Presence::Waiting;
        }
        self.by_connection.insert(connection, rank);
        let config = Box::new(self.config.clone());
        self.send(vec![connection], FromLauncher::Welcome { rank, config, again });
        self.notice(Notice::Joined(rank));
        self.admit();
        // A server may come after the last declaration.
        if self.declaring.is_some() {
            self.show_view();
        }
        Ok(rank)
    }

    fn free_seat(&self, role: Role) -> Result<Rank, String> {
        let mut seats = self.seats.iter().filter(|(rank, seat)| rank.role == role && !seat.taken);
        let free = seats.find(|(rank, _)| !self.reserved.contains(rank)).map(|(rank, _)| *rank);
        free.ok_or_else(|| "no seat of this role is free; name the rank, or start the job with more".into())
    }

    /// A rank's message.
    pub fn handle(&mut self, connection: ConnectionId, message: ToLauncher, now: Instant) {
        if let ToLauncher::Control(control) = message {
            return self.control(connection, control, now);
        }
        let Some(&rank) = self.by_connection.get(&connection) else {
            return self.send(vec![connection], FromLauncher::Refused("only a rank of the job may say that".into()));
        };
        let outcome = match message {
            ToLauncher::Declare(specs) => self.declare(rank, specs, now),
            ToLauncher::Offer(offers) => self.offer(rank, offers, now),
            ToLauncher::Barrier(name) => self.barrier(rank, name, now),
            ToLauncher::Report(report) => self.report(rank, report, now),
            ToLauncher::AskTime => {
                self.effects.push_back(Effect::Time { to: connection });
                Ok(())
            }
            ToLauncher::Control(_) => unreachable!("answered above"),
        };
        if let Err(text) = outcome {
            self.protocol_failure(rank, text);
        }
    }

    /// A rank said what cannot be understood or must not be said.
    pub fn protocol_failure(&mut self, rank: Rank, text: String) {
        self.failed(rank, format!("broke the rendezvous protocol: {text}"), false);
    }

    fn declare(&mut self, rank: Rank, specs: Vec<TensorSpec>, now: Instant) -> Result<(), String> {
        let seat = self.seat(rank);
        if rank.role != Role::Worker || seat.declared.is_some() {
            return Err("only a worker declares tensors, and only once".into());
        }
        if seat.presence != Presence::First {
            self.declare_again(rank, &specs)?;
            self.seat(rank).declared = Some(specs);
            return Ok(());
        }
        seat.declared = Some(specs);
        let here = self.declaring.get_or_insert_with(|| Gathering { here: BTreeSet::new(), since: now });
        here.here.insert(rank);
        self.show_view();
        Ok(())
    }

    /// Sends the view to every rank once all workers have declared and every rank is there.
    fn show_view(&mut self) {
        let workers = || self.seats.iter().filter(|(rank, _)| rank.role == Role::Worker);
        if !workers().all(|(_, seat)| seat.declared.is_some()) || self.seats.values().any(|seat| !seat.taken) {
            return;
        }
        let declarations = workers().filter_map(|(_, seat)| seat.declared.as_ref());
        // A seat that is empty at first is that of a worker which has what the first worker has.
        let empty = usize::from(self.config.seats() - self.config.workers);
        let declarations =
            declarations.chain(workers().filter_map(|(_, seat)| seat.declared.as_ref()).take(1).cycle().take(empty));
        let declarations: Vec<Vec<TensorSpec>> = declarations.cloned().collect();
        let view = PackedView::pack(declarations.iter(), self.config.servers);
        // Declarations that contradict each other are refused by every rank for itself, each with the same words.
        if let Ok(layout) = Layout::build(&declarations, self.config.layout_options()) {
            // Chunks are dealt round, so the shards that got none are the last ones; they have nothing to store.
            let shards = layout.shards.iter().filter(|chunks| !chunks.is_empty()).count();
            self.checkpoints.expect(shards as u32);
            if let Some(why) = self.too_large(&layout) {
                self.ended = true;
                return self.notice(Notice::Refused(why));
            }
            self.layout = Some(Arc::new(layout));
        }
        self.declaring = None;
        self.view = Some(view.clone());
        self.send(self.everybody(), FromLauncher::View(view));
    }

    fn offer(&mut self, rank: Rank, offers: Vec<Offer>, now: Instant) -> Result<(), String> {
        if let Some((from, to, _)) = offers.iter().find(|(from, ..)| from.rank != rank) {
            return Err(format!("an offer of {from} to {to} can only come from {}", from.rank));
        }
        if let Some((_, to, _)) = offers.iter().find(|(_, to, _)| !self.seats.contains_key(&to.rank)) {
            return Err(format!("an offer to {to}, who is not of this job"));
        }
        let seat = self.seat(rank);
        if seat.offered.replace(offers).is_some() {
            return Err("every rank offers once".into());
        }
        if seat.presence == Presence::Admitted {
            return self.show_tenures(rank);
        }
        let offering = self.offering.get_or_insert_with(|| Gathering { here: BTreeSet::new(), since: now });
        offering.here.insert(rank);
        if offering.here.len() < self.seats.values().filter(|seat| seat.presence == Presence::First).count() {
            return Ok(());
        }
        self.offering = None;
        let mut inboxes: BTreeMap<Rank, Vec<Offer>> = BTreeMap::new();
        for offer in self.seats.values_mut().filter_map(|seat| seat.offered.as_mut()).flat_map(std::mem::take) {
            inboxes.entry(offer.1.rank).or_default().push(offer);
        }
        for rank in self.seats.keys().copied().collect::<Vec<_>>() {
            let to = self.seat(rank).connection.into_iter().collect();
            self.send(to, FromLauncher::Offers(inboxes.remove(&rank).unwrap_or_default()));
        }
        self.running = true;
        self.heard = Some(now);
        self.notice(Notice::Running);
        Ok(())
    }

    fn report(&mut self, rank: Rank, report: Report, now: Instant) -> Result<(), String> {
        self.heard = Some(now);
        match report {
            Report::Progress { clock } => {
                let seat = self.seat(rank);
                seat.clock = seat.clock.max(Some(clock));
            }
            Report::Sent(sent) => {
                let seat = self.seat(rank);
                (seat.sent, seat.reported) = (sent, Some(now));
            }
            Report::Paths(paths) => {
                self.seat(rank).paths.clone_from(&paths);
                self.notice(Notice::Paths { rank, paths });
            }
            Report::CheckpointWritten { shard, clock, info } => {
                if let Some(parts) = self.checkpoints.written(shard, clock, info)? {
                    self.effects.push_back(Effect::Record { clock, parts });
                }
            }
            Report::CheckpointLate { clock, reached } => {
                if let Some(command) = self.checkpoints.late(clock, reached) {
                    self.send(self.everybody(), FromLauncher::Command(command));
                }
            }
            Report::Claim { lane, shard, epoch, claim } => self.claim(PeerId { rank, lane }, shard, epoch, claim)?,
            Report::Declined { shard, text } => self.declined(rank, shard, &text),
            Report::Rebuild { lane, proposal } => self.pass_on(PeerId { rank, lane }, proposal)?,
            Report::PathCounts { lane, counts } => {
                self.seat(rank).path_counts.insert(lane, counts);
            }
            Report::NotFinite { clock, worker, tensor } => {
                // The clocks come in order, each from several shards at about the same time.
                if self.not_finite.0.is_none_or(|last| clock > last) {
                    self.not_finite = (Some(clock), self.not_finite.1 + 1);
                    let count = self.not_finite.1;
                    self.notice(Notice::NotFinite { clock, worker, tensor, count });
                }
            }
            Report::Waits { lane, waits } => self.on_waits(PeerId { rank, lane }, waits, now),
            Report::Prepared { number, lane, from } => self.on_prepared(PeerId { rank, lane }, number, from),
            Report::WorkerLost { lane, worker, text } => self.on_worker_lost(PeerId { rank, lane }, worker, text)?,
            Report::Lacked { worker, clock, chunks } => self.on_lacked(worker, clock, chunks),
            Report::Connected => self.on_connected(rank)?,
            Report::MetricsAt { address } => self.seat(rank).metrics = Some(address),
            Report::Timeline(part) => self.notice(Notice::Timeline { rank, part: Box::new(part) }),
            Report::Failed { text, elsewhere } => self.failed(rank, text, elsewhere),
            Report::Finished { .. } if self.retired(rank) => {}
            Report::Finished { summary } => {
                self.seat(rank).finished = true;
                self.notice(Notice::Finished { rank, summary });
                self.pass_barriers();
                self.end_servers();
            }
        }
        Ok(())
    }

    /// The furthest clock that anybody has reported.
    fn clock_reached(&self) -> Clock {
        self.seats.values().filter_map(|seat| seat.clock).max().unwrap_or(self.config.start_clock)
    }

    /// Why the ranks of the host whose memory is known do not fit into it.
    fn too_large(&self, layout: &Layout) -> Option<String> {
        let (host, bytes) = self.room.as_ref()?;
        let ranks = self.seats.iter().filter(|(_, seat)| seat.host == *host).map(|(rank, _)| *rank);
        self.config.check_memory(layout, ranks, *bytes).err().map(|why| why.to_string())
    }

    /// The model's layout, once all workers have declared their tensors.
    pub fn layout(&self) -> Option<Arc<Layout>> {
        self.layout.clone()
    }

    /// A connection is gone.
    pub fn lost(&mut self, connection: ConnectionId) {
        self.checkpoints.forget(connection);
        self.forget_asker(connection);
        let Some(rank) = self.by_connection.remove(&connection) else { return };
        let seat = self.seat(rank);
        seat.connection = None;
        if !seat.finished {
            self.left(rank);
        }
    }

    fn everybody(&self) -> Vec<ConnectionId> {
        self.seats.values().filter_map(|seat| seat.connection).collect()
    }

    fn seat(&mut self, rank: Rank) -> &mut Seat {
        self.seats.get_mut(&rank).expect("every rank of the job has a seat")
    }

    fn send(&mut self, to: Vec<ConnectionId>, message: FromLauncher) {
        self.effects.push_back(Effect::Send { to, message });
    }

    fn notice(&mut self, notice: Notice) {
        self.effects.push_back(Effect::Notice(notice));
    }
}
