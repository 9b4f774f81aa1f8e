//! One connection's memory while io_uring moves its bytes: at most one receive and one send at a time.
//!
//! What the kernel reads and writes by itself (the read buffer, the slot of a payload, the requests being sent with their headers and
//! sources, and the lists of ranges) lies in one allocation that never moves. While an operation is with the kernel nobody
//! touches its half of it; posts meanwhile go into the path's own queue.
//!
//! Invariant: memory is named to the kernel only while its half is marked as busy; the mark is taken off by the operation's
//! [`Finished`] alone; a flow that is dropped while busy leaves its memory (and so the leases) allocated for ever.

use std::{
    fmt,
    io::{self, IoSlice},
    mem,
    net::TcpStream,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
};

use io_uring::{opcode, types};

use super::{
    framing::{Inbound, Outbound, Queued, RANGES_MAX},
    ring::{Finished, Operation, Ring},
    socket,
};
use crate::transport::poller::Token;

/// Memory that the kernel works on.
struct Shared {
    stream: TcpStream,
    inbound: Inbound,
    receive: Message<2>,
    outbound: Outbound,
    send: Message<RANGES_MAX>,
}

/// Ranges as sendmsg and recvmsg take them.
struct Message<const RANGES: usize> {
    header: libc::msghdr,
    ranges: [libc::iovec; RANGES],
}

impl<const RANGES: usize> Message<RANGES> {
    fn new() -> Message<RANGES> {
        // SAFETY: a msghdr is made of integers and pointers, for which zeros are values: no name, no ranges, no control data.
        let header = unsafe { mem::zeroed() };
        Message { header, ranges: [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; RANGES] }
    }
}

pub(super) struct Flow {
    token: Token,
    /// From `Box::into_raw`.
    shared: NonNull<Shared>,
    receiving: bool,
    sending: bool,
}

// SAFETY: a flow owns its memory as a box does, and all that lies in it is `Send` but the pointers of `Message`, which point into
// that same memory and regions. Which thread runs when the kernel writes there makes no difference: nobody looks until `Finished`.
unsafe impl Send for Flow {}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Flow { token, receiving, sending, .. } = self;
        write!(f, "Flow {{ {token:?}, receiving: {receiving}, sending: {sending} }}")
    }
}

impl Flow {
    /// The flow of a connection that nothing else reads, writes or watches. `token` is no other flow's.
    pub(super) fn new(stream: TcpStream, token: Token) -> io::Result<Flow> {
        // A socket that does not block may answer EAGAIN to io_uring instead of being waited for.
        stream.set_nonblocking(false)?;
        let shared = Shared {
            stream,
            inbound: Inbound::default(),
            receive: Message::new(),
            outbound: Outbound::default(),
            send: Message::new(),
        };
        let shared = NonNull::from(Box::leak(Box::new(shared)));
        Ok(Flow { token, shared, receiving: false, sending: false })
    }

    /// Whether an operation is with the kernel.
    pub(super) fn is_busy(&self) -> bool {
        self.receiving || self.sending
    }

    /// Writes that were taken from the path's queue and are not all sent.
    pub(super) fn unsent(&self) -> usize {
        // SAFETY: the length of the queue is no part of what a send names to the kernel, and only `&mut self` changes it.
        unsafe { (*self.shared.as_ptr()).outbound.len() }
    }

    /// The receiving half, unless the kernel has it.
    pub(super) fn inbound(&mut self) -> Option<&mut Inbound> {
        // SAFETY: the allocation lives as long as the flow, the kernel has no receive that names the half, and the result borrows
        // the flow, so that none can begin.
        (!self.receiving).then(|| unsafe { &mut (*self.shared.as_ptr()).inbound })
    }

    /// The requests being sent, unless the kernel has them.
    pub(super) fn outbound(&mut self) -> Option<&mut Outbound> {
        // SAFETY: as for `inbound`, with the sending half.
        (!self.sending).then(|| unsafe { &mut (*self.shared.as_ptr()).outbound })
    }

