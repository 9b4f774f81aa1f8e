//! The roster driven by hand: who joins, who is missing, what is refused, and that a refusal changes nothing.
//!
//! Invariant: no sockets and no sleeping; every moment is made up.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    message::{Command, Control, FromLauncher, Report, ToLauncher},
    notice::Notice,
    roster::{ConnectionId, Effect, Roster},
};
use crate::{
    layout::TensorSpec,
    optim::LiveChange,
    session::{Change, JobConfig, Owed, Wait},
    transport::Endpoint,
    types::{PeerId, Rank, Role, ShardId},
};

/// One server, two workers.
struct Stage {
    roster: Roster,
    start: Instant,
    sent: Vec<(ConnectionId, FromLauncher)>,
    notices: Vec<Notice>,
    recorded: Vec<u64>,
}

const SERVER: ConnectionId = 10;
const WORKERS: [ConnectionId; 2] = [20, 21];

impl Stage {
    fn new(change: impl FnOnce(&mut JobConfig)) -> Stage {
        let mut config = JobConfig { workers: 2, join_ms: 30_000, setup_ms: 60_000, ..JobConfig::default() };
        change(&mut config);
        let start = Instant::now();
        let roster = Roster::new(config, BTreeSet::new(), start);
        Stage { roster, start, sent: Vec::new(), notices: Vec::new(), recorded: Vec::new() }
    }

    fn join(&mut self, connection: ConnectionId, role: Role, index: Option<u16>) -> Result<Rank, String> {
        let outcome = self.roster.join(connection, role, index, ("host".into(), 1));
        self.collect();
        outcome
    }

    fn say(&mut self, connection: ConnectionId, message: ToLauncher) {
        self.roster.handle(connection, message, self.start);
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(effect) = self.roster.poll_effect() {
            match effect {
                Effect::Send { to, message } => self.sent.extend(to.into_iter().map(|id| (id, message.clone()))),
                Effect::Notice(notice) => self.notices.push(notice),
                Effect::Swap(_) | Effect::HangUp(_) => unreachable!("each shard has one copy"),
                Effect::Time { to } => {
                    let message = FromLauncher::Time { at_ns: 1, clock: "test".into() };
                    self.sent.push((to, message));
                }
                Effect::Record { clock, .. } => {
                    self.recorded.push(clock);
                    self.roster.checkpoint_recorded(clock, Ok(()));
                }
            }
        }
    }

    fn take(&mut self) -> Vec<(ConnectionId, FromLauncher)> {
        std::mem::take(&mut self.sent)
    }

    fn all_join(&mut self) {
        self.join(SERVER, Role::Server, Some(0)).unwrap();
        for (index, connection) in WORKERS.into_iter().enumerate() {
            self.join(connection, Role::Worker, Some(index as u16)).unwrap();
        }
        self.take();
    }

    fn run(&mut self) {
        self.all_join();
        WORKERS.into_iter().for_each(|connection| self.say(connection, ToLauncher::Declare(Vec::new())));
        [SERVER, WORKERS[0], WORKERS[1]].into_iter().for_each(|c| self.say(c, ToLauncher::Offer(Vec::new())));
        assert_eq!(self.notices.last(), Some(&Notice::Running));
        self.take();
        self.notices.clear();
    }

    /// The text of the time-out that comes `after` the start.
    fn timed_out(&mut self, after: Duration) -> Option<String> {
        self.roster.handle_timeout(self.start + after);
        self.collect();
        self.notices.iter().find_map(|notice| match notice {
            Notice::TimedOut(text) => Some(text.clone()),
            _ => None,
        })
    }
}

impl Stage {
    /// The verdicts that were told.
    fn verdicts(&self) -> Vec<String> {
        let told = self.notices.iter().filter_map(|notice| match notice {
            Notice::Waiting(verdict) => Some(verdict.to_string()),
            _ => None,
        });
        told.collect()
    }
}

const S: fn(u64) -> Duration = Duration::from_secs;

