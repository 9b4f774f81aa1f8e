//! A device of the tests that reaches itself: what one of its queue pairs posts has happened at the other when the call returns.
//!
//! It does what the driver asks of a reliable-connected pair: writes, inline or from registered memory, with or without 32 bits;
//! posted receives, which those use up; completions, of requests that ask for one and of what fails. A byte of what is written
//! inline may be spoilt on the way (`Link::spoil`).
//!
//! It gives what it was asked for and no more, as a provider that rounds nothing up: a pair refuses requests and receives beyond the
//! places of its queues, ranges beyond its number of them, and more inline bytes than it was made for. A place is free again when
//! the completion that stands for it was taken out. A completion for which its queue has no room is lost (`Link::overran`).
//!
//! Invariant: one thread uses it; what it does not know ends the test (`Table::of_stubs`).

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    ptr::{self, NonNull},
    slice,
    sync::Arc,
};

use nix::errno::Errno;

use super::device::{Device, Limits};
use crate::sys::verbs::{
    self as v, IbvAsyncEvent, IbvCompChannel, IbvCompatPortAttr, IbvContext, IbvCq, IbvMr, IbvPd, IbvPortAttr, IbvQp,
    IbvQpAttr, IbvQpCap, IbvQpInitAttr, IbvRecvWr, IbvSendWr, IbvWc, Table,
};

/// The context, and what lies behind it: its address is also that of the protection domain.
#[repr(C)]
pub(super) struct Link {
    context: IbvContext,
    channel: IbvCompChannel,
    /// Registered memory by its key, which counts from 1; null when it was given back.
    memory: RefCell<Vec<(*mut u8, usize)>>,
    /// By number, which counts from 1; null when destroyed.
    pairs: RefCell<Vec<*mut Pair>>,
    /// A place in what is written inline, and the bits to turn round there: of the next such write.
    pub(super) spoil: Cell<Option<(usize, u8)>>,
    /// Lists of requests that were handed in.
    pub(super) lists: Cell<u64>,
    /// Whether a completion was lost, for its queue was full.
    pub(super) overran: Cell<bool>,
}

#[repr(C)]
struct Queue {
    raw: IbvCq,
    room: usize,
    waiting: RefCell<VecDeque<Told>>,
}

/// A completion, and how many places of its pair's queues it stands for.
struct Told {
    completion: IbvWc,
    requests: u32,
    receives: u32,
}

#[repr(C)]
struct Pair {
    raw: IbvQp,
    /// What it was made for.
    most: IbvQpCap,
    state: Cell<u32>,
    receives: RefCell<VecDeque<u64>>,
    /// The number of the other end, once it is connected.
    peer: Cell<Option<u32>>,
    /// Places taken in its two queues, and requests since the last that completed.
    requests_taken: Cell<u32>,
    receives_taken: Cell<u32>,
    uncompleted: Cell<u32>,
}

