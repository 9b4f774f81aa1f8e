//! Whether a thread that has nothing to do goes on looking or falls asleep.
//!
//! Waking a sleeping thread costs several microseconds, so it is worth looking a little longer when something is about to come,
//! and a waste of a core that other ranks share when nothing is. Which of the two it is, the last waits tell: a wait that was over
//! within [`SPIN_MAX`] could have been spun through, so the next one may spin longer; one that outlasted its spinning makes the next
//! shorter. A thread whose waits are long does not spin at all, but for a look at each wake-up.
//!
//! Invariant: no wait spins for longer than [`SPIN_MAX`]; time is an argument.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The longest time that a wait is spun through: about what two wake-ups cost.
pub const SPIN_MAX: Duration = Duration::from_micros(20);

/// What a wait that could have been spun through earns at first.
const SPIN_MIN: Duration = Duration::from_micros(4);

/// The idle time of one thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idle {
    /// How long the next wait may spin.
    budget: Duration,
    /// Since when there has been nothing to do.
    since: Option<Instant>,
    /// Whether this wait has outlasted its spinning.
    slept: bool,
}

impl Idle {
    /// There was something to do.
    pub fn busy(&mut self, now: Instant) {
        let Some(since) = self.since.take() else { return };
        let waited = now.saturating_duration_since(since);
        if waited <= SPIN_MAX {
            self.budget = (2 * self.budget).clamp(SPIN_MIN, SPIN_MAX);
        } else if self.slept {
            self.budget /= 2;
            if self.budget < SPIN_MIN {
                self.budget = Duration::ZERO;
            }
        }
        self.slept = false;
    }

    /// There was nothing to do: whether to look again at once, instead of sleeping.
    pub fn may_spin(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let spin = now.saturating_duration_since(since) < self.budget;
        self.slept |= !spin;
        spin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One wait in which something comes after `time`; how long it was spun through, looking every microsecond.
    fn wait(idle: &mut Idle, now: &mut Instant, time: Duration) -> Duration {
        let begun = *now;
        while *now < begun + time && idle.may_spin(*now) {
            *now += Duration::from_micros(1);
        }
        let spun = *now - begun;
        *now = (*now).max(begun + time);
        idle.busy(*now);
        spun
    }

    #[test]
    fn short_waits_are_learnt_and_long_ones_cost_nothing() {
        let (mut idle, mut now) = (Idle::default(), Instant::now());
        let (short, long) = (Duration::from_micros(8), Duration::from_millis(5));
        assert_eq!(wait(&mut idle, &mut now, long), Duration::ZERO);
        for _ in 0..5 {
            wait(&mut idle, &mut now, short);
        }
        assert_eq!(wait(&mut idle, &mut now, short), short, "spun through");
        for _ in 0..5 {
            assert!(wait(&mut idle, &mut now, long) <= SPIN_MAX);
        }
        assert_eq!(wait(&mut idle, &mut now, long), Duration::ZERO);
    }

    #[test]
    fn what_is_always_busy_never_counts_as_a_wait() {
        let (mut idle, mut now) = (Idle::default(), Instant::now());
        for _ in 0..100 {
            now += Duration::from_micros(1);
            idle.busy(now);
        }
        assert!(!idle.may_spin(now), "nothing has been learnt yet");
    }
}
