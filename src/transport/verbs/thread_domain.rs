//! A thread domain: a promise to the device's provider that one thread at a time uses the queue pairs made in it, which then lock
//! nothing and have a doorbell of their own. Where the provider knows none, queue pairs are made in the plain protection domain.
//!
//! The promise is kept by the types: a transport's queue pairs are reached through `&mut` of it alone.
//!
//! Invariant: ended in the reverse order of the making: queue pairs, parent domain, thread domain, protection domain.

use std::{
    ffi::c_int,
    fmt, io,
    ptr::{self, NonNull},
};

use crate::sys::verbs::{IbvContext, IbvParentDomainInitAttr, IbvPd, IbvTd, IbvTdInitAttr, VerbsExtension};

/// A thread domain, and the parent domain that joins it to a protection domain.
pub(super) struct ThreadDomain {
    parent: NonNull<IbvPd>,
    thread: NonNull<IbvTd>,
    dealloc_td: unsafe extern "C" fn(*mut IbvTd) -> c_int,
    dealloc_pd: unsafe extern "C" fn(*mut IbvPd) -> c_int,
}

impl ThreadDomain {
    /// A thread domain for queue pairs of `pd`, or why there is none.
    ///
    /// # Safety
    ///
    /// Context and domain are open, and stay so until this is dropped; `dealloc_pd` is libibverbs' own.
    pub(super) unsafe fn new(
        context: *mut IbvContext,
        pd: NonNull<IbvPd>,
        dealloc_pd: unsafe extern "C" fn(*mut IbvPd) -> c_int,
    ) -> io::Result<ThreadDomain> {
        let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        // SAFETY: the context is open (our caller).
        let extension = unsafe { VerbsExtension::of(context) }.ok_or_else(unsupported)?;
        // SAFETY: it is as long as we believe, and lives as long as the context.
        let VerbsExtension { alloc_parent_domain, dealloc_td, alloc_td, .. } = unsafe { &*extension };
        let (Some(alloc_parent_domain), Some(dealloc_td), Some(alloc_td)) = (alloc_parent_domain, dealloc_td, alloc_td)
        else {
            return Err(unsupported());
        };
        // SAFETY: the function is the provider's, the context open, the structure ours; the result is checked.
        let thread = unsafe { alloc_td(context, &mut IbvTdInitAttr::default()) };
        let thread = NonNull::new(thread).ok_or_else(io::Error::last_os_error)?;
        let mut wanted =
            IbvParentDomainInitAttr { pd: pd.as_ptr(), td: thread.as_ptr(), comp_mask: 0, allocator: [ptr::null(); 3] };
        // SAFETY: as above, and the two domains are valid.
        let parent = unsafe { alloc_parent_domain(context, &mut wanted) };
        let Some(parent) = NonNull::new(parent) else {
            let error = io::Error::last_os_error();
            // SAFETY: ended once; nothing was made of it.
            unsafe { dealloc_td(thread.as_ptr()) };
            return Err(error);
        };
        Ok(ThreadDomain { parent, thread, dealloc_td: *dealloc_td, dealloc_pd })
    }

    /// In what queue pairs are made.
    pub(super) fn pd(&self) -> NonNull<IbvPd> {
        self.parent
    }
}

impl Drop for ThreadDomain {
    fn drop(&mut self) {
        // SAFETY: each is ended once, the one that uses the other first; the queue pairs, which keep the device alive, are gone,
        // and the protection domain is still there (`new`).
        let results = unsafe { [(self.dealloc_pd)(self.parent.as_ptr()), (self.dealloc_td)(self.thread.as_ptr())] };
        if results != [0, 0] {
            tracing::error!("ending a thread domain left something behind: {results:?}");
        }
    }
}

