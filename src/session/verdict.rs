//! Who keeps whom waiting: every rank says what it waits for, and one verdict is read off all that they say.
//!
//! Reports are edges of a graph: this rank waits for that one. Whoever is waited for and gives no sign of life is the cause; if
//! all are alive, the cause is whoever is waited for and waits for nobody itself.
//!
//! Invariant: pure; the verdict depends on the reports alone, never on their order, and names only ranks that somebody waits for.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::types::{ChunkId, Clock, PeerId, Rank, Role};

/// What is awaited of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owed {
    /// That it takes its seat.
    Join,
    /// A worker's tensors.
    Declaration,
    /// How it can be reached.
    Endpoints,
    /// Its coming to a barrier.
    Barrier,
    /// That its path comes up.
    Path,
    /// A worker's gradient.
    Push,
    /// A server's answer.
    Parameters,
    /// A slot for a gradient.
    Room,
    /// A shard's norm, or the decision about a step.
    Decision,
    /// That it takes note of a worker's leaving.
    Goodbye,
    /// Any report to the launcher.
    Report,
}

/// One thing that a rank waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Of whom.
    pub of: PeerId,
    /// What.
    pub owed: Owed,
    /// Of which chunk.
    pub chunk: Option<ChunkId>,
    /// At which clock.
    pub clock: Option<Clock>,
    /// For how long, in milliseconds.
    pub since_ms: u64,
    /// The fabric of the path between them; empty where there is none.
    pub fabric: String,
    /// How long ago the last sign of life came over that path, in milliseconds; `None` where there is no path yet.
    pub silence_ms: Option<u64>,
}

/// Most waits that one report names.
pub const WAITS_MAX: usize = 64;

/// What is known of those who keep the others waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// They give signs of life and wait for nobody.
    Alive,
    /// They give no sign of life.
    Silent,
    /// They have not come that far; nobody has a path to them.
    Missing,
}

/// Who keeps the job waiting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Who.
    pub ranks: Vec<Rank>,
    /// What they are.
    pub finding: Finding,
    /// Their host, if they are on one and it is known.
    pub host: Option<String>,
    /// Whether they are all that the job has on that host, and more than one.
    pub whole_host: bool,
    /// What is awaited of them.
    pub owed: Owed,
    /// Of which chunk.
    pub chunk: Option<ChunkId>,
    /// At which clock.
    pub clock: Option<Clock>,
    /// The fabric over which it would come; empty where there is no path.
    pub fabric: String,
    /// Ranks that wait for them, directly or for somebody who does.
    pub others: usize,
    /// Whether a worker is among those.
    pub holds_workers: bool,
    /// How long the longest of them has waited, in milliseconds.
    pub since_ms: u64,
    /// How long ago the last sign of life of any of them was, in milliseconds; `None` if nobody has a path to them.
    pub silence_ms: Option<u64>,
}

/// The verdict on what the ranks report, each lane for itself; `None` if nobody waits. A rank is silent after `silent_ms`
/// milliseconds without a sign of life; `hosts` are those of the ranks that have joined.
pub fn judge(reports: &BTreeMap<PeerId, Vec<Wait>>, hosts: &BTreeMap<Rank, String>, silent_ms: u64) -> Option<Verdict> {
    let waits: Vec<(Rank, &Wait)> =
        reports.iter().flat_map(|(from, waits)| waits.iter().map(|wait| (from.rank, wait))).collect();
    let causes = causes(&waits, silent_ms);
    let of_them = || waits.iter().filter(|(from, wait)| causes.contains(&wait.of.rank) && !causes.contains(from));
    // The wait of the lowest clock is the one that the others follow from.
    let (_, first) = of_them().min_by_key(|(_, wait)| (wait.clock, u64::MAX - wait.since_ms, wait.of, wait.chunk))?;
    let silence = silence(&waits, &causes);
    let finding = match silence {
        None => Finding::Missing,
        Some(silence) if silence >= silent_ms => Finding::Silent,
        Some(_) => Finding::Alive,
    };
    let others = followers(&waits, &causes);
    let mut of_hosts = causes.iter().map(|rank| hosts.get(rank));
    let host = of_hosts.next().flatten().filter(|host| of_hosts.all(|other| other == Some(*host)));
    let beside =
        |host: &String| hosts.iter().filter(|(_, other)| *other == host).all(|(rank, _)| causes.contains(rank));
    Some(Verdict {
        finding,
        whole_host: causes.len() > 1 && finding == Finding::Silent && host.is_some_and(beside),
        host: host.cloned(),
        owed: first.owed,
        chunk: first.chunk,
        clock: first.clock,
        fabric: first.fabric.clone(),
        holds_workers: others.iter().any(|rank| rank.role == Role::Worker),
        others: others.len(),
        since_ms: waits
            .iter()
            .filter(|(from, _)| others.contains(from))
            .map(|(_, wait)| wait.since_ms)
            .max()
            .unwrap_or(0),
        silence_ms: silence,
        ranks: causes.into_iter().collect(),
    })
}

