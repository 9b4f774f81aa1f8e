//! A reliable-connected queue pair, its states as types: [`Builder`] makes a [`Prepared`] one, which takes receives and has a
//! number to tell the peer; `connect` makes that a [`QueuePair`], which sends.
//!
//! Invariant: only a connected pair sends; a pair that is dropped is destroyed, and from then on the device neither reads nor
//! writes memory for it. Both directions begin at random packet numbers, ours drawn here, the peer's told by it.

use std::{
    fmt, io,
    ptr::{self, NonNull},
    sync::Arc,
};

use super::{
    VerbsOptions,
    address::{Address, Link},
    chain::Chain,
    completion::CompletionQueue,
    device::Device,
};
use crate::{
    Error, Result,
    sys::verbs::{self as v, IbvAhAttr, IbvGid, IbvGlobalRoute, IbvQp, IbvQpAttr, IbvQpCap, IbvQpInitAttr, IbvRecvWr},
    wire::{FrameHeader, random_bytes},
};

/// Packets carry 24 bits of their number.
const PSN_BITS: u32 = 0xff_ffff;

/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 64;

/// How long a peer is told to wait where no receive is posted (0.64 ms). Credits see to it that it never happens.
const RNR_TIMER: u8 = 12;

/// Receives posted in one list.
const RECEIVE_BATCH: usize = 32;

/// What a queue pair is made of.
pub(super) struct Builder<'a> {
    pub(super) device: &'a Arc<Device>,
    pub(super) queue: &'a Arc<CompletionQueue>,
    pub(super) options: &'a VerbsOptions,
    /// Receives that may be posted at one time.
    pub(super) receives: u32,
}

/// A pair that can be told to a peer, and takes receives.
#[derive(Debug)]
pub(super) struct Prepared {
    raw: Raw,
}

/// A pair that has a peer.
#[derive(Debug)]
pub(super) struct QueuePair {
    raw: Raw,
    remote: Address,
}

struct Raw {
    device: Arc<Device>,
    /// Keeps the seat.
    _queue: Arc<CompletionQueue>,
    pair: NonNull<IbvQp>,
    options: VerbsOptions,
    psn: u32,
}

// SAFETY: libibverbs' objects belong to the process and not to a thread, and its functions lock what they share.
unsafe impl Send for Raw {}

impl Builder<'_> {
    /// Makes the pair, ready for receives.
    pub(super) fn build(self) -> Result<Prepared> {
        let Builder { device, queue, options, receives } = self;
        let psn = u32::from_le_bytes(random_bytes()?) & PSN_BITS;
        let mut wanted = IbvQpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: queue.raw(),
            recv_cq: queue.raw(),
            srq: ptr::null_mut(),
            cap: IbvQpCap {
                max_send_wr: options.send_depth,
                max_recv_wr: receives,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: FrameHeader::SIZE as u32,
            },
            qp_type: v::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue are valid and stay so as long as the pair holds them; the structure is ours, of the header's
        // size; the result is checked.
        let pair = unsafe { (device.table().create_qp)(device.pd_of_pairs(), &mut wanted) };
        let pair = NonNull::new(pair).ok_or_else(|| {
            let subject = format!(
                "a queue pair of {} sends and {receives} receives on RDMA device {} (it has queues of up to {})",
                options.send_depth, device.place.device, device.limits.queue_requests
            );
            Error::os("ibv_create_qp", subject, io::Error::last_os_error())
        })?;
        let raw = Raw { device: device.clone(), _queue: queue.clone(), pair, options: options.clone(), psn };
        raw.initialise()?;
        Ok(Prepared { raw })
    }
}

impl Prepared {
    /// What the peer needs to know of the pair itself: its number, and the first packet number that it will send.
    pub(super) fn number_and_psn(&self) -> (u32, u32) {
        // SAFETY: valid until `drop`.
        (unsafe { (*self.raw.pair.as_ptr()).qp_num }, self.raw.psn)
    }

    /// Posts receives, which complete under `wr_id`.
    pub(super) fn receive(&self, count: u32, wr_id: u64) -> Result<()> {
        self.raw.receive(count, wr_id)
    }

    /// Joins the pair to its peer: it receives and sends.
    pub(super) fn connect(self, remote: &Address) -> Result<QueuePair> {
        self.raw.join(remote)?;
        Ok(QueuePair { raw: self.raw, remote: *remote })
    }
}

impl QueuePair {
    /// Begins again, with the numbers of the first time; all that was posted is gone. For a caller whom nobody has heard yet.
    pub(super) fn restart(&self) -> Result<()> {
        self.raw.modify("RESET", &mut IbvQpAttr { qp_state: v::QPS_RESET, ..Default::default() }, v::QP_STATE)?;
        self.raw.initialise()?;
        self.raw.join(&self.remote)
    }

    /// The peer's end.
    pub(super) fn remote(&self) -> &Address {
        &self.remote
    }

    /// Posts receives, which complete under `wr_id`.
    pub(super) fn receive(&self, count: u32, wr_id: u64) -> Result<()> {
        self.raw.receive(count, wr_id)
    }

    /// Hands in a list of requests, with one doorbell.
    ///
    /// # Safety
    ///
    /// Until a request has completed, or the pair is dropped, nobody writes to the range that it reads.
    #[inline]
    pub(super) unsafe fn send(&self, chain: &mut Chain) -> Result<()> {
        let mut refused = ptr::null_mut();
        let list = chain.link();
        if list.is_null() {
            return Ok(());
        }
        // SAFETY: the pair is valid, its context's functions are the provider's, and the list is well-formed until the end of
        // this call, which copies it. The ranges lie in registered regions (or the device refuses them) and are left alone
        // (our caller).
        let result = unsafe { v::post_send(self.raw.pair.as_ptr(), list, &mut refused) };
        self.raw.check("ibv_post_send", result)
    }

