//! A global allocator that counts, thread by thread.
//!
//! Invariant: it adds nothing to the system's allocator but the counting.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// What the calling thread has allocated since [`reset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// How many times.
    pub count: usize,
    /// Bytes of the largest.
    pub largest: usize,
}

pub fn reset() {
    COUNT.set(0);
    LARGEST.set(0);
}

pub fn allocated() -> Allocated {
    Allocated { count: COUNT.get(), largest: LARGEST.get() }
}

fn note(bytes: usize) {
    // A thread that is ending has no counters any more.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call is passed on unchanged to the system's allocator, which upholds the trait's contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promises are passed on; `pointer` came from the system's allocator, as all do.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as for `realloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[test]
fn the_counters_count() {
    reset();
    let bytes = std::hint::black_box(vec![0u8; 12_345]);
    assert_eq!(allocated(), Allocated { count: 1, largest: 12_345 });
    drop(bytes);
    assert_eq!(allocated().count, 1);
}
