//! The header's structures and numbers by the names that they have here: without C's prefix, which the module's name stands for.
//!
//! Invariant: nothing is declared here.
#![forbid(unsafe_code)]

pub use super::generated::{
    _compat_ibv_port_attr as IbvCompatPortAttr, IBV_ACCESS_LOCAL_WRITE as ACCESS_LOCAL_WRITE,
    IBV_ACCESS_RELAXED_ORDERING as ACCESS_RELAXED_ORDERING, IBV_ACCESS_REMOTE_WRITE as ACCESS_REMOTE_WRITE,
    IBV_EVENT_CQ_ERR as EVENT_CQ_ERR, IBV_EVENT_DEVICE_FATAL as EVENT_DEVICE_FATAL,
    IBV_EVENT_PORT_ERR as EVENT_PORT_ERR, IBV_EVENT_QP_ACCESS_ERR as EVENT_QP_ACCESS_ERR,
    IBV_EVENT_QP_FATAL as EVENT_QP_FATAL, IBV_EVENT_QP_REQ_ERR as EVENT_QP_REQ_ERR, IBV_PORT_ACTIVE as PORT_ACTIVE,
    IBV_QP_ACCESS_FLAGS as QP_ACCESS_FLAGS, IBV_QP_AV as QP_AV, IBV_QP_DEST_QPN as QP_DEST_QPN,
    IBV_QP_MAX_DEST_RD_ATOMIC as QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC as QP_MAX_QP_RD_ATOMIC,
    IBV_QP_MIN_RNR_TIMER as QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU as QP_PATH_MTU, IBV_QP_PKEY_INDEX as QP_PKEY_INDEX,
    IBV_QP_PORT as QP_PORT, IBV_QP_RETRY_CNT as QP_RETRY_CNT, IBV_QP_RNR_RETRY as QP_RNR_RETRY,
    IBV_QP_RQ_PSN as QP_RQ_PSN, IBV_QP_SQ_PSN as QP_SQ_PSN, IBV_QP_STATE as QP_STATE, IBV_QP_TIMEOUT as QP_TIMEOUT,
    IBV_QPS_ERR as QPS_ERR, IBV_QPS_INIT as QPS_INIT, IBV_QPS_RESET as QPS_RESET, IBV_QPS_RTR as QPS_RTR,
    IBV_QPS_RTS as QPS_RTS, IBV_QPT_RC as QPT_RC, IBV_SEND_INLINE as SEND_INLINE, IBV_SEND_SIGNALED as SEND_SIGNALED,
    IBV_WC_BAD_RESP_ERR as WC_BAD_RESP_ERR, IBV_WC_FATAL_ERR as WC_FATAL_ERR, IBV_WC_GENERAL_ERR as WC_GENERAL_ERR,
    IBV_WC_LOC_ACCESS_ERR as WC_LOC_ACCESS_ERR, IBV_WC_LOC_LEN_ERR as WC_LOC_LEN_ERR,
    IBV_WC_LOC_PROT_ERR as WC_LOC_PROT_ERR, IBV_WC_LOC_QP_OP_ERR as WC_LOC_QP_OP_ERR,
    IBV_WC_RECV_RDMA_WITH_IMM as WC_RECV_RDMA_WITH_IMM, IBV_WC_REM_ACCESS_ERR as WC_REM_ACCESS_ERR,
    IBV_WC_REM_INV_REQ_ERR as WC_REM_INV_REQ_ERR, IBV_WC_REM_OP_ERR as WC_REM_OP_ERR,
    IBV_WC_RESP_TIMEOUT_ERR as WC_RESP_TIMEOUT_ERR, IBV_WC_RETRY_EXC_ERR as WC_RETRY_EXC_ERR,
    IBV_WC_RNR_RETRY_EXC_ERR as WC_RNR_RETRY_EXC_ERR, IBV_WC_WR_FLUSH_ERR as WC_WR_FLUSH_ERR,
    IBV_WR_RDMA_WRITE as WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM as WR_RDMA_WRITE_WITH_IMM, ibv_ah_attr as IbvAhAttr,
    ibv_async_event as IbvAsyncEvent, ibv_comp_channel as IbvCompChannel, ibv_context as IbvContext, ibv_cq as IbvCq,
    ibv_device as IbvDevice, ibv_device_attr as IbvDeviceAttr, ibv_gid as IbvGid, ibv_global_route as IbvGlobalRoute,
    ibv_mr as IbvMr, ibv_pd as IbvPd, ibv_port_attr as IbvPortAttr, ibv_qp as IbvQp, ibv_qp_attr as IbvQpAttr,
    ibv_qp_cap as IbvQpCap, ibv_qp_init_attr as IbvQpInitAttr, ibv_recv_wr as IbvRecvWr, ibv_send_wr as IbvSendWr,
    ibv_send_wr__bindgen_ty_1 as IbvSendData, ibv_send_wr__bindgen_ty_2 as IbvSendTarget,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_1 as IbvRdma, ibv_sge as IbvSge, ibv_wc as IbvWc,
};
