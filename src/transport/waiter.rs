//! Where a thread sleeps: until a driver has something to do, another thread wakes it, or a deadline passes.
//!
//! No wake-up is lost. Every driver is armed before the sleep, and one that has work already says so and prevents it; an event
//! after that makes the driver's descriptor readable, which `ppoll` looks at before it sleeps. A wake-up by another thread stays
//! in the eventfd until the waiter takes it out, so it counts even if it came before the sleep: whoever hands over work does so
//! first and wakes second, and the waiter's thread looks for work after every return.
//!
//! Invariant: `wait` returns within its deadline or the drivers' own, whichever comes first, and does not spin.
#![forbid(unsafe_code)]

use std::{
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};

use super::{Armed, Wakeup};
use crate::{Error, Result};

/// One thread waits for at most so many drivers: one of each fabric, and the GPU.
pub const DRIVERS_MAX: usize = 8;

/// The place where one thread sleeps.
#[derive(Debug)]
pub struct Waiter {
    event: Arc<EventFd>,
}

/// Wakes a [`Waiter`] from another thread.
#[derive(Clone, Debug)]
pub struct WakeHandle {
    event: Arc<EventFd>,
}

/// Why [`Waiter::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Something is to be looked at: a driver to poll, or work from another thread.
    Event,
    /// A deadline, the caller's or a driver's, has passed.
    Deadline,
}

impl Waiter {
    /// A waiter that nobody has woken yet.
    pub fn new() -> Result<Waiter> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::os("eventfd", "a waiter", e))?;
        Ok(Waiter { event: Arc::new(event) })
    }

    /// A handle for another thread.
    pub fn handle(&self) -> WakeHandle {
        WakeHandle { event: self.event.clone() }
    }

    /// Sleeps until one of `drivers` wants to be polled, a handle was used, or `deadline` passes. May return early.
    ///
    /// # Panics
    ///
    /// If there are more than [`DRIVERS_MAX`] drivers.
    pub fn wait(&self, drivers: &mut [&mut dyn Wakeup], deadline: Option<Instant>) -> Result<Woken> {
        self.wait_from(Instant::now(), drivers, deadline)
    }

    /// The same for a caller who knows what time it is: one reading of the clock less on the way of every message. The sleep may be
    /// too long by what `now` is old.
    pub fn wait_from(&self, now: Instant, drivers: &mut [&mut dyn Wakeup], deadline: Option<Instant>) -> Result<Woken> {
        assert!(drivers.len() <= DRIVERS_MAX, "{} drivers to wait for, the limit is {DRIVERS_MAX}", drivers.len());
        let mut until = deadline;
        for driver in drivers.iter_mut() {
            if driver.arm_wakeup()? == Armed::Ready {
                return Ok(Woken::Event);
            }
            until = [until, driver.next_deadline()].into_iter().flatten().min();
        }
        let mut fds: [PollFd<'_>; DRIVERS_MAX + 1] =
            std::array::from_fn(|_| PollFd::new(self.event.as_fd(), PollFlags::POLLIN));
        for (fd, driver) in fds[1..].iter_mut().zip(drivers.iter()) {
            *fd = PollFd::new(driver.fd(), PollFlags::POLLIN);
        }
        // Rounded up, so that the deadline has passed when the sleep ends by it.
        let left = until.map(|until| until.saturating_duration_since(now) + Duration::from_nanos(1));
        match ppoll(&mut fds[..=drivers.len()], left.map(TimeSpec::from_duration), None) {
            Ok(0) => Ok(Woken::Deadline),
            Ok(_) => {
                // When it was a driver that woke us there is nothing to take out of the eventfd.
                if fds[0].any() == Some(true) {
                    let _ = self.event.read();
                }
                Ok(Woken::Event)
            }
            Err(Errno::EINTR) => Ok(Woken::Event),
            Err(e) => Err(Error::os("ppoll", "a waiter", e)),
        }
    }
}

impl WakeHandle {
    /// Wakes the waiter, or keeps it from falling asleep the next time.
    pub fn wake(&self) {
        // It can fail only because the counter is at its limit, and then the waiter has been woken often enough.
        let _ = self.event.write(1);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::BorrowedFd, thread};

    use super::*;

    struct Driver {
        event: EventFd,
        ready: Armed,
        deadline: Option<Instant>,
    }

    impl Driver {
        fn idle() -> Driver {
            let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            Driver { event, ready: Armed::Sleep, deadline: None }
        }
    }

    impl Wakeup for Driver {
        fn fd(&self) -> BorrowedFd<'_> {
            self.event.as_fd()
        }

        fn arm_wakeup(&mut self) -> Result<Armed> {
            Ok(self.ready)
        }

        fn next_deadline(&self) -> Option<Instant> {
            self.deadline
        }
    }

    fn soon(ms: u64) -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(ms))
    }

    #[test]
    fn it_sleeps_until_the_nearest_deadline() {
        let waiter = Waiter::new().unwrap();
        let (mut one, mut other) = (Driver::idle(), Driver::idle());
        other.deadline = soon(20);
        let until = other.deadline.unwrap();
        assert_eq!(waiter.wait(&mut [&mut one, &mut other], soon(60_000)).unwrap(), Woken::Deadline);
        assert!(Instant::now() >= until);
    }

    #[test]
    fn a_driver_with_work_prevents_the_sleep_and_an_event_ends_it() {
        let waiter = Waiter::new().unwrap();
        let mut driver = Driver { ready: Armed::Ready, ..Driver::idle() };
        assert_eq!(waiter.wait(&mut [&mut driver], soon(60_000)).unwrap(), Woken::Event);
        driver.ready = Armed::Sleep;
        driver.event.write(1).unwrap();
        assert_eq!(waiter.wait(&mut [&mut driver], soon(60_000)).unwrap(), Woken::Event);
    }

    #[test]
    fn a_wake_up_before_the_sleep_counts_and_counts_once() {
        let waiter = Waiter::new().unwrap();
        let handle = waiter.handle();
        handle.wake();
        handle.wake();
        assert_eq!(waiter.wait(&mut [], soon(60_000)).unwrap(), Woken::Event);
        assert_eq!(waiter.wait(&mut [], soon(5)).unwrap(), Woken::Deadline);
    }

    #[test]
    fn ten_thousand_hand_overs_at_random_moments_lose_none() {
        let waiter = Waiter::new().unwrap();
        let handle = waiter.handle();
        let mailbox = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let theirs = mailbox.clone();
        let other = thread::spawn(move || {
            for turn in 0..10_000u64 {
                // Waits until the last one was taken, so that every wake-up meets a waiter that sleeps or is about to.
                while theirs.load(std::sync::atomic::Ordering::Acquire) != turn * 2 {
                    thread::yield_now();
                }
                for _ in 0..(turn * 7919) % 64 {
                    std::hint::spin_loop();
                }
                theirs.store(turn * 2 + 1, std::sync::atomic::Ordering::Release);
                handle.wake();
            }
        });
        for turn in 0..10_000u64 {
            while mailbox.load(std::sync::atomic::Ordering::Acquire) != turn * 2 + 1 {
                assert_eq!(waiter.wait(&mut [], soon(10_000)).unwrap(), Woken::Event, "wake-up {turn} was lost");
            }
            mailbox.store(turn * 2 + 2, std::sync::atomic::Ordering::Release);
        }
        other.join().unwrap();
    }
}
