//! The library through its C calls, found by dlopen as the real one would be: a step of the committed PTX, late work, failures.
//!
//! Invariant: settings come from the environment, so each test that needs its own runs this program again for itself alone.

use std::{
    ffi::{CString, c_int, c_void},
    process::Command,
    ptr::null_mut,
};

use libloading::{Library, Symbol};

const PTX: &str = include_str!("../../../../kernels/gradwire.ptx");
/// Set in the program that a test starts for itself.
const INNER: &str = "SOFTCUDA_TEST_INNER";

struct Driver(Library);

impl Driver {
    fn load() -> Driver {
        let mut path = std::env::current_exe().unwrap();
        path.pop();
        // SAFETY: our own library, which does nothing when it is loaded.
        Driver(
            unsafe { Library::new(path.join("libgradwire_softcuda.so")) }
                .expect("cargo builds the library for its tests"),
        )
    }

    /// A call of two words, as most are.
    fn two(&self, name: &str, a: usize, b: usize) -> u32 {
        // SAFETY: each call named here takes two integers or pointers that the test keeps valid; one that takes fewer ignores
        // the rest, which the C calling convention allows.
        unsafe {
            let call: Symbol<'_, unsafe extern "C" fn(usize, usize) -> u32> = self.0.get(name.as_bytes()).unwrap();
            call(a, b)
        }
    }

    fn four(&self, name: &str, words: [usize; 4]) -> u32 {
        // SAFETY: as above, with four.
        unsafe {
            let call: Symbol<'_, unsafe extern "C" fn(usize, usize, usize, usize) -> u32> =
                self.0.get(name.as_bytes()).unwrap();
            call(words[0], words[1], words[2], words[3])
        }
    }

    /// What a call writes through its first pointer.
    fn made(&self, name: &str, b: usize) -> usize {
        let mut out = 0usize;
        assert_eq!(self.two(name, &raw mut out as usize, b), 0, "{name}");
        out
    }

    fn launches(&self) -> c_int {
        // SAFETY: it takes nothing.
        unsafe {
            let call: Symbol<'_, unsafe extern "C" fn() -> c_int> = self.0.get(b"softcuda_launches").unwrap();
            call()
        }
    }

    /// A context, a stream, and `gradwire_encode` of the committed PTX.
    fn ready(&self) -> (usize, usize) {
        assert_eq!(self.two("cuInit", 0, 0), 0);
        let context = self.made("cuDevicePrimaryCtxRetain", 0);
        assert_eq!(self.two("cuCtxSetCurrent", context, 0), 0);
        let (ptx, name) = (CString::new(PTX).unwrap(), c"gradwire_encode");
        let module = self.made("cuModuleLoadData", ptx.as_ptr() as usize);
        let mut function = 0usize;
        let words = [&raw mut function as usize, module, name.as_ptr() as usize, 0];
        assert_eq!(self.four("cuModuleGetFunction", words), 0);
        (self.made("cuStreamCreate", 1), function)
    }

    fn launch(&self, function: usize, stream: usize, mut table: u64) -> u32 {
        type Launch = unsafe extern "C" fn(
            usize,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            usize,
            *mut *mut c_void,
            *mut *mut c_void,
        ) -> u32;
        let (mut segments, mut tiles) = (1u32, 1u32);
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut table).cast(), (&raw mut segments).cast(), (&raw mut tiles).cast()];
        // SAFETY: three arguments of 8, 4 and 4 bytes, as the kernel has parameters.
        unsafe {
            let call: Symbol<'_, Launch> = self.0.get(b"cuLaunchKernel").unwrap();
            call(function, 1, 1, 1, 256, 1, 1, 0, stream, arguments.as_mut_ptr(), null_mut())
        }
    }

    /// Encodes four values as f32: table, copy in, launch, copy out. Returns the destination and the first status that is not 0.
    fn encode(&self, function: usize, stream: usize, out: &mut [f32; 4]) -> Result<(), u32> {
        let check = |status: u32| if status == 0 { Ok(()) } else { Err(status) };
        let allocate = || {
            let mut address = 0usize;
            check(self.two("cuMemAlloc_v2", &raw mut address as usize, 128)).map(|()| address)
        };
        let (table, master, wire) = (allocate()?, allocate()?, allocate()?);
        let mut segment = [0u64; 16];
        (segment[2], segment[5]) = (master as u64, wire as u64);
        (segment[7], segment[8]) = (4, 1 << 32);
        let values = [1.5f32, -0.0, 3e-40, f32::INFINITY];
        check(self.four("cuMemcpyHtoDAsync_v2", [table, segment.as_ptr() as usize, 128, stream]))?;
        check(self.four("cuMemcpyHtoDAsync_v2", [master, values.as_ptr() as usize, 16, stream]))?;
        check(self.launch(function, stream, table as u64))?;
        let event = self.made("cuEventCreate", 2);
        check(self.four("cuMemcpyDtoHAsync_v2", [out.as_mut_ptr() as usize, wire, 16, stream]))?;
        check(self.two("cuEventRecord", event, stream))?;
        let mut waited = 0;
        while self.two("cuEventQuery", event, 0) == 600 && waited < 10_000 {
            waited += 1;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(waited > 0, std::env::var("SOFTCUDA_LATE").is_ok(), "late exactly where it is asked for");
        check(self.two("cuEventQuery", event, 0))?;
        assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
        Ok(())
    }
}

