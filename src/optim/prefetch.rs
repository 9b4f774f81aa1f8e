//! Asking the processor for memory that will be needed soon.
//!
//! Invariant: nothing is read or written; an address beyond the slice is asked for or not, and never followed.

/// Bytes that a processor fetches at once.
const LINE: usize = 64;

/// Asks for `len` bytes that begin `offset` bytes into (or beyond) `bytes`. On architectures for which nothing is written here it
/// does nothing.
#[inline(always)]
pub fn run(bytes: &[u8], offset: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len).step_by(LINE) {
        let address = bytes.as_ptr().wrapping_add(offset + line);
        // SAFETY: a prefetch is a hint; it accesses nothing, whatever the address, and raises no fault.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, offset, len, LINE);
}
