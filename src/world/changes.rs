//! The launcher's part in changes of a simulated job while it runs, of settings and of who is of the job: it asks every lane to
//! prepare and tells every lane the clock, each at another moment.
//!
//! Invariant: what is decided is decided by the launcher's own book; here are only the delays. What one lane is told comes in the
//! order in which it was said.

use std::collections::VecDeque;

use super::{copies::News, *};
use crate::session::{Change, Changes, NEVER};

/// What is on its way between the launcher and a server's lane.
#[derive(Clone, Copy, Debug)]
enum Message {
    Prepare(u64, Clock, Change),
    /// By which lane.
    Prepared(u64, PeerId, Clock),
    Settle(u64, Option<(Clock, Change)>),
}

/// Changes that are made while the job runs.
#[derive(Debug)]
pub(super) struct Changing {
    pub book: Changes,
    /// The round in which each is asked for, if no other is being made then, and the clock from which on.
    pub wanted: VecDeque<(u64, Change, Clock)>,
    /// The round in which a message comes, the server that it comes to or from, and the message.
    under_way: Vec<(u64, usize, Message)>,
    /// What was settled, in order.
    pub settled: Vec<(Clock, Change)>,
}

impl Changing {
    pub fn new(change: Option<LiveChange>, servers: usize, random: &mut SimRandom) -> Changing {
        let wanted = change.map(|change| (1 + random.below(600), Change::Settings(change), 0));
        Changing {
            book: Changes::new(servers),
            wanted: wanted.into_iter().collect(),
            under_way: Vec::new(),
            settled: Vec::new(),
        }
    }

    /// The clock from which on settings were changed.
    pub fn settings_from(&self) -> Option<Clock> {
        self.settled.iter().find(|(_, change)| matches!(change, Change::Settings(_))).map(|(clock, _)| *clock)
    }
}

impl World<'_> {
    /// Whether nobody is to be told of any change of who is of the job.
    pub(super) fn members_are_settled(&self) -> bool {
        let is_member = |change: &Change| !matches!(change, Change::Settings(_));
        let changing = &self.changing;
        let waits = changing.wanted.iter().any(|(_, change, _)| is_member(change))
            || changing.book.open().is_some_and(|change| is_member(&change));
        let settles = |(_, _, message): &(u64, usize, Message)| matches!(message, Message::Settle(_, Some((_, change))) if is_member(change));
        let news =
            |(_, news): &(Instant, News)| matches!(news, News::Settle(_, Some((_, change))) if is_member(change));
        let serving = self.copies.tenures.iter().filter_map(|tenure| self.copies.news.get(&tenure.primary));
        !waits && !changing.under_way.iter().any(settles) && !serving.flatten().any(news)
    }

    /// Passes on what is due.
    pub(super) fn change(&mut self, round: u64) -> Result<(), String> {
        let is_due = self.changing.wanted.front().is_some_and(|(due, ..)| *due <= round);
        if is_due && !self.changing.book.is_open() {
            let (_, change, at) = self.changing.wanted.pop_front().expect("just seen");
            // The launcher hears of progress late: what it takes for the furthest clock may be long past.
            let reached = self.served().map(|server| server.shard().clock_max()).min().unwrap_or(0);
            let reached = reached.saturating_sub(self.random.below(4));
            let (number, clock) = self.changing.book.begin(change, at, reached)?;
            self.tell_all(round, Message::Prepare(number, clock, change));
        }
        let due = |message: &mut (u64, usize, Message)| message.0 <= round;
        for (_, server, message) in self.changing.under_way.extract_if(.., due).collect::<Vec<_>>() {
            match message {
                Message::Prepare(number, clock, change) => {
                    let lane = self.server(server).expect("where nobody else may serve everybody does");
                    let from = lane.prepare_change(number, clock, change);
                    self.prepared(round, server, (number, PeerId::server(server as u16, 0), from));
                }
                Message::Prepared(number, lane, from) => {
                    if self.copies.tenures[server].primary != lane {
                        continue; // another one serves in its place
                    }
                    if let Some(settled) = self.changing.book.prepared(number, ShardId(server as u16), from) {
                        let made = Some(settled).filter(|(clock, _)| *clock != NEVER);
                        self.changing.settled.extend(made);
                        self.tell_all(round, Message::Settle(number, made));
                        self.membership_settled(round, settled);
                    }
                }
                Message::Settle(number, settled) => {
                    let server = self.server(server).expect("where nobody else may serve everybody does");
                    let changed = server.settle_change(number, settled);
                    changed.map_err(|error| error.to_string())?;
                }
            }
        }
        Ok(())
    }

    /// A lane's answer is on its way to the launcher.
    pub(super) fn prepared(&mut self, round: u64, shard: usize, (number, lane, from): (u64, PeerId, Clock)) {
        let later = round + 1 + self.random.below(50);
        self.changing.under_way.push((later, shard, Message::Prepared(number, lane, from)));
    }

    fn tell_all(&mut self, round: u64, message: Message) {
        if self.options.has_tenures() {
            // In one order with the news of who serves.
            match message {
                Message::Prepare(number, clock, change) => self.tell_everybody(News::Prepare(number, clock, change)),
                Message::Settle(number, settled) => self.tell_everybody(News::Settle(number, settled)),
                Message::Prepared(..) => unreachable!("that is for the launcher"),
            }
            return;
        }
        for server in 0..usize::from(self.options.servers) {
            let earlier = self.changing.under_way.iter().filter(|(_, of, _)| *of == server).map(|(due, ..)| *due + 1);
            let due = (round + 1 + self.random.below(50)).max(earlier.max().unwrap_or(0));
            self.changing.under_way.push((due, server, message));
        }
    }
}
