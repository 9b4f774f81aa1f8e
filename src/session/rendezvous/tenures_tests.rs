//! Servers that come and go under the roster's eyes, with two copies of each shard: who may claim what, who is told, and when the job
//! must end.
//!
//! Invariant: no sockets and no sleeping; the store answers when the test says so.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Instant,
};

use super::{
    message::{Command, Control, FromLauncher, Report, ToLauncher},
    notice::{Departure, Notice},
    roster::{ConnectionId, Effect, Roster},
    swaps::Swapping,
};
use crate::{
    optim::LiveChange,
    session::{Change, Claim, JobConfig, Proposal, Swap, Tenure, TenureLog, TenureStore, pair},
    transport::Endpoint,
    types::{Epoch, PeerId, Rank, Role, ShardId},
};

const SERVERS: u16 = 3;
const WORKER: ConnectionId = 100;

/// Three servers with a shard each, one worker; server n is connection n until it comes again.
struct Stage {
    roster: Roster,
    log: TenureLog,
    _directory: tempfile::TempDir,
    swaps: VecDeque<Swapping>,
    /// The store answers at once.
    answers: bool,
    sent: Vec<(ConnectionId, FromLauncher)>,
    notices: Vec<Notice>,
    hung_up: Vec<ConnectionId>,
}

impl Stage {
    fn running() -> Stage {
        let mut config = JobConfig { servers: SERVERS, replicas: 2, ..JobConfig::default() };
        config.checkpoint.dir = Some("/c".into());
        config.validate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut stage = Stage {
            roster: Roster::new(config, BTreeSet::new(), Instant::now()),
            log: TenureLog::open(&directory.path().join("tenures")).unwrap(),
            _directory: directory,
            swaps: VecDeque::new(),
            answers: true,
            sent: Vec::new(),
            notices: Vec::new(),
            hung_up: Vec::new(),
        };
        for server in 0..SERVERS {
            stage.join(u64::from(server), server).unwrap();
        }
        stage.roster.join(WORKER, Role::Worker, Some(0), ("host".into(), 9)).unwrap();
        stage.say(WORKER, ToLauncher::Declare(Vec::new()));
        for connection in (0..u64::from(SERVERS)).chain([WORKER]) {
            stage.say(connection, ToLauncher::Offer(Vec::new()));
        }
        assert_eq!(stage.notices.last(), Some(&Notice::Running));
        stage.forget();
        stage
    }

    fn forget(&mut self) {
        self.sent.clear();
        self.notices.clear();
        self.hung_up.clear();
    }

    fn join(&mut self, connection: ConnectionId, server: u16) -> Result<Rank, String> {
        let joined = self.roster.join(connection, Role::Server, Some(server), ("host".into(), connection as u32));
        self.collect();
        joined
    }

    fn say(&mut self, connection: ConnectionId, message: ToLauncher) {
        self.roster.handle(connection, message, Instant::now());
        self.collect();
    }

    fn report(&mut self, connection: ConnectionId, report: Report) {
        self.say(connection, ToLauncher::Report(report));
    }

    /// The lane of the shard that this connection's rank has, if it is its `place` of the pair.
    fn claim(&mut self, connection: ConnectionId, place: usize, shard: u16, epoch: Epoch, claim: Claim) {
        let lane = lanes(shard)[place].lane;
        self.report(connection, Report::Claim { lane, shard: ShardId(shard), epoch, claim });
    }

    fn lose(&mut self, connection: ConnectionId) {
        self.roster.lost(connection);
        self.collect();
    }

    /// The store answers all that it has been asked.
    fn answer(&mut self) {
        while let Some(swap) = self.swaps.pop_front() {
            let outcome = self.log.compare_and_swap(swap.shard, swap.expected, swap.next);
            self.roster.swapped(swap, outcome);
            self.take_effects();
        }
    }

    fn collect(&mut self) {
        self.take_effects();
        if self.answers {
            self.answer();
        }
    }

    fn take_effects(&mut self) {
        while let Some(effect) = self.roster.poll_effect() {
            match effect {
                Effect::Send { to, message } => self.sent.extend(to.into_iter().map(|id| (id, message.clone()))),
                Effect::Notice(notice) => self.notices.push(notice),
                Effect::Swap(swap) => self.swaps.push_back(swap),
                Effect::HangUp(connection) => self.hung_up.push(connection),
                Effect::Time { .. } | Effect::Record { .. } => unreachable!("nobody asked"),
            }
        }
    }

