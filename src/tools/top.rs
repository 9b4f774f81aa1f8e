//! What `gradwire top` shows: two looks at a job's status, made into rates, beside ceilings from a benchmark.
//!
//! Invariant: pure; a rate is made of what ranks reported at two moments, over the time between these, and where there is no second
//! report there is no rate.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::{
    Error, Result,
    session::{Status, Verdict},
    types::{Clock, Rank, Role},
};

/// One rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankFigures {
    /// Who.
    pub rank: Rank,
    /// Its state, as in a status.
    pub state: String,
    /// The last clock that it reported.
    pub clock: Option<Clock>,
    /// Clocks a second.
    pub clocks_per_s: Option<f64>,
    /// Payload bytes sent a second, over all fabrics.
    pub sent_bytes_per_s: Option<f64>,
}

/// One fabric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FabricFigures {
    /// Its name.
    pub fabric: String,
    /// Payload bytes that all ranks together sent a second.
    pub sent_bytes_per_s: f64,
    /// What a benchmark's ceiling was.
    pub ceiling_bytes_per_s: Option<f64>,
}

/// A job at a moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// The job's name.
    pub name: String,
    /// Steps a second: the clocks of the slowest worker.
    pub steps_per_s: Option<f64>,
    /// Who keeps the job waiting, if somebody is waited for longer than `warn_ms`.
    pub verdict: Option<Verdict>,
    /// The running worker with the lowest clock, if others are ahead of it.
    pub slowest: Option<Rank>,
    /// The clock of the last complete checkpoint.
    pub checkpoint: Option<Clock>,
    /// Clocks at which a gradient was not finite.
    pub not_finite: u64,
    /// All ranks, servers first.
    pub ranks: Vec<RankFigures>,
    /// The fabrics over which anything was sent.
    pub fabrics: Vec<FabricFigures>,
}

/// The ceilings of fabrics, in bytes a second, from lines of `gradwire bench … --json`; of several the highest.
///
/// # Errors
///
/// [`Error::Config`] if no line has one.
pub fn ceilings(text: &str) -> Result<BTreeMap<String, f64>> {
    let mut found: BTreeMap<String, f64> = BTreeMap::new();
    for row in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        if let (Some(fabric), Some(rate)) = (row["transport"].as_str(), row["ceiling_bytes_per_s"].as_f64()) {
            let best = found.entry(fabric.into()).or_default();
            *best = best.max(rate);
        }
    }
    if found.is_empty() {
        return Err(Error::Config(
            "no ceiling in the file: write it with `gradwire bench push-pull --transport tcp --json > FILE`".into(),
        ));
    }
    Ok(found)
}

impl Figures {
    /// What two looks at a job make, the second one later.
    pub fn between(before: &Status, now: &Status, ceilings: &BTreeMap<String, f64>) -> Figures {
        let mut fabrics: BTreeMap<&str, f64> = BTreeMap::new();
        let mut ranks = Vec::with_capacity(now.ranks.len());
        for rank in &now.ranks {
            let earlier = before.ranks.iter().find(|other| other.rank == rank.rank);
            // Over the time between the two reports, not between the two looks.
            let seconds =
                earlier.map_or(0.0, |earlier| rank.reported_ms.saturating_sub(earlier.reported_ms) as f64 / 1e3);
            let rate = |after: u64, before: u64| (seconds > 0.0).then(|| after.saturating_sub(before) as f64 / seconds);
            let mut all = None;
            for (fabric, bytes) in &rank.sent {
                let before = earlier.and_then(|earlier| earlier.sent.get(fabric)).copied().unwrap_or(0);
                let rate = rate(*bytes, before);
                *fabrics.entry(fabric).or_default() += rate.unwrap_or(0.0);
                all = rate.map(|rate| rate + all.unwrap_or(0.0)).or(all);
            }
            ranks.push(RankFigures {
                rank: rank.rank,
                state: rank.state.clone(),
                clock: rank.clock,
                clocks_per_s: earlier.and_then(|earlier| rate(rank.clock?, earlier.clock.unwrap_or(0))),
                sent_bytes_per_s: all,
            });
        }
        let workers = || ranks.iter().filter(|rank| rank.rank.role == Role::Worker && rank.state == "running");
        let slowest = workers().min_by_key(|rank| rank.clock);
        let ahead = workers().any(|rank| slowest.is_some_and(|slowest| rank.clock > slowest.clock));
        Figures {
            name: now.name.clone(),
            steps_per_s: slowest.and_then(|rank| rank.clocks_per_s),
            verdict: now.verdict.clone(),
            slowest: slowest.filter(|_| ahead).map(|rank| rank.rank),
            checkpoint: now.checkpoint,
            not_finite: now.not_finite,
            fabrics: fabrics
                .into_iter()
                .map(|(fabric, sent_bytes_per_s)| FabricFigures {
                    fabric: fabric.into(),
                    sent_bytes_per_s,
                    ceiling_bytes_per_s: ceilings.get(fabric).copied(),
                })
                .collect(),
            ranks,
        }
    }

