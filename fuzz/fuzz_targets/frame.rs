//! Fuzzes the frame header's decoders, with both checksums made right, or zero where there are none, so that the fields behind them
//! are reached.
//!
//! Invariant: what decodes encodes to the same bytes.
#![no_main]

use gradwire::wire::FrameHeader;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: [u8; FrameHeader::SIZE]| {
    let _ = FrameHeader::decode(&input);
    let mut sealed = input;
    for (from, to) in [(0, 12), (16, 60)] {
        let checksum = crc32c(&sealed[from..to]);
        sealed[to..to + 4].copy_from_slice(&checksum.to_le_bytes());
    }
    if let Ok(header) = FrameHeader::decode(&sealed) {
        assert_eq!(header.encode(), sealed);
    }
    let _ = FrameHeader::decode_unsealed(&input);
    let mut unsealed = input;
    for checksum in [12..16, 60..64] {
        unsealed[checksum].fill(0);
    }
    let header = FrameHeader::decode_unsealed(&unsealed);
    if let Ok(header) = &header {
        assert_eq!(header.encode_unsealed(), unsealed);
    }
    // The checksums are all that they differ in.
    assert_eq!(header, FrameHeader::decode(&sealed));
});

/// CRC-32C, a bit at a time: the target shares no code with what it tests.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}
