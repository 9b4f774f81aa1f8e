//! Whether a thread that has nothing to do goes on looking or falls asleep.
//!
//! Waking a sleeping thread costs several microseconds, so it is worth looking a little longer when something is about to come. It
//! is worse than useless when nothing is, or when the peer needs the very core that spins. Which of these it is cannot be known,
//! but tried: a wait that is spun through lets the next one spin too; one that outlasts its spinning forbids it for a number of
//! short waits, which doubles with every failure. Long waits are no reason to try again: a thread whose waits are long does not
//! spin at all.
//!
//! Invariant: no wait spins for longer than [`SPIN_MAX`]; time is an argument.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The longest time that a wait is spun through: about what two wake-ups of an idle core cost in a virtual machine (57 to 105
/// microseconds for a round trip of two sleepers, of which the way itself takes 7). Who spins for as long as sleeping would have
/// cost loses at most the same again.
pub const SPIN_MAX: Duration = Duration::from_micros(50);

/// A wait of this length, slept through, is short: spinning might have done.
const SHORT: Duration = Duration::from_micros(120);

/// Short waits without spinning after many failures: what spinning in vain costs is then less than a hundredth of the time.
const PAUSE_MAX: u32 = 1024;

/// The idle time of one thread.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Since when there has been nothing to do.
    since: Option<Instant>,
    /// Whether this wait has come to an end of its looking.
    slept: bool,
    /// Short waits that still are not to spin.
    pause: u32,
    /// What `pause` becomes at the next failure.
    next_pause: u32,
}

impl Default for Idle {
    fn default() -> Idle {
        Idle { since: None, slept: false, pause: 1, next_pause: 2 }
    }
}

impl Idle {
    /// There was something to do.
    pub fn busy(&mut self, now: Instant) {
        let Some(since) = self.since.take() else { return };
        let waited = now.saturating_duration_since(since);
        match (std::mem::take(&mut self.slept), self.pause) {
            (false, _) => self.next_pause = 2,
            (true, 0) => {
                self.pause = self.next_pause;
                self.next_pause = (2 * self.next_pause).min(PAUSE_MAX);
            }
            (true, _) if waited <= SHORT => self.pause -= 1,
            (true, _) => {}
        }
    }

    /// There was nothing to do: whether to look again at once, instead of sleeping.
    pub fn may_spin(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let spin = self.pause == 0 && now.saturating_duration_since(since) < SPIN_MAX;
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
    fn short_waits_are_spun_through_and_long_ones_cost_nothing() {
        let (mut idle, mut now) = (Idle::default(), Instant::now());
        let (short, long) = (Duration::from_micros(8), Duration::from_millis(5));
        for _ in 0..1000 {
            assert_eq!(wait(&mut idle, &mut now, long), Duration::ZERO);
        }
        wait(&mut idle, &mut now, short);
        for _ in 0..1000 {
            assert_eq!(wait(&mut idle, &mut now, short), short);
        }
        assert_eq!(wait(&mut idle, &mut now, long), SPIN_MAX, "it had to try");
        assert_eq!(wait(&mut idle, &mut now, long), Duration::ZERO);
    }

    /// What two threads on one core see: whoever spins keeps the other from answering.
    #[test]
    fn spinning_that_never_helps_is_given_up() {
        let (mut idle, mut now) = (Idle::default(), Instant::now());
        let mut spun = Duration::ZERO;
        let count = 10_000;
        for _ in 0..count {
            // Sleeping would have brought it after ten microseconds; spinning delays it by as long as it lasts.
            let begun = now;
            while idle.may_spin(now) {
                now += Duration::from_micros(1);
            }
            spun += now - begun;
            now += Duration::from_micros(10);
            idle.busy(now);
        }
        assert!(spun < count * Duration::from_micros(10) / 50, "{spun:?} spun in vain");
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