impl fmt::Debug for ThreadDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadDomain").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, mem::MaybeUninit};

    use nix::errno::Errno;

    use super::*;

    thread_local! {
        /// What the provider was asked, in order.
        static ASKED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    }

    fn asked(what: String) {
        ASKED.with_borrow_mut(|asked| asked.push(what));
    }

    const PD: usize = 0x1000;
    const TD: usize = 0x2000;
    const PARENT: usize = 0x3000;

    unsafe extern "C" fn alloc_td(_: *mut IbvContext, _: *mut IbvTdInitAttr) -> *mut IbvTd {
        asked("alloc_td".into());
        ptr::without_provenance_mut(TD)
    }

    unsafe extern "C" fn no_td(_: *mut IbvContext, _: *mut IbvTdInitAttr) -> *mut IbvTd {
        asked("alloc_td".into());
        Errno::EOPNOTSUPP.set();
        ptr::null_mut()
    }

    unsafe extern "C" fn dealloc_td(td: *mut IbvTd) -> c_int {
        asked(format!("dealloc_td {:#x}", td.addr()));
        0
    }

    unsafe extern "C" fn alloc_parent(_: *mut IbvContext, wanted: *mut IbvParentDomainInitAttr) -> *mut IbvPd {
        // SAFETY: the structure that `new` hands in.
        let IbvParentDomainInitAttr { pd, td, comp_mask, .. } = unsafe { &*wanted };
        asked(format!("alloc_parent {:#x} {:#x} {comp_mask}", pd.addr(), td.addr()));
        ptr::without_provenance_mut(PARENT)
    }

    unsafe extern "C" fn no_parent(_: *mut IbvContext, _: *mut IbvParentDomainInitAttr) -> *mut IbvPd {
        asked("alloc_parent".into());
        Errno::ENOMEM.set();
        ptr::null_mut()
    }

    unsafe extern "C" fn dealloc_pd(pd: *mut IbvPd) -> c_int {
        asked(format!("dealloc_pd {:#x}", pd.addr()));
        0
    }

    #[repr(C)]
    struct Opened {
        extension: VerbsExtension,
        context: MaybeUninit<IbvContext>,
    }

    fn opened() -> Box<Opened> {
        let extension = VerbsExtension {
            alloc_parent_domain: Some(alloc_parent),
            dealloc_td: Some(dealloc_td),
            alloc_td: Some(alloc_td),
            others: [ptr::null(); 22],
            size: size_of::<VerbsExtension>() + size_of::<IbvContext>(),
        };
        let mut opened = Box::new(Opened { extension, context: MaybeUninit::zeroed() });
        mark(&mut opened, usize::MAX);
        opened
    }

    fn mark(opened: &mut Opened, mark: usize) {
        // SAFETY: within the structure's own bytes.
        unsafe { (&raw mut (*opened.context.as_mut_ptr()).abi_compat).write(ptr::without_provenance_mut(mark)) };
    }

    /// What becomes of a thread domain on such a context, and what the provider was asked until it was dropped.
    fn try_on(opened: &mut Opened) -> (Result<usize, Option<i32>>, Vec<String>) {
        let context = (&raw mut *opened).wrapping_byte_add(std::mem::offset_of!(Opened, context)).cast();
        let pd = NonNull::new(ptr::without_provenance_mut(PD)).unwrap();
        // SAFETY: the functions are this test's and look at nothing but numbers; the marks of the context are set.
        let made = unsafe { ThreadDomain::new(context, pd, dealloc_pd) };
        let result = made.as_ref().map(|domain| domain.pd().as_ptr().addr()).map_err(|error| error.raw_os_error());
        drop(made);
        (result, ASKED.take())
    }

    #[test]
    fn what_is_made_last_is_ended_first() {
        let (result, asked) = try_on(&mut opened());
        assert_eq!(result, Ok(PARENT));
        assert_eq!(asked, ["alloc_td", "alloc_parent 0x1000 0x2000 0", "dealloc_pd 0x3000", "dealloc_td 0x2000"]);
    }

    #[test]
    fn a_provider_without_them_is_left_as_it_was() {
        let unsupported = (Err(Some(libc::EOPNOTSUPP)), Vec::<String>::new());
        let mut old = opened();
        mark(&mut old, 0);
        assert_eq!(try_on(&mut old), unsupported);
        let mut short = opened();
        short.extension.size -= 1;
        assert_eq!(try_on(&mut short), unsupported);
        let mut empty = opened();
        empty.extension.alloc_parent_domain = None;
        assert_eq!(try_on(&mut empty), unsupported);
        let mut refusing = opened();
        refusing.extension.alloc_td = Some(no_td);
        assert_eq!(try_on(&mut refusing), (unsupported.0, vec!["alloc_td".into()]));
        let mut without_memory = opened();
        without_memory.extension.alloc_parent_domain = Some(no_parent);
        let (result, asked) = try_on(&mut without_memory);
        assert_eq!(result, Err(Some(libc::ENOMEM)));
        assert_eq!(asked, ["alloc_td", "alloc_parent", "dealloc_td 0x2000"]);
    }
}
