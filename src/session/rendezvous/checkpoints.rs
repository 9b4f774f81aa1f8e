//! Checkpoints from the launcher's side: which clock was asked for, whose parts have come, who waits for the answer.
//!
//! A checkpoint is asked for at a clock that lies ahead of every reported one. Reports lag, so a shard may have passed that clock
//! when the request comes; it says so, and the launcher asks again, further ahead each time.
//!
//! Invariant: a checkpoint is handed on once, when every shard's part of one clock is there, in the order of the shards.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{message::Command, roster::ConnectionId};
use crate::types::{Clock, ShardId};

/// How far ahead of the last reported clock the first request lies: reports lag by about one clock.
const MARGIN_FIRST: Clock = 2;

/// Incomplete checkpoints that are remembered; shards are never this far apart.
const OPEN_MAX: usize = 64;

#[derive(Debug)]
struct Request {
    clock: Clock,
    margin: Clock,
    /// Why the job ends with it, if it does.
    stop: Option<String>,
    waiting: Vec<ConnectionId>,
}

impl Request {
    fn command(&self) -> Command {
        match &self.stop {
            Some(reason) => Command::Stop { reason: reason.clone(), checkpoint: true, clock: Some(self.clock) },
            None => Command::Checkpoint { clock: self.clock },
        }
    }
}

/// What hangs on a checkpoint that has been recorded.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    pub waiting: Vec<ConnectionId>,
    pub stopping: bool,
}

#[derive(Debug)]
pub(super) struct Checkpoints {
    shards: u32,
    /// Whether a part may come twice: from the copy that served, and from the one that took over.
    repeats: bool,
    open: BTreeMap<Clock, BTreeMap<ShardId, Value>>,
    request: Option<Request>,
    last: Option<Clock>,
}

impl Checkpoints {
    pub fn new(shards: u32, repeats: bool) -> Checkpoints {
        Checkpoints { shards, repeats, open: BTreeMap::new(), request: None, last: None }
    }

    /// Only the first `shards` shards have something to store.
    pub fn expect(&mut self, shards: u32) {
        self.shards = shards;
    }

    /// The clock of the last complete checkpoint.
    pub fn last(&self) -> Option<Clock> {
        self.last
    }

    /// A request, or one that joins the request already under way; the command that all ranks are to hear.
    pub fn request(&mut self, reached: Clock, stop: Option<String>, waiting: Option<ConnectionId>) -> Command {
        let clock = reached.saturating_add(MARGIN_FIRST);
        let fresh = || Request { clock, margin: MARGIN_FIRST, stop: None, waiting: Vec::new() };
        let request = self.request.get_or_insert_with(fresh);
        request.stop = request.stop.take().or(stop);
        request.waiting.extend(waiting);
        request.command()
    }

    /// A shard had passed the clock that was asked for: the next attempt, or nothing if that was an older one.
    pub fn late(&mut self, clock: Clock, reached: Clock) -> Option<Command> {
        let request = self.request.as_mut().filter(|request| request.clock == clock)?;
        request.margin = request.margin.saturating_mul(2);
        request.clock = clock.max(reached).saturating_add(request.margin);
        Some(request.command())
    }

    /// A shard's part; all parts if it was the last.
    pub fn written(&mut self, shard: ShardId, clock: Clock, info: Value) -> Result<Option<Vec<Value>>, String> {
        if u32::from(shard.0) >= self.shards {
            return Err(format!("there is no shard {}", shard.0));
        }
        let is_there =
            self.last >= Some(clock) || self.open.get(&clock).is_some_and(|parts| parts.contains_key(&shard));
        if self.repeats && is_there {
            return Ok(None);
        }
        let parts = self.open.entry(clock).or_default();
        if parts.insert(shard, info).is_some() {
            return Err(format!("shard {} has reported its part of clock {clock} already", shard.0));
        }
        if parts.len() < self.shards as usize {
            while self.open.len() > OPEN_MAX {
                self.open.pop_first();
            }
            return Ok(None);
        }
        Ok(self.open.remove(&clock).map(|parts| parts.into_values().collect()))
    }

