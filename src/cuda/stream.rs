//! Streams and events.
//!
//! Invariant: work on a stream is done in its order, and after the events that the stream was told to wait for.

use std::{ffi::c_void, os::fd::RawFd, ptr::NonNull};

use super::{Context, Function};
use crate::{
    Result,
    sys::cuda::{self, DeviceAddress, Handle},
};

/// A queue of work on a device.
pub struct Stream {
    context: Context,
    raw: Handle,
}

/// A point on a stream that can be waited for.
pub struct Event {
    context: Context,
    raw: Handle,
}

// SAFETY: streams belong to the process, the driver locks what threads share, and `raw` is only ever handed to it.
unsafe impl Send for Stream {}
// SAFETY: as for streams.
unsafe impl Send for Event {}

impl Stream {
    /// A stream that waits for no other unless it is told to.
    pub fn new(context: &Context) -> Result<Stream> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle; the context is current.
        let make = |table: &cuda::Table| unsafe { (table.stream_create)(&raw mut raw, cuda::STREAM_NON_BLOCKING) };
        context.call("cuStreamCreate", make)?;
        Ok(Stream { context: context.clone(), raw })
    }

    /// Puts a copy from the host on the stream.
    ///
    /// # Safety
    ///
    /// Until the stream has done it, `source` stays readable and unchanged for `len` bytes, and `target` is `len` bytes of live
    /// device memory that nothing else touches.
    pub unsafe fn copy_to_device(&self, target: DeviceAddress, source: NonNull<u8>, len: usize) -> Result<()> {
        let source = source.as_ptr().cast::<c_void>();
        // SAFETY: the caller's word.
        self.context
            .call("cuMemcpyHtoDAsync_v2", |table| unsafe { (table.memcpy_to_device)(target, source, len, self.raw) })
    }

    /// Puts a copy to the host on the stream.
    ///
    /// # Safety
    ///
    /// Until the stream has done it, `target` stays writable for `len` bytes and nobody touches them, and `source` is `len` bytes
    /// of live device memory that nothing else writes.
    pub unsafe fn copy_to_host(&self, target: NonNull<u8>, source: DeviceAddress, len: usize) -> Result<()> {
        let target = target.as_ptr().cast::<c_void>();
        // SAFETY: the caller's word.
        self.context
            .call("cuMemcpyDtoHAsync_v2", |table| unsafe { (table.memcpy_to_host)(target, source, len, self.raw) })
    }

    /// Puts a copy within the device on the stream.
    ///
    /// # Safety
    ///
    /// Until the stream has done it, both are `len` bytes of live device memory that do not overlap, of which nothing else writes
    /// the one or touches the other.
    pub unsafe fn copy_on_device(&self, target: DeviceAddress, source: DeviceAddress, len: usize) -> Result<()> {
        // SAFETY: the caller's word.
        self.context
            .call("cuMemcpyDtoDAsync_v2", |table| unsafe { (table.memcpy_on_device)(target, source, len, self.raw) })
    }

    /// Puts a fill on the stream.
    ///
    /// # Safety
    ///
    /// Until the stream has done it, `target` is `len` bytes of live device memory that nothing else touches.
    pub unsafe fn fill(&self, target: DeviceAddress, value: u8, len: usize) -> Result<()> {
        // SAFETY: the caller's word.
        self.context.call("cuMemsetD8Async", |table| unsafe { (table.memset)(target, value, len, self.raw) })
    }

    /// Launches one of our kernels: `grid` blocks of `block` threads, and the three parameters that each of them takes.
    ///
    /// # Safety
    ///
    /// The function is a kernel with the parameters (u64, u32, u32). Until the stream has done it, what it reaches through them
    /// is live memory that nothing else touches.
    pub unsafe fn launch(&self, function: &Function, grid: u32, block: u32, parameters: (u64, u32, u32)) -> Result<()> {
        let (mut table, mut segments, mut tiles) = parameters;
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut table).cast(), (&raw mut segments).cast(), (&raw mut tiles).cast()];
        let function = function.raw();
        // SAFETY: a pointer to each parameter, which the driver copies within the call; the rest is the caller's word.
        self.context.call("cuLaunchKernel", |driver| unsafe {
            let extra = std::ptr::null_mut();
            (driver.launch_kernel)(function, grid, 1, 1, block, 1, 1, 0, self.raw, arguments.as_mut_ptr(), extra)
        })
    }

    /// What is put on this stream from now on begins after `event`.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both handles are live.
        self.context.call("cuStreamWaitEvent", |table| unsafe { (table.stream_wait_event)(self.raw, event.raw, 0) })
    }

    /// The event happens when all that was put on the stream before is done.
    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both handles are live.
        self.context.call("cuEventRecord", |table| unsafe { (table.event_record)(event.raw, self.raw) })
    }

    /// Has a 1 written into an eventfd when all that was put on the stream before is done. A context that has failed writes none.
    ///
    /// # Safety
    ///
    /// The descriptor is an eventfd that stays open until the stream is done with all that was put on it.
    pub unsafe fn notify(&self, eventfd: RawFd) -> Result<()> {
        let data = std::ptr::without_provenance_mut::<c_void>(eventfd as usize);
        // SAFETY: the function takes the number for what it is, and may run on any thread.
        self.context.call("cuLaunchHostFunc", |table| unsafe { (table.launch_host_func)(self.raw, write_one, data) })
    }

    /// Waits for all that was put on the stream. Not for the data path.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is live.
        self.context.call("cuStreamSynchronize", |table| unsafe { (table.stream_synchronize)(self.raw) })
    }
}

