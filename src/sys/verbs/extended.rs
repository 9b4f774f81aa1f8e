//! What lies before `struct ibv_context` in memory: younger functions of the provider, as `struct verbs_context` ends. The calls
//! that C's header makes through it (`ibv_alloc_td` and its like) are inline there and no symbols.
//!
//! The structure grows at its front, so its end stays where it is; and it says how long the library made it.
//!
//! Invariant: a function is taken only from a context that is that long; `tests` compares places with the header.

use std::ffi::{c_int, c_void};

use super::{IbvContext, IbvPd};

/// `struct ibv_td`, opaque: a thread domain.
#[repr(C)]
pub struct IbvTd {
    _opaque: [u8; 0],
}

/// `struct ibv_td_init_attr`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct IbvTdInitAttr {
    /// Which members of later versions count: none.
    pub comp_mask: u32,
}

/// `struct ibv_parent_domain_init_attr`.
#[derive(Debug)]
#[repr(C)]
pub struct IbvParentDomainInitAttr {
    /// The protection domain.
    pub pd: *mut IbvPd,
    /// The thread domain.
    pub td: *mut IbvTd,
    /// Which of the members below count.
    pub comp_mask: u32,
    /// An allocator of the caller's own, and what it is handed.
    pub allocator: [*const c_void; 3],
}

/// The end of `struct verbs_context`, up to its `struct ibv_context`.
#[repr(C)]
pub struct VerbsExtension {
    /// A protection domain whose queue pairs share a thread domain; null and errno.
    pub alloc_parent_domain: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvParentDomainInitAttr) -> *mut IbvPd>,
    /// Ends a thread domain. 0 or an errno.
    pub dealloc_td: Option<unsafe extern "C" fn(*mut IbvTd) -> c_int>,
    /// A thread domain: its objects are used by one thread at a time; null and errno.
    pub alloc_td: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvTdInitAttr) -> *mut IbvTd>,
    /// Others; the last is no function.
    pub others: [*const c_void; 22],
    /// Bytes of the whole structure as the library has it, the context included.
    pub size: usize,
}

impl VerbsExtension {
    /// The extension of a context, if it has one of this length.
    ///
    /// # Safety
    ///
    /// The context is one that libibverbs has opened and not closed.
    pub unsafe fn of(context: *mut IbvContext) -> Option<*const VerbsExtension> {
        // SAFETY: the context is valid (our caller).
        if unsafe { (*context).abi_compat }.addr() != usize::MAX {
            return None;
        }
        // SAFETY: with this mark the context is the last member of a `struct verbs_context`, whose length stands right before it.
        let extension = unsafe { context.cast::<VerbsExtension>().sub(1) };
        // SAFETY: as above.
        let size = unsafe { (&raw const (*extension).size).read() };
        (size >= size_of::<VerbsExtension>() + size_of::<IbvContext>()).then_some(extension.cast_const())
    }
}
