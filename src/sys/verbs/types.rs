//! The structures and numbers of <infiniband/verbs.h> that we use, as rdma-core lays them out.
//!
//! The header may be used under the OpenIB.org BSD licence or the GPL, version 2; what is declared after it here is so under the
//! former.
//!
//! Invariant: every structure begins as the header's does and ends where we stop reading, except those that we hand in: they
//! have the header's size. `tests` compares offsets, sizes and numbers with the header where there is one.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `struct ibv_device`, opaque.
#[repr(C)]
pub struct IbvDevice {
    _opaque: [u8; 0],
}

/// What a provider does without entering the kernel: `struct ibv_context_ops` as far as we call it.
#[repr(C)]
pub struct IbvContextOps {
    _before_poll_cq: [*const c_void; 11],
    /// Takes completions out of a queue: their number, or negative.
    pub poll_cq: unsafe extern "C" fn(*mut IbvCq, c_int, *mut IbvWc) -> c_int,
    /// Asks for an event at the next completion (second argument 0: at any). 0 or an errno.
    pub req_notify_cq: unsafe extern "C" fn(*mut IbvCq, c_int) -> c_int,
    _before_post_send: [*const c_void; 12],
    /// Hands in a list of requests; the last argument is set to the first that was not taken. 0 or an errno.
    pub post_send: unsafe extern "C" fn(*mut IbvQp, *mut IbvSendWr, *mut *mut IbvSendWr) -> c_int,
    /// Hands in receives, likewise.
    pub post_recv: unsafe extern "C" fn(*mut IbvQp, *mut IbvRecvWr, *mut *mut IbvRecvWr) -> c_int,
    _after_post_recv: [*const c_void; 5],
}

/// `struct ibv_context`, up to its descriptors.
#[repr(C)]
pub struct IbvContext {
    /// The device that was opened.
    pub device: *mut IbvDevice,
    /// The provider's functions.
    pub ops: IbvContextOps,
    /// Of commands to the kernel.
    pub cmd_fd: c_int,
    /// Readable when an asynchronous event is there.
    pub async_fd: c_int,
}

/// `struct ibv_pd`, opaque.
#[repr(C)]
pub struct IbvPd {
    _opaque: [u8; 0],
}

/// `struct ibv_mr`.
#[repr(C)]
pub struct IbvMr {
    /// The device.
    pub context: *mut IbvContext,
    /// The protection domain.
    pub pd: *mut IbvPd,
    /// The first byte.
    pub addr: *mut c_void,
    /// Bytes.
    pub length: usize,
    /// The kernel's number.
    pub handle: u32,
    /// The key under which our own requests name it.
    pub lkey: u32,
    /// The key under which a peer's requests name it.
    pub rkey: u32,
}

/// `struct ibv_comp_channel`, up to its descriptor.
#[repr(C)]
pub struct IbvCompChannel {
    /// The device.
    pub context: *mut IbvContext,
    /// Readable when an event is there.
    pub fd: c_int,
}

/// `struct ibv_cq`, up to its size.
#[repr(C)]
pub struct IbvCq {
    /// The device.
    pub context: *mut IbvContext,
    /// Where its events go.
    pub channel: *mut IbvCompChannel,
    /// Ours.
    pub cq_context: *mut c_void,
    /// The kernel's number.
    pub handle: u32,
    /// How many completions it holds.
    pub cqe: c_int,
}

/// `struct ibv_qp`, up to its number.
#[repr(C)]
pub struct IbvQp {
    /// The device.
    pub context: *mut IbvContext,
    /// Ours.
    pub qp_context: *mut c_void,
    /// The protection domain.
    pub pd: *mut IbvPd,
    /// Where sends complete.
    pub send_cq: *mut IbvCq,
    /// Where receives complete.
    pub recv_cq: *mut IbvCq,
    /// A shared receive queue, or null.
    pub srq: *mut c_void,
    /// The kernel's number.
    pub handle: u32,
    /// The number by which peers name it (24 bits).
    pub qp_num: u32,
}