impl Link {
    /// A new one, for as long as the process lives.
    pub(super) fn new() -> &'static Link {
        let mut context = IbvContext { async_fd: -1, ..IbvContext::default() };
        context.ops.post_send = Some(post_send);
        context.ops.post_recv = Some(post_recv);
        context.ops.poll_cq = Some(poll_cq);
        let link = Link {
            context,
            channel: IbvCompChannel { fd: -1, ..IbvCompChannel::default() },
            memory: RefCell::default(),
            pairs: RefCell::default(),
            spoil: Cell::new(None),
            lists: Cell::new(0),
            overran: Cell::new(false),
        };
        Box::leak(Box::new(link))
    }

    /// A device on it, open.
    pub(super) fn device(&'static self) -> Arc<Device> {
        let mut table = Table::of_stubs();
        (table.reg_mr_iova2, table.dereg_mr) = (reg_mr_iova2, dereg_mr);
        (table.create_cq, table.destroy_cq) = (create_cq, destroy_cq);
        (table.create_qp, table.modify_qp, table.destroy_qp) = (create_qp, modify_qp, destroy_qp);
        (table.get_async_event, table.get_cq_event) = (no_event, no_queue);
        (table.query_port, table.close_device) = (query_port, ended);
        (table.destroy_comp_channel, table.dealloc_pd) = (ended, ended);
        let limits = Limits { queue_requests: 4096, completions: 1 << 16, message_bytes: 4096, mtu: 3, lid: 0 };
        let ours = NonNull::from(self);
        let device =
            Device::fake(Box::leak(Box::new(table)), ours.cast(), ours.cast(), NonNull::from(&self.channel), limits);
        Arc::new(device)
    }

    /// How often memory was registered.
    pub(super) fn registrations(&self) -> u64 {
        self.memory.borrow().len() as u64
    }

    /// The memory that a request or a peer means: `length` bytes from `address` on under a key.
    fn at(&self, key: u32, address: u64, length: usize) -> Option<*mut u8> {
        let (start, len) = *self.memory.borrow().get(key.checked_sub(1)? as usize)?;
        let end = usize::try_from(address).ok()?.checked_add(length)?;
        (!start.is_null() && end <= len).then(|| start.wrapping_add(address as usize))
    }

    fn pair(&self, number: u32) -> Option<&Pair> {
        let pair = *self.pairs.borrow().get(number.checked_sub(1)? as usize)?;
        // SAFETY: made by `create_qp`, and null as soon as it is destroyed.
        unsafe { pair.as_ref() }
    }

    /// What becomes of a request: the status of its completion.
    ///
    /// # Safety
    ///
    /// The request is well-formed.
    unsafe fn carry(&self, from: &Pair, request: &IbvSendWr) -> u32 {
        if from.state.get() == v::QPS_ERR {
            return v::WC_WR_FLUSH_ERR;
        }
        let to = from.peer.get().and_then(|number| self.pair(number));
        let Some(to) = to.filter(|to| to.peer.get() == Some(from.raw.qp_num)) else { return v::WC_RETRY_EXC_ERR };
        let mut length = 0;
        if request.num_sge == 1 {
            // SAFETY: our caller's.
            let (range, target) = unsafe { (*request.sg_list, request.wr.rdma) };
            length = range.length as usize;
            let is_inline = request.send_flags & v::SEND_INLINE != 0;
            let source = match is_inline {
                true => Some(ptr::with_exposed_provenance_mut(range.addr as usize)),
                false => self.at(range.lkey, range.addr, length),
            };
            let Some(source) = source else { return v::WC_LOC_PROT_ERR };
            let Some(target) = self.at(target.rkey, target.remote_addr, length) else { return v::WC_REM_ACCESS_ERR };
            // SAFETY: both ranges are valid, and left to the device until it says that it is done with them.
            unsafe { ptr::copy_nonoverlapping(source, target, length) };
            if is_inline && let Some((place, bits)) = self.spoil.take() {
                // SAFETY: as above.
                let bytes: &mut [u8] = unsafe { slice::from_raw_parts_mut(target, length) };
                bytes[place] ^= bits;
            }
        }
        if request.opcode == v::WR_RDMA_WRITE_WITH_IMM {
            let Some(wr_id) = to.receives.borrow_mut().pop_front() else { return v::WC_RNR_RETRY_EXC_ERR };
            let mut told =
                IbvWc { wr_id, opcode: v::WC_RECV_RDMA_WITH_IMM, byte_len: length as u32, ..IbvWc::default() };
            // SAFETY: all members of the unions are 32 bits.
            told.__bindgen_anon_1.imm_data = unsafe { request.__bindgen_anon_1.imm_data };
            to.complete_receive(told);
        }
        0
    }
}

impl Pair {
    /// Why a request is not taken: 0 or an errno.
    fn refusal(&self, request: &IbvSendWr) -> c_int {
        if !matches!(self.state.get(), v::QPS_RTS | v::QPS_ERR) || request.num_sge as u32 > self.most.max_send_sge {
            return libc::EINVAL;
        }
        if request.num_sge == 1 && request.send_flags & v::SEND_INLINE != 0 {
            // SAFETY: the caller's list is well-formed.
            let bytes = unsafe { (*request.sg_list).length };
            if bytes > self.most.max_inline_data {
                return libc::EINVAL;
            }
        }
        if self.requests_taken.get() == self.most.max_send_wr { libc::ENOMEM } else { 0 }
    }

    fn complete_request(&self, completion: IbvWc) {
        let requests = self.uncompleted.take();
        self.complete(self.raw.send_cq, Told { completion, requests, receives: 0 });
    }

    fn complete_receive(&self, completion: IbvWc) {
        self.complete(self.raw.recv_cq, Told { completion, requests: 0, receives: 1 });
    }

    fn complete(&self, queue: *mut IbvCq, mut told: Told) {
        told.completion.qp_num = self.raw.qp_num;
        // SAFETY: queues are made by `create_cq`, on a context of a link, and live longer than the pairs on them.
        let (queue, link) = unsafe { (&*queue.cast::<Queue>(), link_of((*queue).context)) };
        if queue.waiting.borrow().len() == queue.room {
            link.overran.set(true);
            return;
        }
        queue.waiting.borrow_mut().push_back(told);
    }

