//! The table against <cuda.h>, and libraries that are no driver.
//!
//! Invariant: where there is no header this is said aloud, and under CI it is a failure.

use std::mem::{offset_of, size_of};

use super::*;
use crate::sys::header;

#[test]
fn a_library_that_is_not_there_or_is_another_is_told_by_name() {
    let error = Table::open("libcuda-of-nowhere.so.1").err().unwrap();
    assert!(error.contains("libcuda-of-nowhere.so.1 cannot be loaded") && error.contains("No such file"), "{error}");
    let error = Table::open("libc.so.6").err().unwrap();
    assert!(error.contains("libc.so.6 is not a CUDA driver") && error.contains("cuInit"), "{error}");
}

/// Declarations that a compiler refuses where ours and the header's types differ.
const FUNCTIONS: &str = "
CUresult cuInit(unsigned); CUresult cuDriverGetVersion(int *);
CUresult cuGetErrorName(CUresult, const char **); CUresult cuGetErrorString(CUresult, const char **);
CUresult cuDeviceGetCount(int *); CUresult cuDeviceGet(int *, int); CUresult cuDeviceGetName(char *, int, int);
CUresult cuDeviceTotalMem_v2(size_t *, int); CUresult cuDeviceGetAttribute(int *, CUdevice_attribute, int);
CUresult cuDeviceGetPCIBusId(char *, int, int);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, int); CUresult cuDevicePrimaryCtxRelease_v2(int);
CUresult cuCtxSetCurrent(CUcontext); CUresult cuMemGetInfo_v2(size_t *, size_t *);
CUresult cuMemAlloc_v2(unsigned long long *, size_t); CUresult cuMemFree_v2(unsigned long long);
CUresult cuMemHostRegister_v2(void *, size_t, unsigned); CUresult cuMemHostUnregister(void *);
CUresult cuMemcpyHtoDAsync_v2(unsigned long long, const void *, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void *, unsigned long long, size_t, CUstream);
CUresult cuMemcpyDtoDAsync_v2(unsigned long long, unsigned long long, size_t, CUstream);
CUresult cuMemsetD8Async(unsigned long long, unsigned char, size_t, CUstream);
CUresult cuStreamCreate(CUstream *, unsigned); CUresult cuStreamDestroy_v2(CUstream);
CUresult cuStreamSynchronize(CUstream); CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuLaunchHostFunc(CUstream, void (*)(void *), void *);
CUresult cuEventCreate(CUevent *, unsigned); CUresult cuEventDestroy_v2(CUevent);
CUresult cuEventRecord(CUevent, CUstream); CUresult cuEventQuery(CUevent);
CUresult cuEventElapsedTime(float *, CUevent, CUevent);
CUresult cuModuleLoadData(CUmodule *, const void *); CUresult cuModuleUnload(CUmodule);
CUresult cuModuleGetFunction(CUfunction *, CUmodule, const char *);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,
                        void **);
CUresult cuMemGetAllocationGranularity(size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags);
CUresult cuMemCreate(unsigned long long *, size_t, const CUmemAllocationProp *, unsigned long long);
CUresult cuMemRelease(unsigned long long);
CUresult cuMemAddressReserve(unsigned long long *, size_t, size_t, unsigned long long, unsigned long long);
CUresult cuMemAddressFree(unsigned long long, size_t);
CUresult cuMemMap(unsigned long long, size_t, size_t, unsigned long long, unsigned long long);
CUresult cuMemUnmap(unsigned long long, size_t);
CUresult cuMemSetAccess(unsigned long long, size_t, const CUmemAccessDesc *, size_t);
CUresult cuMemGetHandleForAddressRange(void *, unsigned long long, size_t, CUmemRangeHandleType, unsigned long long);
CUresult cuFlushGPUDirectRDMAWrites(CUflushGPUDirectRDMAWritesTarget, CUflushGPUDirectRDMAWritesScope);
";

fn beliefs() -> Vec<(&'static str, i64)> {
    vec![
        ("sizeof(CUresult)", size_of::<Status>() as i64),
        ("sizeof(CUdevice_attribute)", size_of::<c_uint>() as i64),
        ("sizeof(CUmemRangeHandleType)", size_of::<c_uint>() as i64),
        ("sizeof(CUdeviceptr)", size_of::<DeviceAddress>() as i64),
        ("sizeof(CUmemGenericAllocationHandle)", 8),
        ("sizeof(CUmemAllocationProp)", size_of::<MemAllocationProp>() as i64),
        (
            "offsetof(CUmemAllocationProp, requestedHandleTypes)",
            offset_of!(MemAllocationProp, requested_handle_types) as i64,
        ),
        ("offsetof(CUmemAllocationProp, location)", offset_of!(MemAllocationProp, location) as i64),
        (
            "offsetof(CUmemAllocationProp, allocFlags.compressionType)",
            offset_of!(MemAllocationProp, compression_type) as i64,
        ),
        (
            "offsetof(CUmemAllocationProp, allocFlags.gpuDirectRDMACapable)",
            offset_of!(MemAllocationProp, gpu_direct_rdma_capable) as i64,
        ),
        ("offsetof(CUmemLocation, id)", offset_of!(MemLocation, id) as i64),
        ("sizeof(CUmemAccessDesc)", size_of::<MemAccessDesc>() as i64),
        ("offsetof(CUmemAccessDesc, flags)", offset_of!(MemAccessDesc, flags) as i64),
        ("CUDA_ERROR_OUT_OF_MEMORY", OUT_OF_MEMORY.into()),
        ("CUDA_ERROR_NOT_READY", NOT_READY.into()),
        ("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", MULTIPROCESSOR_COUNT.into()),
        ("CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE", L2_CACHE_SIZE.into()),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", COMPUTE_CAPABILITY_MAJOR.into()),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", COMPUTE_CAPABILITY_MINOR.into()),
        ("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED", GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED.into()),
        ("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS", GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS.into()),
        ("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING", GPU_DIRECT_RDMA_WRITES_ORDERING.into()),
        ("CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST", FLUSH_OPTION_HOST.into()),
        ("CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER", WRITES_ORDERING_OWNER.into()),
        ("CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX", FLUSH_TARGET_CURRENT_CONTEXT.into()),
        ("CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER", FLUSH_TO_OWNER.into()),
        ("CU_STREAM_NON_BLOCKING", STREAM_NON_BLOCKING.into()),
        ("CU_EVENT_DEFAULT", EVENT_DEFAULT.into()),
        ("CU_EVENT_DISABLE_TIMING", EVENT_DISABLE_TIMING.into()),
        ("CU_MEMHOSTREGISTER_PORTABLE", HOST_REGISTER_PORTABLE.into()),
        ("CU_MEM_ALLOCATION_TYPE_PINNED", ALLOCATION_TYPE_PINNED.into()),
        ("CU_MEM_LOCATION_TYPE_DEVICE", LOCATION_TYPE_DEVICE.into()),
        ("CU_MEM_ALLOC_GRANULARITY_MINIMUM", GRANULARITY_MINIMUM.into()),
        ("CU_MEM_ACCESS_FLAGS_PROT_READWRITE", ACCESS_READ_WRITE.into()),
        ("CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD", RANGE_HANDLE_DMA_BUF.into()),
    ]
}

/// The header comes with CUDA, or alone in the wheel `nvidia-cuda-runtime-cu12`; `scripts/test` fetches that one (`CPATH`).
#[test]
fn our_table_is_that_of_the_header() {
    header::compare(FUNCTIONS, "cuda.h", "nvidia-cuda-dev", &beliefs());
}
