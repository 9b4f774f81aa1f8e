//! Servers that join and leave under the roster's eyes: who is started, given a shard and told to go, and what becomes of a wish that
//! cannot be fulfilled.
//!
//! Invariant: no sockets and no sleeping; lanes claim when the test says so.

use std::{collections::BTreeSet, time::Instant};

use super::{
    Scaling,
    message::{Command, Control, FromLauncher, Report, ToLauncher},
    notice::Notice,
    roster::{ConnectionId, Effect, Roster},
};
use crate::{
    optim::LiveChange,
    session::{Claim, JobConfig, Swap, Tenure, TenureLog, TenureStore},
    types::{Rank, Role, ShardId},
};

const WORKER: ConnectionId = 100;
const ASKER: ConnectionId = 200;
const S2: Rank = Rank::server(2);

/// Two servers, with room for three, and so three shards; one worker. Server n is connection n.
struct Stage {
    roster: Roster,
    log: TenureLog,
    _directory: tempfile::TempDir,
    sent: Vec<(ConnectionId, FromLauncher)>,
    notices: Vec<Notice>,
    tenures: Vec<Tenure>,
}

impl Stage {
    fn running() -> Stage {
        let config = JobConfig { servers: 2, max_servers: 3, ..JobConfig::default() };
        config.validate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut stage = Stage {
            tenures: (0..3).map(|shard| config.first_tenure(ShardId(shard))).collect(),
            roster: Roster::new(config, BTreeSet::new(), Instant::now()),
            log: TenureLog::open(&directory.path().join("tenures")).unwrap(),
            _directory: directory,
            sent: Vec::new(),
            notices: Vec::new(),
        };
        stage.join(0);
        stage.join(1);
        stage.roster.join(WORKER, Role::Worker, Some(0), ("host".into(), 9)).unwrap();
        stage.say(WORKER, ToLauncher::Declare(Vec::new()));
        for connection in [0, 1, WORKER] {
            stage.say(connection, ToLauncher::Offer(Vec::new()));
        }
        assert_eq!(stage.notices.last(), Some(&Notice::Running), "nobody waits for the third server");
        stage.sent.clear();
        stage.notices.clear();
        stage
    }

    fn join(&mut self, server: u16) {
        let host = ("host".into(), 1 + u32::from(server));
        self.roster.join(server.into(), Role::Server, Some(server), host).unwrap();
        self.collect();
    }

    fn say(&mut self, connection: ConnectionId, message: ToLauncher) {
        self.roster.handle(connection, message, Instant::now());
        self.collect();
    }

    fn scale(&mut self, servers: u16) {
        self.say(ASKER, ToLauncher::Control(Control::Scale { servers }));
    }

    /// A lane of the shard on this server wants something.
    fn claim(&mut self, server: u16, shard: u16, claim: Claim) {
        let epoch = self.tenures[usize::from(shard)].epoch;
        let claim = Report::Claim { lane: shard, shard: ShardId(shard), epoch, claim };
        self.say(server.into(), ToLauncher::Report(claim));
    }

    /// The lanes do what a move is.
    fn moves(&mut self, shard: u16, from: u16, to: u16) {
        assert_eq!(self.tenures[usize::from(shard)].other, Some(JobConfig::seat(ShardId(shard), to)));
        self.claim(from, shard, Claim::Pair);
        self.claim(to, shard, Claim::Succeed);
    }

    fn collect(&mut self) {
        while let Some(effect) = self.roster.poll_effect() {
            match effect {
                Effect::Send { to, message } => {
                    if let FromLauncher::Command(Command::Tenure { shard, tenure }) = &message {
                        self.tenures[usize::from(shard.0)] = *tenure;
                    }
                    self.sent.extend(to.into_iter().map(|id| (id, message.clone())));
                }
                Effect::Notice(notice) => self.notices.push(notice),
                Effect::Swap(swap) => {
                    let outcome = self.log.compare_and_swap(swap.shard, swap.expected, swap.next);
                    self.roster.swapped(swap, outcome);
                }
                Effect::HangUp(_) => {}
                Effect::Time { .. } | Effect::Record { .. } => unreachable!("nobody asked"),
            }
        }
    }

    fn answers(&mut self) -> Vec<FromLauncher> {
        let (to_asker, others) = std::mem::take(&mut self.sent).into_iter().partition(|(to, _)| *to == ASKER);
        self.sent = others;
        let to_asker: Vec<(ConnectionId, FromLauncher)> = to_asker;
        to_asker.into_iter().map(|(_, message)| message).collect()
    }

