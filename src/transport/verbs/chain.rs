//! Requests that go to a device together: built one after the other, handed in as one list, with one doorbell.
//!
//! Invariant: a request's range and inline bytes live in the chain's own arrays, at its own index, and the arrays do not move
//! between `link` and the end of the call that hands the list in; a chain never grows beyond what it was made for, and no write
//! in it is longer than its port's longest message.

use std::{fmt, ptr};

use crate::{
    sys::verbs::{self as v, IbvRdma, IbvSendData, IbvSendTarget, IbvSendWr, IbvSge},
    wire::FrameHeader,
};

/// A list of requests.
pub(super) struct Chain {
    /// As many as it was made for; the first `len` are the list. What is never set stays zero, so a request costs what it says.
    requests: Box<[IbvSendWr]>,
    ranges: Box<[IbvSge]>,
    headers: Box<[[u8; FrameHeader::SIZE]]>,
    len: usize,
    /// What all of them are called in completions.
    wr_id: u64,
    /// Bytes of the longest write.
    message_bytes: u32,
}

// SAFETY: the pointers in `requests` are null but for the time of one call, and point into the chain's own arrays then.
unsafe impl Send for Chain {}

/// Where a request's bytes go at the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) rkey: u32,
    pub(super) offset: u64,
}

impl Chain {
    /// An empty chain for up to `capacity` requests to a port whose longest message has `message_bytes`.
    pub(super) fn new(capacity: usize, message_bytes: u32) -> Chain {
        Chain {
            requests: (0..capacity).map(|_| IbvSendWr::default()).collect(),
            ranges: (0..capacity).map(|_| IbvSge::default()).collect(),
            headers: vec![[0; FrameHeader::SIZE]; capacity].into(),
            len: 0,
            wr_id: 0,
            message_bytes,
        }
    }

    /// Begins a new list, whose requests complete under `wr_id`.
    #[inline]
    pub(super) fn begin(&mut self, wr_id: u64) {
        self.wr_id = wr_id;
        self.len = 0;
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A write of registered bytes.
    pub(super) fn write(&mut self, range: IbvSge, target: Target) {
        // Soft-RDMA takes longer ones, and does something else.
        assert!(range.length <= self.message_bytes, "a write of {} bytes, above {}", range.length, self.message_bytes);
        self.push(v::WR_RDMA_WRITE, 0, Some(range), target);
    }

    /// A note: its bytes into the peer's ring, and 32 bits with the completion there.
    #[inline]
    pub(super) fn note(&mut self, header: &FrameHeader, immediate: u32, target: Target) {
        let at = self.len;
        let range = IbvSge { addr: 0, length: FrameHeader::SIZE as u32, lkey: 0 };
        self.push(v::WR_RDMA_WRITE_WITH_IMM, immediate, Some(range), target);
        // The fabric checks what it carries.
        self.headers[at] = header.encode_unsealed();
        self.requests[at].send_flags = v::SEND_INLINE;
    }

    /// 32 bits alone.
    pub(super) fn word(&mut self, immediate: u32, target: Target) {
        self.push(v::WR_RDMA_WRITE_WITH_IMM, immediate, None, target);
    }

    /// A write of nothing: its acknowledgement is all that is wanted.
    pub(super) fn probe(&mut self, target: Target) {
        self.push(v::WR_RDMA_WRITE, 0, None, target);
    }

    /// Has the last request complete when it is done, not only when it fails.
    #[inline]
    pub(super) fn signal(&mut self) {
        self.last().send_flags |= v::SEND_SIGNALED;
    }

    /// The list, for one call.
    #[inline]
    pub(super) fn link(&mut self) -> *mut IbvSendWr {
        let mut next = ptr::null_mut();
        let list =
            self.requests[..self.len].iter_mut().zip(&mut self.ranges[..self.len]).zip(&self.headers[..self.len]);
        for ((request, range), header) in list.rev() {
            if request.send_flags & v::SEND_INLINE != 0 {
                range.addr = header.as_ptr().expose_provenance() as u64;
            }
            request.sg_list = range;
            request.next = next;
            next = request;
        }
        next
    }

    #[inline]
    fn last(&mut self) -> &mut IbvSendWr {
        self.requests[..self.len].last_mut().expect("there is a request")
    }

    #[inline]
    fn push(&mut self, opcode: u32, immediate: u32, range: Option<IbvSge>, target: Target) {
        assert!(self.len < self.requests.len(), "a chain longer than the send queue");
        let request = &mut self.requests[self.len];
        request.wr_id = self.wr_id;
        request.num_sge = i32::from(range.is_some());
        request.opcode = opcode;
        request.send_flags = 0;
        request.__bindgen_anon_1 = IbvSendData { imm_data: immediate.to_be() };
        request.wr = IbvSendTarget { rdma: IbvRdma { remote_addr: target.offset, rkey: target.rkey } };
        self.ranges[self.len] = range.unwrap_or_default();
        self.len += 1;
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("requests", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Note, NoteKind};

    #[test]
    fn a_list_leads_through_all_requests_and_to_their_bytes() {
        let mut chain = Chain::new(3, 9);
        let target = Target { rkey: 5, offset: 640 };
        let header = FrameHeader { target: None, note: Note { clock: 7, ..Note::new(NoteKind::Credit) } };
        assert!(chain.link().is_null());
        chain.begin(77);
        chain.write(IbvSge { addr: 4096, length: 9, lkey: 3 }, target);
        chain.note(&header, 0x0102_0304, target);
        chain.signal();
        chain.word(1, target);
        let mut at = chain.link();
        let mut seen = Vec::new();
        while !at.is_null() {
            // SAFETY: the list is the chain's own, just linked.
            let (request, range) = unsafe { (*at, *(*at).sg_list) };
            seen.push((request.opcode, request.send_flags, request.num_sge, range.length));
            if request.send_flags & v::SEND_INLINE != 0 {
                // SAFETY: inline bytes are the chain's own.
                let bytes = unsafe { *(range.addr as usize as *const [u8; FrameHeader::SIZE]) };
                assert_eq!(bytes, header.encode_unsealed());
                // SAFETY: all members of the union are 32 bits.
                let immediate = unsafe { request.__bindgen_anon_1.imm_data };
                assert_eq!((immediate.to_ne_bytes(), request.wr_id), ([1, 2, 3, 4], 77));
            }
            // SAFETY: the chain's requests are all writes.
            let target = unsafe { request.wr.rdma };
            assert_eq!((target.rkey, target.remote_addr), (5, 640));
            at = request.next;
        }
        let inline = v::SEND_INLINE | v::SEND_SIGNALED;
        assert_eq!(seen, [(0, 0, 1, 9), (1, inline, 1, 64), (1, 0, 0, 0)]);
    }

    #[test]
    #[should_panic(expected = "a write of 10 bytes, above 9")]
    fn a_write_longer_than_the_longest_message_is_our_own_mistake() {
        let mut chain = Chain::new(3, 9);
        chain.begin(77);
        chain.write(IbvSge { addr: 0, length: 10, lkey: 3 }, Target { rkey: 5, offset: 0 });
    }
}
