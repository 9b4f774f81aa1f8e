//! Modules, functions and launches.
//!
//! Invariant: an argument is copied when its launch is put on a stream; the caller's memory is not looked at afterwards.

use std::ffi::{CStr, c_char, c_uint, c_void};

use gradwire_ptx::Module;

use crate::{
    state::{INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, NOT_FOUND, Status, call, give},
    streams::put_launch,
};

/// # Safety
///
/// `module` is valid for a write, `image` is a text that ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_void) -> Status {
    call("cuModuleLoadData", |state| {
        state.current()?;
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's word: PTX ends with a zero byte.
        let text = unsafe { CStr::from_ptr(image.cast()) };
        let parsed = Module::parse(text.to_str().map_err(|_| INVALID_PTX)?).map_err(|error| {
            eprintln!("soft CUDA: {error}");
            INVALID_PTX
        })?;
        let handle = state.handle();
        state.modules.insert(handle, parsed);
        // SAFETY: the caller's word.
        unsafe { give(module, handle) }
    })
}

/// # Safety
///
/// None is needed: a module is a number here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: usize) -> Status {
    call("cuModuleUnload", |state| state.modules.remove(&module).map(|_| ()).ok_or(INVALID_HANDLE))
}

/// # Safety
///
/// `function` is valid for a write, `name` is a text that ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) -> Status {
    call("cuModuleGetFunction", |state| {
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's word.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| NOT_FOUND)?;
        let module = state.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let found = module.function(name).cloned().ok_or(NOT_FOUND)?;
        let handle = state.handle();
        state.functions.insert(handle, found);
        // SAFETY: the caller's word.
        unsafe { give(function, handle) }
    })
}

/// # Safety
///
/// `arguments` holds a pointer for each of the kernel's parameters, each readable for that parameter's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: usize,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status {
    call("cuLaunchKernel", |state| {
        state.current()?;
        let function = state.functions.get(&function).cloned().ok_or(INVALID_HANDLE)?;
        let flat = [grid_y, grid_z, block_y, block_z] == [1; 4] && shared_bytes == 0;
        if !flat || arguments.is_null() || !extra.is_null() || grid_x == 0 || !(1..=1024).contains(&block_x) {
            return Err(INVALID_VALUE);
        }
        let mut values = Vec::new();
        for (index, size) in function.parameter_sizes().into_iter().enumerate() {
            // SAFETY: the caller's word: a pointer for each parameter.
            let from = unsafe { arguments.add(index).read() };
            let mut bytes = [0u8; 8];
            // SAFETY: that pointer is readable for the parameter's size, which is 8 at most.
            unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from.cast(), size) };
            values.push(u64::from_le_bytes(bytes));
        }
        put_launch(state, stream, function, [grid_x, block_x], values)
    })
}