/// The last sign of life that anybody had of each of these; of them all the latest.
fn silence(waits: &[(Rank, &Wait)], of: &BTreeSet<Rank>) -> Option<u64> {
    waits.iter().filter(|(_, wait)| of.contains(&wait.of.rank)).filter_map(|(_, wait)| wait.silence_ms).min()
}

/// The silent ones; if all are alive those who wait for nobody; if all wait for each other, those who have been waited for longest.
fn causes(waits: &[(Rank, &Wait)], silent_ms: u64) -> BTreeSet<Rank> {
    let awaited: BTreeSet<Rank> = waits.iter().map(|(_, wait)| wait.of.rank).collect();
    let is_silent = |rank: &Rank| silence(waits, &BTreeSet::from([*rank])).is_some_and(|silence| silence >= silent_ms);
    let silent: BTreeSet<Rank> = awaited.iter().copied().filter(is_silent).collect();
    if !silent.is_empty() {
        return silent;
    }
    let waiting: BTreeSet<Rank> = waits.iter().map(|(from, _)| *from).collect();
    let roots: BTreeSet<Rank> = awaited.difference(&waiting).copied().collect();
    if !roots.is_empty() {
        return roots;
    }
    let longest = waits.iter().max_by_key(|(_, wait)| (wait.since_ms, wait.of));
    longest.map(|(_, wait)| wait.of.rank).into_iter().collect()
}

/// Who waits for one of `causes`, or for somebody who does.
fn followers(waits: &[(Rank, &Wait)], causes: &BTreeSet<Rank>) -> BTreeSet<Rank> {
    let mut held = causes.clone();
    loop {
        let more: Vec<Rank> = waits
            .iter()
            .filter(|(from, wait)| held.contains(&wait.of.rank) && !held.contains(from))
            .map(|(from, _)| *from)
            .collect();
        if more.is_empty() {
            return held.difference(causes).copied().collect();
        }
        held.extend(more);
    }
}

/// "worker 1", "worker 1 and worker 2", and no more than eight of them by name.
pub(super) fn names(ranks: &[Rank]) -> String {
    let all: Vec<String> = ranks.iter().map(Rank::to_string).collect();
    let shown = all.len().min(8);
    match all.len() {
        0 | 1 => all.concat(),
        n if n > shown => format!("{} and {} more", all[..shown].join(", "), n - shown),
        n => format!("{} and {}", all[..n - 1].join(", "), all[n - 1]),
    }
}

impl Verdict {
    /// The launcher's own verdict where no rank says anything; `None` if there is no rank.
    pub(super) fn all_silent(ranks: Vec<Rank>, silence_ms: u64, hosts: &BTreeMap<Rank, String>) -> Option<Verdict> {
        let first = hosts.get(ranks.first()?);
        let host = first.filter(|host| ranks.iter().all(|rank| hosts.get(rank) == Some(host))).cloned();
        Some(Verdict {
            finding: Finding::Silent,
            whole_host: host.is_some() && ranks.len() > 1,
            host,
            owed: Owed::Report,
            chunk: None,
            clock: None,
            fabric: String::new(),
            others: 0,
            holds_workers: true,
            since_ms: silence_ms,
            silence_ms: Some(silence_ms),
            ranks,
        })
    }

    /// What they have not done.
    fn debt(&self) -> String {
        let clock = self.clock.map(|clock| format!(" clock {clock}")).unwrap_or_default();
        let of_clock = self.clock.map(|clock| format!(" of clock {clock}")).unwrap_or_default();
        match self.owed {
            Owed::Join => "not joined".into(),
            Owed::Declaration => "not declared any tensors".into(),
            Owed::Endpoints => "not offered any endpoints".into(),
            Owed::Barrier => "not reached a barrier".into(),
            Owed::Path => "not connected".into(),
            Owed::Push => format!("not pushed{clock}"),
            Owed::Parameters => format!("not answered with the parameters{of_clock}"),
            Owed::Room => format!("made no room for a gradient{of_clock}"),
            Owed::Decision => format!("not decided upon{clock}"),
            Owed::Goodbye => "not said goodbye".into(),
            Owed::Report => "not reported anything to the launcher".into(),
        }
    }

    /// What is known of their life.
    fn life(&self) -> String {
        let one = self.ranks.len() == 1;
        let seconds = seconds(self.silence_ms.unwrap_or(0));
        let computes = self.ranks.iter().all(|rank| rank.role == Role::Worker);
        match (self.finding, one) {
            (Finding::Missing, _) => String::new(),
            (Finding::Silent, true) => {
                format!("; no sign of life for {seconds} s: it is stopped, or its host is gone")
            }
            (Finding::Silent, false) => {
                format!("; no sign of life for {seconds} s: they are stopped, or their hosts are gone")
            }
            (Finding::Alive, _) => {
                let (whose, they) = if one { ("its", "it is") } else { ("their", "they are") };
                let does = if computes { "computing" } else { "busy" };
                format!("; {whose} last sign of life {seconds} s ago: {they} alive and {does}")
            }
        }
    }
}

