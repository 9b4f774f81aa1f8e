//! The functions of libibverbs that we call, found at run time, and the structures that they share with us.
//!
//! Why no binding from a registry: docs/decisions/0005-libibverbs-at-run-time.md. The calls of the data path (`ibv_post_send`,
//! `ibv_post_recv`, `ibv_poll_cq`, `ibv_req_notify_cq`) are inline in C and no symbols: they go through [`IbvContextOps`].
//!
//! Invariant: types and numbers here are those of <infiniband/verbs.h> for every libibverbs.so.1 from rdma-core 28 on (the
//! soname and the version of each symbol stand for one binary interface); `tests` compares them with the header where there is
//! one.

mod constants;
mod types;

#[cfg(test)]
mod tests;

use std::{
    error::Error as _,
    ffi::{c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

pub use constants::*;
use libloading::Library;
pub use types::*;

/// The name under which distributions install libibverbs.
pub const SONAME: &str = "libibverbs.so.1";

/// Declares the table: a field per function, named as in C without its prefix, and the lookup of all of them.
macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// libibverbs' functions.
        pub struct Table {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Keeps the code mapped.
            _library: Library,
        }

        impl Table {
            fn look_up(library: Library) -> Result<Table, String> {
                $(
                    // SAFETY: the type is that of the symbol in <infiniband/verbs.h>, the same in every library of this soname
                    // (invariant of this file); the pointer is kept beside the library, so it never dangles.
                    let $name = unsafe {
                        *library.get::<unsafe extern "C" fn($($argument),*) $(-> $result)?>($symbol)
                            .map_err(|error| format!("{:?} is missing: {}", $symbol, reason(&error)))?
                    };
                )*
                Ok(Table { $($name,)* _library: library })
            }
        }
    };
}

table! {
    /// The devices, null at the end; null and errno if there are none.
    get_device_list = c"ibv_get_device_list": fn(*mut c_int) -> *mut *mut IbvDevice;
    /// Gives the list back; devices that are open stay.
    free_device_list = c"ibv_free_device_list": fn(*mut *mut IbvDevice);
    /// A device's name.
    get_device_name = c"ibv_get_device_name": fn(*mut IbvDevice) -> *const c_char;
    /// Opens a device; null and errno.
    open_device = c"ibv_open_device": fn(*mut IbvDevice) -> *mut IbvContext;
    /// Closes it. 0 or -1.
    close_device = c"ibv_close_device": fn(*mut IbvContext) -> c_int;
    /// What the device can. 0 or an errno.
    query_device = c"ibv_query_device": fn(*mut IbvContext, *mut IbvDeviceAttr) -> c_int;
    /// How a port is, but for the last two bytes of the structure. 0 or an errno.
    query_port = c"ibv_query_port": fn(*mut IbvContext, u8, *mut IbvPortAttr) -> c_int;
    /// A protection domain; null and errno.
    alloc_pd = c"ibv_alloc_pd": fn(*mut IbvContext) -> *mut IbvPd;
    /// Ends it. 0 or an errno.
    dealloc_pd = c"ibv_dealloc_pd": fn(*mut IbvPd) -> c_int;
    /// Registers memory (first byte, bytes, the address that requests give to its first byte, access); null and errno. Leaves
    /// optional kinds of access out where the kernel does not know them.
    reg_mr_iova2 = c"ibv_reg_mr_iova2": fn(*mut IbvPd, *mut c_void, usize, u64, c_uint) -> *mut IbvMr;
    /// Ends a registration. 0 or an errno.
    dereg_mr = c"ibv_dereg_mr": fn(*mut IbvMr) -> c_int;
    /// A channel for completion events; null and errno.
    create_comp_channel = c"ibv_create_comp_channel": fn(*mut IbvContext) -> *mut IbvCompChannel;
    /// Ends it. 0 or an errno.
    destroy_comp_channel = c"ibv_destroy_comp_channel": fn(*mut IbvCompChannel) -> c_int;
    /// A completion queue (size, ours, channel, interrupt vector); null and errno.
    create_cq = c"ibv_create_cq": fn(*mut IbvContext, c_int, *mut c_void, *mut IbvCompChannel, c_int) -> *mut IbvCq;
    /// Ends it, once all its events are acknowledged. 0 or an errno.
    destroy_cq = c"ibv_destroy_cq": fn(*mut IbvCq) -> c_int;
    /// Takes one event out of a channel. 0, or -1 and errno.
    get_cq_event = c"ibv_get_cq_event": fn(*mut IbvCompChannel, *mut *mut IbvCq, *mut *mut c_void) -> c_int;
    /// Acknowledges events of a completion queue.
    ack_cq_events = c"ibv_ack_cq_events": fn(*mut IbvCq, c_uint);
    /// A queue pair; null and errno.
    create_qp = c"ibv_create_qp": fn(*mut IbvPd, *mut IbvQpInitAttr) -> *mut IbvQp;
    /// Changes it; the last argument says which attributes count. 0 or an errno.
    modify_qp = c"ibv_modify_qp": fn(*mut IbvQp, *mut IbvQpAttr, c_int) -> c_int;
    /// Ends it, once all its events are acknowledged: the device touches nothing for it any more. 0 or an errno.
    destroy_qp = c"ibv_destroy_qp": fn(*mut IbvQp) -> c_int;
    /// Takes one asynchronous event. 0, or -1 and errno.
    get_async_event = c"ibv_get_async_event": fn(*mut IbvContext, *mut IbvAsyncEvent) -> c_int;
    /// Acknowledges it.
    ack_async_event = c"ibv_ack_async_event": fn(*mut IbvAsyncEvent);
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