#[test]
fn a_seat_is_taken_once_and_only_if_it_exists() {
    let mut stage = Stage::new(|_| {});
    stage.all_join();
    let before = format!("{:?}", stage.roster);
    for (role, index, word) in [
        (Role::Worker, Some(1), "worker 1 has joined already"),
        (Role::Worker, Some(2), "there is no worker 2: this job has 2"),
        (Role::Server, None, "no seat of this role is free"),
    ] {
        let text = stage.join(99, role, index).unwrap_err();
        assert!(text.contains(word), "{text}");
    }
    assert_eq!(format!("{:?}", stage.roster), before, "a refusal changes nothing");
}

#[test]
fn any_rank_means_a_free_one_that_the_launcher_does_not_start() {
    let config = JobConfig { workers: 3, ..JobConfig::default() };
    let mut roster = Roster::new(config, BTreeSet::from([Rank::worker(0)]), Instant::now());
    let mut join = |connection| roster.join(connection, Role::Worker, None, (String::new(), 1));
    assert_eq!(join(1), Ok(Rank::worker(1)));
    assert_eq!(join(2), Ok(Rank::worker(2)));
    assert!(join(3).is_err());
}

#[test]
fn the_missing_are_named_in_time() {
    let mut stage = Stage::new(|_| {});
    stage.join(SERVER, Role::Server, Some(0)).unwrap();
    stage.join(WORKERS[0], Role::Worker, Some(0)).unwrap();
    assert_eq!(stage.roster.next_deadline(), Some(stage.start + S(30)));
    assert_eq!(stage.timed_out(S(1)), None);
    // From the first worker on it is worth telling that others are not there, and told again when it has lasted twice as long.
    assert_eq!(stage.roster.next_deadline(), Some(stage.start + S(6)));
    for (after, told) in [(5, 0), (6, 1), (7, 1), (11, 2), (16, 2), (29, 3)] {
        assert_eq!(stage.timed_out(S(after)), None);
        let verdicts = stage.verdicts();
        assert_eq!(verdicts.len(), told, "after {after} s: {verdicts:?}");
        assert!(verdicts.iter().all(|text| text.starts_with("worker 1 has not joined; 2 others wait")), "{verdicts:?}");
    }
    assert_eq!(stage.timed_out(S(30)).unwrap(), "worker 1 has not joined within 30 s");
    assert_eq!(stage.roster.next_deadline(), None, "said once");
}

#[test]
fn many_missing_are_counted_beyond_eight() {
    let mut stage = Stage::new(|config| config.workers = 20);
    let text = stage.timed_out(S(30)).unwrap();
    assert!(text.starts_with("server 0, worker 0,") && text.contains("worker 6 and 13 more have not joined"), "{text}");
}

#[test]
fn whoever_does_not_declare_offer_or_come_to_a_barrier_is_named() {
    let mut stage = Stage::new(|_| {});
    stage.all_join();
    assert_eq!(stage.timed_out(S(1000)), None, "nobody waits for anything yet");
    stage.say(WORKERS[1], ToLauncher::Declare(Vec::new()));
    assert_eq!(stage.timed_out(S(60)).unwrap(), "worker 0 has not declared any tensors within 60 s");

    let mut stage = Stage::new(|_| {});
    stage.all_join();
    stage.say(WORKERS[0], ToLauncher::Offer(Vec::new()));
    let text = stage.timed_out(S(60)).unwrap();
    assert_eq!(text, "server 0 and worker 1 have not offered any endpoints within 60 s");

    let mut stage = Stage::new(|_| {});
    stage.run();
    stage.say(SERVER, ToLauncher::Barrier("b".into()));
    stage.say(WORKERS[0], ToLauncher::Barrier("b".into()));
    assert_eq!(stage.timed_out(S(60)).unwrap(), "worker 1 has not reached barrier `b` within 60 s");
}

