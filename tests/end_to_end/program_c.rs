//! The training program once more, by the C API, with gradients and parameters on a GPU: a program that knows CUDA and
//! gradwire.h, and nothing of Rust.
//!
//! Invariant: gradients reach the library by device addresses alone, through the CUDA driver.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use gradwire::ffi::{
    Status, TensorDescription, View, WorkerHandle, gw_clock, gw_connect_on_gpu, gw_finish, gw_gradient_view,
    gw_last_error, gw_loss_scale, gw_parameter_view, gw_parameters, gw_push_pull_in_place, gw_rank, gw_wait,
};
use nix::libc::{RTLD_NOW, dlopen, dlsym};

use crate::program::{gradient, model};

type Copy<To, From> = unsafe extern "C" fn(To, From, usize, usize) -> c_int;

/// What the program needs of CUDA's driver, with device 0's primary context current on this thread.
struct Cuda {
    to_device: Copy<u64, *const c_void>,
    to_host: Copy<*mut c_void, u64>,
    synchronize: unsafe extern "C" fn() -> c_int,
}

impl Cuda {
    fn open() -> Cuda {
        let name = CString::new(std::env::var("GRADWIRE_CUDA_LIBRARY").unwrap()).unwrap();
        // SAFETY: a library that may be opened, and the types that cuda.h gives its functions.
        unsafe {
            let library = dlopen(name.as_ptr(), RTLD_NOW);
            assert!(!library.is_null(), "{name:?}");
            let find = |name: &CStr| {
                let found = dlsym(library, name.as_ptr());
                assert!(!found.is_null(), "{name:?}");
                found
            };
            let init: unsafe extern "C" fn(c_uint) -> c_int = std::mem::transmute(find(c"cuInit"));
            let retain: unsafe extern "C" fn(*mut usize, c_int) -> c_int =
                std::mem::transmute(find(c"cuDevicePrimaryCtxRetain"));
            let current: unsafe extern "C" fn(usize) -> c_int = std::mem::transmute(find(c"cuCtxSetCurrent"));
            let mut context = 0;
            assert_eq!((init(0), retain(&raw mut context, 0), current(context)), (0, 0, 0));
            Cuda {
                to_device: std::mem::transmute::<*mut c_void, Copy<u64, *const c_void>>(find(c"cuMemcpyHtoDAsync_v2")),
                to_host: std::mem::transmute::<*mut c_void, Copy<*mut c_void, u64>>(find(c"cuMemcpyDtoHAsync_v2")),
                synchronize: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(find(
                    c"cuCtxSynchronize",
                )),
            }
        }
    }

    fn write(&self, to: u64, values: &[f32]) {
        // SAFETY: the library's view is as long as the tensor; the wait keeps `values` until they are over.
        let outcome =
            unsafe { ((self.to_device)(to, values.as_ptr().cast(), size_of_val(values), 0), (self.synchronize)()) };
        assert_eq!(outcome, (0, 0));
    }

    fn read(&self, from: u64, values: &mut [f32]) {
        // SAFETY: as above.
        let outcome =
            unsafe { ((self.to_host)(values.as_mut_ptr().cast(), from, size_of_val(values), 0), (self.synchronize)()) };
        assert_eq!(outcome, (0, 0));
    }
}

fn check(status: Status) -> Result<(), String> {
    match status {
        Status::GwOk => Ok(()),
        // SAFETY: a text that stays until this thread's next failure.
        other => Err(format!("{other:?} {}", unsafe { CStr::from_ptr(gw_last_error()) }.to_string_lossy())),
    }
}

fn view(
    call: unsafe extern "C" fn(WorkerHandle, usize, *mut View) -> Status,
    worker: WorkerHandle,
    tensor: usize,
    len: usize,
) -> Result<u64, String> {
    let mut view = View { data: std::ptr::null_mut(), elements: 0, dtype: 9, device: -2 };
    // SAFETY: a place for a view.
    check(unsafe { call(worker, tensor, &raw mut view) })?;
    assert_eq!((view.device, view.elements, view.dtype), (0, len, 0));
    Ok(view.data as u64)
}

/// Trains for `steps` clocks.
pub fn play(steps: u64) -> Result<(), String> {
    let tensors = model();
    let names: Vec<CString> = tensors.iter().map(|spec| CString::new(spec.name.clone()).unwrap()).collect();
    let described = tensors.iter().zip(&names).map(|(spec, name)| TensorDescription {
        name: name.as_ptr().cast::<c_char>(),
        shape: spec.shape.as_ptr(),
        dimensions: spec.shape.len(),
        dtype: 0,
        init: 2,
        init_value: 0.1,
        group: spec.group,
    });
    let described: Vec<TensorDescription> = described.collect();
    let (mut worker, mut rank, mut clock, mut scale) = (0, 0, 0, 0.0);
    // SAFETY: descriptions whose names and shapes live in `tensors` and `names`, and places for answers.
    unsafe {
        check(gw_connect_on_gpu(described.as_ptr(), described.len(), 0, &raw mut worker))?;
        check(gw_rank(worker, &raw mut rank))?;
        check(gw_clock(worker, &raw mut clock))?;
        check(gw_loss_scale(worker, &raw mut scale))?;
    }
    let cuda = Cuda::open();
    assert_eq!((clock, scale), (0, 1.0));
    for clock in clock..steps {
        for (index, spec) in tensors.iter().enumerate().rev() {
            let values: Vec<f32> = (0..spec.elements().unwrap())
                .map(|element| gradient(rank as u16, clock, &spec.name, element))
                .collect();
            cuda.write(view(gw_gradient_view, worker, index, values.len())?, &values);
            check(gw_push_pull_in_place(worker, index))?;
        }
        check(gw_wait(worker, 60_000))?;
    }
    let mut digest = 0;
    for (index, spec) in tensors.iter().enumerate() {
        let mut there = vec![0.0f32; spec.elements().unwrap() as usize];
        let mut copied = there.clone();
        cuda.read(view(gw_parameter_view, worker, index, there.len())?, &mut there);
        // SAFETY: room for as many values as is said.
        check(unsafe { gw_parameters(worker, index, copied.as_mut_ptr().cast(), copied.len()) })?;
        assert!(there == copied && there.iter().any(|value| *value != 0.0), "{}", spec.name);
        digest = crc32c::crc32c_append(digest, bytemuck::cast_slice(&there));
    }
    println!("digest {digest:08x}");
    check(gw_finish(worker))
}