/// Runs on a thread of the driver, where no call of the driver may be made.
unsafe extern "C" fn write_one(data: *mut c_void) {
    let one = 1u64;
    // SAFETY: eight readable bytes; `notify`'s caller keeps the eventfd open. It fails only when the counter is at its limit, and
    // then the sleeper has been woken often enough.
    unsafe { libc::write(data.addr() as RawFd, (&raw const one).cast(), size_of::<u64>()) };
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `new`, ended once.
        self.context.end("cuStreamDestroy_v2", |table| unsafe { (table.stream_destroy)(self.raw) });
    }
}

impl Event {
    /// An event that only says whether it has happened.
    pub fn new(context: &Context) -> Result<Event> {
        Event::with_flags(context, cuda::EVENT_DISABLE_TIMING)
    }

    /// An event that knows when it happened.
    pub fn timed(context: &Context) -> Result<Event> {
        Event::with_flags(context, cuda::EVENT_DEFAULT)
    }

    fn with_flags(context: &Context, flags: u32) -> Result<Event> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle; the context is current.
        context.call("cuEventCreate", |table| unsafe { (table.event_create)(&raw mut raw, flags) })?;
        Ok(Event { context: context.clone(), raw })
    }

    /// Whether it has happened.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Gpu`] if the context has failed: then it never will.
    pub fn has_happened(&self) -> Result<bool> {
        // SAFETY: the handle is live.
        let status = self.context.attempt(|table| unsafe { (table.event_query)(self.raw) })?;
        if status == cuda::NOT_READY {
            return Ok(false);
        }
        let named = || self.context.info().to_string();
        self.context.driver().check("cuEventQuery", named, status).map(|()| true)
    }

    /// Seconds from `earlier` to this one; both are [`Event::timed`] and have happened.
    pub fn seconds_since(&self, earlier: &Event) -> Result<f64> {
        let mut milliseconds = 0f32;
        // SAFETY: a place for the number; both handles are live.
        self.context.call("cuEventElapsedTime", |table| unsafe {
            (table.event_elapsed_time)(&raw mut milliseconds, earlier.raw, self.raw)
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `with_flags`, ended once.
        self.context.end("cuEventDestroy_v2", |table| unsafe { (table.event_destroy)(self.raw) });
    }
}