    /// A request has failed: whatever else is posted does too.
    fn fail(&self) {
        self.state.set(v::QPS_ERR);
        for wr_id in self.receives.take() {
            self.complete_receive(IbvWc { wr_id, status: v::WC_WR_FLUSH_ERR, ..IbvWc::default() });
        }
    }

    /// Nothing is posted any more; completions that wait stand for nothing.
    fn reset(&self) {
        self.receives.borrow_mut().clear();
        self.peer.set(None);
        self.requests_taken.set(0);
        self.receives_taken.set(0);
        self.uncompleted.set(0);
        for queue in [self.raw.send_cq, self.raw.recv_cq] {
            // SAFETY: queues are made by `create_cq`, and live longer than the pairs on them.
            let mut waiting = unsafe { &*queue.cast::<Queue>() }.waiting.borrow_mut();
            for told in waiting.iter_mut().filter(|told| told.completion.qp_num == self.raw.qp_num) {
                (told.requests, told.receives) = (0, 0);
            }
        }
    }
}

/// Safety: a context, or a protection domain, of a link.
unsafe fn link_of<'a, T>(part: *mut T) -> &'a Link {
    // SAFETY: our caller promises it, and links live for ever.
    unsafe { &*part.cast::<Link>() }
}

unsafe extern "C" fn post_send(pair: *mut IbvQp, list: *mut IbvSendWr, refused: *mut *mut IbvSendWr) -> c_int {
    // SAFETY: made by `create_qp`, on a context of a link.
    let (pair, link) = unsafe { (&*pair.cast::<Pair>(), link_of((*pair).context)) };
    link.lists.set(link.lists.get() + 1);
    // SAFETY: the caller's list is well-formed.
    let mut next = unsafe { list.as_ref() };
    while let Some(request) = next {
        let errno = pair.refusal(request);
        if errno != 0 {
            // SAFETY: the target is the caller's.
            unsafe { *refused = ptr::from_ref(request).cast_mut() };
            return errno;
        }
        pair.requests_taken.set(pair.requests_taken.get() + 1);
        pair.uncompleted.set(pair.uncompleted.get() + 1);
        // SAFETY: as above.
        let status = unsafe { link.carry(pair, request) };
        if status != 0 || request.send_flags & v::SEND_SIGNALED != 0 {
            pair.complete_request(IbvWc { wr_id: request.wr_id, status, ..IbvWc::default() });
        }
        if status != 0 && pair.state.get() != v::QPS_ERR {
            pair.fail();
        }
        // SAFETY: as above.
        next = unsafe { request.next.as_ref() };
    }
    0
}

unsafe extern "C" fn post_recv(pair: *mut IbvQp, list: *mut IbvRecvWr, refused: *mut *mut IbvRecvWr) -> c_int {
    // SAFETY: made by `create_qp`; the caller's list is well-formed.
    let (pair, mut next) = unsafe { (&*pair.cast::<Pair>(), list.as_ref()) };
    while let Some(receive) = next {
        if pair.receives_taken.get() == pair.most.max_recv_wr {
            // SAFETY: the target is the caller's.
            unsafe { *refused = ptr::from_ref(receive).cast_mut() };
            return libc::ENOMEM;
        }
        pair.receives_taken.set(pair.receives_taken.get() + 1);
        pair.receives.borrow_mut().push_back(receive.wr_id);
        // SAFETY: as above.
        next = unsafe { receive.next.as_ref() };
    }
    0
}

unsafe extern "C" fn poll_cq(queue: *mut IbvCq, room: c_int, completions: *mut IbvWc) -> c_int {
    // SAFETY: made by `create_cq`, on a context of a link.
    let (mut waiting, link) = unsafe { ((*queue.cast::<Queue>()).waiting.borrow_mut(), link_of((*queue).context)) };
    let count = waiting.len().min(room as usize);
    for (at, Told { completion, requests, receives }) in waiting.drain(..count).enumerate() {
        if let Some(pair) = link.pair(completion.qp_num) {
            pair.requests_taken.set(pair.requests_taken.get() - requests);
            pair.receives_taken.set(pair.receives_taken.get() - receives);
        }
        // SAFETY: the caller has room for so many.
        unsafe { completions.add(at).write(completion) };
    }
    count as c_int
}

