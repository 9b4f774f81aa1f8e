//! Arbitrary bytes at the rendezvous: cut into lines, each read as every message that may come there.
#![no_main]

use gradwire::session::decode_lines;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = decode_lines(data);
});
