//! The launcher's book of who waits for whom: when a rank has waited for too long, all are asked, and one verdict is read off
//! what they answer.
//!
//! Invariant: no I/O and no clock in here; a verdict is made of what was said after the last question, never of old news.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    session::{Finding, JobConfig, Verdict, Wait, judge},
    types::{PeerId, Rank, Role},
};

/// The same verdict is told again after this long at the latest.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// What was told last, and when.
#[derive(Debug)]
struct Told {
    ranks: Vec<Rank>,
    finding: Finding,
    since_ms: u64,
    at: Instant,
}

/// What the ranks have said about their waits.
#[derive(Debug)]
pub(super) struct Waiting {
    warn: Duration,
    silent: Duration,
    reports: BTreeMap<PeerId, Vec<Wait>>,
    /// When everybody was asked; until all have answered, or time is up.
    asked: Option<Instant>,
    judged: Option<(Instant, Verdict)>,
    told: Option<Told>,
}

impl Waiting {
    pub fn new(config: &JobConfig) -> Waiting {
        Waiting {
            warn: config.warn(),
            silent: Duration::from_millis(config.silent_ms()),
            reports: BTreeMap::new(),
            asked: None,
            judged: None,
            told: None,
        }
    }

    /// A thread of a rank says what it waits for; `true` if everybody is to be asked now.
    pub fn heard(&mut self, from: PeerId, waits: Vec<Wait>, now: Instant) -> bool {
        let overdue = waits.iter().any(|wait| u128::from(wait.since_ms) >= self.warn.as_millis());
        let rested = self.judged.as_ref().is_none_or(|(at, _)| now >= *at + self.warn / 4);
        let asks = self.asked.is_none() && overdue && rested;
        if asks {
            self.reports.clear();
            self.asked = Some(now);
        }
        if self.asked.is_some() {
            self.reports.insert(from, waits);
        }
        asks
    }

    /// When [`Waiting::poll`] must be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.asked.map(|asked| asked + self.silent)
    }

    /// Judges once all of `expected` have answered but for those that are known to be silent, or when their time is up; gives the
    /// verdict if it is to be told.
    pub fn poll(
        &mut self,
        now: Instant,
        mut expected: impl Iterator<Item = PeerId>,
        hosts: &BTreeMap<Rank, String>,
    ) -> Option<Verdict> {
        let asked = self.asked?;
        let silent_ms = self.silent.as_millis() as u64;
        let is_silent = |peer: &PeerId| {
            let mut seen = self.reports.values().flatten().filter(|wait| wait.of.rank == peer.rank).peekable();
            seen.peek().is_some() && seen.all(|wait| wait.silence_ms.is_some_and(|silence| silence >= silent_ms))
        };
        let late = now >= asked + self.silent;
        if !late && !expected.all(|peer| self.reports.contains_key(&peer) || is_silent(&peer)) {
            return None;
        }
        self.asked = None;
        let verdict = judge(&self.reports, hosts, silent_ms);
        self.conclude(verdict, now)
    }

    /// While the job is still being put together the launcher itself knows who waits for whom.
    pub fn judge_setup(
        &mut self,
        reports: &BTreeMap<PeerId, Vec<Wait>>,
        hosts: &BTreeMap<Rank, String>,
        now: Instant,
    ) -> Option<Verdict> {
        self.conclude(judge(reports, hosts, u64::MAX), now)
    }

    /// No rank has given the launcher a sign of life for so long.
    pub fn all_silent(
        &mut self,
        ranks: Vec<Rank>,
        silence_ms: u64,
        hosts: &BTreeMap<Rank, String>,
        now: Instant,
    ) -> Option<Verdict> {
        self.conclude(Verdict::all_silent(ranks, silence_ms, hosts), now)
    }

    /// How long a rank that was asked may take to answer.
    pub fn silent(&self) -> Duration {
        self.silent
    }

    /// How long a wait may be before it is told.
    pub fn warn(&self) -> Duration {
        self.warn
    }

    /// The last verdict, as long as it holds: ranks that go on waiting say so again.
    pub fn verdict(&self, now: Instant) -> Option<&Verdict> {
        let (_, verdict) = self.judged.as_ref().filter(|(at, _)| now < *at + self.warn + self.silent)?;
        Some(verdict)
    }

    /// What was said is old news: somebody who was waited for is waited for no more.
    pub fn forget(&mut self) {
        self.reports.clear();
        (self.asked, self.judged, self.told) = (None, None, None);
    }

    /// How long the longest of the workers that wait has waited, by what they said last: servers wait while all compute, too.
    pub fn workers_waited_ms(&self) -> u64 {
        let workers = self.reports.iter().filter(|(from, _)| from.rank.role == Role::Worker);
        workers.flat_map(|(_, waits)| waits).map(|wait| wait.since_ms).max().unwrap_or(0)
    }

    /// Keeps a verdict; gives it back if it is to be told. That all workers compute is no news, however long it takes.
    fn conclude(&mut self, verdict: Option<Verdict>, now: Instant) -> Option<Verdict> {
        self.judged = verdict.map(|verdict| (now, verdict));
        let (_, verdict) = self.judged.as_ref()?;
        if verdict.finding == Finding::Alive && !verdict.holds_workers {
            return None;
        }
        let is_known = self.told.as_ref().is_some_and(|told| {
            (&told.ranks, told.finding) == (&verdict.ranks, verdict.finding)
                && verdict.since_ms < told.since_ms.saturating_mul(2)
                && now < told.at + TELL_AGAIN
        });
        if is_known {
            return None;
        }
        let Verdict { ranks, finding, since_ms, .. } = verdict.clone();
        self.told = Some(Told { ranks, finding, since_ms, at: now });
        Some(verdict.clone())
    }
}