    /// The same for people.
    pub fn text(&self) -> String {
        let steps = self.steps_per_s.map_or("-".into(), |rate| format!("{rate:.1}"));
        let checkpoint = self.checkpoint.map_or("none yet".into(), |clock| format!("clock {clock}"));
        let mut text = format!("job {}   {steps} steps/s   last checkpoint: {checkpoint}\n", self.name);
        text += &match (&self.verdict, self.slowest) {
            (Some(verdict), _) => format!("waiting: {verdict}\n"),
            (None, Some(rank)) => {
                format!("furthest behind by the last reports: {rank}; nobody has been waited for overlong\n")
            }
            (None, None) => "nobody has been waited for overlong\n".into(),
        };
        if self.not_finite > 0 {
            text += &format!("gradients that were not finite at {} clocks\n", self.not_finite);
        }
        text += &format!("\n{:<12} {:<11} {:>9} {:>9} {:>12}\n", "rank", "state", "clock", "clocks/s", "sent/s");
        let rate = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.1}"));
        for rank in &self.ranks {
            let clock = rank.clock.map_or("-".into(), |clock| clock.to_string());
            let (clocks, sent) = (rate(rank.clocks_per_s), rank.sent_bytes_per_s.map_or("-".into(), plain_rate));
            let name = rank.rank.to_string();
            text += &format!("{name:<12} {:<11} {clock:>9} {clocks:>9} {sent:>12}\n", rank.state);
        }
        text += &format!("\n{:<12} {:>12} {:>12} {:>6}\n", "fabric", "sent/s", "ceiling", "share");
        for fabric in &self.fabrics {
            let ceiling = fabric.ceiling_bytes_per_s;
            let share = ceiling.map_or("-".into(), |ceiling| format!("{:.2}", fabric.sent_bytes_per_s / ceiling));
            let (sent, ceiling) = (plain_rate(fabric.sent_bytes_per_s), ceiling.map_or("not given".into(), plain_rate));
            text += &format!("{:<12} {sent:>12} {ceiling:>12} {share:>6}\n", fabric.fabric);
        }
        if self.fabrics.iter().any(|fabric| fabric.ceiling_bytes_per_s.is_none()) {
            text += "a ceiling comes from a file: gradwire bench push-pull --transport tcp --json > FILE, then --ceiling FILE\n";
        }
        text
    }
}

fn plain_rate(rate: f64) -> String {
    match rate {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::RankStatus;

    fn status(ranks: &[(Rank, Clock, u64, u64)]) -> Status {
        let rank = |(rank, clock, reported_ms, tcp): &(Rank, Clock, u64, u64)| RankStatus {
            path_counts: Default::default(),
            rank: *rank,
            state: "running".into(),
            host: "a".into(),
            pid: 1,
            clock: Some(*clock),
            paths: Vec::new(),
            metrics: None,
            sent: BTreeMap::from([("tcp".into(), *tcp)]),
            reported_ms: *reported_ms,
        };
        Status {
            shards: Vec::new(),
            name: "job".into(),
            instance: 0,
            ranks: ranks.iter().map(rank).collect(),
            turns: Vec::new(),
            lacked: 0,
            checkpoint: None,
            not_finite: 0,
            verdict: None,
            metrics: None,
        }
    }

    #[test]
    fn rates_are_of_the_time_between_reports() {
        let (one, two) = (Rank::worker(0), Rank::worker(1));
        let before = status(&[(one, 100, 1000, 0), (two, 98, 1000, 1_000_000)]);
        let now = status(&[(one, 110, 2000, 2_000_000), (two, 103, 1500, 2_000_000)]);
        let ceilings = BTreeMap::from([("tcp".into(), 8e6)]);
        let figures = Figures::between(&before, &now, &ceilings);
        assert_eq!((figures.steps_per_s, figures.slowest), (Some(10.0), Some(two)));
        let tcp = &figures.fabrics[0];
        assert_eq!((tcp.sent_bytes_per_s, tcp.ceiling_bytes_per_s), (4e6, Some(8e6)));
        assert!(figures.text().contains("4.0 MB/s     8.0 MB/s   0.50"), "{}", figures.text());
        let still = Figures::between(&now, &now, &BTreeMap::new());
        assert_eq!((still.steps_per_s, still.ranks[0].sent_bytes_per_s), (None, None));
        assert!(still.text().contains("not given"), "{}", still.text());
    }

    #[test]
    fn ceilings_are_the_highest_of_a_benchmark() {
        let text = "{\"transport\":\"tcp\",\"ceiling_bytes_per_s\":5e9}\nnoise\n{\"transport\":\"tcp\",\"ceiling_bytes_per_s\":7e9}\n\
                    {\"transport\":\"shm\",\"ceiling_bytes_per_s\":null}\n";
        assert_eq!(ceilings(text).unwrap(), BTreeMap::from([("tcp".into(), 7e9)]));
        assert!(ceilings("{}").unwrap_err().to_string().contains("gradwire bench"));
    }
}
