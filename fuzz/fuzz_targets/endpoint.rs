//! Fuzzes the parser of endpoint addresses.
//!
//! Invariant: what parses is written back to text that parses to the same.
#![no_main]

use gradwire::wire::{format_addresses, parse_addresses};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(addresses) = parse_addresses(text) {
        assert_eq!(parse_addresses(&format_addresses(&addresses)).expect("our own text"), addresses);
    }
});
