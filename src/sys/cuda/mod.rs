//! The functions of the CUDA driver that we call, found at run time.
//!
//! Why no binding from a registry: docs/decisions/0006-libcuda-at-run-time.md.
//!
//! Invariant: types and numbers here are those of <cuda.h> for every driver from CUDA 11.0 on (a symbol with `_v2` stands for
//! one binary interface); `tests` compares them with the header where there is one. A status is a plain number: drivers return
//! codes that no header of ours knows.

#[cfg(test)]
mod tests;

use std::{
    error::Error as _,
    ffi::{c_char, c_int, c_uint, c_void},
};

use libloading::Library;

/// The name under which NVIDIA's driver installs itself.
pub const SONAME: &str = "libcuda.so.1";

/// `CUresult`.
pub type Status = c_uint;
/// `CUdevice`: a number from 0.
pub type Device = c_int;
/// `CUdeviceptr`.
pub type DeviceAddress = u64;
/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`: what the driver alone can read.
pub type Handle = *mut c_void;
/// `CUhostFn`.
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

/// `CUDA_SUCCESS`.
pub const SUCCESS: Status = 0;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NOT_READY`.
pub const NOT_READY: Status = 600;

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
pub const MULTIPROCESSOR_COUNT: c_uint = 16;
/// `CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE`.
pub const L2_CACHE_SIZE: c_uint = 38;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
pub const COMPUTE_CAPABILITY_MAJOR: c_uint = 75;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR`.
pub const COMPUTE_CAPABILITY_MINOR: c_uint = 76;
/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED`.
pub const GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: c_uint = 110;
/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS`.
pub const GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS: c_uint = 117;
/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING`.
pub const GPU_DIRECT_RDMA_WRITES_ORDERING: c_uint = 118;