/// Runs the test of this name again in a program of its own with this environment; true where this already is that program.
fn is_alone(test: &str, environment: &[(&str, &str)]) -> bool {
    if std::env::var(INNER).is_ok() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(INNER, "1");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

#[test]
fn a_launch_does_what_it_is_to_do() {
    if is_alone("a_launch_does_what_it_is_to_do", &[]) {
        let driver = Driver::load();
        assert_eq!(driver.two("cuCtxSynchronize", 0, 0), 3, "nothing before cuInit");
        let (stream, function) = driver.ready();
        let mut out = [0.0; 4];
        driver.encode(function, stream, &mut out).unwrap();
        driver.encode(function, stream, &mut out).unwrap();
        assert_eq!(driver.launches(), 2);
    }
}

#[test]
fn late_work_is_late_and_gets_done_by_itself() {
    if is_alone("late_work_is_late_and_gets_done_by_itself", &[("SOFTCUDA_LATE", "3")]) {
        let driver = Driver::load();
        let (stream, function) = driver.ready();
        driver.encode(function, stream, &mut [0.0; 4]).unwrap();
        assert_eq!(driver.launches(), 1);
    }
}

#[test]
fn a_call_fails_when_it_is_told_to_and_works_again() {
    let failures = [("SOFTCUDA_FAIL", "cuMemAlloc_v2:2=2, cuLaunchKernel:1=719")];
    if is_alone("a_call_fails_when_it_is_told_to_and_works_again", &failures) {
        let driver = Driver::load();
        let (stream, function) = driver.ready();
        let out = &mut [0.0; 4];
        let seen = [0; 3].map(|_| driver.encode(function, stream, out));
        assert_eq!(seen, [Err(2), Err(719), Ok(())]);
        assert_eq!(driver.launches(), 1);
    }
}

#[test]
fn a_full_card_says_so() {
    if is_alone("a_full_card_says_so", &[("SOFTCUDA_MEMORY", "300")]) {
        let driver = Driver::load();
        let (stream, function) = driver.ready();
        assert_eq!(driver.encode(function, stream, &mut [0.0; 4]), Err(2));
    }
}

#[test]
fn no_card_is_an_error_and_not_a_crash() {
    if is_alone("no_card_is_an_error_and_not_a_crash", &[("SOFTCUDA_DEVICES", "0")]) {
        assert_eq!(Driver::load().two("cuInit", 0, 0), 100);
    }
}

#[test]
fn a_kernel_that_leaves_its_memory_poisons_the_context() {
    if is_alone("a_kernel_that_leaves_its_memory_poisons_the_context", &[]) {
        let driver = Driver::load();
        let (stream, function) = driver.ready();
        assert_eq!(driver.launch(function, stream, 4096), 700);
        assert_eq!(driver.two("cuStreamSynchronize", stream, 0), 700);
        assert_eq!(driver.encode(function, stream, &mut [0.0; 4]), Err(700));
        assert_eq!(driver.two("cuDevicePrimaryCtxRelease_v2", 0, 0), 0);
        let (stream, function) = driver.ready();
        driver.encode(function, stream, &mut [0.0; 4]).unwrap();
    }
}
