//! The table against the header: a C program, compiled where there are a compiler and <infiniband/verbs.h>, prints every
//! offset, size and number that we believe, and the compiler itself compares the functions' types.
//!
//! Invariant: every structure and every function of the table stands here.

use std::mem::{offset_of, size_of};

use super::*;
use crate::sys::header;

#[test]
fn a_library_that_is_not_there_or_is_another_is_told_by_name() {
    let error = Table::open("libibverbs-of-nowhere.so.1").err().unwrap();
    assert!(error.contains("libibverbs-of-nowhere.so.1 cannot be loaded") && error.contains("No such file"), "{error}");
    let error = Table::open("libc.so.6").err().unwrap();
    assert!(error.contains("libc.so.6 is not of rdma-core") && error.contains("ibv_get_device_list"), "{error}");
}

/// C's types of the functions, in the order of the table.
const FUNCTIONS: &[(&str, &str)] = &[
    ("ibv_get_device_list", "struct ibv_device **(*)(int *)"),
    ("ibv_free_device_list", "void (*)(struct ibv_device **)"),
    ("ibv_get_device_name", "const char *(*)(struct ibv_device *)"),
    ("ibv_open_device", "struct ibv_context *(*)(struct ibv_device *)"),
    ("ibv_close_device", "int (*)(struct ibv_context *)"),
    ("ibv_query_device", "int (*)(struct ibv_context *, struct ibv_device_attr *)"),
    ("ibv_query_port", "int (*)(struct ibv_context *, uint8_t, struct _compat_ibv_port_attr *)"),
    ("ibv_alloc_pd", "struct ibv_pd *(*)(struct ibv_context *)"),
    ("ibv_dealloc_pd", "int (*)(struct ibv_pd *)"),
    ("ibv_reg_mr_iova2", "struct ibv_mr *(*)(struct ibv_pd *, void *, size_t, uint64_t, unsigned int)"),
    ("ibv_dereg_mr", "int (*)(struct ibv_mr *)"),
    ("ibv_create_comp_channel", "struct ibv_comp_channel *(*)(struct ibv_context *)"),
    ("ibv_destroy_comp_channel", "int (*)(struct ibv_comp_channel *)"),
    ("ibv_create_cq", "struct ibv_cq *(*)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int)"),
    ("ibv_destroy_cq", "int (*)(struct ibv_cq *)"),
    ("ibv_get_cq_event", "int (*)(struct ibv_comp_channel *, struct ibv_cq **, void **)"),
    ("ibv_ack_cq_events", "void (*)(struct ibv_cq *, unsigned int)"),
    ("ibv_create_qp", "struct ibv_qp *(*)(struct ibv_pd *, struct ibv_qp_init_attr *)"),
    ("ibv_modify_qp", "int (*)(struct ibv_qp *, struct ibv_qp_attr *, int)"),
    ("ibv_destroy_qp", "int (*)(struct ibv_qp *)"),
    ("ibv_get_async_event", "int (*)(struct ibv_context *, struct ibv_async_event *)"),
    ("ibv_ack_async_event", "void (*)(struct ibv_async_event *)"),
    // Members of the operations, as expressions.
    ("((struct ibv_context_ops *)0)->poll_cq", "int (**)(struct ibv_cq *, int, struct ibv_wc *)"),
    ("((struct ibv_context_ops *)0)->req_notify_cq", "int (**)(struct ibv_cq *, int)"),
    (
        "((struct ibv_context_ops *)0)->post_send",
        "int (**)(struct ibv_qp *, struct ibv_send_wr *, struct ibv_send_wr **)",
    ),
    (
        "((struct ibv_context_ops *)0)->post_recv",
        "int (**)(struct ibv_qp *, struct ibv_recv_wr *, struct ibv_recv_wr **)",
    ),
];

