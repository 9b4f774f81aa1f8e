//! The functions of libibverbs that we call, found at run time, and the structures that they share with us.
//!
//! Why no binding from a registry: docs/decisions/0005-libibverbs-at-run-time.md. The calls of the data path (`ibv_post_send`,
//! `ibv_post_recv`, `ibv_poll_cq`, `ibv_req_notify_cq`) are inline in C and no symbols; here they are functions, as there.
//!
//! Invariant: types and numbers are those of <infiniband/verbs.h>, of which scripts/verbs-table has made `generated.rs`, for every
//! libibverbs.so.1 from rdma-core 28 on (the soname and the version of each symbol stand for one binary interface); the compiler
//! compares the type of each function of the table with the header's.

mod extended;
#[allow(missing_docs, non_camel_case_types, dead_code, clippy::undocumented_unsafe_blocks)]
mod generated;
mod names;

#[cfg(test)]
mod tests;

use std::{
    error::Error as _,
    ffi::{c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

pub use extended::*;
use libloading::Library;
pub use names::*;

/// The name under which distributions install libibverbs.
pub const SONAME: &str = "libibverbs.so.1";

/// Declares the table: a field per function, named as in C without its prefix, and the lookup of all of them. Those in
/// `may_lack` are younger than rdma-core 28.
macro_rules! table {
    (
        needs { $($(#[$doc:meta])* $name:ident = $symbol:ident: fn($($argument:ty),*) $(-> $result:ty)?;)* }
        may_lack {
            $($(#[$young_doc:meta])* $young:ident = $young_symbol:ident: fn($($young_argument:ty),*) -> $young_result:ty;)*
        }
    ) => {
        /// libibverbs' functions.
        pub struct Table {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $($(#[$young_doc])* pub $young: Option<unsafe extern "C" fn($($young_argument),*) -> $young_result>,)*
            /// Keeps the code mapped. A test's table has functions of its own.
            _library: Option<Library>,
        }

        // The header's types are ours. Constants that nobody uses leave no trace in the binary: nothing is linked by this.
        $(const _: unsafe extern "C" fn($($argument),*) $(-> $result)? = generated::$symbol;)*
        $(const _: unsafe extern "C" fn($($young_argument),*) -> $young_result = generated::$young_symbol;)*

        impl Table {
            fn look_up(library: Library) -> Result<Table, String> {
                $(
                    // SAFETY: the type is that of the symbol in <infiniband/verbs.h>, the same in every library of this soname
                    // (invariant of this file); the pointer is kept beside the library, so it never dangles.
                    let $name = unsafe {
                        *library.get::<unsafe extern "C" fn($($argument),*) $(-> $result)?>(stringify!($symbol))
                            .map_err(|error| format!("{} is missing: {}", stringify!($symbol), reason(&error)))?
                    };
                )*
                $(
                    // SAFETY: as above.
                    let $young = unsafe {
                        library.get::<unsafe extern "C" fn($($young_argument),*) -> $young_result>(stringify!($young_symbol))
                            .ok().map(|function| *function)
                    };
                )*
                Ok(Table { $($name,)* $($young,)* _library: Some(library) })
            }

            /// A table for tests to put functions of their own into: each that they leave ends the process.
            #[cfg(test)]
            pub fn of_stubs() -> Table {
                extern "C" fn unexpected() {
                    panic!("a function of libibverbs that the test did not expect");
                }
                Table {
                    // SAFETY: whatever its arguments, the function reads none of them and never returns.
                    $($name: unsafe {
                        std::mem::transmute::<extern "C" fn(), unsafe extern "C" fn($($argument),*) $(-> $result)?>(unexpected)
                    },)*
                    $($young: None,)*
                    _library: None,
                }
            }
        }
    };
}

table! {
    needs {
        /// The devices, null at the end; null and errno if there are none.
        get_device_list = ibv_get_device_list: fn(*mut c_int) -> *mut *mut IbvDevice;
        /// Gives the list back; devices that are open stay.
        free_device_list = ibv_free_device_list: fn(*mut *mut IbvDevice);
        /// A device's name.
        get_device_name = ibv_get_device_name: fn(*mut IbvDevice) -> *const c_char;
        /// Opens a device; null and errno.
        open_device = ibv_open_device: fn(*mut IbvDevice) -> *mut IbvContext;
        /// Closes it. 0 or -1.
        close_device = ibv_close_device: fn(*mut IbvContext) -> c_int;
        /// What the device can. 0 or an errno.
        query_device = ibv_query_device: fn(*mut IbvContext, *mut IbvDeviceAttr) -> c_int;
        /// How a port is, but for the last two bytes of the structure. 0 or an errno.
        query_port = ibv_query_port: fn(*mut IbvContext, u8, *mut IbvCompatPortAttr) -> c_int;
        /// A protection domain; null and errno.
        alloc_pd = ibv_alloc_pd: fn(*mut IbvContext) -> *mut IbvPd;
        /// Ends it. 0 or an errno.
        dealloc_pd = ibv_dealloc_pd: fn(*mut IbvPd) -> c_int;
        /// Registers memory (first byte, bytes, the address that requests give to its first byte, access); null and errno. Leaves
        /// optional kinds of access out where the kernel does not know them.
        reg_mr_iova2 = ibv_reg_mr_iova2: fn(*mut IbvPd, *mut c_void, usize, u64, c_uint) -> *mut IbvMr;
        /// Ends a registration. 0 or an errno.
        dereg_mr = ibv_dereg_mr: fn(*mut IbvMr) -> c_int;
        /// A channel for completion events; null and errno.
        create_comp_channel = ibv_create_comp_channel: fn(*mut IbvContext) -> *mut IbvCompChannel;
        /// Ends it. 0 or an errno.
        destroy_comp_channel = ibv_destroy_comp_channel: fn(*mut IbvCompChannel) -> c_int;
        /// A completion queue (size, ours, channel, interrupt vector); null and errno.
        create_cq = ibv_create_cq: fn(*mut IbvContext, c_int, *mut c_void, *mut IbvCompChannel, c_int) -> *mut IbvCq;
        /// Ends it, once all its events are acknowledged. 0 or an errno.
        destroy_cq = ibv_destroy_cq: fn(*mut IbvCq) -> c_int;
        /// Takes one event out of a channel. 0, or -1 and errno.
        get_cq_event = ibv_get_cq_event: fn(*mut IbvCompChannel, *mut *mut IbvCq, *mut *mut c_void) -> c_int;
        /// Acknowledges events of a completion queue.
        ack_cq_events = ibv_ack_cq_events: fn(*mut IbvCq, c_uint);
        /// A queue pair; null and errno.
        create_qp = ibv_create_qp: fn(*mut IbvPd, *mut IbvQpInitAttr) -> *mut IbvQp;
        /// Changes it; the last argument says which attributes count. 0 or an errno.
        modify_qp = ibv_modify_qp: fn(*mut IbvQp, *mut IbvQpAttr, c_int) -> c_int;
        /// Ends it, once all its events are acknowledged: the device touches nothing for it any more. 0 or an errno.
        destroy_qp = ibv_destroy_qp: fn(*mut IbvQp) -> c_int;
        /// Takes one asynchronous event. 0, or -1 and errno.
        get_async_event = ibv_get_async_event: fn(*mut IbvContext, *mut IbvAsyncEvent) -> c_int;
        /// Acknowledges it.
        ack_async_event = ibv_ack_async_event: fn(*mut IbvAsyncEvent);
    }
    may_lack {
        /// Registers memory of a device (first byte in the dma-buf, bytes, the address that requests give to its first byte, the
        /// dma-buf, access); null and errno. Since rdma-core 34.
        reg_dmabuf_mr = ibv_reg_dmabuf_mr: fn(*mut IbvPd, u64, usize, u64, c_int, c_int) -> *mut IbvMr;
    }
}

/// What libibverbs puts into every context, also where the provider has nothing of its own.
const FILLED: &str = "libibverbs fills in all operations of a context";

/// Hands in a list of requests; the last argument is set to the first that was not taken. 0 or an errno.
///
/// # Safety
///
/// The queue pair is valid, the list well-formed and not changed by anybody during the call, and what it names valid until it
/// has completed.
pub unsafe fn post_send(pair: *mut IbvQp, list: *mut IbvSendWr, refused: *mut *mut IbvSendWr) -> c_int {
    // SAFETY: a valid pair has a valid context, and the rest our caller promises.
    unsafe { (*(*pair).context).ops.post_send.expect(FILLED)(pair, list, refused) }
}

/// Hands in receives, likewise.
///
/// # Safety
///
/// As of [`post_send`].
pub unsafe fn post_recv(pair: *mut IbvQp, list: *mut IbvRecvWr, refused: *mut *mut IbvRecvWr) -> c_int {
    // SAFETY: as in `post_send`.
    unsafe { (*(*pair).context).ops.post_recv.expect(FILLED)(pair, list, refused) }
}

/// Takes up to `count` completions out of a queue: their number, or negative.
///
/// # Safety
///
/// The queue is valid, and there is room for so many.
pub unsafe fn poll_cq(queue: *mut IbvCq, count: c_int, completions: *mut IbvWc) -> c_int {
    // SAFETY: a valid queue has a valid context, and the rest our caller promises.
    unsafe { (*(*queue).context).ops.poll_cq.expect(FILLED)(queue, count, completions) }
}

/// Asks for an event at the next completion (`only_solicited` 0: at any). 0 or an errno.
///
/// # Safety
///
/// The queue is valid.
pub unsafe fn req_notify_cq(queue: *mut IbvCq, only_solicited: c_int) -> c_int {
    // SAFETY: as in `poll_cq`.
    unsafe { (*(*queue).context).ops.req_notify_cq.expect(FILLED)(queue, only_solicited) }
}

impl IbvWc {
    /// The 32 bits that came with the completion, in network byte order.
    pub fn imm_data(&self) -> u32 {
        // SAFETY: all members of the union are 32 bits.
        unsafe { self.__bindgen_anon_1.imm_data }
    }
}

impl Table {
    /// Loads the library of that name, or says in words why not.
    pub fn open(name: &str) -> Result<Table, String> {
        // SAFETY: loading runs the library's initialisers. Under the name given that is the distribution's libibverbs, which is
        // trusted like every library that the dynamic linker would have loaded for us; it is never unloaded before exit by
        // `table`, and where a test drops it, no pointer of it is left.
        let library =
            unsafe { Library::new(name) }.map_err(|error| format!("{name} cannot be loaded: {}", reason(&error)))?;
        Table::look_up(library).map_err(|error| format!("{name} is not of rdma-core 28 or later: {error}"))
    }
}

/// What the dynamic linker said; the error itself says only which of its functions was called.
fn reason(error: &libloading::Error) -> String {
    error.source().unwrap_or(error).to_string()
}

/// libibverbs, loaded at the first call and for good; or why there is none, and what to install.
pub fn table() -> Result<&'static Table, &'static str> {
    static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
    let load = || {
        Table::open(SONAME).map_err(|error| {
            format!("{error} (`apt-get install libibverbs1 ibverbs-providers` or `dnf install libibverbs`)")
        })
    };
    TABLE.get_or_init(load).as_ref().map_err(String::as_str)
}