    /// Who was told of tenures, which ones, since this was asked last.
    fn tenures_told(&mut self) -> Vec<(ConnectionId, u16, Tenure)> {
        let told = self.sent.drain(..).filter_map(|(to, message)| match message {
            FromLauncher::Command(Command::Tenure { shard, tenure }) => Some((to, shard.0, tenure)),
            _ => None,
        });
        told.collect()
    }

    fn told_gone(&self, rank: Rank) -> Vec<ConnectionId> {
        let told = self.sent.iter().filter(
            |(_, message)| matches!(message, FromLauncher::Command(Command::Gone { rank: gone }) if *gone == rank),
        );
        told.map(|(to, _)| *to).collect()
    }

    fn departures(&self) -> Vec<&Departure> {
        let gone = self.notices.iter().filter_map(|notice| match notice {
            Notice::Gone(departure) => Some(&**departure),
            _ => None,
        });
        gone.collect()
    }

    fn copies_lost(&self) -> Option<(u16, Vec<Rank>)> {
        self.notices.iter().find_map(|notice| match notice {
            Notice::CopiesLost { shard, servers } => Some((shard.0, servers.clone())),
            _ => None,
        })
    }

    /// What `gradwire status` shows of each shard.
    fn standing(&mut self) -> Vec<(Rank, Epoch, String)> {
        self.forget();
        self.say(200, ToLauncher::Control(Control::Status));
        let Some((200, FromLauncher::Status(status))) = self.sent.pop() else { panic!("no status") };
        status.shards.into_iter().map(|shard| (shard.primary, shard.epoch, shard.backup_state)).collect()
    }

    /// Server 1 dies; its shard is taken over by server 2, and server 0's goes on alone.
    fn lose_server_1(&mut self) {
        self.lose(1);
        self.claim(2, 1, 1, 0, Claim::TakeOver);
        self.claim(0, 0, 0, 0, Claim::GoAlone);
        self.forget();
    }
}

fn lanes(shard: u16) -> [PeerId; 2] {
    pair(ShardId(shard), SERVERS, 1)
}

fn tenure(shard: u16, epoch: Epoch, place: usize, is_paired: bool) -> Tenure {
    Tenure { epoch, primary: lanes(shard)[place], other: Some(lanes(shard)[1 - place]), is_paired }
}

const S1: Rank = Rank::server(1);

#[test]
fn a_checkpoint_that_was_asked_for_is_asked_for_again_when_another_serves() {
    let mut stage = Stage::running();
    stage.say(200, ToLauncher::Control(Control::Checkpoint));
    let asked = |stage: &Stage| {
        let commands = stage.sent.iter().filter_map(|(to, message)| match message {
            FromLauncher::Command(Command::Checkpoint { clock }) => Some((*to, *clock)),
            _ => None,
        });
        commands.collect::<Vec<_>>()
    };
    let first = asked(&stage);
    assert!(first.contains(&(2, 2)), "{first:?}");
    stage.forget();
    stage.lose(1);
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    assert_eq!(asked(&stage), [], "who served goes on serving");
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    assert!(asked(&stage).contains(&(2, 2)), "{:?}", stage.sent);
}

#[test]
fn a_server_that_is_gone_ends_nothing_and_everybody_is_told() {
    let mut stage = Stage::running();
    stage.lose(1);
    assert_eq!(stage.told_gone(S1), [0, 2, WORKER]);
    let [departure] = stage.departures()[..] else { panic!("{:?}", stage.notices) };
    assert_eq!((departure.pid, &departure.why), (1, &None));
    assert_eq!(departure.others, [Rank::server(0), Rank::server(2)]);
    stage.roster.gone(S1, Some("was killed".into()));
    stage.collect();
    assert_eq!(stage.departures().len(), 1, "its process' end is no second departure");
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    let to_all = |tenure| [0, 2, WORKER].map(|to| (to, 1, tenure));
    assert_eq!(stage.tenures_told(), to_all(tenure(1, 1, 1, false)));
    let told = Notice::Tenure { shard: ShardId(1), tenure: tenure(1, 1, 1, false), alone: vec![ShardId(1)] };
    assert_eq!(stage.notices.last(), Some(&told));
}

