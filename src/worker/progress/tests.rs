//! Who turns an engine, tried on one that only writes down who did, and that answers each command with an event.
//!
//! Invariant: no test depends on how long something takes, but for limits that only a hang can pass.

use super::*;
use crate::{
    mem::{Region, RegionOptions},
    transport::Waiter,
    types::ChunkId,
};

/// Longer than anything here may take.
const HANG: Duration = Duration::from_secs(20);

struct Recorder {
    shared: Arc<Shared>,
    waiter: Waiter,
    /// Who has carried out each command.
    by: Arc<Mutex<Vec<Who>>>,
    commands: VecDeque<Command>,
    /// Turns that a command takes to be answered.
    turns: u32,
    left: u32,
}

impl Recorder {
    fn carry_out(&mut self, who: Who) {
        for _ in self.commands.drain(..) {
            self.by.lock().unwrap().push(who);
            self.left += self.turns;
        }
    }
}

impl Turn for Recorder {
    fn once(&mut self, who: Who, latest: Option<Instant>) -> bool {
        match self.shared.enter(who, &mut self.commands) {
            Entry::Turn(_) => self.carry_out(who),
            Entry::Leave => return true,
            Entry::Over => return false,
        }
        if self.left > 0 {
            self.left -= 1;
            if self.left == 0 {
                self.shared.lock().events.push_back(Event::Finished);
                self.shared.notify();
            }
        } else {
            let most = Instant::now() + 2 * HANG;
            self.waiter.wait(&mut [], Some(latest.map_or(most, |latest| latest.min(most)))).unwrap();
        }
        true
    }

    fn begin(&mut self) {
        if let Entry::Turn(_) = self.shared.enter(Who::Program, &mut self.commands) {
            self.carry_out(Who::Program);
        }
    }
}

struct Bench {
    progress: Progress,
    by: Arc<Mutex<Vec<Who>>>,
}

impl Bench {
    fn new(turns: u32) -> Bench {
        let (shared, by) = (Arc::new(Shared::default()), Arc::new(Mutex::new(Vec::new())));
        let waiter = Waiter::new().unwrap();
        let wake = waiter.handle();
        let commands = VecDeque::new();
        let recorder = Recorder { shared: shared.clone(), waiter, by: by.clone(), commands, turns, left: 0 };
        Bench { progress: Progress::with(shared, Arc::new(Mutex::new(recorder)), wake).unwrap(), by }
    }

    /// Waits for one event as a program does.
    fn wait(&self) {
        let (begun, mut events) = (Instant::now(), VecDeque::new());
        let shift = self.progress.shift();
        self.progress.events(&shift, begun + 2 * HANG, &mut events).unwrap();
        assert!(!events.is_empty() && begun.elapsed() < HANG, "{:?} after {:?}", self.progress, begun.elapsed());
    }

    /// Until the thread has the engine.
    fn await_thread(&self) {
        let begun = Instant::now();
        while !self.progress.shared.lock().is_of_thread() {
            assert!(begun.elapsed() < HANG, "{:?}", self.progress);
            std::thread::yield_now();
        }
    }

    /// Until `count` commands have been carried out; by whom.
    fn carried_out(&self, count: usize) -> Vec<Who> {
        let begun = Instant::now();
        loop {
            let by = self.by.lock().unwrap().clone();
            if by.len() >= count {
                return by;
            }
            assert!(begun.elapsed() < HANG, "{by:?}, {:?}", self.progress);
            std::thread::yield_now();
        }
    }
}

fn small() -> Command {
    Command::Finish
}

fn large() -> Command {
    let (_, gradient) = Region::allocate(AT_ONCE + 1, &RegionOptions::default()).unwrap();
    Command::Push { chunk: ChunkId(0), clock: 0, gradient: Some(gradient), reply: None }
}

#[test]
fn while_the_program_computes_the_thread_carries_out_commands_of_any_size() {
    let bench = Bench::new(1);
    bench.progress.command([small()]);
    bench.progress.command([large()]);
    assert_eq!(bench.carried_out(2), [Who::Thread; 2]);
}

#[test]
fn a_program_that_waits_again_and_again_does_all_by_itself() {
    let bench = Bench::new(3);
    for _ in 0..1000 {
        bench.progress.command([small()]);
        bench.wait();
    }
    let by = bench.carried_out(1000);
    let own = by.iter().filter(|who| **who == Who::Program).count();
    assert!(own > 500, "{own} of 1000: the thread comes back only after a time in which this one did not run");
}

#[test]
fn once_the_program_computes_again_the_thread_takes_over_by_itself() {
    for times in 1..20 {
        let bench = Bench::new(2);
        for _ in 0..times {
            bench.progress.command([small()]);
            bench.wait();
        }
        // Whether it is still away or not: nobody waits, and it is carried out all the same.
        bench.progress.command([large()]);
        bench.carried_out(times + 1);
        bench.await_thread();
        bench.progress.command([small()]);
        assert_eq!(*bench.carried_out(times + 2).last().unwrap(), Who::Thread);
    }
}

#[test]
fn a_program_that_only_asks_is_served_by_the_thread() {
    let bench = Bench::new(5);
    for _ in 0..20 {
        bench.progress.command([small()]);
        let (begun, mut events) = (Instant::now(), VecDeque::new());
        while events.is_empty() {
            bench.progress.events(&bench.progress.shift(), Instant::now(), &mut events).unwrap();
            assert!(begun.elapsed() < HANG);
        }
    }
    assert_eq!(bench.carried_out(20), [Who::Thread; 20]);
}

#[test]
fn a_long_wait_keeps_the_thread_away_and_its_end_calls_it_back() {
    let bench = Bench::new(1);
    let (begun, mut events) = (Instant::now(), VecDeque::new());
    {
        let shift = bench.progress.shift();
        while !bench.progress.shared.lock().wants_word {
            assert!(begun.elapsed() < HANG);
            bench.progress.events(&shift, Instant::now() + LINGER, &mut events).unwrap();
        }
        assert!(!bench.progress.shared.lock().is_of_thread() && events.is_empty());
    }
    bench.await_thread();
}

#[test]
fn whoever_turns_nothing_is_forgotten() {
    let bench = Bench::new(2);
    let mut dice = 12345u32;
    for round in 0..2000 {
        dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bench.progress.command([if dice >> 31 == 1 { small() } else { large() }]);
        match dice >> 20 & 15 {
            // Long enough for the thread to come back, short enough for it to be about to, or at once.
            0 => std::thread::sleep(2 * LINGER),
            1..4 => std::thread::sleep(LINGER),
            _ => {}
        }
        bench.wait();
        assert_eq!(bench.by.lock().unwrap().len(), round + 1);
    }
}

#[test]
fn the_end_comes_whoever_turns() {
    for waits in [false, true] {
        let bench = Bench::new(1);
        bench.progress.command([small()]);
        if waits {
            bench.wait();
        }
        let begun = Instant::now();
        drop(bench);
        assert!(begun.elapsed() < HANG);
    }
}
