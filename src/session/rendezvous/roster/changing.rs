//! Settings that are changed while the job runs, as the launcher's end of the rendezvous sees it.
//!
//! Invariant: a lane that was told to prepare is always told to go on, with the change or without it.

use super::*;
use crate::{
    optim::LiveChange,
    session::{Change, NEVER},
    types::ShardId,
};

impl Roster {
    /// Somebody wants settings changed; answered when every lane has prepared.
    pub(super) fn begin_change(&mut self, connection: ConnectionId, change: LiveChange) -> Result<(), String> {
        self.may_change(&change)?;
        let change = Change::Settings(change);
        let (number, clock) = self.changes.begin(change, 0, self.clock_reached())?;
        self.changing_for = Some(connection);
        let command = Command::Prepare { number, clock, change };
        self.send(self.everybody(), FromLauncher::Command(command));
        Ok(())
    }

    fn may_change(&self, change: &LiveChange) -> Result<(), String> {
        change.check(&self.config.optimizer, self.config.consistency).map_err(|error| error.to_string())?;
        match (self.running, self.ended) {
            (true, false) => Ok(()),
            (_, true) => Err("nothing can be changed any more: the job is ending".into()),
            _ => Err("nothing can be changed yet: the job has not begun to train".into()),
        }
    }

    /// Another lane is to serve a shard: it is told of all that has changed before it does, since whoever served may not have heard of
    /// it, and keeps no record of who is of the job.
    pub(super) fn tell_changes(&mut self, rank: Rank) {
        let to = || self.seats[&rank].connection.into_iter().collect();
        let settled = |(number, clock, change): &(u64, Clock, Change)| {
            FromLauncher::Command(Command::Change { number: *number, change: Some((*clock, *change)) })
        };
        let messages: Vec<_> = self.changes.made().iter().map(|change| (to(), settled(change))).collect();
        messages.into_iter().for_each(|(to, message)| self.send(to, message));
    }

    /// Another lane serves a shard, and has promised nothing yet: all are asked to prepare once more.
    pub(super) fn prepare_again(&mut self, shard: ShardId) {
        let Some((number, clock, change)) = self.changes.displaced(shard) else { return };
        self.send(self.everybody(), FromLauncher::Command(Command::Prepare { number, clock, change }));
    }

    /// A lane begins nothing of `from` and later clocks.
    pub(super) fn on_prepared(&mut self, lane: PeerId, number: u64, from: Clock) {
        if !self.serves(lane) {
            return; // another one serves in its place
        }
        let shard = self.config.shard_of(lane);
        let Some((clock, change)) = self.changes.prepared(number, shard, from) else { return };
        let settled = (clock != NEVER).then_some((clock, change));
        self.send(self.everybody(), FromLauncher::Command(Command::Change { number, change: settled }));
        if settled.is_none() {
            self.cannot_join(change);
            return self.make_changes();
        }
        let asker = self.changing_for.take();
        self.send(asker.into_iter().collect(), FromLauncher::Changed { clock });
        self.notice(Notice::Changed { clock, change });
        match change {
            Change::Settings(_) => {}
            Change::Lost(worker) | Change::Leaves(worker) | Change::Opens(worker) => {
                self.member_turned(worker, clock, false);
            }
            Change::Joins(worker) => self.member_turned(worker, clock, true),
        }
        self.make_changes();
    }

    /// The job ends: lanes that have prepared go on as they were.
    pub(super) fn give_up_change(&mut self) {
        self.refuse_orders("the job ended before that could be done");
        let Some(number) = self.changes.cancel() else { return };
        self.send(self.everybody(), FromLauncher::Command(Command::Change { number, change: None }));
        let text = "the job ended before the change could be made".into();
        let asker = self.changing_for.take();
        self.send(asker.into_iter().collect(), FromLauncher::Refused(text));
    }
}