#[test]
fn of_two_claims_that_race_one_is_granted_and_the_other_is_told_how_things_stand() {
    let mut stage = Stage::running();
    stage.answers = false;
    stage.claim(1, 1, 0, 0, Claim::TakeOver);
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    stage.answer();
    let taken = tenure(0, 1, 1, false);
    let told: Vec<_> = [0, 1, 2, WORKER, 0].map(|to| (to, 0, taken)).into();
    assert_eq!(stage.tenures_told(), told, "all, and then the slower one alone");
    assert_eq!(stage.standing()[0], (S1, 1, "catching up".into()));
}

#[test]
fn what_may_not_be_claimed_is_refused_to_the_claimant_alone() {
    let mut stage = Stage::running();
    for (connection, place, claim) in
        [(0, 0, Claim::TakeOver), (0, 0, Claim::Pair), (1, 1, Claim::GoAlone), (1, 1, Claim::Pair)]
    {
        stage.claim(connection, place, 0, 0, claim);
        assert_eq!(stage.tenures_told(), [(connection, 0, tenure(0, 0, 0, true))], "{claim:?}");
    }
    stage.claim(1, 1, 0, 7, Claim::TakeOver);
    assert_eq!(stage.tenures_told(), [(1, 0, tenure(0, 0, 0, true))], "an epoch that has never been");
    assert!(stage.notices.is_empty() && stage.swaps.is_empty());
}

#[test]
fn who_claims_what_is_not_its_own_breaks_the_protocol_and_is_gone() {
    let mut stage = Stage::running();
    stage.claim(2, 0, 0, 0, Claim::GoAlone);
    let [departure] = stage.departures()[..] else { panic!("{:?}", stage.notices) };
    assert!(departure.why.as_ref().is_some_and(|why| why.contains("holds no copy of shard 0")), "{departure:?}");
    assert_eq!(stage.hung_up, [2]);
    // A worker's slip ends the job, as ever.
    stage.report(WORKER, Report::Claim { lane: 0, shard: ShardId(9), epoch: 0, claim: Claim::Pair });
    assert!(matches!(stage.notices.last(), Some(Notice::Failed { .. })));
}

#[test]
fn a_server_that_fails_is_gone_in_its_own_words() {
    let mut stage = Stage::running();
    stage.report(1, Report::Failed { text: "disk full".into(), elsewhere: false });
    assert_eq!(stage.departures()[0].why.as_deref(), Some("failed: disk full"));
    assert_eq!((stage.told_gone(S1).len(), &stage.hung_up[..]), (3, &[1][..]));
    stage.lose(1);
    assert_eq!(stage.notices.len(), 1, "the end of its connection is no news");
}

#[test]
fn a_seat_is_taken_again_once_nobody_counts_on_who_held_it() {
    let mut stage = Stage::running();
    let text = stage.join(11, 1).unwrap_err();
    assert!(text.contains("has joined already"), "{text}");
    stage.lose(1);
    stage.forget();
    assert_eq!(stage.join(11, 1), Ok(S1));
    assert!(matches!(stage.sent[..], [(11, FromLauncher::Welcome { .. })]), "{:?}", stage.sent);
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    let has_view = |stage: &Stage| stage.sent.iter().any(|sent| matches!(sent, (11, FromLauncher::View(_))));
    assert!(!has_view(&stage), "shard 0 counts on the backup that is no more");
    stage.claim(11, 1, 0, 0, Claim::TakeOver);
    assert_eq!(stage.standing()[0], (Rank::server(0), 0, "catching up".into()), "it has the name, and nothing else");
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    assert!(has_view(&stage));
}

#[test]
fn who_comes_again_is_shown_the_job_and_catches_up() {
    let mut stage = Stage::running();
    stage.lose_server_1();
    stage.join(11, 1).unwrap();
    assert!(matches!(stage.sent[..], [(11, FromLauncher::Welcome { .. }), (11, FromLauncher::View(_))]));
    stage.forget();
    stage.say(11, ToLauncher::Offer(Vec::new()));
    assert!(matches!(&stage.sent[0], (11, FromLauncher::Offers(offers)) if offers.is_empty()), "{:?}", stage.sent);
    assert_eq!(stage.tenures_told(), [(11, 0, tenure(0, 1, 0, false)), (11, 1, tenure(1, 1, 1, false))]);
    let states = |stage: &mut Stage| stage.standing().into_iter().map(|(.., state)| state).collect::<Vec<_>>();
    assert_eq!(states(&mut stage), ["catching up", "catching up", "complete"]);
    stage.claim(0, 0, 0, 1, Claim::Pair);
    let told = Notice::Tenure { shard: ShardId(0), tenure: tenure(0, 2, 0, true), alone: vec![ShardId(1)] };
    assert_eq!(stage.notices, [told]);
    stage.claim(2, 1, 1, 1, Claim::Pair);
    assert_eq!(states(&mut stage), ["complete"; 3]);
    // And it may take over.
    stage.lose(0);
    stage.forget();
    stage.claim(11, 1, 0, 2, Claim::TakeOver);
    assert_eq!(stage.tenures_told().len(), 3);
    assert_eq!(stage.copies_lost(), None);
}

