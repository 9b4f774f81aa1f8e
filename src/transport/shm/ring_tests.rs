//! The ring's protocol under every interleaving, and under every value that the memory model lets a load return.
//!
//! Each model runs three times: as it is, where no execution may fail, and twice broken on purpose, once without the full fences
//! and once without Acquire and Release, where some execution must fail: that is what shows that the model could see it.
//!
//! Invariant: what runs here is the code of `ring.rs`; only the words are another kind.

use loom::{
    model::Builder,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{self, AtomicU64},
    },
    thread,
};

use super::*;

/// A word whose orderings count, or do not.
struct Cell<const ORDERED: bool>(AtomicU64);

impl<const ORDERED: bool> Cell<ORDERED> {
    fn ordering(asked: Ordering) -> Ordering {
        if ORDERED { asked } else { Ordering::Relaxed }
    }
}

impl<const ORDERED: bool> Word for Cell<ORDERED> {
    fn load(&self, ordering: Ordering) -> u64 {
        self.0.load(Self::ordering(ordering))
    }

    fn store(&self, value: u64, ordering: Ordering) {
        self.0.store(value, Self::ordering(ordering));
    }
}

struct Words<const ORDERED: bool> {
    controls: [Cell<ORDERED>; CONTROLS],
    entry: Cell<ORDERED>,
}

/// A ring of one entry of one word, so that it is full after every push.
struct Model<const FENCED: bool, const ORDERED: bool>(Arc<Words<ORDERED>>);

impl<const FENCED: bool, const ORDERED: bool> Model<FENCED, ORDERED> {
    fn new() -> Self {
        let word = || Cell(AtomicU64::new(0));
        Model(Arc::new(Words { controls: std::array::from_fn(|_| word()), entry: word() }))
    }

    fn ends(self) -> (Producer<Self>, Consumer<Self>) {
        let other = Model(self.0.clone());
        (Producer::new(self), Consumer::new(other))
    }
}

impl<const FENCED: bool, const ORDERED: bool> Shared for Model<FENCED, ORDERED> {
    type Word = Cell<ORDERED>;
    const ENTRIES: u64 = 1;
    const WORDS: usize = 1;

    fn control(&self, which: Control) -> &Cell<ORDERED> {
        &self.0.controls[which as usize]
    }

    fn entry(&self, _slot: u64, _word: usize) -> &Cell<ORDERED> {
        &self.0.entry
    }

    fn full_fence() {
        if FENCED {
            atomic::fence(Ordering::SeqCst);
        }
    }
}

/// What the kernel is to the driver: a wake-up that stays until it is taken.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.heard.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.heard.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// All executions with at most five switches that no wait forces, or as many as LOOM_MAX_PREEMPTIONS says.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(5));
    builder.check(model);
}

/// Two entries through a ring of one, each side asleep whenever it has to wait. A lost wake-up is a deadlock.
fn two_entries_arrive<const FENCED: bool, const ORDERED: bool>() {
    explore(|| {
        let (mut producer, mut consumer) = Model::<FENCED, ORDERED>::new().ends();
        let entries = Arc::new(Bell::default());
        let room = Arc::new(Bell::default());
        let (their_entries, their_room) = (entries.clone(), room.clone());
        let writer = thread::spawn(move || {
            for value in 1..=2 {
                while !producer.has_room().unwrap() {
                    producer.set_waiting(true);
                    Model::<FENCED, ORDERED>::full_fence();
                    if !producer.has_room().unwrap() {
                        their_room.wait();
                    }
                    producer.set_waiting(false);
                }
                producer.push(&[value; ENTRY_WORDS]);
                if producer.must_wake() {
                    their_entries.ring();
                }
            }
        });
        for value in 1..=2 {
            let entry = loop {
                if let Some(entry) = consumer.pop().unwrap() {
                    break entry;
                }
                consumer.set_sleeping(true);
                Model::<FENCED, ORDERED>::full_fence();
                if !consumer.has_more() {
                    entries.wait();
                }
                consumer.set_sleeping(false);
            };
            assert_eq!(entry[0], value, "an entry was lost, doubled or torn");
            if consumer.release() {
                room.ring();
            }
        }
        writer.join().unwrap();
        assert_eq!(consumer.pop(), Ok(None));
    });
}

#[test]
fn no_entry_and_no_wake_up_is_lost() {
    two_entries_arrive::<true, true>();
}

