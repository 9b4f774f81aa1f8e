//! How a job stands, for whoever asks.
//!
//! Invariant: looking changes nothing.

use super::*;

impl Roster {
    pub(super) fn status(&self, now: Instant) -> Status {
        let ranks = self.seats.iter().map(|(rank, seat)| RankStatus {
            rank: *rank,
            state: self.state_of(*rank, seat).into(),
            host: seat.host.clone(),
            pid: seat.pid,
            clock: seat.clock,
            paths: seat.paths.clone(),
            path_counts: seat.path_counts.values().fold(PathCounts::default(), |sum, counts| sum.and(*counts)),
            metrics: seat.metrics,
            sent: seat.sent.clone(),
            reported_ms: seat.reported.map_or(0, |at| at.saturating_duration_since(self.started).as_millis() as u64),
        });
        Status {
            name: self.config.name.clone(),
            instance: self.config.instance,
            ranks: ranks.collect(),
            shards: self.shards_standing(),
            turns: self.members.turns.iter().copied().collect(),
            lacked: self.members.lacked,
            checkpoint: self.checkpoints.last(),
            not_finite: self.not_finite.1,
            verdict: self.waiting.verdict(now).cloned(),
            metrics: self.metrics,
        }
    }

    fn state_of(&self, rank: Rank, seat: &Seat) -> &'static str {
        match seat {
            Seat { finished: true, .. } => "finished",
            Seat { presence: Presence::Gone, pid: 0, .. } => "free",
            Seat { presence: Presence::Gone, .. } => "gone",
            Seat { taken: false, .. } => "not joined",
            Seat { connection: None, .. } => "lost",
            _ if rank.role == Role::Worker && self.running && self.is_through(rank, seat) => "joining",
            _ if rank.role == Role::Worker && self.members.is_told_to_leave(rank.index) => "leaving",
            _ if self.running => "running",
            Seat { declared: Some(_), .. } => "declared",
            _ => "joined",
        }
    }
}