#[test]
fn who_is_gone_again_is_no_backup() {
    let mut stage = Stage::running();
    stage.lose_server_1();
    stage.join(11, 1).unwrap();
    stage.say(11, ToLauncher::Offer(Vec::new()));
    stage.lose(11);
    stage.forget();
    stage.claim(0, 0, 0, 1, Claim::Pair);
    assert_eq!(stage.tenures_told(), [(0, 0, tenure(0, 1, 0, false))], "refused");
    assert_eq!(stage.standing()[0].2, "gone");
    assert_eq!(stage.copies_lost(), None, "it held nothing that anybody needs");
    assert!(stage.join(12, 1).is_ok());
}

#[test]
fn a_shard_that_has_lost_both_copies_ends_the_job_by_name() {
    let mut stage = Stage::running();
    stage.lose_server_1();
    stage.lose(2);
    assert_eq!(stage.copies_lost(), Some((1, vec![S1, Rank::server(2)])));
    assert!(stage.told_gone(Rank::server(2)).is_empty(), "nobody is to claim");
    assert!(stage.join(11, 1).is_err());
}

#[test]
fn both_copies_may_be_lost_before_anybody_has_claimed() {
    let mut stage = Stage::running();
    stage.answers = false;
    stage.lose(1);
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    stage.lose(2);
    assert_eq!(stage.copies_lost(), Some((1, vec![S1, Rank::server(2)])));
}

/// A primary that goes on alone and dies before the store has answered leaves a backup that has not everything.
#[test]
fn a_primary_that_went_alone_with_its_last_breath_takes_its_shard_along() {
    let mut stage = Stage::running();
    stage.answers = false;
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    stage.lose(0);
    assert_eq!(stage.copies_lost(), None, "server 1 may take over");
    stage.answer();
    assert_eq!(stage.copies_lost(), Some((0, vec![Rank::server(0), S1])));
}

#[test]
fn a_server_without_a_part_is_put_out_while_its_process_still_runs() {
    let mut stage = Stage::running();
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    assert!(stage.hung_up.is_empty(), "it could still take over shard 0");
    stage.forget();
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    assert_eq!((&stage.hung_up[..], stage.told_gone(S1)), (&[1][..], vec![0, 2, WORKER]));
    let why = stage.departures()[0].why.clone().unwrap();
    assert!(why.contains("was not heard"), "{why}");
    stage.claim(1, 0, 1, 0, Claim::GoAlone);
    assert_eq!(stage.standing()[1].0, Rank::server(2), "it is nobody any more");
}

#[test]
fn a_store_that_cannot_be_used_lets_nobody_take_over_and_that_is_said_once() {
    let mut stage = Stage::running();
    stage.answers = false;
    stage.lose(1);
    stage.forget();
    for _ in 0..2 {
        stage.claim(2, 1, 1, 0, Claim::TakeOver);
        let swap = stage.swaps.pop_front().unwrap();
        stage.roster.swapped(swap, Swap::Unavailable("no majority".into()));
        stage.collect();
        assert_eq!(stage.tenures_told(), [(2, 1, tenure(1, 0, 0, true))]);
    }
    assert_eq!(stage.notices, [Notice::StoreUnavailable("no majority".into())]);
    // What was written all the same, and is found by the next who asks, is told to all.
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    let swap = stage.swaps.pop_front().unwrap();
    stage.roster.swapped(swap, Swap::Present(swap.next));
    stage.collect();
    assert_eq!(stage.tenures_told().len(), 3);
}

