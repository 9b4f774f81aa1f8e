//! A libibverbs of the tests: a device that reaches nothing, registers what it is told to, and writes down every call.
//!
//! Invariant: each test has its own; what it does not expect ends it (`Table::of_stubs`).

use std::{
    ffi::{c_int, c_uint, c_void},
    ptr::{self, NonNull},
    sync::{Arc, Mutex},
};

use nix::errno::Errno;

use super::device::{Device, Limits};
use crate::sys::verbs::{IbvCompChannel, IbvContext, IbvMr, IbvPd, Table};

/// A call of a function that registers, with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// `ibv_reg_mr_iova2`.
    Pages { address: u64, length: usize, iova: u64, access: u32 },
    /// `ibv_reg_dmabuf_mr`.
    DmaBuf { offset: u64, length: usize, iova: u64, fd: i32, access: i32 },
    /// `ibv_dereg_mr` of what was registered.
    Ended,
}

/// What the functions know: the protection domain that they are handed is the address of this.
#[derive(Default)]
struct State {
    calls: Mutex<Vec<Call>>,
    /// Errors to answer with instead of registering, of pages and of a dma-buf.
    refuse_pages: Mutex<Option<i32>>,
    refuse_dma_buf: Mutex<Option<i32>>,
}

pub(super) struct Fake {
    device: Arc<Device>,
    state: &'static State,
}

impl Fake {
    pub(super) const LKEY: u32 = 11;
    pub(super) const RKEY: u32 = 22;

    /// A library of today.
    pub(super) fn new() -> Fake {
        Fake::with(Some(reg_dmabuf_mr))
    }

    /// A library that does not know dma-bufs.
    pub(super) fn old() -> Fake {
        Fake::with(None)
    }

    fn with(reg_dmabuf_mr: Option<RegDmaBuf>) -> Fake {
        let mut table = Table::of_stubs();
        (table.reg_mr_iova2, table.dereg_mr, table.reg_dmabuf_mr) = (reg_mr_iova2, dereg_mr, reg_dmabuf_mr);
        (table.destroy_comp_channel, table.dealloc_pd) = (destroy_comp_channel, dealloc_pd);
        table.close_device = close_device;
        // Both live as long as the process: devices hold their table so long.
        let (state, table): (&'static State, &'static Table) = (Box::leak(Box::default()), Box::leak(Box::new(table)));
        let limits = Limits { queue_requests: 1, completions: 1, message_bytes: 1, mtu: 1, lid: 0 };
        let domain = NonNull::from(state).cast();
        let device = Device::fake(table, NonNull::dangling(), domain, NonNull::dangling(), limits);
        Fake { device: Arc::new(device), state }
    }

    pub(super) fn device(&self) -> Arc<Device> {
        self.device.clone()
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        self.state.calls.lock().unwrap().clone()
    }

    pub(super) fn refuse_pages(&self, errno: i32) {
        *self.state.refuse_pages.lock().unwrap() = Some(errno);
    }

    pub(super) fn refuse_dma_buf(&self, errno: i32) {
        *self.state.refuse_dma_buf.lock().unwrap() = Some(errno);
    }
}

type RegDmaBuf = unsafe extern "C" fn(*mut IbvPd, u64, usize, u64, c_int, c_int) -> *mut IbvMr;

/// Safety: `pd` is the address of a `State` that lives for ever.
unsafe fn state_of(pd: *mut IbvPd) -> &'static State {
    // SAFETY: our caller promises it.
    unsafe { &*pd.cast::<State>() }
}

fn answer(pd: *mut IbvPd, refusal: &Mutex<Option<i32>>) -> *mut IbvMr {
    match *refusal.lock().unwrap() {
        Some(errno) => {
            Errno::from_raw(errno).set();
            ptr::null_mut()
        }
        None => Box::into_raw(Box::new(IbvMr { pd, lkey: Fake::LKEY, rkey: Fake::RKEY, ..IbvMr::default() })),
    }
}

unsafe extern "C" fn reg_mr_iova2(
    pd: *mut IbvPd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut IbvMr {
    // SAFETY: the fake's devices have no other domain.
    let state = unsafe { state_of(pd) };
    state.calls.lock().unwrap().push(Call::Pages { address: address.addr() as u64, length, iova, access });
    answer(pd, &state.refuse_pages)
}

unsafe extern "C" fn reg_dmabuf_mr(
    pd: *mut IbvPd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut IbvMr {
    // SAFETY: the fake's devices have no other domain.
    let state = unsafe { state_of(pd) };
    state.calls.lock().unwrap().push(Call::DmaBuf { offset, length, iova, fd, access });
    answer(pd, &state.refuse_dma_buf)
}

unsafe extern "C" fn dereg_mr(region: *mut IbvMr) -> c_int {
    // SAFETY: made by `answer` and ended once; a second time would be noticed by the allocator or in `calls`.
    let region = unsafe { Box::from_raw(region) };
    // SAFETY: as above.
    unsafe { state_of(region.pd) }.calls.lock().unwrap().push(Call::Ended);
    0
}

unsafe extern "C" fn destroy_comp_channel(_channel: *mut IbvCompChannel) -> c_int {
    0
}

unsafe extern "C" fn dealloc_pd(_pd: *mut IbvPd) -> c_int {
    0
}

unsafe extern "C" fn close_device(_context: *mut IbvContext) -> c_int {
    0
}