#[test]
fn the_view_comes_when_all_are_there_whatever_the_order() {
    let mut stage = Stage::new(|_| {});
    let specs = |name: &str| vec![TensorSpec::new(name, vec![2, 3])];
    for (index, connection) in WORKERS.into_iter().enumerate() {
        stage.join(connection, Role::Worker, Some(index as u16)).unwrap();
    }
    stage.take();
    stage.say(WORKERS[1], ToLauncher::Declare(specs("b")));
    stage.say(WORKERS[0], ToLauncher::Declare(specs("a")));
    assert!(stage.take().is_empty(), "the server is not there yet");
    stage.join(SERVER, Role::Server, None).unwrap();
    let views = stage.take().into_iter().filter_map(|(to, message)| match message {
        FromLauncher::View(packed) => Some((to, packed.unpack().unwrap())),
        _ => None,
    });
    let views: Vec<_> = views.collect();
    assert_eq!(views.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [SERVER, WORKERS[0], WORKERS[1]]);
    assert!(views.iter().all(|(_, view)| view.declarations == [specs("a"), specs("b")] && view.servers == 1));
}

#[test]
fn offers_reach_those_they_are_for() {
    let mut stage = Stage::new(|_| {});
    stage.all_join();
    let at = |text: &str| Endpoint::new("tcp", text);
    let (server, w0, w1) = (PeerId::server(0, 0), PeerId::worker(0), PeerId::worker(1));
    stage.say(SERVER, ToLauncher::Offer(vec![(server, w0, at("s0")), (server, w1, at("s1"))]));
    stage.say(WORKERS[0], ToLauncher::Offer(vec![(w0, server, at(""))]));
    assert!(stage.take().is_empty());
    stage.say(WORKERS[1], ToLauncher::Offer(vec![]));
    let sent: Vec<_> = stage.take().into_iter().map(|(to, message)| (to, format!("{message:?}"))).collect();
    assert_eq!(sent.len(), 3);
    assert!(sent[0].0 == SERVER && sent[0].1.matches("Endpoint").count() == 1);
    assert!(sent[1].0 == WORKERS[0] && sent[1].1.contains("s0") && !sent[1].1.contains("s1"));
    assert!(sent[2].0 == WORKERS[1] && sent[2].1.contains("s1"));
}

#[test]
fn a_rank_that_breaks_the_protocol_fails_by_name() {
    let forged = (PeerId::worker(1), PeerId::server(0, 0), Endpoint::default());
    let to_nobody = (PeerId::worker(0), PeerId::server(7, 0), Endpoint::default());
    let part = |shard| Report::CheckpointWritten { shard: ShardId(shard), clock: 1, info: serde_json::Value::Null };
    let cases = [
        (WORKERS[0], ToLauncher::Offer(vec![forged])),
        (WORKERS[0], ToLauncher::Offer(vec![to_nobody])),
        (SERVER, ToLauncher::Declare(Vec::new())),
        (SERVER, ToLauncher::Report(part(1))),
        (WORKERS[0], ToLauncher::Barrier("x".repeat(65))),
    ];
    for (connection, message) in cases {
        let mut stage = Stage::new(|_| {});
        stage.all_join();
        stage.notices.clear();
        stage.say(connection, message);
        assert!(matches!(&stage.notices[..], [Notice::Failed { elsewhere: false, .. }]), "{:?}", stage.notices);
    }
}

#[test]
fn barriers_open_when_the_last_one_comes() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    for connection in [WORKERS[1], SERVER] {
        stage.say(connection, ToLauncher::Barrier("a".into()));
        stage.say(connection, ToLauncher::Barrier("b".into()));
    }
    stage.say(WORKERS[0], ToLauncher::Barrier("b".into()));
    let sent = stage.take();
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|(_, message)| matches!(message, FromLauncher::BarrierPassed(name) if name == "b")));
}

