//! Whom the job waits for: ranks that do not come while it is put together, and those that keep others waiting while it runs.
//!
//! Invariant: every wait has a deadline, and its end names all who are missing.

use super::*;
use crate::session::{Owed, Verdict, Wait};

/// A wait of the job's beginning, or at a barrier.
struct SetupWait {
    since: Instant,
    limit: Duration,
    /// Since when it is worth telling: servers are there at once, and programs take a while to begin.
    watched: Option<Instant>,
    owed: Owed,
    missing: Vec<Rank>,
    /// Those that wait.
    here: Vec<Rank>,
    /// What the missing have not done, after their names.
    undone: String,
}

impl Roster {
    /// Looks whether somebody has been waited for too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.ended {
            return;
        }
        let is_here = |(rank, seat): (&Rank, &Seat)| rank.role == Role::Worker && seat.taken;
        if self.first_worker.is_none() && self.seats.iter().any(is_here) {
            self.first_worker = Some(now);
        }
        let waits = self.waits();
        if let Some(wait) = waits.iter().find(|wait| wait.since + wait.limit <= now) {
            let has = names(wait.missing.iter().copied());
            let text = format!("{has} not {} within {}", wait.undone, seconds(wait.limit));
            self.ended = true;
            return self.notice(Notice::TimedOut(text));
        }
        self.warn_of_setup(&waits, now);
        self.watch_silence(now);
        self.judge(now);
    }

    /// When `handle_timeout` must be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.ended {
            return None;
        }
        let waits = self.waits();
        let warned = self.warned.map(|at| at + self.waiting.warn());
        let warning = |wait: &SetupWait| Some(warned.unwrap_or(wait.watched? + self.waiting.warn()));
        let setup = waits.iter().flat_map(|wait| [Some(wait.since + wait.limit), warning(wait)]);
        setup.flatten().chain(self.waiting.next_deadline()).chain(self.silence_deadline()).min()
    }

    /// A thread of a rank says what it waits for.
    pub(super) fn on_waits(&mut self, from: PeerId, waits: Vec<Wait>, now: Instant) {
        if self.waiting.heard(from, waits, now) {
            self.send(self.everybody(), FromLauncher::Command(Command::TellWaits));
        }
        self.judge(now);
    }

    fn judge(&mut self, now: Instant) {
        let present = self.seats.iter().filter(|(_, seat)| seat.connection.is_some() && !seat.finished);
        let expected: Vec<PeerId> = present.flat_map(|(rank, _)| self.lanes_of(*rank)).collect();
        let hosts = self.hosts();
        let verdict = self.waiting.poll(now, expected.into_iter(), &hosts);
        self.tell(verdict);
        self.drop_stragglers(now);
    }

    /// When the silence of all ranks is to be looked at next.
    fn silence_deadline(&self) -> Option<Instant> {
        let heard = self.heard.filter(|_| self.running)?;
        Some(self.asked.map_or(heard + self.waiting.warn(), |asked| asked + self.waiting.silent()))
    }

    /// A rank that waits says so, and one that gets on too: where none says anything, none runs. They are asked once more, and then it
    /// is told, by the launcher's own knowledge.
    fn watch_silence(&mut self, now: Instant) {
        let Some(heard) = self.heard.filter(|_| self.running) else { return };
        if self.asked.is_some_and(|asked| heard > asked) {
            self.asked = None;
        }
        match self.asked {
            None if now >= heard + self.waiting.warn() => {
                self.asked = Some(now);
                self.send(self.everybody(), FromLauncher::Command(Command::TellWaits));
            }
            Some(asked) if now >= asked + self.waiting.silent() => {
                self.asked = Some(now);
                let here = self.seats.iter().filter(|(_, seat)| seat.connection.is_some() && !seat.finished);
                let ranks: Vec<Rank> = here.map(|(rank, _)| *rank).collect();
                let silence_ms = now.saturating_duration_since(heard).as_millis() as u64;
                let verdict = self.waiting.all_silent(ranks, silence_ms, &self.hosts(), now);
                self.tell(verdict);
            }
            _ => {}
        }
    }

    /// The waits of the beginning, as if those that are there had reported them.
    fn warn_of_setup(&mut self, waits: &[SetupWait], now: Instant) {
        let due = |wait: &&SetupWait| wait.watched.is_some_and(|since| since + self.waiting.warn() <= now);
        let Some(wait) = waits.iter().find(due) else { return };
        let since = wait.watched.unwrap_or(now);
        if self.warned.is_some_and(|at| now < at + self.waiting.warn()) {
            return;
        }
        self.warned = Some(now);
        let since_ms = now.saturating_duration_since(since).as_millis() as u64;
        let of = |rank: &Rank| Wait {
            of: PeerId { rank: *rank, lane: 0 },
            owed: wait.owed,
            chunk: None,
            clock: None,
            since_ms,
            fabric: String::new(),
            silence_ms: None,
        };
        let reports =
            wait.here.iter().map(|rank| (PeerId { rank: *rank, lane: 0 }, wait.missing.iter().map(of).collect()));
        let verdict = self.waiting.judge_setup(&reports.collect(), &self.hosts(), now);
        self.tell(verdict);
    }

    fn tell(&mut self, verdict: Option<Verdict>) {
        if let Some(verdict) = verdict {
            self.notice(Notice::Waiting(Box::new(verdict)));
        }
    }

    fn hosts(&self) -> BTreeMap<Rank, String> {
        let taken = self.seats.iter().filter(|(_, seat)| seat.taken);
        taken.map(|(rank, seat)| (*rank, seat.host.clone())).collect()
    }

    /// Every wait that is open.
    fn waits(&self) -> Vec<SetupWait> {
        let mut waits = Vec::new();
        let setup = Duration::from_millis(self.config.setup_ms);
        let mut add = |(since, watched), limit, owed, undone: String, is_here: &dyn Fn(Rank, &Seat) -> bool| {
            let (mut here, mut missing) = (Vec::new(), Vec::new());
            for (rank, seat) in &self.seats {
                if is_here(*rank, seat) { here.push(*rank) } else { missing.push(*rank) }
            }
            let watched = Some(watched).flatten().filter(|_| !here.is_empty());
            waits.push(SetupWait { since, watched, limit, owed, missing, here, undone });
        };
        if self.seats.values().any(|seat| !seat.taken) {
            let join = Duration::from_millis(self.config.join_ms);
            add((self.started, self.first_worker), join, Owed::Join, "joined".into(), &|_, seat| seat.taken);
        }
        if let Some(gathering) = &self.declaring {
            let here = |rank: Rank, seat: &Seat| rank.role == Role::Server || seat.declared.is_some();
            add(
                (gathering.since, Some(gathering.since)),
                setup,
                Owed::Declaration,
                "declared any tensors".into(),
                &here,
            );
        }
        if let Some(gathering) = &self.offering {
            let here = |rank, _: &Seat| gathering.here.contains(&rank);
            add(
                (gathering.since, Some(gathering.since)),
                setup,
                Owed::Endpoints,
                "offered any endpoints".into(),
                &here,
            );
        }
        for (name, gathering) in &self.barriers {
            let here =
                |rank, seat: &Seat| seat.finished || seat.presence == Presence::Gone || gathering.here.contains(&rank);
            add(
                (gathering.since, Some(gathering.since)),
                setup,
                Owed::Barrier,
                format!("reached barrier `{name}`"),
                &here,
            );
        }
        waits
    }
}
