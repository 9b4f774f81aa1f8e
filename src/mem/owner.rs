//! The process that something belongs to: `fork` copies memory, but neither threads nor what is at the other end of a descriptor.
//!
//! Invariant: what was made before a fork belongs to the parent alone. A copy that bypasses the C library (a bare `clone`) is not
//! noticed.

use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

/// How many forks lie between this process and the one that first asked. It costs a load to look at, where `getpid` is a system
/// call, and every small message would make several.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Has every child count; made once.
static COUNTING: LazyLock<()> = LazyLock::new(|| {
    extern "C" fn child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler is as long-lived as the program, and adds to a number: nothing that a child of a process with threads may
    // not do.
    let failed = unsafe { libc::pthread_atfork(None, None, Some(child)) };
    assert!(failed == 0, "pthread_atfork: no memory");
});

/// Remembers in which process it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    process: u32,
    forks: u32,
}

impl Owner {
    /// This process.
    pub fn here() -> Owner {
        LazyLock::force(&COUNTING);
        Owner { process: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// Whether this is the process in which it was made, and no copy of that.
    pub fn is_here(self) -> bool {
        self.forks == FORKS.load(Ordering::Relaxed)
    }

    /// Its number.
    pub fn process(self) -> u32 {
        self.process
    }
}
