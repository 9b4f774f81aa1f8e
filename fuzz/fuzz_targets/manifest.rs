//! Arbitrary bytes as a checkpoint's manifest, and the same with a right checksum, so that what lies behind it is reached.
#![no_main]

use gradwire::checkpoint::{decode_manifest, seal_manifest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = decode_manifest(data);
    let _ = decode_manifest(&seal_manifest(data));
});