#[test]
fn the_job_ends_with_the_last_worker() {
    let mut stage = Stage::new(|config| config.checkpoint.dir = Some("/c".into()));
    stage.run();
    let finished = || ToLauncher::Report(Report::Finished { summary: 1.into() });
    stage.say(WORKERS[0], finished());
    assert!(stage.take().is_empty());
    stage.roster.lost(WORKERS[0]);
    stage.say(WORKERS[1], finished());
    let stop = |to: &(ConnectionId, FromLauncher)| {
        matches!(&to.1, FromLauncher::Command(Command::End { checkpoint: true, .. }))
    };
    let sent = stage.take();
    assert!(sent.iter().all(stop) && sent[0].0 == SERVER, "{sent:?}");
    assert!(!stage.notices.iter().any(|notice| matches!(notice, Notice::Lost(_))));
}

/// The workers were through before the clock at which the job was to stop, and the servers waited for the word to leave until
/// they were killed, without the checkpoint at the end.
#[test]
fn a_job_that_ends_before_its_stop_is_ended_as_usual() {
    let mut stage = Stage::new(|config| config.checkpoint.dir = Some("/c".into()));
    stage.run();
    stage.say(WORKERS[0], ToLauncher::Report(Report::Progress { clock: 49 }));
    stage.roster.request_checkpoint(Some("preempted".into()), None).unwrap();
    stage.collect();
    assert!(
        stage.take().iter().all(|(_, m)| matches!(m, FromLauncher::Command(Command::Stop { clock: Some(51), .. })))
    );
    for worker in WORKERS {
        stage.say(worker, ToLauncher::Report(Report::Progress { clock: 50 }));
        stage.say(worker, ToLauncher::Report(Report::Finished { summary: 1.into() }));
    }
    let end = |m: &FromLauncher| matches!(m, FromLauncher::Command(Command::End { clock: 50, checkpoint: true }));
    assert_eq!(stage.take().iter().filter(|(to, message)| *to == SERVER && end(message)).count(), 1);
    stage.say(SERVER, ToLauncher::Report(Report::Finished { summary: 1.into() }));
    assert!(stage.take().is_empty(), "told once");
}

/// A rank that reports a clock beyond all reason brought the launcher down.
#[test]
fn a_clock_beyond_all_reason_does_no_harm() {
    let mut stage = Stage::new(|config| config.checkpoint.dir = Some("/c".into()));
    stage.run();
    stage.say(WORKERS[0], ToLauncher::Report(Report::Progress { clock: u64::MAX }));
    stage.say(99, ToLauncher::Control(Control::Checkpoint));
    assert_eq!(stage.take().len(), 3);
}

#[test]
fn a_lost_rank_is_reported_and_its_seat_stays_taken() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    stage.roster.lost(WORKERS[1]);
    stage.collect();
    assert_eq!(stage.notices, [Notice::Lost(Rank::worker(1))]);
    assert!(stage.join(50, Role::Worker, Some(1)).is_err());
}

#[test]
fn a_checkpoint_on_demand_lies_ahead_and_is_answered_when_complete() {
    let mut stage = Stage::new(|config| (config.checkpoint.dir, config.shards_per_server) = (Some("/c".into()), 2));
    stage.run();
    for (connection, clock) in [(WORKERS[0], 7), (WORKERS[1], 9), (WORKERS[1], 8)] {
        stage.say(connection, ToLauncher::Report(Report::Progress { clock }));
    }
    stage.say(99, ToLauncher::Control(Control::Checkpoint));
    let sent = stage.take();
    let asked = |message: &FromLauncher| matches!(message, FromLauncher::Command(Command::Checkpoint { clock: 11 }));
    assert!(sent.len() == 3 && sent.iter().all(|(_, message)| asked(message)), "{sent:?}");
    for shard in 0..2 {
        assert!(stage.recorded.is_empty());
        let report = Report::CheckpointWritten { shard: ShardId(shard), clock: 11, info: shard.into() };
        stage.say(SERVER, ToLauncher::Report(report));
    }
    assert_eq!(stage.recorded, [11]);
    assert!(matches!(&stage.take()[..], [(99, FromLauncher::CheckpointWritten { clock: 11 })]));
    stage.say(99, ToLauncher::Control(Control::Status));
    let sent = stage.take();
    let [(99, FromLauncher::Status(status))] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!(status.checkpoint, Some(11));
    assert_eq!(status.ranks.iter().map(|rank| rank.clock).collect::<Vec<_>>(), [None, Some(7), Some(9)]);
}

