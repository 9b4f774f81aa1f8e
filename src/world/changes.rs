//! The launcher's part in changing settings while a simulated job runs: it asks every lane to prepare and tells every lane the
//! clock, each at another moment.
//!
//! Invariant: what is decided is decided by the launcher's own book; here are only the delays.

use super::*;
use crate::session::Changes;

/// What is on its way between the launcher and a server's lane.
#[derive(Debug)]
enum Message {
    Prepare(u64, Clock),
    Prepared(u64, Clock),
    Settle(u64, (Clock, LiveChange)),
}

/// A change that is made at a random moment.
#[derive(Debug)]
pub(super) struct Changing {
    book: Changes,
    change: LiveChange,
    /// The round in which it is asked for.
    at: Option<u64>,
    /// The round in which a message comes, the server that it comes to or from, and the message.
    under_way: Vec<(u64, usize, Message)>,
    /// The clock from which on it holds.
    pub clock: Option<Clock>,
}

impl Changing {
    pub fn new(change: LiveChange, servers: usize, random: &mut SimRandom) -> Changing {
        let at = Some(1 + random.below(600));
        Changing { book: Changes::new(servers), change, at, under_way: Vec::new(), clock: None }
    }
}

impl World<'_> {
    /// Passes on what is due.
    pub(super) fn change(&mut self, round: u64) -> Result<(), String> {
        let Some(mut changing) = self.changing.take() else { return Ok(()) };
        // The launcher hears of progress late: what it takes for the furthest clock may be long past.
        if changing.at.is_some_and(|at| at <= round) {
            changing.at = None;
            let reached = self
                .servers
                .iter()
                .filter_map(|node| node.replica.as_ref()?.served())
                .map(|server| server.shard().clock_max());
            let reached = reached.min().unwrap_or(0);
            let (number, clock) = changing.book.begin(changing.change, reached.saturating_sub(self.random.below(4)))?;
            self.tell_all(&mut changing, round, || Message::Prepare(number, clock));
        }
        let due = |message: &mut (u64, usize, Message)| message.0 <= round;
        for (_, server, message) in changing.under_way.extract_if(.., due).collect::<Vec<_>>() {
            match message {
                Message::Prepare(number, clock) => {
                    let from =
                        self.server(server).expect("no change is made where copies are").prepare_change(number, clock);
                    let later = round + 1 + self.random.below(50);
                    changing.under_way.push((later, server, Message::Prepared(number, from)));
                }
                Message::Prepared(number, from) => {
                    let lane = PeerId::server(server as u16, 0);
                    if let Some(settled) = changing.book.prepared(number, lane, from) {
                        changing.clock = Some(settled.0);
                        self.tell_all(&mut changing, round, || Message::Settle(number, settled));
                    }
                }
                Message::Settle(number, settled) => {
                    let server = self.server(server).expect("no change is made where copies are");
                    let changed = server.settle_change(number, Some(settled));
                    changed.map_err(|error| error.to_string())?;
                }
            }
        }
        self.changing = Some(changing);
        Ok(())
    }

    fn tell_all(&mut self, changing: &mut Changing, round: u64, message: impl Fn() -> Message) {
        for server in 0..usize::from(self.options.servers) {
            changing.under_way.push((round + 1 + self.random.below(50), server, message()));
        }
    }
}