    fn refusal(&mut self) -> String {
        match self.answers().pop() {
            Some(FromLauncher::Refused(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    /// Whether a server was told to go.
    fn lets_go(&self, server: ConnectionId) -> bool {
        let retires = |message: &FromLauncher| matches!(message, FromLauncher::Command(Command::Retire));
        self.sent.iter().any(|(to, message)| *to == server && retires(message))
    }

    fn primaries(&self) -> Vec<u16> {
        self.tenures.iter().map(|tenure| tenure.primary.rank.index).collect()
    }
}

#[test]
fn a_server_joins_and_leaves_and_whoever_asked_is_told_of_every_move() {
    let mut stage = Stage::running();
    stage.scale(3);
    assert_eq!(stage.notices, [Notice::Scaling { servers: 3, moves: 1 }, Notice::Wanted(S2)]);
    assert!(stage.sent.iter().all(|(to, _)| *to == ASKER), "nothing moves before it is there: {:?}", stage.sent);
    stage.join(2);
    stage.say(2, ToLauncher::Offer(Vec::new()));
    stage.moves(2, 0, 2);
    assert_eq!(stage.primaries(), [0, 1, 2]);
    let told = stage.answers();
    let [FromLauncher::Scaling(begun), FromLauncher::Scaling(moved), FromLauncher::Scaled { servers: 3, moved: 1 }] =
        &told[..]
    else {
        panic!("{told:?}")
    };
    assert_eq!((*begun, moved.shard), (Scaling { moved: 0, moves: 1, shard: None }, Some((ShardId(2), S2))));
    // And back to one.
    stage.sent.clear();
    stage.scale(1);
    stage.moves(1, 1, 0);
    stage.moves(2, 2, 0);
    assert_eq!(stage.primaries(), [0, 0, 0]);
    assert_eq!([0, 1, 2].map(|server| stage.lets_go(server)), [false, true, true]);
    assert!(!stage.answers().iter().any(|told| matches!(told, FromLauncher::Scaled { .. })), "they are still there");
    for server in [1, 2] {
        stage.say(server, ToLauncher::Report(Report::Finished { summary: serde_json::Value::Null }));
        stage.roster.lost(server);
        stage.collect();
    }
    assert!(matches!(stage.answers()[..], [FromLauncher::Scaled { servers: 1, moved: 2 }]));
    assert!(stage.notices.contains(&Notice::Retired(S2)));
    assert!(
        !stage.notices.iter().any(|notice| matches!(notice, Notice::Gone(_) | Notice::Lost(_))),
        "{:?}",
        stage.notices
    );
    // The seat may be taken again.
    stage.scale(2);
    assert_eq!(stage.notices.last(), Some(&Notice::Wanted(Rank::server(1))));
}

/// Whoever takes a shard has promised nothing, and is told what has changed before it serves.
#[test]
fn a_setting_that_changes_as_a_shard_moves_is_settled_by_whoever_serves_then() {
    let mut stage = Stage::running();
    let change = LiveChange { learning_rate: Some(0.5), ..LiveChange::default() };
    let prepared = |number, lane, from| ToLauncher::Report(Report::Prepared { number, lane, from });
    let changed = |stage: &mut Stage| {
        let clock = |told| if let FromLauncher::Changed { clock } = told { Some(clock) } else { None };
        stage.answers().into_iter().find_map(clock)
    };
    stage.say(ASKER, ToLauncher::Control(Control::Change(change)));
    for (server, lane) in [(0, 0), (1, 1), (0, 2)] {
        stage.say(server, prepared(1, lane, 5));
    }
    assert_eq!(changed(&mut stage), Some(5));
    stage.scale(3);
    stage.join(2);
    stage.say(2, ToLauncher::Offer(Vec::new()));
    stage.say(ASKER, ToLauncher::Control(Control::Change(change)));
    stage.say(0, prepared(2, 0, 9));
    stage.say(0, prepared(2, 2, 9));
    stage.sent.clear();
    stage.moves(2, 0, 2);
    stage.say(1, prepared(2, 1, 9));
    stage.say(0, prepared(2, 2, 9));
    let to_new = stage.sent.iter().filter(|(to, _)| *to == 2).filter_map(|(_, message)| match message {
        FromLauncher::Command(Command::Change { number, .. }) => Some(("changed", *number)),
        FromLauncher::Command(Command::Prepare { number, .. }) => Some(("prepare", *number)),
        FromLauncher::Command(Command::Tenure { tenure, .. }) if tenure.primary.rank == S2 => Some(("serves", 0)),
        _ => None,
    });
    assert_eq!(to_new.collect::<Vec<_>>(), [("changed", 1), ("serves", 0), ("prepare", 2)]);
    assert_eq!(changed(&mut stage), None, "whoever serves shard 2 has not answered");
    stage.say(2, prepared(2, 2, 12));
    assert_eq!(changed(&mut stage), Some(12));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut stage = Stage::running();
    for servers in [0, 4] {
        stage.scale(servers);
        let text = stage.refusal();
        assert!(text.contains("room for 1 to 3"), "{text}");
    }
    stage.scale(3);
    stage.answers();
    stage.scale(1);
    let text = stage.refusal();
    assert!(text.contains("on its way to 3 servers already (0 of 1"), "{text}");
}

#[test]
fn a_server_that_is_lost_before_it_has_everything_leaves_the_shard_where_it_was() {
    let mut stage = Stage::running();
    stage.scale(3);
    stage.join(2);
    stage.say(2, ToLauncher::Offer(Vec::new()));
    assert_eq!(stage.tenures[2].other, Some(JobConfig::seat(ShardId(2), 2)));
    stage.roster.lost(2);
    stage.collect();
    let text = stage.refusal();
    assert!(text.contains("server 2") && text.contains("0 of 1 shards had moved"), "{text}");
    assert_eq!((stage.tenures[2].other, stage.primaries()), (None, vec![0, 1, 0]));
    stage.claim(0, 2, Claim::Pair);
    assert!(!stage.tenures[2].is_paired);
    stage.scale(3);
    assert_eq!(stage.notices.last(), Some(&Notice::Wanted(S2)), "once more");
    // One that counts as complete is taken back only after whoever serves has gone on alone.
    stage.join(2);
    stage.say(2, ToLauncher::Offer(Vec::new()));
    stage.claim(0, 2, Claim::Pair);
    stage.roster.lost(2);
    stage.collect();
    assert!(stage.tenures[2].is_paired);
    stage.claim(0, 2, Claim::GoAlone);
    assert_eq!(stage.tenures[2].other, None);
}

#[test]
fn a_server_that_cannot_be_had_or_declines_ends_the_wish_and_nothing_else() {
    let mut stage = Stage::running();
    stage.scale(3);
    stage.roster.missed(S2, "cannot be started from here");
    stage.collect();
    assert!(stage.refusal().contains("server 2 cannot be started from here"));
    stage.scale(3);
    stage.join(2);
    stage.say(2, ToLauncher::Offer(Vec::new()));
    let declined = Report::Declined { shard: ShardId(2), text: "no memory".into() };
    stage.say(2, ToLauncher::Report(declined));
    assert!(stage.refusal().contains("server 2 cannot hold shard 2: no memory"));
    assert_eq!(stage.tenures[2].other, None);
    assert!(stage.lets_go(2), "it has no shard: {:?}", stage.sent);
    assert!(stage.notices.iter().any(|notice| matches!(notice, Notice::ScaleFailed(_))));
}

#[test]
fn a_server_that_serves_takes_the_job_along() {
    let mut stage = Stage::running();
    stage.roster.lost(1);
    stage.collect();
    let lost = Notice::CopiesLost { shard: ShardId(1), servers: vec![Rank::server(1)] };
    assert!(stage.notices.contains(&lost), "{:?}", stage.notices);
}

#[test]
fn a_store_that_cannot_be_used_ends_the_wish() {
    let mut stage = Stage::running();
    stage.roster.handle(ASKER, ToLauncher::Control(Control::Scale { servers: 1 }), Instant::now());
    let asked = std::iter::from_fn(|| stage.roster.poll_effect()).find_map(|effect| match effect {
        Effect::Swap(swap) => Some(swap),
        _ => None,
    });
    stage.roster.swapped(asked.expect("shard 1 is to move"), Swap::Unavailable("no majority".into()));
    // It would be tried for ever otherwise.
    let effects: Vec<_> = std::iter::from_fn(|| stage.roster.poll_effect()).collect();
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Swap(_))), "{effects:?}");
    let refused = effects.iter().find_map(|effect| match effect {
        Effect::Send { to, message: FromLauncher::Refused(text) } if to[..] == [ASKER] => Some(text),
        _ => None,
    });
    assert!(refused.is_some_and(|text| text.contains("no majority")), "{effects:?}");
}
