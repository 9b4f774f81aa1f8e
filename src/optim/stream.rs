//! Stores past the cache, for bytes that nobody here reads soon.
//!
//! A store to a line that is not in the cache fetches the line first; this one does not. So a copy that is written and not read costs
//! half as much of the memory's time.
//!
//! Invariant: [`copy`] writes what `copy_from_slice` would, and what it wrote is seen by others after [`fence`] as any store is.

/// Copies `from` to `to`, which are equally long, past the cache as far as the addresses allow.
///
/// # Panics
///
/// If the lengths differ.
#[inline(always)]
pub(super) fn copy(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        const WORD: usize = size_of::<__m128i>();
        if to.as_ptr().addr().is_multiple_of(WORD) {
            assert_eq!(from.len(), to.len(), "a copy of another length");
            let (words, rest) = to.as_chunks_mut::<WORD>();
            let (theirs, their_rest) = from.as_chunks::<WORD>();
            for (to, from) in words.iter_mut().zip(theirs) {
                // SAFETY: both are 16 bytes; `to` is aligned, since the first is and each has as many bytes as the alignment.
                unsafe { _mm_stream_si128(to.as_mut_ptr().cast(), _mm_loadu_si128(from.as_ptr().cast())) };
            }
            rest.copy_from_slice(their_rest);
            return;
        }
    }
    to.copy_from_slice(from);
}

/// What was copied is seen by others before anything that is stored after this.
#[inline(always)]
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    std::arch::x86_64::_mm_sfence();
}
