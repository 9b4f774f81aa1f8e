//! The stopwatch, and figures made of what it measured.
//!
//! Invariant: what is timed allocates nothing for the stopwatch's sake, and rounds of the warm-up are in no figure.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{Result, observe::Usage};

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

/// The bytes that count: of each round, and of what ends the measurement after the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Of a round.
    pub round: u64,
    /// Of the end.
    pub end: u64,
}

/// What one process measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Bytes that count, of all timed rounds and of what ended them.
    pub bytes: u64,
    /// How many rounds were timed.
    pub rounds: u64,
    /// How many rounds there were, with those of the warm-up.
    pub rounds_all: u64,
    /// How long the timed rounds and their end took together.
    pub elapsed_ns: u64,
    /// Processor time of this process in them.
    pub cpu_ns: u64,
    /// Half of the rounds took at most so long.
    pub latency_ns_p50: u64,
    /// All but one in a hundred took at most so long.
    pub latency_ns_p99: u64,
    /// All but one in a thousand; of fewer than 1,000 rounds the slowest.
    pub latency_ns_p999: u64,
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
    /// Warms up, then times rounds of `bytes` each.
    ///
    /// # Errors
    ///
    /// The first error of `round`.
    pub fn take(bytes: u64, pace: Pace, mut round: impl FnMut() -> Result<()>) -> Result<Measured> {
        let load = Load { round: bytes, end: 0 };
        Measured::take_until(&mut (), load, pace, |()| round(), |()| Ok(()))
    }

    /// Warms up, then times rounds over `state` and, in the rate but in no round's latency, what ends them: rounds that overlap are
    /// over only when nothing of the last one is under way any more. The warm-up ends in the same way.
    ///
    /// # Errors
    ///
    /// The first error of `round` or `end`.
    pub fn take_until<S>(
        state: &mut S,
        load: Load,
        pace: Pace,
        mut round: impl FnMut(&mut S) -> Result<()>,
        mut end: impl FnMut(&mut S) -> Result<()>,
    ) -> Result<Measured> {
        let room = match pace {
            Pace::Rounds(rounds) => rounds.min(ROUNDS_MAX),
            Pace::Seconds(_) => ROUNDS_MAX,
        };
        let mut times = Vec::with_capacity(room as usize);
        let since = Instant::now();
        let mut warm = 0;
        while warm < WARM_UP_MIN || !pace.is_over(warm, since, 10) {
            round(state)?;
            warm += 1;
        }
        end(state)?;
        let used = Usage::now();
        let start = Instant::now();
        let mut last = start;
        while times.is_empty() || !pace.is_over(times.len() as u64, start, 1) {
            round(state)?;
            let now = Instant::now();
            times.push(now.duration_since(last).as_nanos() as u64);
            last = now;
        }
        end(state)?;
        let elapsed_ns = start.elapsed().as_nanos() as u64;
        let cpu_ns = Usage::now().since(used).cpu_ns;
        let rounds = times.len() as u64;
        times.sort_unstable();
        let quantile = |share: f64| times[((rounds - 1) as f64 * share).round() as usize];
        Ok(Measured {
            bytes: load.round * rounds + load.end,
            rounds,
            rounds_all: rounds + warm,
            elapsed_ns,
            cpu_ns,
            latency_ns_p50: quantile(0.5),
            latency_ns_p99: quantile(0.99),
            latency_ns_p999: quantile(0.999),
        })
    }
}

/// What a whole benchmark reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figure {
    /// The bytes that count, of all processes together, a second.
    pub bytes_per_s: f64,
    /// The median of a round.
    pub latency_us_p50: f64,
    /// The 99th percentile of a round.
    pub latency_us_p99: f64,
    /// The 99.9th percentile of a round.
    pub latency_us_p999: f64,
    /// Processor time of the timed rounds.
    pub cpu_s: f64,
    /// How long the timed rounds took, of the slowest process.
    pub seconds: f64,
    /// Rounds that were timed, of one process.
    pub rounds: f64,
}

