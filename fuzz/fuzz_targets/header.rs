//! Arbitrary bytes as a safetensors file: a shard of a checkpoint, or a file of first values.
#![no_main]

use gradwire::checkpoint::decode_header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = decode_header(data);
    // With a length in front that fits, so that the description behind it is reached.
    let mut file = (data.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(data);
    let _ = decode_header(&file);
});
