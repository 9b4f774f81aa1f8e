//! What the library knows: one state behind one lock, and the wrapper that every call goes through.
//!
//! Invariant: no panic crosses into the caller; an injected failure happens before the call has done anything.

use std::{
    cell::Cell,
    collections::HashMap,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use gradwire_ptx::{Function, Memory, Module};

use crate::{streams::Stream, virtual_memory::Physical};

/// `CUresult`.
pub(crate) type Status = u32;

/// The results that this library gives by itself, with their names and words as the driver has them.
pub(crate) const STATUS: [(Status, &std::ffi::CStr, &std::ffi::CStr); 14] = [
    (0, c"CUDA_SUCCESS", c"no error"),
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"CUDA_ERROR_NOT_READY", c"device not ready"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
];

pub(crate) const INVALID_VALUE: Status = 1;
pub(crate) const OUT_OF_MEMORY: Status = 2;
pub(crate) const NOT_INITIALIZED: Status = 3;
pub(crate) const NO_DEVICE: Status = 100;
pub(crate) const INVALID_DEVICE: Status = 101;
pub(crate) const INVALID_CONTEXT: Status = 201;
pub(crate) const INVALID_PTX: Status = 218;
pub(crate) const INVALID_HANDLE: Status = 400;
pub(crate) const NOT_FOUND: Status = 500;
pub(crate) const NOT_READY: Status = 600;
pub(crate) const ILLEGAL_ADDRESS: Status = 700;
pub(crate) const NOT_SUPPORTED: Status = 801;
pub(crate) const LAUNCH_FAILED: Status = 719;

/// One card: its memory, its only context, what was put on it.
#[derive(Default)]
pub(crate) struct Device {
    pub(crate) memory: Memory,
    /// How often the primary context is held.
    pub(crate) held: u32,
    /// What a kernel did to the context; every later call returns it.
    pub(crate) poison: Status,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) is_ready: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) modules: HashMap<usize, Module>,
    pub(crate) functions: HashMap<usize, Arc<Function>>,
    /// By handle; handle 0 is each device's default stream, kept under `usize::MAX - device`.
    pub(crate) streams: HashMap<usize, Stream>,
    /// The stream and the position on it after which an event has happened; `None` before it is recorded.
    pub(crate) events: HashMap<usize, Option<(usize, u64)>>,
    /// Page-locked host memory that the card gave, by address.
    pub(crate) pinned: HashMap<usize, Box<[u128]>>,
    /// Page-locked host memory of the caller: bytes by address.
    pub(crate) registered: HashMap<usize, usize>,
    /// Physical memory of the card, by handle.
    pub(crate) physical: HashMap<u64, Physical>,
    /// Mapped addresses: their handle.
    pub(crate) mapped: HashMap<u64, u64>,
    pub(crate) launches: u64,
    next_handle: usize,
    calls: HashMap<&'static str, u64>,
}

impl State {
    pub(crate) fn handle(&mut self) -> usize {
        self.next_handle += 16;
        0x50F7_0000 + self.next_handle
    }

    /// Whether the environment wants this call of this name to fail; one with a `!` takes the context with it.
    fn injected(&mut self, name: &'static str) -> Option<Status> {
        let count = self.calls.entry(name).or_default();
        *count += 1;
        let wanted = format!("{name}:{count}=");
        let failures = std::env::var("SOFTCUDA_FAIL").ok()?;
        let code = failures.split(',').find_map(|failure| failure.trim().strip_prefix(&wanted))?;
        let status = code.trim_end_matches('!').parse().ok()?;
        if code.ends_with('!')
            && let Some(device) = CURRENT.get().and_then(|device| self.devices.get_mut(device))
        {
            device.poison = status;
        }
        Some(status)
    }

    /// Whether these bytes of the host are page-locked.
    pub(crate) fn is_pinned(&self, start: usize, bytes: usize) -> bool {
        let holds = |at: usize, len: usize| at <= start && start + bytes <= at + len;
        self.registered.iter().any(|(at, len)| holds(*at, *len))
            || self.pinned.iter().any(|(at, memory)| holds(*at, memory.len() * 16))
    }

    /// The card whose context is current on this thread.
    pub(crate) fn current(&mut self) -> Result<usize, Status> {
        let device = CURRENT.get().ok_or(INVALID_CONTEXT)?;
        match self.devices.get(device) {
            None => Err(INVALID_CONTEXT),
            Some(Device { held: 0, .. }) => Err(INVALID_CONTEXT),
            Some(Device { poison: 0, .. }) => Ok(device),
            Some(Device { poison, .. }) => Err(*poison),
        }
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

thread_local! {
    /// The device of the context that is current on this thread.
    pub(crate) static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Adds a line to the log, if there is one: in one write, so that processes do not cut each other's lines.
pub(crate) fn log(line: &str) {
    let Ok(path) = std::env::var("SOFTCUDA_LOG") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Err(error) = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())) {
        eprintln!("soft CUDA: SOFTCUDA_LOG: {error}");
    }
}

/// A number from the environment.
pub(crate) fn setting(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Runs the body of the call `name`.
pub(crate) fn call(name: &'static str, body: impl FnOnce(&mut State) -> Result<(), Status>) -> Status {
    let run = || {
        let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = state.injected(name) {
            return status;
        }
        if !state.is_ready && name != "cuInit" {
            return NOT_INITIALIZED;
        }
        body(&mut state).err().unwrap_or(0)
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(LAUNCH_FAILED)
}

/// Writes a result where the caller wants it.
///
/// # Safety
///
/// `to` is null or valid for writing a `T`.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Status> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: not null, and valid by the caller's word.
    unsafe { to.write(value) };
    Ok(())
}
