//! One lane of a shard: it serves, or it follows the lane that does, and changes its part as the store's tenures say.
//!
//! Invariant: a lane serves only under a tenure that names it; whoever is deposed, or is not counted on any more, begins anew.

use std::time::{Duration, Instant};

use super::Standby;
use crate::{
    Error, Result,
    server::{EventLoop, Progress},
    session::{Change, Claim, Paths, Proposal, Tenure},
    transport::{Transport, Wakeup},
    types::{Clock, Epoch, PeerId, Rank, ShardId},
};

/// The pause after a claim that was refused.
const PATIENCE: Duration = Duration::from_millis(100);

/// A lane in the part that it has now.
pub enum Part<T> {
    /// It answers workers.
    Serving(Box<EventLoop<T>>),
    /// It has a copy, and may take over.
    Following(Box<Standby<T>>),
}

/// What a tenure makes of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It goes on as it was.
    Stays,
    /// It serves from now on.
    Serves,
    /// What it has is of no use: it is to begin anew, as a backup that has nothing, if it is to follow at all.
    BeginsAnew,
}

/// One lane of a shard with one copy or two.
pub struct Replica<T> {
    me: PeerId,
    tenure: Tenure,
    /// A claim was refused, or the store could not be asked: none is made before.
    patient_until: Option<Instant>,
    /// The number of the last change that this lane has heard of; an earlier one may be told again.
    settled: u64,
    /// Always there but while it changes.
    part: Option<Part<T>>,
}

impl<T: Transport> Replica<T> {
    /// A lane that serves.
    pub fn serving(me: PeerId, tenure: Tenure, event_loop: EventLoop<T>) -> Replica<T> {
        Replica { me, tenure, patient_until: None, settled: 0, part: Some(Part::Serving(Box::new(event_loop))) }
    }

    /// A lane that follows.
    pub fn following(me: PeerId, tenure: Tenure, standby: Standby<T>) -> Replica<T> {
        Replica { me, tenure, patient_until: None, settled: 0, part: Some(Part::Following(Box::new(standby))) }
    }

    /// Its part.
    pub fn part(&mut self) -> &mut Part<T> {
        self.part.as_mut().expect("there but while it changes")
    }

    /// The event loop, if it serves.
    pub fn serves(&mut self) -> Option<&mut EventLoop<T>> {
        match self.part() {
            Part::Serving(event_loop) => Some(event_loop),
            Part::Following(_) => None,
        }
    }

    /// [`Replica::serves`], to be looked at.
    pub fn served(&self) -> Option<&EventLoop<T>> {
        match &self.part {
            Some(Part::Serving(event_loop)) => Some(event_loop),
            _ => None,
        }
    }

    /// The standby, if it follows.
    pub fn followed(&self) -> Option<&Standby<T>> {
        match &self.part {
            Some(Part::Following(standby)) => Some(standby),
            _ => None,
        }
    }

    /// The tenure that it knows.
    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    /// The transport and what belongs to it.
    pub fn paths(&mut self) -> &mut Paths<T> {
        match self.part() {
            Part::Serving(event_loop) => event_loop.paths(),
            Part::Following(standby) => standby.paths(),
        }
    }

    /// What wakes whoever sleeps while there is nothing to do.
    pub fn wakeups(&mut self) -> (&mut dyn Wakeup, Option<&mut dyn Wakeup>)
    where
        T: Wakeup,
    {
        match self.part() {
            Part::Serving(event_loop) => event_loop.wakeups(),
            Part::Following(standby) => standby.wakeups(),
        }
    }

    /// Does what can be done now.
    ///
    /// # Errors
    ///
    /// Those of [`EventLoop::turn`] and [`Standby::turn`].
    pub fn turn(&mut self, now: Instant) -> Result<Progress> {
        match self.part() {
            Part::Serving(event_loop) => event_loop.turn(now),
            Part::Following(standby) => standby.turn(now),
        }
    }

