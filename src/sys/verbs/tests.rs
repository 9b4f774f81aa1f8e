//! Finding the library.
//!
//! Invariant: no test needs libibverbs.

use super::*;

#[test]
fn a_library_that_is_not_there_or_is_another_is_told_by_name() {
    let error = Table::open("libibverbs-of-nowhere.so.1").err().unwrap();
    assert!(error.contains("libibverbs-of-nowhere.so.1 cannot be loaded") && error.contains("No such file"), "{error}");
    let error = Table::open("libc.so.6").err().unwrap();
    assert!(error.contains("libc.so.6 is not of rdma-core") && error.contains("ibv_get_device_list"), "{error}");
}
