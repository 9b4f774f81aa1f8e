//! What a completion's status and a device's event mean here, in words.
//!
//! Invariant: every text names the number, so that it can be looked up, and says what it means for the path.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::sys::verbs as v;

/// Why a request (or, if `is_receive`, a posted receive) completed without success. `patience` is how long the device tried.
pub(super) fn status(status: u32, vendor_error: u32, patience: Duration) -> String {
    let seconds = patience.as_secs_f64();
    let what = match status {
        v::WC_LOC_LEN_ERR => "a message was longer than this device sends or than fits".to_string(),
        v::WC_LOC_QP_OP_ERR => "this device could not make sense of a request of ours".into(),
        v::WC_LOC_PROT_ERR => "a range of ours is not registered with this device".into(),
        v::WC_WR_FLUSH_ERR => {
            "the queue pair went to error: the peer sent what it may not, or our device failed".into()
        }
        v::WC_BAD_RESP_ERR => "the peer's device sent an answer that cannot be".into(),
        v::WC_LOC_ACCESS_ERR => "the peer wrote to memory of ours that it may not write".into(),
        v::WC_REM_INV_REQ_ERR => "the peer's device could not make sense of a request of ours".into(),
        v::WC_REM_ACCESS_ERR => {
            "remote access error: the key or the range that we wrote to is wrong, or was withdrawn by the peer".into()
        }
        v::WC_REM_OP_ERR => "the peer's device failed".into(),
        v::WC_RETRY_EXC_ERR => format!(
            "retries exceeded: the peer did not acknowledge for {seconds:.1} s or more; it has ended, or ended this path, or the \
             network between us is cut"
        ),
        v::WC_RNR_RETRY_EXC_ERR => "the peer had no receive posted for a note of ours after all tries".into(),
        v::WC_FATAL_ERR => "this device failed".into(),
        v::WC_RESP_TIMEOUT_ERR => format!("the peer's device did not answer for {seconds:.1} s or more"),
        v::WC_GENERAL_ERR => "the device gives no reason".into(),
        _ => "a failure that is not expected on this kind of queue pair".into(),
    };
    format!("{what} (completion status {status}, maker's code {vendor_error:#x})")
}

/// What a device's event says of a rail.
pub(super) fn event(kind: u32) -> String {
    let what = match kind {
        v::EVENT_CQ_ERR => "a completion queue overflowed",
        v::EVENT_QP_FATAL => "the queue pair failed",
        v::EVENT_QP_REQ_ERR => "the peer's device sent a request that makes no sense",
        v::EVENT_QP_ACCESS_ERR => "the peer wrote with a key or to a range that it may not use",
        v::EVENT_DEVICE_FATAL => "the device failed or was taken away",
        v::EVENT_PORT_ERR => "its port went down",
        _ => "something changed",
    };
    format!("{what} (event {kind})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_words_and_its_number() {
        let patience = Duration::from_millis(940);
        let mut seen = Vec::new();
        for number in [1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 19, 20, 21] {
            let text = status(number, 0x51, patience);
            assert!(text.contains(&format!("status {number},")) && text.contains("0x51"), "{text}");
            assert!(!text.contains("not expected"), "{text}");
            let words = text.split(" (").next().unwrap().to_string();
            assert!(!seen.contains(&words), "{words}");
            seen.push(words);
        }
        assert!(status(12, 0, patience).contains("0.9 s"));
        assert!(status(10, 0, patience).contains("key or the range"));
        assert!(status(3, 0, patience).contains("not expected"));
        assert!(event(v::EVENT_PORT_ERR).contains("went down"));
    }
}