fn seconds(ms: u64) -> String {
    let seconds = ms as f64 / 1000.0;
    if ms < 10_000 { format!("{seconds:.1}") } else { format!("{seconds:.0}") }
}

/// One line.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = self.ranks.len() == 1;
        let (has, them) = if one { ("has", "it") } else { ("have", "them") };
        match (&self.host, self.whole_host) {
            (Some(host), true) => write!(f, "all ranks of host {host} ({}) {has} ", names(&self.ranks))?,
            (Some(host), false) => write!(f, "{} (host {host}) {has} ", names(&self.ranks))?,
            (None, _) => write!(f, "{} {has} ", names(&self.ranks))?,
        }
        f.write_str(&self.debt())?;
        let chunk = self.chunk.map(|chunk| format!("chunk {}", chunk.0));
        let fabric = Some(&self.fabric).filter(|fabric| !fabric.is_empty()).map(|fabric| format!("over {fabric}"));
        let details: Vec<String> = chunk.into_iter().chain(fabric).collect();
        if !details.is_empty() {
            write!(f, " ({})", details.join(", "))?;
        }
        if self.owed == Owed::Report {
            return f.write_str(&self.life());
        }
        let (others, wait) = if self.others == 1 { ("other", "waits") } else { ("others", "wait") };
        write!(f, "; {} {others} {wait} for {them} since {} s", self.others, seconds(self.since_ms))?;
        f.write_str(&self.life())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S0: PeerId = PeerId::server(0, 0);
    const W0: PeerId = PeerId::worker(0);
    const W1: PeerId = PeerId::worker(1);

    fn wait(of: PeerId, owed: Owed, since_ms: u64, silence_ms: Option<u64>) -> Wait {
        let (chunk, clock) = (Some(ChunkId(4)), Some(12));
        Wait { of, owed, chunk, clock, since_ms, fabric: "tcp".into(), silence_ms }
    }

    fn text(reports: &[(PeerId, &[Wait])], hosts: &[(Rank, &str)]) -> String {
        let reports = reports.iter().map(|(from, waits)| (*from, waits.to_vec())).collect();
        let hosts = hosts.iter().map(|(rank, host)| (*rank, host.to_string())).collect();
        judge(&reports, &hosts, 3000).unwrap().to_string()
    }

    #[test]
    fn a_stopped_and_a_computing_worker_get_different_verdicts() {
        let hosts = [(W0.rank, "a"), (S0.rank, "a"), (W1.rank, "b")];
        let waits = |silence| {
            [(W0, wait(S0, Owed::Parameters, 30_000, Some(10))), (S0, wait(W1, Owed::Push, 29_000, Some(silence)))]
        };
        let say = |silence| {
            let [(a, first), (b, second)] = waits(silence);
            text(&[(a, &[first]), (b, &[second])], &hosts)
        };
        assert_eq!(
            say(400),
            "worker 1 (host b) has not pushed clock 12 (chunk 4, over tcp); 2 others wait for it since 30 s; its last sign of \
             life 0.4 s ago: it is alive and computing"
        );
        assert_eq!(
            say(31_000),
            "worker 1 (host b) has not pushed clock 12 (chunk 4, over tcp); 2 others wait for it since 30 s; no sign of life for \
             31 s: it is stopped, or its host is gone"
        );
    }

    #[test]
    fn a_host_that_is_gone_is_named_as_one() {
        let s1 = PeerId::server(1, 0);
        let hosts = [(S0.rank, "a"), (W0.rank, "a"), (s1.rank, "b"), (W1.rank, "b")];
        let silent = |of, owed| wait(of, owed, 6000, Some(6500));
        let reports: [(PeerId, &[Wait]); 2] = [
            (W0, &[silent(s1, Owed::Parameters), wait(S0, Owed::Parameters, 6000, Some(0))]),
            (S0, &[silent(W1, Owed::Push)]),
        ];
        let told = text(&reports, &hosts);
        assert!(told.starts_with("all ranks of host b (server 1 and worker 1) have not"), "{told}");
        assert!(
            told.contains("2 others wait for them") && told.ends_with("they are stopped, or their hosts are gone"),
            "{told}"
        );
    }

    #[test]
    fn who_has_not_joined_is_neither_alive_nor_silent() {
        let mut missing = wait(W1, Owed::Join, 5000, None);
        (missing.chunk, missing.clock, missing.fabric) = (None, None, String::new());
        let told = text(&[(W0, &[missing])], &[(W0.rank, "a")]);
        assert_eq!(told, "worker 1 has not joined; 1 other waits for it since 5.0 s");
    }

    #[test]
    fn nobody_waits_and_nothing_is_said() {
        assert_eq!(judge(&BTreeMap::from([(W0, Vec::new())]), &BTreeMap::new(), 3000), None);
    }
}
