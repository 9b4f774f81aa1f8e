//! The io_uring of a transport: what is handed to the kernel, what has come back, and how a sleeper learns of it.
//!
//! The ring belongs to the thread that uses it first (`SINGLE_ISSUER`): a transport may be made on one thread and used on another,
//! so the ring is made by its first use. Completions are worked out when that thread asks for them (`DEFER_TASKRUN`), on older
//! kernels when it next enters the kernel.
//!
//! A ring that ends interrupts every thread that made or used it, once: a blocking call with a timeout there may then answer EINTR.
//! Hence the ring is tried on a thread of its own, which ends at once, and nothing is made on a thread that only makes a transport.
//!
//! **No wake-up is lost.** With deferred completions the descriptor to sleep on is an eventfd that the kernel writes to whenever it
//! has work for us and had none before. [`Ring::may_sleep`] first submits what waits, then empties the eventfd, and only then looks
//! whether there is work (the flag that the kernel sets before it writes to the eventfd) or a completion. What came before the
//! emptying is seen by the look, what comes after it makes the eventfd readable. Without deferred completions the descriptor is
//! the ring's own, which is readable as long as a completion lies in the queue; the kernel puts it there before a sleep goes on,
//! since its work for the thread interrupts the sleep.
//!
//! Invariant: an operation's memory is named to the kernel by [`super::flow`] alone, which keeps it until the operation's
//! [`Finished`] has come back; nobody else can make a `Finished`.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    thread,
    time::Instant,
};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::{
    errno::Errno,
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::transport::poller::Token;
use crate::{Error, Result};

/// Entries that can wait for one submission. When they are used up, what is there is submitted.
const SUBMISSIONS: u32 = 256;

/// Completions that can wait: a receive, a send and two cancellations of a thousand peers. The kernel keeps what is beyond.
const COMPLETIONS: u32 = 4096;

/// Why there is no ring.
#[derive(Debug)]
pub(super) enum Trouble {
    /// A system call was refused.
    Call { call: &'static str, errno: Errno },
    /// It is there, and too old.
    Lacks(&'static str),
}

/// Who works out completions, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// The thread, when it asks for them (Linux 6.1).
    Deferred,
    /// The thread, whenever it enters the kernel (Linux 5.19).
    Cooperative,
    /// The thread, interrupted for it.
    Plain,
}

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Receive = 0,
    Send = 1,
    /// Of one of the two above.
    Cancel = 2,
    /// The poller has something to say: handshakes are made by readiness.
    Watch = 3,
}

/// An operation that the kernel is done with.
#[derive(Debug)]
pub(super) struct Finished {
    user_data: u64,
    result: i32,
}

impl Finished {
    pub(super) fn operation(&self) -> Operation {
        match self.user_data >> OPERATION_SHIFT {
            0 => Operation::Receive,
            1 => Operation::Send,
            2 => Operation::Cancel,
            _ => Operation::Watch,
        }
    }

    /// The connection that it was about.
    pub(super) fn token(&self) -> Token {
        Token::of_path(self.user_data)
    }

    /// Bytes moved.
    pub(super) fn count(&self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

/// A token says in its two highest bits what kind of socket it names; here they say what was done to one of a path.
const OPERATION_SHIFT: u32 = 62;

fn user_data(token: Token, operation: Operation) -> u64 {
    (operation as u64) << OPERATION_SHIFT | token.without_kind()
}

pub(super) struct Ring {
    uring: IoUring,
    /// With deferred completions: readable when there is work.
    event: Option<EventFd>,
    finished: VecDeque<Finished>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("fd", &self.uring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring of the best flavour that the kernel has. It belongs to the calling thread, and watches `poller`.
    pub(super) fn open(poller: BorrowedFd<'_>) -> Result<Ring, Trouble> {
        let mut last = None;
        for flavour in [Flavour::Deferred, Flavour::Cooperative, Flavour::Plain] {
            match Ring::of(flavour, poller) {
                // A flag that it does not know.
                Err(trouble @ Trouble::Call { errno: Errno::EINVAL, .. }) => last = Some(trouble),
                result => return result,
            }
        }
        Err(last.expect("there are flavours"))
    }

    pub(super) fn of(flavour: Flavour, poller: BorrowedFd<'_>) -> Result<Ring, Trouble> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETIONS).dontfork();
        match flavour {
            Flavour::Deferred => builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag(),
            Flavour::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag(),
            Flavour::Plain => &mut builder,
        };
        let uring: IoUring = builder.build(SUBMISSIONS).map_err(refused("io_uring_setup"))?;
        let mut event = None;
        if flavour == Flavour::Deferred {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let ours = EventFd::from_flags(flags).map_err(|errno| Trouble::Call { call: "eventfd", errno })?;
            uring.submitter().register_eventfd(ours.as_raw_fd()).map_err(refused("io_uring_register"))?;
            event = Some(ours);
        }
        let mut ring = Ring { uring, event, finished: VecDeque::with_capacity(SUBMISSIONS as usize) };
        ring.watch(poller).expect("a new ring has room");
        Ok(ring)
    }

    /// Asks to be told once that `poller` has something to say; at once if it has. So nothing is missed if this is called after
    /// every look at the poller.
    pub(super) fn watch(&mut self, poller: BorrowedFd<'_>) -> Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(poller.as_raw_fd()), libc::POLLIN as u32);
        let entry = poll.build().user_data((Operation::Watch as u64) << OPERATION_SHIFT);
        // SAFETY: a poll names no memory. The poller's descriptor is open as long as the ring: one transport owns both.
        unsafe { self.push(&entry) }.map_err(|e| Error::os("io_uring_enter", "the tcp transport", e))
    }

    /// Hands an operation on `token`'s connection to the kernel, with the next submission.
    ///
    /// # Safety
    ///
    /// Memory and descriptor that `entry` names stay valid and untouched until the operation's [`Finished`].
    pub(super) unsafe fn begin(
        &mut self,
        token: Token,
        operation: Operation,
        entry: squeue::Entry,
    ) -> Result<(), io::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry.user_data(user_data(token, operation))) }
    }

    /// Asks for an operation to end soon. It still ends with its `Finished`.
    pub(super) fn cancel(&mut self, token: Token, operation: Operation) {
        let entry = opcode::AsyncCancel::new(user_data(token, operation)).build();
        // SAFETY: a cancellation names no memory and no descriptor.
        let pushed = unsafe { self.push(&entry.user_data(user_data(token, Operation::Cancel))) };
        if let Err(error) = pushed {
            // The socket is shut down before: that ends the operation as well.
            tracing::debug!(%error, "could not ask for a cancellation");
        }
    }

    /// Submits what waits and collects what is finished, without waiting.
    pub(super) fn collect(&mut self) -> Result<()> {
        let has_work = {
            let queue = self.uring.submission();
            !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
        };
        if has_work {
            self.submit().map_err(|e| Error::os("io_uring_enter", "the tcp transport", e))?;
        }
        self.reap();
        Ok(())
    }

    /// Submits what waits.
    pub(super) fn flush(&mut self) -> Result<()> {
        if self.uring.submission().is_empty() {
            return Ok(());
        }
        self.submit().map_err(|e| Error::os("io_uring_enter", "the tcp transport", e))
    }

    /// What was finished first and not taken yet.
    pub(super) fn next(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    /// How many there are for [`Ring::next`].
    pub(super) fn finished(&self) -> usize {
        self.finished.len()
    }

    /// Waits until an operation on `token`'s connection is finished; `None` if that has not happened by `until`. Others keep
    /// their turn.
    pub(super) fn wait_for(&mut self, token: Token, until: Instant) -> io::Result<Option<Finished>> {
        loop {
            self.reap();
            let is_ours = |finished: &Finished| {
                matches!(finished.operation(), Operation::Receive | Operation::Send) && finished.token() == token
            };
            if let Some(at) = self.finished.iter().position(is_ours) {
                return Ok(self.finished.remove(at));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timespec = types::Timespec::from(left);
            match self.uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec)) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Where a sleeper waits, once [`Ring::may_sleep`] has said that it may.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match &self.event {
            Some(event) => event.as_fd(),
            // SAFETY: the ring's descriptor is open as long as the ring, which the result borrows.
            None => unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) },
        }
    }

    /// Whether there is nothing to do. From then on an event makes the descriptor readable.
    pub(super) fn may_sleep(&mut self) -> Result<bool> {
        if !self.finished.is_empty() {
            return Ok(false);
        }
        self.flush()?;
        if let Some(event) = &self.event {
            // Fails only if it is empty already.
            let _ = event.read();
        }
        let queue = self.uring.submission();
        let has_work = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        Ok(!has_work && self.uring.completion().is_empty())
    }

    fn reap(&mut self) {
        for entry in self.uring.completion() {
            let finished = Finished { user_data: entry.user_data(), result: entry.result() };
            if finished.operation() != Operation::Cancel {
                self.finished.push_back(finished);
            }
        }
    }

    fn submit(&self) -> io::Result<()> {
        match self.uring.submit() {
            Ok(_) => Ok(()),
            // Interrupted, or completions must be taken first: what is left goes with the next submission.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// # Safety
    ///
    /// As [`Ring::begin`].
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the caller's promise.
        if unsafe { self.uring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        self.reap();
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.map_err(|_| io::Error::other("the kernel takes no more submissions"))
    }
}

/// Whether this process may use io_uring and the kernel has what the driver needs.
pub(super) fn attempt() -> Result<(), Trouble> {
    let attempt = thread::Builder::new().name("io_uring".into()).spawn(use_a_small_ring);
    let attempt = attempt.map_err(refused("pthread_create"))?;
    attempt.join().expect("the attempt does not panic")
}

/// A ring is made, asked and used.
fn use_a_small_ring() -> Result<(), Trouble> {
    let mut uring = IoUring::new(2).map_err(refused("io_uring_setup"))?;
    let parameters = uring.params();
    let features = [
        (parameters.is_feature_nodrop(), "completions that are never dropped (Linux 5.5)"),
        (parameters.is_feature_submit_stable(), "stable submissions (Linux 5.5)"),
        (parameters.is_feature_fast_poll(), "receives that wait without a thread (Linux 5.7)"),
        (parameters.is_feature_ext_arg(), "waits with a deadline (Linux 5.11)"),
    ];
    if let Some((_, what)) = features.iter().find(|(is_there, _)| !is_there) {
        return Err(Trouble::Lacks(what));
    }
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe).map_err(refused("io_uring_register"))?;
    let operations = [
        (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
        (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL"),
    ];
    if let Some((_, what)) = operations.iter().find(|(code, _)| !probe.is_supported(*code)) {
        return Err(Trouble::Lacks(what));
    }
    // SAFETY: an operation that does nothing names no memory.
    let pushed = unsafe { uring.submission().push(&opcode::Nop::new().build()) };
    pushed.expect("a new ring is empty");
    uring.submit().map_err(refused("io_uring_enter")).map(|_| ())
}

fn refused(call: &'static str) -> impl Fn(io::Error) -> Trouble {
    move |error| Trouble::Call { call, errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)) }
}
