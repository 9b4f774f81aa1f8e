//! PTX, compiled by the driver for the device that is there.
//!
//! Invariant: a function keeps its module loaded.

use std::{
    ffi::{CString, c_void},
    sync::Arc,
};

use super::Context;
use crate::{Error, Result, sys::cuda::Handle};

/// Kernels on a device.
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    raw: Handle,
}

/// One kernel.
pub struct Function {
    raw: Handle,
    _module: Arc<Inner>,
}

// SAFETY: modules belong to the process, the driver locks what threads share, and `raw` is only ever handed to it.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing is written after `load`.
unsafe impl Sync for Inner {}
// SAFETY: as for modules.
unsafe impl Send for Function {}

impl Module {
    /// Compiles `ptx`; the driver keeps what it has compiled in the user's cache.
    pub fn load(context: &Context, ptx: &str) -> Result<Module> {
        let text = CString::new(ptx).map_err(|_| Error::Config("the PTX holds a zero byte".into()))?;
        let mut raw = std::ptr::null_mut();
        let image = text.as_ptr().cast::<c_void>();
        // SAFETY: a place for the handle, and a text that ends with a zero byte, which is read within the call.
        context.call("cuModuleLoadData", |table| unsafe { (table.module_load_data)(&raw mut raw, image) })?;
        Ok(Module { inner: Arc::new(Inner { context: context.clone(), raw }) })
    }

    /// The kernel of that name.
    pub fn function(&self, name: &str) -> Result<Function> {
        let text = CString::new(name).map_err(|_| Error::Config(format!("no kernel is called {name:?}")))?;
        let mut raw = std::ptr::null_mut();
        let call = |table: &crate::sys::cuda::Table| {
            // SAFETY: a place for the handle, a live module, and a text that ends with a zero byte.
            unsafe { (table.module_get_function)(&raw mut raw, self.inner.raw, text.as_ptr()) }
        };
        self.inner.context.call("cuModuleGetFunction", call)?;
        Ok(Function { raw, _module: self.inner.clone() })
    }
}

impl Function {
    pub(super) fn raw(&self) -> Handle {
        self.raw
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`, unloaded once, when no function of it is left.
        self.context.end("cuModuleUnload", |table| unsafe { (table.module_unload)(self.raw) });
    }
}