#[test]
fn a_checkpoint_that_cannot_be_is_refused_with_the_reason() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    stage.say(99, ToLauncher::Control(Control::Checkpoint));
    assert!(matches!(&stage.take()[..], [(99, FromLauncher::Refused(text))] if text.contains("--checkpoint-dir")));
    let mut stage = Stage::new(|config| config.checkpoint.dir = Some("/c".into()));
    stage.all_join();
    assert!(stage.roster.request_checkpoint(None, None).unwrap_err().contains("has not begun"));
}

#[test]
fn after_a_failure_everybody_is_told_and_nobody_may_join() {
    let mut stage = Stage::new(|_| {});
    stage.join(SERVER, Role::Server, Some(0)).unwrap();
    stage.take();
    stage.roster.fail("worker 0: out of memory".into());
    stage.collect();
    assert!(matches!(&stage.take()[..], [(SERVER, FromLauncher::Command(Command::JobFailed { .. }))]));
    assert!(stage.join(WORKERS[0], Role::Worker, None).unwrap_err().contains("ending"));
    assert_eq!(stage.timed_out(S(1000)), None, "a job that has failed does not fail again");
}

#[test]
fn a_control_caller_is_no_rank() {
    let mut stage = Stage::new(|_| {});
    stage.all_join();
    stage.notices.clear();
    stage.say(99, ToLauncher::Barrier("b".into()));
    assert!(matches!(&stage.take()[..], [(99, FromLauncher::Refused(_))]));
    assert!(stage.notices.is_empty());
}

/// Memory is looked at once, when all workers have declared and before any rank has seen the view by which it would allocate.
#[test]
fn a_job_that_does_not_fit_into_the_host_is_refused_before_anybody_allocates() {
    for (host, fits) in [("host", false), ("another", true)] {
        let mut stage = Stage::new(|_| {});
        stage.roster.limit_memory(host.into(), 1 << 20);
        stage.all_join();
        stage.take();
        let tensor = || vec![TensorSpec::new("t", [1 << 20])];
        WORKERS.into_iter().for_each(|connection| stage.say(connection, ToLauncher::Declare(tensor())));
        let refused = stage.notices.iter().find_map(|notice| match notice {
            Notice::Refused(text) => Some(text.clone()),
            _ => None,
        });
        let seen = stage.take().iter().any(|(_, message)| matches!(message, FromLauncher::View(_)));
        assert_eq!((refused.is_none(), seen), (fits, fits), "{refused:?}");
        // 4 MiB of parameters: master and two arrays, one place more a chunk for replies, four slots of 1 MiB for each of two workers.
        if let Some(text) = refused {
            assert!(text.contains(&format!("1 servers take {} bytes", (4 + 8 + 4 + 8) << 20)), "{text}");
        }
    }
}

fn wait(of: PeerId, owed: Owed, since_ms: u64, silence_ms: u64) -> Wait {
    let silence_ms = Some(silence_ms);
    Wait { of, owed, chunk: None, clock: Some(3), since_ms, fabric: "tcp".into(), silence_ms }
}

fn waits(waits: &[Wait]) -> ToLauncher {
    ToLauncher::Report(Report::Waits { lane: 0, waits: waits.to_vec() })
}