/// Every offset, size and number as C expressions, and what we believe them to be.
fn beliefs() -> Vec<(&'static str, i64)> {
    macro_rules! offsets {
        ($type:ty, $c_type:literal: $($field:ident $c_field:literal),* $(,)?) => {
            vec![$((concat!("offsetof(", $c_type, ", ", $c_field, ")"), offset_of!($type, $field) as i64)),*]
        };
    }
    let mut beliefs = offsets!(IbvContext, "struct ibv_context":
        device "device", ops "ops", cmd_fd "cmd_fd", async_fd "async_fd");
    beliefs.extend(offsets!(IbvContextOps, "struct ibv_context_ops":
        poll_cq "poll_cq", req_notify_cq "req_notify_cq", post_send "post_send", post_recv "post_recv"));
    beliefs.extend(offsets!(IbvMr, "struct ibv_mr":
        context "context", pd "pd", addr "addr", length "length", handle "handle", lkey "lkey", rkey "rkey"));
    beliefs.extend(offsets!(IbvCompChannel, "struct ibv_comp_channel": context "context", fd "fd"));
    beliefs.extend(offsets!(IbvCq, "struct ibv_cq":
        context "context", channel "channel", cq_context "cq_context", handle "handle", cqe "cqe"));
    beliefs.extend(offsets!(IbvQp, "struct ibv_qp":
        context "context", qp_context "qp_context", pd "pd", send_cq "send_cq", recv_cq "recv_cq", srq "srq",
        handle "handle", qp_num "qp_num"));
    beliefs.extend(offsets!(IbvSge, "struct ibv_sge": addr "addr", length "length", lkey "lkey"));
    beliefs.extend(offsets!(IbvSendWr, "struct ibv_send_wr":
        wr_id "wr_id", next "next", sg_list "sg_list", num_sge "num_sge", opcode "opcode", send_flags "send_flags",
        imm_data "imm_data", remote_addr "wr.rdma.remote_addr", rkey "wr.rdma.rkey"));
    beliefs.extend(offsets!(IbvRecvWr, "struct ibv_recv_wr":
        wr_id "wr_id", next "next", sg_list "sg_list", num_sge "num_sge"));
    beliefs.extend(offsets!(IbvWc, "struct ibv_wc":
        wr_id "wr_id", status "status", opcode "opcode", vendor_err "vendor_err", byte_len "byte_len",
        imm_data "imm_data", qp_num "qp_num", src_qp "src_qp", wc_flags "wc_flags", pkey_index "pkey_index",
        slid "slid", sl "sl", dlid_path_bits "dlid_path_bits"));
    beliefs.extend(offsets!(IbvQpCap, "struct ibv_qp_cap":
        max_send_wr "max_send_wr", max_recv_wr "max_recv_wr", max_send_sge "max_send_sge",
        max_recv_sge "max_recv_sge", max_inline_data "max_inline_data"));
    beliefs.extend(offsets!(IbvQpInitAttr, "struct ibv_qp_init_attr":
        qp_context "qp_context", send_cq "send_cq", recv_cq "recv_cq", srq "srq", cap "cap", qp_type "qp_type",
        sq_sig_all "sq_sig_all"));
    beliefs.extend(offsets!(IbvGlobalRoute, "struct ibv_global_route":
        dgid "dgid", flow_label "flow_label", sgid_index "sgid_index", hop_limit "hop_limit",
        traffic_class "traffic_class"));
    beliefs.extend(offsets!(IbvAhAttr, "struct ibv_ah_attr":
        grh "grh", dlid "dlid", sl "sl", src_path_bits "src_path_bits", static_rate "static_rate",
        is_global "is_global", port_num "port_num"));
    beliefs.extend(offsets!(IbvQpAttr, "struct ibv_qp_attr":
        qp_state "qp_state", cur_qp_state "cur_qp_state", path_mtu "path_mtu", path_mig_state "path_mig_state",
        qkey "qkey", rq_psn "rq_psn", sq_psn "sq_psn", dest_qp_num "dest_qp_num", qp_access_flags "qp_access_flags",
        cap "cap", ah_attr "ah_attr", alt_ah_attr "alt_ah_attr", pkey_index "pkey_index",
        alt_pkey_index "alt_pkey_index", en_sqd_async_notify "en_sqd_async_notify", sq_draining "sq_draining",
        max_rd_atomic "max_rd_atomic", max_dest_rd_atomic "max_dest_rd_atomic", min_rnr_timer "min_rnr_timer",
        port_num "port_num", timeout "timeout", retry_cnt "retry_cnt", rnr_retry "rnr_retry",
        alt_port_num "alt_port_num", alt_timeout "alt_timeout", rate_limit "rate_limit"));
    beliefs.extend(offsets!(IbvDeviceAttr, "struct ibv_device_attr":
        fw_ver "fw_ver", max_qp "max_qp", max_qp_wr "max_qp_wr", max_cq "max_cq", max_cqe "max_cqe",
        max_mr "max_mr", phys_port_cnt "phys_port_cnt"));
    beliefs.extend(offsets!(IbvPortAttr, "struct ibv_port_attr":
        state "state", max_mtu "max_mtu", active_mtu "active_mtu", gid_tbl_len "gid_tbl_len",
        max_msg_sz "max_msg_sz", lid "lid", link_layer "link_layer"));
    beliefs.extend(offsets!(IbvAsyncEvent, "struct ibv_async_event": element "element", event_type "event_type"));
    beliefs.extend(sizes());
    beliefs.extend(CONSTANTS);
    beliefs
}

fn sizes() -> Vec<(&'static str, i64)> {
    macro_rules! sizes {
        ($($type:ty, $c_type:literal);* $(;)?) => {
            vec![$((concat!("sizeof(", $c_type, ")"), size_of::<$type>() as i64)),*]
        };
    }
    sizes!(
        IbvContextOps, "struct ibv_context_ops"; IbvSge, "struct ibv_sge"; IbvSendWr, "struct ibv_send_wr";
        IbvRecvWr, "struct ibv_recv_wr"; IbvWc, "struct ibv_wc"; IbvQpInitAttr, "struct ibv_qp_init_attr";
        IbvGlobalRoute, "struct ibv_global_route"; IbvAhAttr, "struct ibv_ah_attr"; IbvQpAttr, "struct ibv_qp_attr";
        IbvDeviceAttr, "struct ibv_device_attr"; IbvPortAttr, "struct ibv_port_attr";
        IbvAsyncEvent, "struct ibv_async_event"; IbvMr, "struct ibv_mr"; IbvQpCap, "struct ibv_qp_cap";
        c_uint, "enum ibv_wc_status"; c_uint, "enum ibv_event_type"; c_uint, "enum ibv_qp_state";
    )
}

#[test]
fn our_layout_is_that_of_the_header() {
    // A macro of the header hides the function of this name.
    let mut declarations = String::from("#undef ibv_query_port\n");
    for (function, c_type) in FUNCTIONS {
        declarations.push_str(&format!(
            "_Static_assert(__builtin_types_compatible_p(__typeof__(&{function}), {c_type}), \"{function}\");\n"
        ));
    }
    header::compare(&declarations, "infiniband/verbs.h", "libibverbs-dev", &beliefs());
}