impl Figure {
    /// Processes that measured at the same time: rates and processor times add up; of times the slowest process' count.
    pub fn together(parts: &[Measured]) -> Figure {
        let rate = |part: &Measured| part.bytes as f64 * 1e9 / part.elapsed_ns.max(1) as f64;
        let largest = |number: fn(&Measured) -> u64| parts.iter().map(number).max().unwrap_or(0) as f64;
        Figure {
            bytes_per_s: parts.iter().map(rate).sum(),
            latency_us_p50: largest(|part| part.latency_ns_p50) / 1e3,
            latency_us_p99: largest(|part| part.latency_ns_p99) / 1e3,
            latency_us_p999: largest(|part| part.latency_ns_p999) / 1e3,
            cpu_s: parts.iter().map(|part| part.cpu_ns).sum::<u64>() as f64 / 1e9,
            seconds: largest(|part| part.elapsed_ns) / 1e9,
            rounds: largest(|part| part.rounds),
        }
    }

    /// The median of repetitions, of each number by itself; `None` of none.
    pub fn median(repetitions: &[Figure]) -> Option<Figure> {
        let of = |number: fn(&Figure) -> f64| median(repetitions.iter().map(number).collect());
        Some(Figure {
            bytes_per_s: of(|figure| figure.bytes_per_s)?,
            latency_us_p50: of(|figure| figure.latency_us_p50)?,
            latency_us_p99: of(|figure| figure.latency_us_p99)?,
            latency_us_p999: of(|figure| figure.latency_us_p999)?,
            cpu_s: of(|figure| figure.cpu_s)?,
            seconds: of(|figure| figure.seconds)?,
            rounds: of(|figure| figure.rounds)?,
        })
    }
}

/// The median of numbers; `None` of none.
pub fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    let upper = *all.get(all.len() / 2)?;
    Some(if all.len().is_multiple_of(2) { (all[all.len() / 2 - 1] + upper) / 2.0 } else { upper })
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
        assert_eq!((measured.rounds, measured.rounds_all, rounds, measured.bytes), (100, 110, 110, 6400));
        assert!(measured.latency_ns_p50 < 1_000_000, "{measured:?}");
        let order = [measured.latency_ns_p50, measured.latency_ns_p99, measured.latency_ns_p999, measured.elapsed_ns];
        assert!(order.is_sorted(), "{measured:?}");
    }

    /// What ends the rounds is in the rate and in no round; the warm-up has an end of its own.
    #[test]
    fn the_end_counts_for_the_rate_alone() {
        let mut ends = 0;
        let end = |ends: &mut u32| {
            *ends += 1;
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        };
        let load = Load { round: 10, end: 3 };
        let measured = Measured::take_until(&mut ends, load, Pace::Rounds(5), |_| Ok(()), end).unwrap();
        assert_eq!((ends, measured.bytes), (2, 53));
        assert!(measured.elapsed_ns >= 20_000_000 && measured.latency_ns_p50 < 20_000_000, "{measured:?}");
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
        let one = Measured {
            bytes: 10_000,
            rounds: 10,
            rounds_all: 13,
            elapsed_ns: 1000,
            cpu_ns: 500,
            latency_ns_p50: 90_000,
            latency_ns_p99: 200_000,
            latency_ns_p999: 210_000,
        };
        let other = Measured { latency_ns_p50: 110_000, latency_ns_p99: 150_000, ..one };
        let figure = Figure::together(&[one, other]);
        assert_eq!((figure.bytes_per_s, figure.latency_us_p50, figure.latency_us_p99), (2e10, 110.0, 200.0));
        assert_eq!((figure.latency_us_p999, figure.cpu_s, figure.seconds), (210.0, 1e-6, 1e-6));
    }

    #[test]
    fn medians_are_by_number() {
        let figure = |rate, p50| Figure { bytes_per_s: rate, latency_us_p50: p50, ..Figure::default() };
        let all = [figure(1.0, 9.0), figure(5.0, 1.0), figure(3.0, 5.0)];
        let median = Figure::median(&all).unwrap();
        assert_eq!((median.bytes_per_s, median.latency_us_p50), (3.0, 5.0));
        assert_eq!(Figure::median(&all[..2]).unwrap().bytes_per_s, 3.0);
        assert_eq!(Figure::median(&[]), None);
    }
}