/// `struct ibv_sge`: a range of registered memory.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvSge {
    /// The first byte, in the addresses of the region (of inline data: in memory).
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// The region's key.
    pub lkey: u32,
}

/// `struct ibv_send_wr`, with the union `wr` as RDMA requests use it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IbvSendWr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// The next request, or null.
    pub next: *mut IbvSendWr,
    /// What to send.
    pub sg_list: *mut IbvSge,
    /// How many ranges.
    pub num_sge: c_int,
    /// One of `WR_*`.
    pub opcode: c_uint,
    /// Some of `SEND_*`.
    pub send_flags: c_uint,
    /// In network byte order.
    pub imm_data: u32,
    /// Where it goes, in the addresses of the peer's region.
    pub remote_addr: u64,
    /// The peer's region.
    pub rkey: u32,
    /// Of other kinds of requests.
    pub others: [u32; 19],
}

/// `struct ibv_recv_wr`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IbvRecvWr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// The next one, or null.
    pub next: *mut IbvRecvWr,
    /// Where to receive.
    pub sg_list: *mut IbvSge,
    /// How many ranges.
    pub num_sge: c_int,
}

/// `struct ibv_wc`: a completion. Where `status` is not 0, only `wr_id`, `vendor_err` and `qp_num` mean anything.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvWc {
    /// The request's.
    pub wr_id: u64,
    /// 0, or how it failed.
    pub status: c_uint,
    /// What kind of completion; `WC_RECV_RDMA_WITH_IMM` of a note.
    pub opcode: c_uint,
    /// The maker's number for an error.
    pub vendor_err: u32,
    /// Bytes received.
    pub byte_len: u32,
    /// In network byte order.
    pub imm_data: u32,
    /// Our queue pair.
    pub qp_num: u32,
    /// The peer's, of datagrams.
    pub src_qp: u32,
    /// `WC_WITH_IMM` and others.
    pub wc_flags: c_uint,
    /// Of datagrams.
    pub pkey_index: u16,
    /// Of datagrams.
    pub slid: u16,
    /// Of datagrams.
    pub sl: u8,
    /// Of datagrams.
    pub dlid_path_bits: u8,
}

/// `struct ibv_qp_cap`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvQpCap {
    /// Requests that the send queue holds.
    pub max_send_wr: u32,
    /// Receives that the receive queue holds.
    pub max_recv_wr: u32,
    /// Ranges of a request.
    pub max_send_sge: u32,
    /// Ranges of a receive.
    pub max_recv_sge: u32,
    /// Bytes that a request may carry itself.
    pub max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub struct IbvQpInitAttr {
    /// Ours.
    pub qp_context: *mut c_void,
    /// Where sends complete.
    pub send_cq: *mut IbvCq,
    /// Where receives complete.
    pub recv_cq: *mut IbvCq,
    /// A shared receive queue, or null.
    pub srq: *mut c_void,
    /// Asked for; afterwards what was granted.
    pub cap: IbvQpCap,
    /// One of `QPT_*`.
    pub qp_type: c_uint,
    /// Whether every request completes.
    pub sq_sig_all: c_int,
}