    /// The name of the pair in events.
    pub(super) fn handle(&self) -> usize {
        self.raw.pair.as_ptr().addr()
    }
}

impl Raw {
    fn initialise(&self) -> Result<()> {
        let mut attributes = IbvQpAttr {
            qp_state: v::QPS_INIT,
            pkey_index: self.options.pkey_index,
            port_num: self.device.place.port,
            qp_access_flags: v::ACCESS_LOCAL_WRITE | v::ACCESS_REMOTE_WRITE,
            ..Default::default()
        };
        self.modify("INIT", &mut attributes, v::QP_STATE | v::QP_PKEY_INDEX | v::QP_PORT | v::QP_ACCESS_FLAGS)
    }

    fn join(&self, remote: &Address) -> Result<()> {
        let Device { place, limits, .. } = &*self.device;
        let mut attributes = IbvQpAttr {
            qp_state: v::QPS_RTR,
            path_mtu: limits.mtu.min(remote.mtu).into(),
            dest_qp_num: remote.qpn,
            rq_psn: remote.psn,
            max_dest_rd_atomic: 1,
            min_rnr_timer: RNR_TIMER,
            ah_attr: IbvAhAttr {
                grh: IbvGlobalRoute {
                    dgid: IbvGid { raw: remote.gid.0 },
                    flow_label: 0,
                    sgid_index: place.gid_index,
                    hop_limit: HOP_LIMIT,
                    traffic_class: self.options.traffic_class,
                },
                dlid: remote.lid,
                sl: self.options.service_level,
                // Within an InfiniBand subnet the local identifier is the whole address.
                is_global: u8::from(place.link != Link::InfiniBand || place.gid.0[..8] != remote.gid.0[..8]),
                port_num: place.port,
                ..Default::default()
            },
            ..Default::default()
        };
        let mask = v::QP_STATE
            | v::QP_AV
            | v::QP_PATH_MTU
            | v::QP_DEST_QPN
            | v::QP_RQ_PSN
            | v::QP_MAX_DEST_RD_ATOMIC
            | v::QP_MIN_RNR_TIMER;
        self.modify("RTR", &mut attributes, mask)?;
        let mut attributes = IbvQpAttr {
            qp_state: v::QPS_RTS,
            sq_psn: self.psn,
            timeout: self.options.ack_timeout,
            retry_cnt: self.options.retry_count,
            rnr_retry: self.options.retry_count,
            max_rd_atomic: 1,
            ..Default::default()
        };
        let mask =
            v::QP_STATE | v::QP_SQ_PSN | v::QP_TIMEOUT | v::QP_RETRY_CNT | v::QP_RNR_RETRY | v::QP_MAX_QP_RD_ATOMIC;
        self.modify("RTS", &mut attributes, mask)
    }

    fn receive(&self, count: u32, wr_id: u64) -> Result<()> {
        let mut left = count as usize;
        while left > 0 {
            let batch = left.min(RECEIVE_BATCH);
            let nothing = IbvRecvWr { wr_id, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 0 };
            let mut list = [nothing; RECEIVE_BATCH];
            let first = list.as_mut_ptr();
            for (at, receive) in list[..batch - 1].iter_mut().enumerate() {
                receive.next = first.wrapping_add(at + 1);
            }
            let mut refused = ptr::null_mut();
            // SAFETY: the pair is valid, its context's functions are the provider's; the list, which ends within the array, is
            // copied by this call. The receives name no memory: a note lands in the ring, which the peer names.
            let result = unsafe { v::post_recv(self.pair.as_ptr(), list.as_mut_ptr(), &mut refused) };
            self.check("ibv_post_recv", result)?;
            left -= batch;
        }
        Ok(())
    }

    fn modify(&self, state: &str, attributes: &mut IbvQpAttr, mask: u32) -> Result<()> {
        // SAFETY: the pair is valid and the structure ours, of the header's size.
        let result = unsafe { (self.device.table().modify_qp)(self.pair.as_ptr(), attributes, mask as i32) };
        if result == 0 {
            return Ok(());
        }
        let subject = format!(
            "a queue pair of RDMA device {} on its way to {state} (port {}, address {} at place {})",
            self.device.place.device, self.device.place.port, self.device.place.gid, self.device.place.gid_index
        );
        Err(Error::os("ibv_modify_qp", subject, io::Error::from_raw_os_error(result)))
    }

    fn check(&self, call: &'static str, result: i32) -> Result<()> {
        match result {
            0 => Ok(()),
            error => {
                let subject = format!("a queue pair of RDMA device {}", self.device.place.device);
                Err(Error::os(call, subject, io::Error::from_raw_os_error(error)))
            }
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // In this state it does nothing more; destroying alone would do, but some devices finish what they are at first.
        let _ = self.modify("ERR", &mut IbvQpAttr { qp_state: v::QPS_ERR, ..Default::default() }, v::QP_STATE);
        // SAFETY: destroyed once; all its events were acknowledged when they were read.
        let result = unsafe { (self.device.table().destroy_qp)(self.pair.as_ptr()) };
        if result != 0 {
            tracing::error!("ibv_destroy_qp failed: {}", io::Error::from_raw_os_error(result));
        }
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("psn", &self.psn).finish_non_exhaustive()
    }
}