    /// Begins to receive, at most `limit` bytes into a slot and a buffer beyond it.
    pub(super) fn receive(&mut self, limit: usize, ring: &mut Ring) -> io::Result<()> {
        if self.receiving {
            return Ok(());
        }
        let shared = self.shared.as_ptr();
        // SAFETY: the allocation is alive and the kernel has no receive that names this half (checked above), so nobody else
        // refers to these two fields.
        let (inbound, message) = unsafe { (&mut (*shared).inbound, &mut (*shared).receive) };
        let mut count = 0;
        for target in inbound.targets(limit).iter_mut().filter(|target| !target.is_empty()) {
            message.ranges[count] = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
            count += 1;
        }
        message.header.msg_iov = message.ranges.as_mut_ptr();
        message.header.msg_iovlen = count;
        let header: *mut libc::msghdr = &mut message.header;
        // SAFETY: `stream` is not changed as long as the flow is there.
        let fd = types::Fd(unsafe { (*shared).stream.as_raw_fd() });
        let entry = opcode::RecvMsg::new(fd, header).build();
        // SAFETY: the half is marked as busy until its `Finished`: until then `inbound` (its buffer, and the lease of the slot) and
        // the message are neither touched nor freed, and the socket stays open.
        unsafe { ring.begin(self.token, Operation::Receive, entry) }?;
        self.receiving = true;
        Ok(())
    }

    /// Begins to send what is left of the last batch, or else all of `queue`, which is empty afterwards.
    pub(super) fn send(&mut self, queue: &mut Outbound, limit: usize, ring: &mut Ring) -> io::Result<()> {
        if self.sending {
            return Ok(());
        }
        let shared = self.shared.as_ptr();
        // SAFETY: as in `receive`, with the sending half.
        let (outbound, message) = unsafe { (&mut (*shared).outbound, &mut (*shared).send) };
        if outbound.is_empty() {
            mem::swap(outbound, queue);
        }
        let mut ranges = [IoSlice::new(&[]); RANGES_MAX];
        let (count, _) = outbound.gather(&mut ranges, limit);
        if count == 0 {
            return Ok(());
        }
        for (named, range) in message.ranges.iter_mut().zip(&ranges[..count]) {
            *named = libc::iovec { iov_base: range.as_ptr().cast_mut().cast(), iov_len: range.len() };
        }
        message.header.msg_iov = message.ranges.as_mut_ptr();
        message.header.msg_iovlen = count;
        let header: *const libc::msghdr = &message.header;
        // SAFETY: as in `receive`.
        let fd = types::Fd(unsafe { (*shared).stream.as_raw_fd() });
        // To the end, as far as the kernel can: what it leaves over is sent by the next operation.
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(fd, header).flags(flags).build();
        // SAFETY: the half is marked as busy until its `Finished`: until then `outbound` (headers and sources) and the message are
        // neither touched nor freed, and the socket stays open.
        unsafe { ring.begin(self.token, Operation::Send, entry) }?;
        self.sending = true;
        Ok(())
    }

    /// The kernel is done with a receive: so many bytes are there.
    pub(super) fn received(&mut self, finished: Finished) -> io::Result<usize> {
        assert!(self.is_of(&finished, Operation::Receive), "a receive of another connection");
        self.receiving = false;
        let count = finished.count()?;
        self.inbound().expect("it was told to be done").received(count);
        Ok(count)
    }

    /// The kernel is done with a send; `done` gets each write that this completes.
    pub(super) fn sent(&mut self, finished: Finished, done: impl FnMut(Queued)) -> io::Result<()> {
        assert!(self.is_of(&finished, Operation::Send), "a send of another connection");
        self.sending = false;
        let count = finished.count()?;
        self.outbound().expect("it was told to be done").advance(count, done);
        Ok(())
    }

    /// Ends the connection, and asks the kernel to end what it still does to it.
    pub(super) fn end(&self, ring: &mut Ring) {
        // SAFETY: `stream` is not changed as long as the flow is there, and a system call on it disturbs no operation's memory.
        socket::end(unsafe { &(*self.shared.as_ptr()).stream });
        for (is_busy, operation) in [(self.receiving, Operation::Receive), (self.sending, Operation::Send)] {
            if is_busy {
                ring.cancel(self.token, operation);
            }
        }
    }

    /// Ends the connection and takes the memory back, which the kernel has none of.
    pub(super) fn close(self) -> (Inbound, Outbound) {
        assert!(!self.is_busy(), "the kernel still uses this connection's memory");
        // SAFETY: it came from a box, no operation names it any more, and the flow, its only owner, is forgotten.
        let shared = unsafe { Box::from_raw(self.shared.as_ptr()) };
        mem::forget(self);
        let Shared { stream, inbound, outbound, .. } = *shared;
        socket::end(&stream);
        (inbound, outbound)
    }

    fn is_of(&self, finished: &Finished, operation: Operation) -> bool {
        finished.token() == self.token && finished.operation() == operation
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if self.is_busy() {
            // Its thread is gone, or the kernel does not let go: memory that may still be written to must never be used again.
            tracing::warn!("a connection ended while the kernel still used its memory, which is lost");
            return;
        }
        // SAFETY: it came from a box, no operation names it any more, and the flow, its only owner, is going.
        drop(unsafe { Box::from_raw(self.shared.as_ptr()) });
    }
}
