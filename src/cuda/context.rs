//! A device's primary context, held.
//!
//! Invariant: the context stays retained as long as a clone lives, and whatever is made in it holds one; calls make it current
//! on their thread first.

use std::sync::Arc;

use super::{
    DeviceInfo,
    device::{self, devices},
    driver::{Driver, driver},
};
use crate::{
    Error, Result,
    sys::cuda::{self, Handle, Status, Table},
};

/// Compute capability that our kernels need (Volta).
const CAPABILITY_MIN: (u32, u32) = (7, 0);

/// The use of one device by this process.
#[derive(Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

struct Inner {
    driver: &'static Driver,
    raw: Handle,
    info: DeviceInfo,
}

// SAFETY: a context belongs to the process; the driver locks what threads share, and `raw` is only ever handed to it.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing is written after `open`.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "context of {}", self.inner.info)
    }
}

impl Context {
    /// Opens device number `ordinal`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is no driver, no such device, or one that is too old; [`Error::Gpu`] if the driver refuses.
    pub fn open(ordinal: u32) -> Result<Context> {
        let known = devices()?;
        let Some(info) = known.iter().find(|info| info.ordinal == ordinal).cloned() else {
            let names: Vec<String> = known.iter().map(DeviceInfo::to_string).collect();
            return Err(Error::Config(format!("there is no GPU {ordinal} here; there are: {}", names.join(", "))));
        };
        if info.capability < CAPABILITY_MIN {
            let (major, minor) = info.capability;
            return Err(Error::Config(format!(
                "{info} has compute capability {major}.{minor}; gradwire's kernels need 7.0 (Volta) or later"
            )));
        }
        let driver = driver()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        let status = unsafe { (driver.table.primary_ctx_retain)(&raw mut raw, device::handle(driver, ordinal)?) };
        driver.check("cuDevicePrimaryCtxRetain", || info.to_string(), status)?;
        Ok(Context { inner: Arc::new(Inner { driver, raw, info }) })
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        &self.inner.info
    }

    /// Bytes of its memory that nobody has.
    pub fn free_bytes(&self) -> Result<u64> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: places for both numbers; the context is current.
        self.call("cuMemGetInfo_v2", |table| unsafe { (table.mem_get_info)(&raw mut free, &raw mut total) })?;
        Ok(free as u64)
    }

    /// Whether what a NIC has written into the device must be flushed before a kernel may read it.
    pub fn needs_flush(&self) -> Result<bool> {
        let ordinal = self.inner.info.ordinal;
        let ask = |attribute| device::attribute_of(self.inner.driver, ordinal, attribute);
        let ordered = ask(cuda::GPU_DIRECT_RDMA_WRITES_ORDERING)? >= cuda::WRITES_ORDERING_OWNER;
        Ok(!ordered && ask(cuda::GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS)? & cuda::FLUSH_OPTION_HOST != 0)
    }

    /// Waits until kernels launched from now on see all that NICs have written into the device. Needed where
    /// [`Context::needs_flush`] says so, once a batch of arrivals.
    pub fn flush_direct_writes(&self) -> Result<()> {
        const CALL: &str = "cuFlushGPUDirectRDMAWrites";
        let flush = self.driver().newer(CALL, self.driver().table.flush_gpu_direct_rdma_writes)?;
        // SAFETY: two numbers; the context is current.
        self.call(CALL, |_| unsafe { flush(cuda::FLUSH_TARGET_CURRENT_CONTEXT, cuda::FLUSH_TO_OWNER) })
    }

    /// One call with this context current; an error names it and the device.
    pub(super) fn call(&self, name: &'static str, call: impl FnOnce(&Table) -> Status) -> Result<()> {
        let status = self.attempt(call)?;
        self.inner.driver.check(name, || self.inner.info.to_string(), status)
    }

    /// The same for a call whose status says more than success or failure.
    pub(super) fn attempt(&self, call: impl FnOnce(&Table) -> Status) -> Result<Status> {
        let Inner { driver, raw, info } = &*self.inner;
        // SAFETY: the context is retained as long as `self`.
        let status = unsafe { (driver.table.ctx_set_current)(*raw) };
        driver.check("cuCtxSetCurrent", || info.to_string(), status)?;
        Ok(call(&driver.table))
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.inner.driver
    }

    /// For a `Drop`: what could not be ended is said and left to the end of the process.
    pub(super) fn end(&self, name: &'static str, call: impl FnOnce(&Table) -> Status) {
        if let Err(error) = self.call(name, call) {
            tracing::debug!("{error}");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Ok(device) = device::handle(self.driver, self.info.ordinal) else { return };
        // SAFETY: retained once in `open`, released once here, after everything that was made in it.
        let status = unsafe { (self.driver.table.primary_ctx_release)(device) };
        if let Err(error) = self.driver.check("cuDevicePrimaryCtxRelease_v2", || self.info.to_string(), status) {
            tracing::debug!("{error}");
        }
    }
}
