//! The stopwatch, and figures made of what it measured.
//!
//! Invariant: what is timed allocates nothing for the stopwatch's sake, and rounds of the warm-up are in no figure.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Result;

/// Most rounds of one measurement: their times are kept, 8 bytes each.
const ROUNDS_MAX: u64 = 1 << 20;

/// Fewest rounds: a median of fewer says little.
const ROUNDS_MIN: u64 = 5;

/// Rounds of a warm-up at least.
const WARM_UP_MIN: u64 = 3;

/// How long to measure; a tenth of it is spent on the warm-up before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// So many rounds: what all workers of a job must agree on.
    Rounds(u64),
    /// As many rounds as fit.
    Seconds(f64),
}

/// What one process measured. A round pushes `bytes` and brings as many back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Bytes in each direction in a round.
    pub bytes: u64,
    /// How many rounds.
    pub rounds: u64,
    /// How long they took together.
    pub elapsed_ns: u64,
    /// Half of the rounds took at most so long.
    pub latency_ns_p50: u64,
    /// All but one in a hundred took at most so long.
    pub latency_ns_p99: u64,
}

impl Pace {
    /// The pace that fills `seconds` with rounds that take `latency_us` each.
    pub fn filling(seconds: f64, latency_us: f64) -> Pace {
        Pace::Rounds(((seconds * 1e6 / latency_us.max(1.0)) as u64).clamp(ROUNDS_MIN, ROUNDS_MAX))
    }

    fn is_over(self, rounds: u64, since: Instant, share: u32) -> bool {
        match self {
            Pace::Rounds(wanted) => rounds >= (wanted / u64::from(share)).min(ROUNDS_MAX),
            Pace::Seconds(seconds) => {
                let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
                rounds >= ROUNDS_MAX || (rounds >= ROUNDS_MIN && since.elapsed() >= time / share)
            }
        }
    }
}

impl Measured {
    /// Warms up, then times rounds of `bytes` in each direction.
    ///
    /// # Errors
    ///
    /// The first error of `round`.
    pub fn take(bytes: u64, pace: Pace, mut round: impl FnMut() -> Result<()>) -> Result<Measured> {
        let room = match pace {
            Pace::Rounds(rounds) => rounds.min(ROUNDS_MAX),
            Pace::Seconds(_) => ROUNDS_MAX,
        };
        let mut times = Vec::with_capacity(room as usize);
        let since = Instant::now();
        let mut warm = 0;
        while warm < WARM_UP_MIN || !pace.is_over(warm, since, 10) {
            round()?;
            warm += 1;
        }
        let start = Instant::now();
        let mut last = start;
        while times.is_empty() || !pace.is_over(times.len() as u64, start, 1) {
            round()?;
            let now = Instant::now();
            times.push(now.duration_since(last).as_nanos() as u64);
            last = now;
        }
        let elapsed_ns = last.duration_since(start).as_nanos() as u64;
        let rounds = times.len() as u64;
        times.sort_unstable();
        let quantile = |share: f64| times[((rounds - 1) as f64 * share).round() as usize];
        Ok(Measured { bytes, rounds, elapsed_ns, latency_ns_p50: quantile(0.5), latency_ns_p99: quantile(0.99) })
    }
}

/// What a whole benchmark reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Payload pushed plus payload brought back, of all workers together.
    pub bytes_per_s: f64,
    /// The median of a round.
    pub latency_us_p50: f64,
    /// The 99th percentile of a round.
    pub latency_us_p99: f64,
}

impl Figure {
    /// Processes that measured at the same time: rates add up; of the latencies the slowest process' count.
    pub fn together(parts: &[Measured]) -> Figure {
        let rate = |part: &Measured| 2.0 * (part.bytes * part.rounds) as f64 * 1e9 / part.elapsed_ns.max(1) as f64;
        let slowest = |latency: fn(&Measured) -> u64| parts.iter().map(latency).max().unwrap_or(0) as f64 / 1e3;
        Figure {
            bytes_per_s: parts.iter().map(rate).sum(),
            latency_us_p50: slowest(|part| part.latency_ns_p50),
            latency_us_p99: slowest(|part| part.latency_ns_p99),
        }
    }

    /// The median of repetitions, of each number by itself; `None` of none.
    pub fn median(repetitions: &[Figure]) -> Option<Figure> {
        let of = |number: fn(&Figure) -> f64| {
            let mut all: Vec<f64> = repetitions.iter().map(number).collect();
            all.sort_by(f64::total_cmp);
            let upper = *all.get(all.len() / 2)?;
            Some(if all.len().is_multiple_of(2) { (all[all.len() / 2 - 1] + upper) / 2.0 } else { upper })
        };
        Some(Figure {
            bytes_per_s: of(|figure| figure.bytes_per_s)?,
            latency_us_p50: of(|figure| figure.latency_us_p50)?,
            latency_us_p99: of(|figure| figure.latency_us_p99)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warm_up_is_in_no_figure() {
        let mut rounds = 0;
        let slow_at_first = || {
            rounds += 1;
            if rounds <= 10 {
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        };
        let measured = Measured::take(64, Pace::Rounds(100), slow_at_first).unwrap();
        assert_eq!((measured.rounds, rounds), (100, 110));
        assert!(measured.elapsed_ns < 2_000_000, "{measured:?}");
        assert!(measured.latency_ns_p50 <= measured.latency_ns_p99 && measured.latency_ns_p99 <= measured.elapsed_ns);
    }

    #[test]
    fn seconds_are_kept_and_errors_are_handed_on() {
        let since = Instant::now();
        let nap = || {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        };
        let measured = Measured::take(64, Pace::Seconds(0.05), nap).unwrap();
        assert!(measured.elapsed_ns >= 50_000_000 && since.elapsed() >= Duration::from_millis(55));
        assert!((5..=50).contains(&measured.rounds), "{measured:?}");
        let failing = || Err(crate::Error::JobFailed("no".into()));
        assert!(Measured::take(64, Pace::Rounds(5), failing).is_err());
    }

    #[test]
    fn rates_add_up_and_the_slowest_counts() {
        let one =
            Measured { bytes: 500, rounds: 10, elapsed_ns: 1000, latency_ns_p50: 90_000, latency_ns_p99: 200_000 };
        let other = Measured { latency_ns_p50: 110_000, latency_ns_p99: 150_000, ..one };
        let figure = Figure::together(&[one, other]);
        assert_eq!(figure, Figure { bytes_per_s: 2e10, latency_us_p50: 110.0, latency_us_p99: 200.0 });
    }

    #[test]
    fn medians_are_by_number() {
        let figure = |rate, p50| Figure { bytes_per_s: rate, latency_us_p50: p50, latency_us_p99: 0.0 };
        let all = [figure(1.0, 9.0), figure(5.0, 1.0), figure(3.0, 5.0)];
        let median = Figure::median(&all).unwrap();
        assert_eq!((median.bytes_per_s, median.latency_us_p50), (3.0, 5.0));
        assert_eq!(Figure::median(&all[..2]).unwrap().bytes_per_s, 3.0);
        assert_eq!(Figure::median(&[]), None);
    }
}