#[test]
fn the_job_ends_when_all_who_serve_have_finished() {
    let finished = || Report::Finished { summary: serde_json::Value::Null };
    let mut stage = Stage::running();
    stage.report(WORKER, finished());
    stage.lose(WORKER);
    // A primary that dies while it ends is taken over from.
    stage.lose(1);
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    assert_eq!(stage.standing()[1].0, Rank::server(2));
    assert!(stage.join(11, 1).is_err(), "nothing is left to catch up with");
    stage.claim(0, 0, 0, 0, Claim::GoAlone);
    for server in [0, 2] {
        stage.report(server, finished());
        stage.lose(server);
    }
    assert_eq!(stage.copies_lost(), None);
    let ends = stage.notices.iter().filter(|notice| matches!(notice, Notice::Finished { .. }));
    assert_eq!(ends.count(), 2);
    assert!(!stage.notices.iter().any(|notice| matches!(notice, Notice::Lost(_) | Notice::Failed { .. })));
}

/// It would wait for the job's view until the launcher loses its patience.
#[test]
fn who_comes_again_as_the_job_ends_is_sent_away() {
    let mut stage = Stage::running();
    stage.lose(1);
    stage.join(11, 1).unwrap();
    stage.report(WORKER, Report::Finished { summary: serde_json::Value::Null });
    assert_eq!(stage.hung_up, [11]);
    assert_eq!(stage.copies_lost(), None);
}

#[test]
fn who_has_finished_and_is_gone_is_not_missed() {
    let mut stage = Stage::running();
    stage.report(WORKER, Report::Finished { summary: serde_json::Value::Null });
    stage.report(1, Report::Finished { summary: serde_json::Value::Null });
    stage.report(1, Report::Finished { summary: serde_json::Value::Null });
    stage.lose(1);
    assert!(stage.departures().is_empty() && stage.copies_lost().is_none(), "{:?}", stage.notices);
    // The last copy of a shard that was not finished is.
    stage.lose(2);
    assert_eq!(stage.copies_lost(), None, "server 0 has the other copy of shard 2");
    stage.lose(0);
    assert!(stage.copies_lost().is_some());
}

#[test]
fn an_offer_to_nobody_ends_nothing() {
    let mut stage = Stage::running();
    stage.lose_server_1();
    let proposal = Proposal { peer: PeerId::server(1, 0), generation: 1, life: 0, endpoint: Endpoint::new("tcp", "x") };
    stage.report(0, Report::Rebuild { lane: 0, proposal });
    assert!(stage.sent.is_empty() && stage.notices.is_empty());
}

#[test]
fn a_job_that_was_told_to_end_loses_nobody() {
    let mut stage = Stage::running();
    stage.roster.stop("enough".into());
    stage.lose(1);
    stage.lose(2);
    assert!(stage.departures().is_empty() && stage.copies_lost().is_none());
}

/// Whoever takes over has promised nothing, and the one before it may not have heard what was settled.
#[test]
fn whoever_takes_over_is_told_what_was_settled_and_asked_to_prepare() {
    let mut stage = Stage::running();
    let change = LiveChange { learning_rate: Some(0.5), ..LiveChange::default() };
    let prepared =
        |number, shard, place: usize, from| Report::Prepared { number, lane: lanes(shard)[place].lane, from };
    for number in [1, 2] {
        stage.say(99, ToLauncher::Control(Control::Change(change)));
        let shards = if number == 1 { 0..SERVERS } else { 0..2 };
        shards.for_each(|shard| stage.report(u64::from(shard), prepared(number, shard, 0, 9 * number)));
    }
    stage.lose(1);
    stage.forget();
    stage.claim(2, 1, 1, 0, Claim::TakeOver);
    let settled = Command::Change { number: 1, change: Some((9, Change::Settings(change))) };
    let told: Vec<_> = stage.sent.iter().filter(|(to, _)| *to == 2).map(|(_, message)| message).collect();
    let [first, FromLauncher::Command(Command::Tenure { .. }), last] = told[..] else { panic!("{told:?}") };
    assert!(matches!(first, FromLauncher::Command(command) if *command == settled), "{first:?}");
    assert!(matches!(last, FromLauncher::Command(Command::Prepare { number: 2, .. })), "{last:?}");
    stage.report(2, prepared(2, 2, 0, 19));
    assert!(
        !stage.notices.iter().any(|notice| matches!(notice, Notice::Changed { .. })),
        "of shard 1 the new lane is awaited"
    );
    stage.report(2, prepared(2, 1, 1, 22));
    assert!(stage.notices.contains(&Notice::Changed { clock: 22, change: Change::Settings(change) }));
}
