//! Devices, contexts and the words for errors.
//!
//! Invariant: a device has one context, the primary one, whose handle is the device's number plus one.

use std::ffi::{c_char, c_int, c_uint};

use gradwire_ptx::Memory;

use crate::state::{
    CURRENT, Device, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, STATUS, Status, call, give, log,
    setting,
};

/// # Safety
///
/// None is needed: the call takes no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: c_uint) -> Status {
    call("cuInit", |state| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let count = setting("SOFTCUDA_DEVICES", 1);
        if count == 0 {
            return Err(NO_DEVICE);
        }
        if !state.is_ready {
            let bytes = setting("SOFTCUDA_MEMORY", 1 << 30);
            state.devices = (0..count).map(|_| Device { memory: Memory::new(bytes), ..Device::default() }).collect();
            state.is_ready = true;
        }
        Ok(())
    })
}

/// # Safety
///
/// `version` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller's word. Needs no cuInit, on a card either.
    unsafe { give(version, 12_090) }.err().unwrap_or(0)
}

/// # Safety
///
/// `count` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    // SAFETY: the caller's word.
    call("cuDeviceGetCount", |state| unsafe { give(count, state.devices.len() as c_int) })
}

/// # Safety
///
/// `device` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    call("cuDeviceGet", |state| {
        usize::try_from(ordinal).ok().filter(|index| *index < state.devices.len()).ok_or(INVALID_DEVICE)?;
        // SAFETY: the caller's word.
        unsafe { give(device, ordinal) }
    })
}

/// # Safety
///
/// `name` is valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    call("cuDeviceGetName", |state| {
        usize::try_from(device).ok().filter(|index| *index < state.devices.len()).ok_or(INVALID_DEVICE)?;
        let text = c"gradwire soft CUDA".to_bytes_with_nul();
        if name.is_null() || (len as usize) < text.len() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: `len` bytes may be written, and the text is not longer.
        unsafe { name.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
        Ok(())
    })
}

/// # Safety
///
/// `value` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) -> Status {
    call("cuDeviceGetAttribute", |state| {
        usize::try_from(device).ok().filter(|index| *index < state.devices.len()).ok_or(INVALID_DEVICE)?;
        // By the driver's numbers: warp size, multiprocessors, compute capability, memory that a NIC may be given, and that what
        // a NIC wrote must be flushed by a call; what is not listed is not there.
        let answer = match attribute {
            10 => 32,
            16 => 2,
            75 => 7,
            76 => 0,
            110 | 117 => 1,
            _ => 0,
        };
        // SAFETY: the caller's word.
        unsafe { give(value, answer) }
    })
}

/// # Safety
///
/// `id` is valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: c_int) -> Status {
    call("cuDeviceGetPCIBusId", |state| {
        usize::try_from(device).ok().filter(|index| *index < state.devices.len()).ok_or(INVALID_DEVICE)?;
        // A domain that no machine has: what looks in /sys finds nothing.
        let text = format!("FFFF:{device:02X}:00.0\0");
        if id.is_null() || (len as usize) < text.len() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: `len` bytes may be written, and the text is not longer.
        unsafe { id.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
        Ok(())
    })
}

/// # Safety
///
/// None is needed: the call takes two numbers. Nothing here is written by a NIC, so there is nothing to wait for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFlushGPUDirectRDMAWrites(target: c_uint, scope: c_uint) -> Status {
    call("cuFlushGPUDirectRDMAWrites", |state| {
        state.current()?;
        log("flush");
        if target == 0 && [100, 200].contains(&scope) { Ok(()) } else { Err(INVALID_VALUE) }
    })
}

/// # Safety
///
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Status {
    call("cuDeviceTotalMem_v2", |state| {
        usize::try_from(device).ok().filter(|index| *index < state.devices.len()).ok_or(INVALID_DEVICE)?;
        // SAFETY: the caller's word.
        unsafe { give(bytes, setting("SOFTCUDA_MEMORY", 1 << 30)) }
    })
}

/// # Safety
///
/// `context` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Status {
    call("cuDevicePrimaryCtxRetain", |state| {
        let index = usize::try_from(device).map_err(|_| INVALID_DEVICE)?;
        state.devices.get_mut(index).ok_or(INVALID_DEVICE)?.held += 1;
        // SAFETY: the caller's word.
        unsafe { give(context, index + 1) }
    })
}

/// # Safety
///
/// None is needed: the call takes no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    call("cuDevicePrimaryCtxRelease_v2", |state| {
        let index = usize::try_from(device).map_err(|_| INVALID_DEVICE)?;
        let device = state.devices.get_mut(index).ok_or(INVALID_DEVICE)?;
        device.held = device.held.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if device.held == 0 {
            // The context's end ends what a kernel did to it, and gives its memory back.
            *device = Device { memory: Memory::new(setting("SOFTCUDA_MEMORY", 1 << 30)), ..Device::default() };
        }
        Ok(())
    })
}

/// # Safety
///
/// None is needed: a context is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: usize) -> Status {
    call("cuCtxSetCurrent", |state| {
        let device = context.checked_sub(1);
        if device.is_some_and(|index| state.devices.get(index).is_none_or(|device| device.held == 0)) {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.set(device);
        Ok(())
    })
}

/// # Safety
///
/// `context` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> Status {
    // SAFETY: the caller's word.
    call("cuCtxGetCurrent", |_| unsafe { give(context, CURRENT.get().map_or(0, |device| device + 1)) })
}

/// # Safety
///
/// `text` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: Status, text: *mut *const c_char) -> Status {
    let found = STATUS.iter().find(|(code, ..)| *code == status);
    // SAFETY: the caller's word.
    let given = unsafe { give(text, found.map_or(std::ptr::null(), |(_, name, _)| name.as_ptr())) };
    if found.is_none() { INVALID_VALUE } else { given.err().unwrap_or(0) }
}

/// # Safety
///
/// `text` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(status: Status, text: *mut *const c_char) -> Status {
    let found = STATUS.iter().find(|(code, ..)| *code == status);
    // SAFETY: the caller's word.
    let given = unsafe { give(text, found.map_or(std::ptr::null(), |(_, _, words)| words.as_ptr())) };
    if found.is_none() { INVALID_VALUE } else { given.err().unwrap_or(0) }
}
