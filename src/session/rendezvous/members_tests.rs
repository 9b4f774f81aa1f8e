//! Workers that are lost and come again under the roster's eyes: in which order the lanes and the others are told, and who is shown
//! the job when.
//!
//! Invariant: no sockets and no sleeping.

use std::{collections::BTreeSet, time::Instant};

use super::{
    message::{Command, Control, FromLauncher, Report, ToLauncher},
    notice::Notice,
    roster::{ConnectionId, Effect, Roster},
};
use crate::{
    layout::TensorSpec,
    session::{Change, JobConfig, OnWorkerLoss},
    types::{Clock, Rank, Role},
};

const SERVER: ConnectionId = 10;
const WORKERS: [ConnectionId; 3] = [20, 21, 22];
/// Another process of worker 1.
const AGAIN: ConnectionId = 31;

/// A server with one shard and three workers, which run.
struct Stage {
    roster: Roster,
    sent: Vec<(ConnectionId, FromLauncher)>,
    notices: Vec<Notice>,
}

fn tensors() -> Vec<TensorSpec> {
    vec![TensorSpec::new("a", [4])]
}

impl Stage {
    fn running() -> Stage {
        let config = JobConfig { workers: 3, on_worker_loss: OnWorkerLoss::Restart, ..JobConfig::default() };
        config.validate().unwrap();
        let roster = Roster::new(config, BTreeSet::new(), Instant::now());
        let mut stage = Stage { roster, sent: Vec::new(), notices: Vec::new() };
        stage.join(SERVER, Rank::server(0)).unwrap();
        for (index, connection) in (0..).zip(WORKERS) {
            stage.join(connection, Rank::worker(index)).unwrap();
            stage.say(connection, ToLauncher::Declare(tensors()));
        }
        [SERVER].into_iter().chain(WORKERS).for_each(|c| stage.say(c, ToLauncher::Offer(Vec::new())));
        assert_eq!(stage.notices.last(), Some(&Notice::Running));
        (stage.sent, stage.notices) = (Vec::new(), Vec::new());
        stage
    }

    fn join(&mut self, connection: ConnectionId, rank: Rank) -> Result<Rank, String> {
        let joined = self.roster.join(connection, rank.role, Some(rank.index), ("host".into(), connection as u32));
        self.collect();
        joined
    }

    fn say(&mut self, connection: ConnectionId, message: ToLauncher) {
        self.roster.handle(connection, message, Instant::now());
        self.collect();
    }

    fn lose(&mut self, connection: ConnectionId) {
        self.roster.lost(connection);
        self.collect();
    }

    fn prepared(&mut self, number: u64, from: Clock) {
        self.say(SERVER, ToLauncher::Report(Report::Prepared { number, lane: 0, from }));
    }

    fn finish(&mut self, connection: ConnectionId) {
        self.say(connection, ToLauncher::Report(Report::Finished { summary: serde_json::Value::Null }));
    }

    fn collect(&mut self) {
        while let Some(effect) = self.roster.poll_effect() {
            match effect {
                Effect::Send { to, message } => self.sent.extend(to.into_iter().map(|id| (id, message.clone()))),
                Effect::Notice(notice) => self.notices.push(notice),
                Effect::HangUp(_) => {}
                other => unreachable!("{other:?}"),
            }
        }
    }

    /// What one of them has been told since this was asked last, of commands and views.
    fn told(&mut self, connection: ConnectionId) -> Vec<FromLauncher> {
        let told = self.sent.extract_if(.., |(to, _)| *to == connection);
        told.map(|(_, message)| message).collect()
    }
}

fn prepare(number: u64, change: Change) -> FromLauncher {
    FromLauncher::Command(Command::Prepare { number, clock: 0, change })
}

fn change(number: u64, clock: Clock, change: Change) -> FromLauncher {
    FromLauncher::Command(Command::Change { number, change: Some((clock, change)) })
}

/// The text of what would be sent: messages cannot be compared.
fn texts(messages: &[FromLauncher]) -> Vec<String> {
    messages.iter().map(|message| format!("{message:?}")).collect()
}