/// `struct ibv_global_route`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
pub struct IbvGlobalRoute {
    /// The peer's GID, in network byte order.
    pub dgid: [u8; 16],
    /// 0 leaves it to the device.
    pub flow_label: u32,
    /// Our GID's place in the port's table.
    pub sgid_index: u8,
    /// Routers on the way.
    pub hop_limit: u8,
    /// DSCP and ECN bits.
    pub traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvAhAttr {
    /// Beyond the subnet, and on Ethernet always.
    pub grh: IbvGlobalRoute,
    /// The peer's local identifier; 0 on Ethernet.
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Low bits of our own local identifier.
    pub src_path_bits: u8,
    /// 0 for none.
    pub static_rate: u8,
    /// Whether `grh` counts.
    pub is_global: u8,
    /// Our port.
    pub port_num: u8,
}

/// `struct ibv_qp_attr`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvQpAttr {
    /// One of `QPS_*`.
    pub qp_state: c_uint,
    /// Not used.
    pub cur_qp_state: c_uint,
    /// 1 to 5: 256 to 4,096 bytes.
    pub path_mtu: c_uint,
    /// Not used.
    pub path_mig_state: c_uint,
    /// Not used.
    pub qkey: u32,
    /// The first packet number that the peer sends.
    pub rq_psn: u32,
    /// The first packet number that we send.
    pub sq_psn: u32,
    /// The peer's queue pair.
    pub dest_qp_num: u32,
    /// What the peer may do.
    pub qp_access_flags: c_uint,
    /// Not used.
    pub cap: IbvQpCap,
    /// The way to the peer.
    pub ah_attr: IbvAhAttr,
    /// Not used.
    pub alt_ah_attr: IbvAhAttr,
    /// The partition key's place in the port's table.
    pub pkey_index: u16,
    /// Not used.
    pub alt_pkey_index: u16,
    /// Not used.
    pub en_sqd_async_notify: u8,
    /// Not used.
    pub sq_draining: u8,
    /// Reads under way; we make none.
    pub max_rd_atomic: u8,
    /// Likewise, of the peer's.
    pub max_dest_rd_atomic: u8,
    /// How long a peer without a receive is told to wait.
    pub min_rnr_timer: u8,
    /// Our port.
    pub port_num: u8,
    /// Time to an acknowledgement: 4.096 us times 2 to the power of this.
    pub timeout: u8,
    /// Tries after the first; 7 means for ever to some devices.
    pub retry_cnt: u8,
    /// Likewise where the peer has no receive posted.
    pub rnr_retry: u8,
    /// Not used.
    pub alt_port_num: u8,
    /// Not used.
    pub alt_timeout: u8,
    /// Not used.
    pub rate_limit: u32,
}

/// `struct ibv_device_attr`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IbvDeviceAttr {
    /// Firmware's version, a string.
    pub fw_ver: [c_char; 64],
    _guids_and_pages: [u64; 4],
    _vendor: [u32; 3],
    /// Queue pairs.
    pub max_qp: c_int,
    /// Requests of a queue.
    pub max_qp_wr: c_int,
    _flags_and_ranges: [u32; 3],
    /// Completion queues.
    pub max_cq: c_int,
    /// Completions of a queue.
    pub max_cqe: c_int,
    /// Registered regions.
    pub max_mr: c_int,
    _others: [u32; 21],
    _max_pkeys: u16,
    _local_ca_ack_delay: u8,
    /// Ports, counted from 1.
    pub phys_port_cnt: u8,
}

/// `struct ibv_port_attr`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IbvPortAttr {
    /// `PORT_ACTIVE` or another.
    pub state: c_uint,
    /// As `IbvQpAttr::path_mtu`.
    pub max_mtu: c_uint,
    /// Likewise, now.
    pub active_mtu: c_uint,
    /// GIDs of the port.
    pub gid_tbl_len: c_int,
    _port_cap_flags: u32,
    /// Longest message in bytes.
    pub max_msg_sz: u32,
    _counters: [u32; 2],
    _pkey_tbl_len: u16,
    /// Local identifier; 0 on Ethernet.
    pub lid: u16,
    _sm_lid: u16,
    _others: [u8; 8],
    /// One of `LINK_LAYER_*`.
    pub link_layer: u8,
    _flags: u8,
    _port_cap_flags2: u16,
}

/// `struct ibv_async_event`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IbvAsyncEvent {
    /// What it is about.
    pub element: IbvAsyncElement,
    /// One of `EVENT_*`.
    pub event_type: c_uint,
}

/// The union in `struct ibv_async_event`: which member is valid, the type says.
#[derive(Clone, Copy)]
#[repr(C)]
pub union IbvAsyncElement {
    /// Of events of a completion queue.
    pub cq: *mut IbvCq,
    /// Of events of a queue pair.
    pub qp: *mut IbvQp,
    /// Of events of a port.
    pub port_num: c_int,
}