    /// The manifest is on the disk (or could not be written). Older incomplete ones will never be completed.
    pub fn recorded(&mut self, clock: Clock, success: bool) -> Recorded {
        if success {
            self.open.retain(|&open, _| open > clock);
            self.last = self.last.max(Some(clock));
        }
        match self.request.take() {
            // A periodic checkpoint at or after the clock that was asked for serves as well, unless the job is to end.
            Some(request) if request.clock == clock || (request.clock < clock && request.stop.is_none()) => {
                Recorded { waiting: request.waiting, stopping: request.stop.is_some() }
            }
            request => {
                self.request = request;
                Recorded::default()
            }
        }
    }

    /// What ranks have been asked to write and have not written yet.
    pub fn requested(&self) -> Option<Command> {
        self.request.as_ref().map(Request::command)
    }

    /// A control caller hung up.
    pub fn forget(&mut self, connection: ConnectionId) {
        if let Some(request) = &mut self.request {
            request.waiting.retain(|&waiting| waiting != connection);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(index: u16, book: &mut Checkpoints, clock: Clock) -> Option<Vec<Value>> {
        book.written(ShardId(index), clock, Value::from(index)).unwrap()
    }

    #[test]
    fn parts_are_handed_on_once_complete_and_in_order() {
        let mut book = Checkpoints::new(3, false);
        assert_eq!(shard(2, &mut book, 5), None);
        assert_eq!(shard(0, &mut book, 5), None);
        assert_eq!(shard(0, &mut book, 6), None);
        assert_eq!(shard(1, &mut book, 5), Some(vec![0.into(), 1.into(), 2.into()]));
        book.recorded(5, true);
        assert_eq!(book.last(), Some(5));
        assert!(book.written(ShardId(0), 6, Value::Null).is_err(), "twice");
        assert!(book.written(ShardId(3), 6, Value::Null).is_err(), "no such shard");
    }

    #[test]
    fn a_copy_that_took_over_may_report_its_part_again() {
        let mut book = Checkpoints::new(2, true);
        assert_eq!(shard(0, &mut book, 5), None);
        assert_eq!(shard(0, &mut book, 5), None);
        assert!(shard(1, &mut book, 5).is_some());
        book.recorded(5, true);
        assert_eq!(shard(1, &mut book, 5), None);
        assert!(book.open.is_empty(), "it is complete");
        assert_eq!(shard(0, &mut book, 6), None);
        assert!(shard(1, &mut book, 6).is_some());
    }

    #[test]
    fn a_late_shard_moves_the_request_ahead() {
        let mut book = Checkpoints::new(1, false);
        assert_eq!(book.request(10, None, Some(7)), Command::Checkpoint { clock: 12 });
        assert_eq!(book.late(12, 15), Some(Command::Checkpoint { clock: 19 }));
        assert_eq!(book.late(12, 15), None, "the second shard that was late for the first attempt");
        assert!(shard(0, &mut book, 19).is_some());
        let recorded = book.recorded(19, true);
        assert_eq!((recorded.waiting, recorded.stopping), (vec![7], false));
    }

    #[test]
    fn a_stop_is_not_answered_by_another_checkpoint() {
        let mut book = Checkpoints::new(1, false);
        let command = book.request(10, Some("preempted".into()), None);
        assert!(matches!(command, Command::Stop { checkpoint: true, clock: Some(12), .. }));
        assert!(!book.recorded(11, true).stopping);
        assert!(book.recorded(12, true).stopping);
        assert!(!book.recorded(12, true).stopping, "once only");
    }

    #[test]
    fn incomplete_checkpoints_are_bounded() {
        let mut book = Checkpoints::new(2, false);
        for clock in 0..1000 {
            assert_eq!(shard(0, &mut book, clock), None);
            assert!(book.open.len() <= OPEN_MAX + 1);
        }
        book.recorded(2000, true);
        assert!(book.open.is_empty());
    }
}