/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST`.
pub const FLUSH_OPTION_HOST: c_int = 1;
/// `CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER`.
pub const WRITES_ORDERING_OWNER: c_int = 100;
/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX`.
pub const FLUSH_TARGET_CURRENT_CONTEXT: c_uint = 0;
/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER`.
pub const FLUSH_TO_OWNER: c_uint = 100;

/// `CU_STREAM_NON_BLOCKING`: does not wait for the default stream.
pub const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DEFAULT`: can be timed.
pub const EVENT_DEFAULT: c_uint = 0;
/// `CU_EVENT_DISABLE_TIMING`.
pub const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CU_MEMHOSTREGISTER_PORTABLE`: page-locked for every context.
pub const HOST_REGISTER_PORTABLE: c_uint = 1;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
pub const ALLOCATION_TYPE_PINNED: c_int = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub const LOCATION_TYPE_DEVICE: c_int = 1;
/// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
pub const GRANULARITY_MINIMUM: c_uint = 0;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
pub const ACCESS_READ_WRITE: c_int = 3;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
pub const RANGE_HANDLE_DMA_BUF: c_uint = 1;

/// `CUmemLocation`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MemLocation {
    /// What kind of place.
    pub kind: c_int,
    /// Which one.
    pub id: c_int,
}

/// `CUmemAllocationProp`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MemAllocationProp {
    /// `type`.
    pub kind: c_int,
    /// As what it may be handed to other processes; not as what it may be exported to devices.
    pub requested_handle_types: c_int,
    /// Where.
    pub location: MemLocation,
    /// Null.
    pub win32_handle_meta_data: *mut c_void,
    /// 0.
    pub compression_type: u8,
    /// 1 if a NIC is to reach it.
    pub gpu_direct_rdma_capable: u8,
    /// 0.
    pub usage: u16,
    /// 0.
    pub reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MemAccessDesc {
    /// Who.
    pub location: MemLocation,
    /// What it may.
    pub flags: c_int,
}

/// Declares the table: a field per function, named as in C without its prefix, and the lookup of all of them. Those that older
/// drivers lack are options.
macro_rules! table {
    (
        needed { $($(#[$doc:meta])* $name:ident = $symbol:literal: fn($($argument:ty),*);)* }
        newer { $($(#[$newer_doc:meta])* $newer:ident = $newer_symbol:literal: fn($($newer_argument:ty),*);)* }
    ) => {
        /// The driver's functions; each returns a [`Status`].
        pub struct Table {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) -> Status,)*
            $($(#[$newer_doc])* pub $newer: Option<unsafe extern "C" fn($($newer_argument),*) -> Status>,)*
            /// Keeps the code mapped.
            _library: Library,
        }

        impl Table {
            fn look_up(library: Library) -> Result<Table, String> {
                $(
                    // SAFETY: the type is that of the symbol in <cuda.h>, the same in every driver (invariant of this file); the
                    // pointer is kept beside the library, so it never dangles.
                    let $name = unsafe {
                        *library.get::<unsafe extern "C" fn($($argument),*) -> Status>($symbol)
                            .map_err(|error| format!("{:?} is missing: {}", $symbol, reason(&error)))?
                    };
                )*
                $(
                    // SAFETY: as above.
                    let $newer = unsafe {
                        library.get::<unsafe extern "C" fn($($newer_argument),*) -> Status>($newer_symbol)
                            .ok()
                            .map(|symbol| *symbol)
                    };
                )*
                Ok(Table { $($name,)* $($newer,)* _library: library })
            }
        }
    };
}

table! {
    needed {
        /// Starts the driver; the argument is 0.
        init = c"cuInit": fn(c_uint);
        /// 1000 x major + 10 x minor of the CUDA that the driver can run.
        driver_get_version = c"cuDriverGetVersion": fn(*mut c_int);
        /// A status's name, such as `CUDA_ERROR_OUT_OF_MEMORY`; null for a code that the driver does not know.
        get_error_name = c"cuGetErrorName": fn(Status, *mut *const c_char);
        /// A status in words.
        get_error_string = c"cuGetErrorString": fn(Status, *mut *const c_char);
        /// How many devices there are.
        device_get_count = c"cuDeviceGetCount": fn(*mut c_int);
        /// A device by its number.
        device_get = c"cuDeviceGet": fn(*mut Device, c_int);
        /// Its name, and how many bytes it may take.
        device_get_name = c"cuDeviceGetName": fn(*mut c_char, c_int, Device);
        /// Its memory in bytes.
        device_total_mem = c"cuDeviceTotalMem_v2": fn(*mut usize, Device);
        /// One of its attributes.
        device_get_attribute = c"cuDeviceGetAttribute": fn(*mut c_int, c_uint, Device);
        /// Its address on the PCI bus, `0000:3b:00.0`, and how many bytes it may take.
        device_get_pci_bus_id = c"cuDeviceGetPCIBusId": fn(*mut c_char, c_int, Device);
        /// The device's primary context, which all of a process share; counted.
        primary_ctx_retain = c"cuDevicePrimaryCtxRetain": fn(*mut Handle, Device);
        /// Gives it back.
        primary_ctx_release = c"cuDevicePrimaryCtxRelease_v2": fn(Device);
        /// Makes a context this thread's current one.
        ctx_set_current = c"cuCtxSetCurrent": fn(Handle);
        /// Free and total bytes.
        mem_get_info = c"cuMemGetInfo_v2": fn(*mut usize, *mut usize);
        /// Device memory.
        mem_alloc = c"cuMemAlloc_v2": fn(*mut DeviceAddress, usize);
        /// Gives it back; waits for the device.
        mem_free = c"cuMemFree_v2": fn(DeviceAddress);
        /// Page-locks host memory.
        mem_host_register = c"cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
        /// Ends that.
        mem_host_unregister = c"cuMemHostUnregister": fn(*mut c_void);
        /// Host to device, on a stream.
        memcpy_to_device = c"cuMemcpyHtoDAsync_v2": fn(DeviceAddress, *const c_void, usize, Handle);
        /// Device to host, on a stream.
        memcpy_to_host = c"cuMemcpyDtoHAsync_v2": fn(*mut c_void, DeviceAddress, usize, Handle);
        /// Device to device, on a stream.
        memcpy_on_device = c"cuMemcpyDtoDAsync_v2": fn(DeviceAddress, DeviceAddress, usize, Handle);
        /// Sets bytes of device memory, on a stream.
        memset = c"cuMemsetD8Async": fn(DeviceAddress, u8, usize, Handle);
        /// A stream.
        stream_create = c"cuStreamCreate": fn(*mut Handle, c_uint);
        /// Ends it; what is on it is still done.
        stream_destroy = c"cuStreamDestroy_v2": fn(Handle);
        /// Waits for all that is on it.
        stream_synchronize = c"cuStreamSynchronize": fn(Handle);
        /// What is put on the stream from now on begins after the event; flags 0.
        stream_wait_event = c"cuStreamWaitEvent": fn(Handle, Handle, c_uint);
        /// Calls a function of ours when the stream gets there, unless the context has failed.
        launch_host_func = c"cuLaunchHostFunc": fn(Handle, HostFunction, *mut c_void);
        /// An event.
        event_create = c"cuEventCreate": fn(*mut Handle, c_uint);
        /// Ends it.
        event_destroy = c"cuEventDestroy_v2": fn(Handle);
        /// The event happens when the stream gets there.
        event_record = c"cuEventRecord": fn(Handle, Handle);
        /// 0 if it has happened, [`NOT_READY`] if not, or what has befallen the context.
        event_query = c"cuEventQuery": fn(Handle);
        /// Milliseconds between two events that have happened.
        event_elapsed_time = c"cuEventElapsedTime": fn(*mut f32, Handle, Handle);
        /// Compiles PTX (a text that ends with a zero byte) for the current context's device.
        module_load_data = c"cuModuleLoadData": fn(*mut Handle, *const c_void);
        /// Ends a module and its functions.
        module_unload = c"cuModuleUnload": fn(Handle);
        /// A kernel by its name.
        module_get_function = c"cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
        /// Function, grid (x, y, z), block (x, y, z), shared bytes, stream, a pointer to each argument, null.
        launch_kernel = c"cuLaunchKernel":
            fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    }
    newer {
        /// What sizes an allocation comes in.
        mem_get_allocation_granularity = c"cuMemGetAllocationGranularity":
            fn(*mut usize, *const MemAllocationProp, c_uint);
        /// Physical memory; flags 0.
        mem_create = c"cuMemCreate": fn(*mut u64, usize, *const MemAllocationProp, u64);
        /// Gives it back once it is mapped nowhere.
        mem_release = c"cuMemRelease": fn(u64);
        /// Addresses: result, bytes, alignment (0), wish (0), flags (0).
        mem_address_reserve = c"cuMemAddressReserve": fn(*mut DeviceAddress, usize, usize, DeviceAddress, u64);
        /// Gives them back.
        mem_address_free = c"cuMemAddressFree": fn(DeviceAddress, usize);
        /// Puts memory at addresses: address, bytes, offset (0), memory, flags (0).
        mem_map = c"cuMemMap": fn(DeviceAddress, usize, usize, u64, u64);
        /// Takes it away.
        mem_unmap = c"cuMemUnmap": fn(DeviceAddress, usize);
        /// Who may touch it.
        mem_set_access = c"cuMemSetAccess": fn(DeviceAddress, usize, *const MemAccessDesc, usize);
        /// CUDA 11.7: a descriptor (written as a C int) of a range of device memory; flags 0.
        mem_get_handle_for_address_range = c"cuMemGetHandleForAddressRange":
            fn(*mut c_void, DeviceAddress, usize, c_uint, u64);
        /// CUDA 11.3: what a NIC wrote before is seen by what is launched after.
        flush_gpu_direct_rdma_writes = c"cuFlushGPUDirectRDMAWrites": fn(c_uint, c_uint);
    }
}

impl Table {
    /// Loads the driver of that name or path, or says in words why not.
    pub fn open(name: &str) -> Result<Table, String> {
        // SAFETY: loading runs the library's initialisers. Under the usual name that is NVIDIA's driver, and under another one what
        // the user has named, which are trusted like every library that the dynamic linker would have loaded for us; it is never
        // unloaded before exit by `cuda`, and where a test drops it, no pointer of it is left.
        let library =
            unsafe { Library::new(name) }.map_err(|error| format!("{name} cannot be loaded: {}", reason(&error)))?;
        Table::look_up(library)
            .map_err(|error| format!("{name} is not a CUDA driver of version 11.0 or later: {error}"))
    }
}

/// What the dynamic linker said; the error itself says only which of its functions was called.
fn reason(error: &libloading::Error) -> String {
    error.source().unwrap_or(error).to_string()
}