#[test]
fn all_are_asked_once_somebody_has_waited_for_long_and_one_verdict_is_told() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    let parameters = |since| waits(&[wait(PeerId::server(0, 0), Owed::Parameters, since, 10)]);
    stage.say(WORKERS[0], parameters(4000));
    assert!(stage.take().is_empty(), "not for long yet");
    stage.say(WORKERS[0], parameters(5000));
    let asked = stage.take();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(asked.iter().all(|(_, message)| matches!(message, FromLauncher::Command(Command::TellWaits))));
    stage.say(WORKERS[0], parameters(5001));
    assert!(stage.verdicts().is_empty(), "not all have answered");
    stage.say(SERVER, waits(&[wait(PeerId::worker(1), Owed::Push, 5002, 10)]));
    assert!(stage.take().is_empty() && stage.verdicts().is_empty(), "one has not");
    stage.say(WORKERS[1], waits(&[]));
    let [verdict] = &stage.verdicts()[..] else { panic!("{:?}", stage.notices) };
    assert!(
        verdict.starts_with("worker 1 (host host) has not pushed clock 3") && verdict.contains("alive"),
        "{verdict}"
    );
    stage.say(99, ToLauncher::Control(Control::Status));
    let told = stage.take().pop();
    let Some((99, FromLauncher::Status(status))) = told else { panic!("{told:?}") };
    assert_eq!(status.verdict.map(|verdict| verdict.ranks), Some(vec![Rank::worker(1)]));
}

#[test]
fn nobody_waits_for_the_answer_of_one_who_is_silent() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    stage.say(WORKERS[0], waits(&[wait(PeerId::server(0, 0), Owed::Parameters, 6000, 10)]));
    stage.say(SERVER, waits(&[wait(PeerId::worker(1), Owed::Push, 6000, 6500)]));
    let [verdict] = &stage.verdicts()[..] else { panic!("{:?}", stage.notices) };
    assert!(verdict.contains("worker 1") && verdict.contains("no sign of life for 6.5 s"), "{verdict}");
}

/// Were it said as if it were news, a job with long steps would say nothing else.
#[test]
fn that_all_workers_compute_is_shown_and_not_told() {
    let mut stage = Stage::new(|_| {});
    stage.run();
    stage.say(SERVER, waits(&[0, 1].map(|worker| wait(PeerId::worker(worker), Owed::Push, 6000, 10))));
    WORKERS.into_iter().for_each(|worker| stage.say(worker, waits(&[])));
    assert!(stage.verdicts().is_empty(), "{:?}", stage.notices);
    stage.say(99, ToLauncher::Control(Control::Status));
    let told = stage.take().pop();
    assert!(matches!(told, Some((99, FromLauncher::Status(status))) if status.verdict.is_some()));
}

#[test]
fn a_change_is_prepared_by_all_lanes_and_given_up_at_the_end() {
    let mut stage = Stage::new(|_| {});
    let change = LiveChange { learning_rate: Some(0.5), ..LiveChange::default() };
    let ask = || ToLauncher::Control(Control::Change(change));
    stage.say(99, ask());
    assert!(matches!(stage.take()[..], [(99, FromLauncher::Refused(_))]), "it does not run yet");
    stage.run();
    stage.say(99, ToLauncher::Control(Control::Change(LiveChange { clip_norm: Some(1.0), ..change })));
    assert!(matches!(stage.take()[..], [(99, FromLauncher::Refused(_))]), "nothing is clipped");
    stage.say(99, ask());
    assert_eq!(stage.take().len(), 3);
    let prepared = |number, from| ToLauncher::Report(Report::Prepared { number, lane: 0, from });
    stage.say(SERVER, prepared(1, 8));
    let sent = stage.take();
    assert!(matches!(sent.last(), Some((99, FromLauncher::Changed { clock: 8 }))), "{sent:?}");
    assert_eq!(stage.notices.last(), Some(&Notice::Changed { clock: 8, change: Change::Settings(change) }));
    stage.say(99, ask());
    stage.take();
    for worker in WORKERS {
        stage.say(worker, ToLauncher::Report(Report::Finished { summary: serde_json::Value::Null }));
    }
    let sent = stage.take();
    let given_up = |(to, message): &(ConnectionId, FromLauncher)| {
        *to == SERVER && matches!(message, FromLauncher::Command(Command::Change { number: 2, change: None }))
    };
    assert!(sent.iter().any(given_up), "{sent:?}");
}
