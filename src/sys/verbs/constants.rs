//! The numbers of <infiniband/verbs.h> that we use, under the licence that types.rs names.
//!
//! Invariant: each stands beside its C name, by which `tests` compares it with the header.

use std::ffi::{c_int, c_uint};

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr, $c_name:literal;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*

        /// Every number of this file as C names it, and what we believe it to be.
        #[cfg(test)]
        pub(super) const CONSTANTS: &[(&str, i64)] = &[$(($c_name, $name as i64)),*];
    };
}

constants! {
    /// A write.
    WR_RDMA_WRITE: c_uint = 0, "IBV_WR_RDMA_WRITE";
    /// A write that also completes a receive of the peer and gives it 32 bits.
    WR_RDMA_WRITE_WITH_IMM: c_uint = 1, "IBV_WR_RDMA_WRITE_WITH_IMM";
    /// The request completes.
    SEND_SIGNALED: c_uint = 2, "IBV_SEND_SIGNALED";
    /// The data are copied into the request.
    SEND_INLINE: c_uint = 8, "IBV_SEND_INLINE";
    /// We, or the device for the peer, may write.
    ACCESS_LOCAL_WRITE: c_uint = 1, "IBV_ACCESS_LOCAL_WRITE";
    /// The peer may write.
    ACCESS_REMOTE_WRITE: c_uint = 2, "IBV_ACCESS_REMOTE_WRITE";
    /// The writes of a message may reach memory in any order; all are there before its completion is.
    ACCESS_RELAXED_ORDERING: c_uint = 1 << 20, "IBV_ACCESS_RELAXED_ORDERING";
    /// Reliable, connected.
    QPT_RC: c_uint = 2, "IBV_QPT_RC";
    /// As created.
    QPS_RESET: c_uint = 0, "IBV_QPS_RESET";
    /// Takes receives.
    QPS_INIT: c_uint = 1, "IBV_QPS_INIT";
    /// Receives.
    QPS_RTR: c_uint = 2, "IBV_QPS_RTR";
    /// Receives and sends.
    QPS_RTS: c_uint = 3, "IBV_QPS_RTS";
    /// Does nothing any more.
    QPS_ERR: c_uint = 6, "IBV_QPS_ERR";
    /// `qp_state` counts.
    QP_STATE: c_int = 1, "IBV_QP_STATE";
    /// `qp_access_flags` counts.
    QP_ACCESS_FLAGS: c_int = 1 << 3, "IBV_QP_ACCESS_FLAGS";
    /// `pkey_index` counts.
    QP_PKEY_INDEX: c_int = 1 << 4, "IBV_QP_PKEY_INDEX";
    /// `port_num` counts.
    QP_PORT: c_int = 1 << 5, "IBV_QP_PORT";
    /// `ah_attr` counts.
    QP_AV: c_int = 1 << 7, "IBV_QP_AV";
    /// `path_mtu` counts.
    QP_PATH_MTU: c_int = 1 << 8, "IBV_QP_PATH_MTU";
    /// `timeout` counts.
    QP_TIMEOUT: c_int = 1 << 9, "IBV_QP_TIMEOUT";
    /// `retry_cnt` counts.
    QP_RETRY_CNT: c_int = 1 << 10, "IBV_QP_RETRY_CNT";
    /// `rnr_retry` counts.
    QP_RNR_RETRY: c_int = 1 << 11, "IBV_QP_RNR_RETRY";
    /// `rq_psn` counts.
    QP_RQ_PSN: c_int = 1 << 12, "IBV_QP_RQ_PSN";
    /// `max_rd_atomic` counts.
    QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13, "IBV_QP_MAX_QP_RD_ATOMIC";
    /// `min_rnr_timer` counts.
    QP_MIN_RNR_TIMER: c_int = 1 << 15, "IBV_QP_MIN_RNR_TIMER";
    /// `sq_psn` counts.
    QP_SQ_PSN: c_int = 1 << 16, "IBV_QP_SQ_PSN";
    /// `max_dest_rd_atomic` counts.
    QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17, "IBV_QP_MAX_DEST_RD_ATOMIC";
    /// `dest_qp_num` counts.
    QP_DEST_QPN: c_int = 1 << 20, "IBV_QP_DEST_QPN";
    /// The request is longer than its queue pair allows.
    WC_LOC_LEN_ERR: c_uint = 1, "IBV_WC_LOC_LEN_ERR";
    /// The request makes no sense to the queue pair.
    WC_LOC_QP_OP_ERR: c_uint = 2, "IBV_WC_LOC_QP_OP_ERR";
    /// Our own range is not registered.
    WC_LOC_PROT_ERR: c_uint = 4, "IBV_WC_LOC_PROT_ERR";
    /// The queue pair went to error before this had its turn.
    WC_WR_FLUSH_ERR: c_uint = 5, "IBV_WC_WR_FLUSH_ERR";
    /// An answer that cannot be.
    WC_BAD_RESP_ERR: c_uint = 7, "IBV_WC_BAD_RESP_ERR";
    /// A write by the peer met a region that does not allow it.
    WC_LOC_ACCESS_ERR: c_uint = 8, "IBV_WC_LOC_ACCESS_ERR";
    /// The peer's device could not make sense of the request.
    WC_REM_INV_REQ_ERR: c_uint = 9, "IBV_WC_REM_INV_REQ_ERR";
    /// The peer's device found the key or the range wrong.
    WC_REM_ACCESS_ERR: c_uint = 10, "IBV_WC_REM_ACCESS_ERR";
    /// The peer's device failed.
    WC_REM_OP_ERR: c_uint = 11, "IBV_WC_REM_OP_ERR";
    /// No acknowledgement after all tries.
    WC_RETRY_EXC_ERR: c_uint = 12, "IBV_WC_RETRY_EXC_ERR";
    /// No receive was posted there after all tries.
    WC_RNR_RETRY_EXC_ERR: c_uint = 13, "IBV_WC_RNR_RETRY_EXC_ERR";
    /// The device failed.
    WC_FATAL_ERR: c_uint = 19, "IBV_WC_FATAL_ERR";
    /// No answer in time.
    WC_RESP_TIMEOUT_ERR: c_uint = 20, "IBV_WC_RESP_TIMEOUT_ERR";
    /// Something else.
    WC_GENERAL_ERR: c_uint = 21, "IBV_WC_GENERAL_ERR";
    /// A peer's write with immediate has landed.
    WC_RECV_RDMA_WITH_IMM: c_uint = 129, "IBV_WC_RECV_RDMA_WITH_IMM";
    /// A completion queue overflowed.
    EVENT_CQ_ERR: c_uint = 0, "IBV_EVENT_CQ_ERR";
    /// A queue pair failed.
    EVENT_QP_FATAL: c_uint = 1, "IBV_EVENT_QP_FATAL";
    /// A peer's request makes no sense.
    EVENT_QP_REQ_ERR: c_uint = 2, "IBV_EVENT_QP_REQ_ERR";
    /// A peer's request may not do what it wants.
    EVENT_QP_ACCESS_ERR: c_uint = 3, "IBV_EVENT_QP_ACCESS_ERR";
    /// The device failed, or was taken away.
    EVENT_DEVICE_FATAL: c_uint = 8, "IBV_EVENT_DEVICE_FATAL";
    /// A port is down.
    EVENT_PORT_ERR: c_uint = 10, "IBV_EVENT_PORT_ERR";
}