#[test]
fn a_worker_is_out_and_in_again_from_clocks_that_all_lanes_have_held() {
    let mut stage = Stage::running();
    stage.lose(WORKERS[1]);
    assert_eq!(texts(&stage.told(SERVER)), texts(&[prepare(1, Change::Lost(1))]));
    stage.join(AGAIN, Rank::worker(1)).unwrap();
    let early = stage.told(AGAIN);
    assert!(
        matches!(early[..], [FromLauncher::Welcome { again: true, .. }]),
        "its predecessor is not expelled: {early:?}"
    );
    stage.prepared(1, 7);
    assert_eq!(texts(&stage.told(SERVER)), texts(&[change(1, 7, Change::Lost(1))]));
    let shown = stage.told(AGAIN);
    assert!(shown.iter().any(|message| matches!(message, FromLauncher::View(_))), "{shown:?}");
    stage.say(AGAIN, ToLauncher::Declare(tensors()));
    stage.say(AGAIN, ToLauncher::Offer(Vec::new()));
    assert!(stage.told(SERVER).is_empty(), "it has not reached the lanes yet");
    stage.say(AGAIN, ToLauncher::Report(Report::Connected));
    assert_eq!(texts(&stage.told(SERVER)), texts(&[prepare(2, Change::Joins(1))]));
    stage.prepared(2, 12);
    let begins = texts(&[change(2, 12, Change::Joins(1))]);
    assert!(texts(&stage.told(AGAIN)).ends_with(&begins));
    stage.say(99, ToLauncher::Control(Control::Status));
    let Some(FromLauncher::Status(status)) = stage.told(99).pop() else { panic!() };
    let turns: Vec<_> = status.turns.iter().map(|turn| (turn.worker, turn.clock, turn.is_in)).collect();
    assert_eq!(turns, [(1, 7, false), (1, 12, true)]);
    assert!(status.ranks.iter().all(|rank| rank.rank.role == Role::Server || rank.state == "running"));
}

/// The last updates of the others would not have been applied: the servers were told to end before they knew who was out.
#[test]
fn the_job_ends_only_when_all_lanes_know_who_is_out() {
    let mut stage = Stage::running();
    stage.lose(WORKERS[1]);
    stage.finish(WORKERS[0]);
    stage.finish(WORKERS[2]);
    let ends = |stage: &mut Stage| texts(&stage.told(SERVER)).iter().any(|text| text.contains("End"));
    assert!(!ends(&mut stage));
    stage.prepared(1, 7);
    assert!(ends(&mut stage));
}

#[test]
fn two_losses_are_made_one_after_the_other_and_the_last_worker_is_not_gone_on_without() {
    let mut stage = Stage::running();
    stage.lose(WORKERS[1]);
    stage.say(SERVER, ToLauncher::Report(Report::WorkerLost { lane: 0, worker: 2, text: "silent".into() }));
    assert_eq!(texts(&stage.told(SERVER)), texts(&[prepare(1, Change::Lost(1))]));
    stage.prepared(1, 7);
    assert_eq!(texts(&stage.told(SERVER)), texts(&[change(1, 7, Change::Lost(1)), prepare(2, Change::Lost(2))]));
    stage.lose(WORKERS[0]);
    assert_eq!(stage.notices.last(), Some(&Notice::Deserted));
}

#[test]
fn who_comes_again_with_other_tensors_is_not_let_in() {
    let mut stage = Stage::running();
    stage.lose(WORKERS[1]);
    stage.prepared(1, 7);
    stage.join(AGAIN, Rank::worker(1)).unwrap();
    stage.say(AGAIN, ToLauncher::Declare(vec![TensorSpec::new("b", [4])]));
    let Some(Notice::Gone(departure)) = stage.notices.last() else { panic!("{:?}", stage.notices) };
    assert!(departure.why.as_ref().is_some_and(|why| why.contains("other tensors")), "{departure:?}");
    assert_eq!(
        stage.join(SERVER + 1, Rank::worker(0)).unwrap_err().split(':').next(),
        Some("worker 0 has joined already (process 20 on host); every rank joins once")
    );
}

/// A barrier that waited for a worker that was gone ended the job when patience did.
#[test]
fn a_barrier_waits_for_nobody_who_is_gone() {
    let mut stage = Stage::running();
    for connection in [SERVER, WORKERS[0], WORKERS[2]] {
        stage.say(connection, ToLauncher::Barrier("b".into()));
    }
    assert!(stage.told(SERVER).is_empty());
    stage.lose(WORKERS[1]);
    let told = texts(&stage.told(SERVER));
    assert!(told[0].contains("BarrierPassed"), "{told:?}");
}