unsafe extern "C" fn create_cq(
    context: *mut IbvContext,
    count: c_int,
    _own: *mut c_void,
    _channel: *mut IbvCompChannel,
    _vector: c_int,
) -> *mut IbvCq {
    let raw = IbvCq { context, ..IbvCq::default() };
    Box::into_raw(Box::new(Queue { raw, room: count as usize, waiting: RefCell::default() })).cast()
}

unsafe extern "C" fn destroy_cq(queue: *mut IbvCq) -> c_int {
    // SAFETY: made by `create_cq`, ended once.
    drop(unsafe { Box::from_raw(queue.cast::<Queue>()) });
    0
}

unsafe extern "C" fn create_qp(pd: *mut IbvPd, wanted: *mut IbvQpInitAttr) -> *mut IbvQp {
    // SAFETY: the domain is a link's, the structure the caller's.
    let (link, wanted) = unsafe { (link_of(pd), &*wanted) };
    let mut pairs = link.pairs.borrow_mut();
    let raw = IbvQp {
        context: pd.cast(),
        send_cq: wanted.send_cq,
        recv_cq: wanted.recv_cq,
        qp_num: pairs.len() as u32 + 1,
        ..IbvQp::default()
    };
    let pair = Pair {
        raw,
        most: wanted.cap,
        state: Cell::new(v::QPS_RESET),
        receives: RefCell::default(),
        peer: Cell::new(None),
        requests_taken: Cell::new(0),
        receives_taken: Cell::new(0),
        uncompleted: Cell::new(0),
    };
    pairs.push(Box::into_raw(Box::new(pair)));
    pairs[pairs.len() - 1].cast()
}

unsafe extern "C" fn modify_qp(pair: *mut IbvQp, attributes: *mut IbvQpAttr, _mask: c_int) -> c_int {
    // SAFETY: made by `create_qp`; the structure is the caller's.
    let (pair, attributes) = unsafe { (&*pair.cast::<Pair>(), &*attributes) };
    pair.state.set(attributes.qp_state);
    match attributes.qp_state {
        v::QPS_RTR => pair.peer.set(Some(attributes.dest_qp_num)),
        v::QPS_RESET => pair.reset(),
        v::QPS_ERR => pair.fail(),
        _ => {}
    }
    0
}

unsafe extern "C" fn destroy_qp(pair: *mut IbvQp) -> c_int {
    // SAFETY: made by `create_qp`, ended once.
    let pair = unsafe { Box::from_raw(pair.cast::<Pair>()) };
    // SAFETY: as there.
    unsafe { link_of(pair.raw.context) }.pairs.borrow_mut()[pair.raw.qp_num as usize - 1] = ptr::null_mut();
    0
}

unsafe extern "C" fn reg_mr_iova2(
    pd: *mut IbvPd,
    address: *mut c_void,
    length: usize,
    _iova: u64,
    _access: c_uint,
) -> *mut IbvMr {
    // SAFETY: the domain is a link's.
    let mut memory = unsafe { link_of(pd) }.memory.borrow_mut();
    memory.push((address.cast(), length));
    let key = memory.len() as u32;
    Box::into_raw(Box::new(IbvMr { pd, lkey: key, rkey: key, ..IbvMr::default() }))
}

unsafe extern "C" fn dereg_mr(region: *mut IbvMr) -> c_int {
    // SAFETY: made by `reg_mr_iova2`, ended once.
    let region = unsafe { Box::from_raw(region) };
    // SAFETY: as there.
    unsafe { link_of(region.pd) }.memory.borrow_mut()[region.rkey as usize - 1].0 = ptr::null_mut();
    0
}

unsafe extern "C" fn ended<T>(_what: *mut T) -> c_int {
    0
}

unsafe extern "C" fn query_port(_context: *mut IbvContext, _port: u8, answer: *mut IbvCompatPortAttr) -> c_int {
    // SAFETY: the caller's structure is the longer one.
    unsafe { (*answer.cast::<IbvPortAttr>()).state = v::PORT_ACTIVE };
    0
}

unsafe extern "C" fn no_event(_context: *mut IbvContext, _event: *mut IbvAsyncEvent) -> c_int {
    Errno::EAGAIN.set();
    -1
}

unsafe extern "C" fn no_queue(_: *mut IbvCompChannel, _: *mut *mut IbvCq, _: *mut *mut c_void) -> c_int {
    Errno::EAGAIN.set();
    -1
}