    /// When `turn` wants to be called even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let next = match &self.part {
            Some(Part::Serving(event_loop)) => event_loop.next_deadline(),
            Some(Part::Following(standby)) => standby.next_deadline(),
            None => None,
        };
        next.into_iter().chain(self.patient_until).min()
    }

    /// How long nothing has come and nothing has been computed; nobody waits for a lane that follows.
    pub fn stillness(&self, now: Instant) -> Duration {
        self.served().map_or(Duration::ZERO, |event_loop| event_loop.stillness(now))
    }

    /// An offer for a path has come.
    pub fn proposed(&mut self, proposal: Proposal, now: Instant) {
        match self.part() {
            Part::Serving(event_loop) => event_loop.paths().proposed(proposal, now),
            Part::Following(standby) => standby.proposed(proposal, now),
        }
    }

    /// Whether what it has is of no use any more: it is to begin anew, as a backup that has nothing.
    pub fn is_useless(&self) -> bool {
        matches!(&self.part, Some(Part::Following(standby)) if standby.is_useless())
    }

    /// What is to be asked of the store, and under which tenure.
    pub fn take_claim(&mut self, now: Instant) -> Option<(Epoch, Claim)> {
        if self.patient_until.is_some_and(|until| now < until) {
            return None;
        }
        self.patient_until = None;
        let epoch = self.tenure.epoch;
        let claim = match self.part() {
            Part::Serving(event_loop) => event_loop.take_claim(),
            Part::Following(standby) => standby.take_claim(),
        };
        claim.map(|claim| (epoch, claim))
    }

    /// A change is settled, or given up. A lane that follows keeps it for the case that it takes over: its primary tells it of settings, if
    /// it has heard of them, and never who is of the job.
    ///
    /// # Errors
    ///
    /// As [`EventLoop::settle_change`].
    pub fn settle_change(&mut self, number: u64, change: Option<(Clock, Change)>) -> Result<()> {
        let is_new = number > self.settled;
        self.settled = self.settled.max(number);
        match self.part() {
            Part::Serving(event_loop) if is_new => event_loop.settle_change(number, change),
            Part::Serving(_) => Ok(()),
            Part::Following(standby) => {
                change.into_iter().for_each(|(clock, change)| standby.keep_change(number, clock, change));
                Ok(())
            }
        }
    }

    /// A change is to be prepared: from which clock on, if this lane serves.
    pub fn prepare_change(&mut self, number: u64, clock: Clock, change: Change) -> Option<Clock> {
        match self.part() {
            Part::Serving(event_loop) => Some(event_loop.prepare_change(number, clock, change)),
            Part::Following(standby) => {
                standby.prepare_change(change);
                None
            }
        }
    }

    /// Another lane serves another shard.
    pub fn set_lane(&mut self, shard: ShardId, lane: PeerId, now: Instant) {
        match self.part() {
            Part::Serving(event_loop) => event_loop.set_lane(shard, lane, now),
            Part::Following(standby) => standby.set_lane(shard, lane),
        }
    }

    /// A server's process is gone.
    pub fn handle_gone(&mut self, rank: Rank) {
        match self.part() {
            Part::Serving(event_loop) => {
                if event_loop.shard().backup().is_some_and(|backup| backup.rank == rank) {
                    event_loop.lose_backup();
                }
            }
            Part::Following(standby) => {
                if standby.primary().rank == rank && standby.is_paired() {
                    standby.lose_primary("its process is gone");
                }
            }
        }
    }

    /// The store's word on who serves the shard.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] if this lane is to serve and does not have the state: both copies are lost.
    pub fn set_tenure(&mut self, tenure: Tenure, now: Instant) -> Result<Standing> {
        if tenure.epoch < self.tenure.epoch {
            return Ok(Standing::Stays);
        }
        let is_new = tenure.epoch > self.tenure.epoch;
        if !is_new {
            self.patient_until = Some(now + PATIENCE);
        }
        self.tenure = tenure;
        let is_mine = tenure.primary == self.me;
        match self.part.take().expect("there but while it changes") {
            Part::Serving(mut event_loop) => {
                if is_mine {
                    event_loop.set_tenure(tenure, is_new);
                }
                self.part = Some(Part::Serving(event_loop));
                Ok(if is_mine { Standing::Stays } else { Standing::BeginsAnew })
            }
            Part::Following(standby) if is_mine && standby.has_claimed() => {
                self.part = Some(Part::Serving(Box::new(standby.take_over(now)?)));
                Ok(Standing::Serves)
            }
            Part::Following(_) if is_mine => Err(Error::JobFailed(format!(
                "both copies of the shard that {} serves are lost: it was started again and has nothing",
                self.me
            ))),
            Part::Following(mut standby) => {
                let is_useless = standby.set_tenure(tenure);
                self.part = Some(Part::Following(standby));
                Ok(if is_useless { Standing::BeginsAnew } else { Standing::Stays })
            }
        }
    }
}