/// Each side is about to sleep while the other moves its index: whoever would sleep has been rung for. (The model above would
/// show a lost wake-up as a deadlock, which cannot be expected by a test.)
fn who_sleeps_is_woken<const FENCED: bool, const ORDERED: bool>() {
    explore(|| {
        let (mut producer, mut consumer) = Model::<FENCED, ORDERED>::new().ends();
        let writer = thread::spawn(move || {
            producer.push(&[1; ENTRY_WORDS]);
            let rung_for_entry = producer.must_wake();
            producer.set_waiting(true);
            Model::<FENCED, ORDERED>::full_fence();
            let sleeps = !producer.has_room().unwrap();
            (rung_for_entry, sleeps)
        });
        consumer.set_sleeping(true);
        Model::<FENCED, ORDERED>::full_fence();
        let sleeps = !consumer.has_more();
        let mut rung_for_room = false;
        if !sleeps && let Some(entry) = consumer.pop().unwrap() {
            assert_eq!(entry[0], 1, "the entry was not there yet");
            rung_for_room = consumer.release();
        }
        let popped = !sleeps;
        let (rung_for_entry, writer_sleeps) = writer.join().unwrap();
        assert!(!sleeps || rung_for_entry, "the receiver's wake-up was lost");
        assert!(!(popped && writer_sleeps) || rung_for_room, "the writer's wake-up was lost");
    });
}

#[test]
fn whoever_is_about_to_sleep_is_woken() {
    who_sleeps_is_woken::<true, true>();
}

#[test]
#[should_panic(expected = "wake-up was lost")]
fn without_the_full_fences_a_wake_up_is_lost() {
    who_sleeps_is_woken::<false, true>();
}

#[test]
#[should_panic(expected = "the entry was not there yet")]
fn without_release_and_acquire_an_entry_is_read_too_early() {
    who_sleeps_is_woken::<true, false>();
}

/// A writer that copies twice, and a receiver that ends it at some moment and then uses the slot for itself.
fn nothing_lands_after<const FENCED: bool, const ORDERED: bool>() {
    explore(|| {
        let (producer, consumer) = Model::<FENCED, ORDERED>::new().ends();
        let slot = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let told = Arc::new(Bell::default());
        let (their_slot, tell) = (slot.clone(), told.clone());
        let writer = thread::spawn(move || {
            for value in 1..=2 {
                let mut may = producer.begin_copy();
                if may {
                    their_slot.iter().for_each(|word| word.store(value, Ordering::Relaxed));
                    may = producer.end_copy();
                }
                if !may {
                    // The driver ends its path now, which the receiver hears.
                    tell.ring();
                    break;
                }
            }
        });
        if !consumer.fence() {
            while consumer.is_copying() {
                told.wait();
            }
        }
        let landed: Vec<u64> = slot.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(landed[0], landed[1], "the slot came back too early: half a write is in it");
        slot.iter().for_each(|word| word.store(99, Ordering::Relaxed));
        writer.join().unwrap();
        assert!(
            slot.iter().all(|word| word.load(Ordering::Relaxed) == 99),
            "the slot came back too early: something landed after"
        );
    });
}

#[test]
fn after_a_fence_nothing_lands_and_the_slot_comes_back() {
    nothing_lands_after::<true, true>();
}

#[test]
#[should_panic(expected = "came back too early")]
fn without_the_full_fences_a_write_lands_after_the_fence() {
    nothing_lands_after::<false, true>();
}

#[test]
#[should_panic(expected = "came back too early")]
fn without_release_and_acquire_the_slot_comes_back_too_early() {
    nothing_lands_after::<true, false>();
}

/// Indexes that nobody can honestly have written, in every direction.
#[test]
fn a_scribbled_index_is_refused_with_what_it_was() {
    loom::model(|| {
        let (mut producer, mut consumer) = Model::<true, true>::new().ends();
        let memory = Model::<true, true>(producer.shared.0.clone());
        for tail in [2, u64::MAX, 1 << 63] {
            memory.control(Control::Tail).store(tail, Ordering::Relaxed);
            let told = consumer.pop().unwrap_err().to_string();
            assert!(told.contains(&tail.to_string()) && told.contains("tail"), "{told}");
        }
        memory.control(Control::Tail).store(0, Ordering::Relaxed);
        producer.push(&[7; ENTRY_WORDS]);
        assert_eq!(consumer.pop().unwrap().unwrap()[0], 7);
        memory.control(Control::Tail).store(0, Ordering::Relaxed);
        assert!(consumer.pop().is_err(), "a tail that goes backwards");
        for head in [2, u64::MAX] {
            memory.control(Control::Head).store(head, Ordering::Relaxed);
            assert!(producer.has_room().unwrap_err().to_string().contains("head"));
        }
    });
}
