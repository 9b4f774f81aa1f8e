//! The driver: loaded once, started once, and its errors in words.
//!
//! Invariant: the table is loaded at the first question and for good; a status becomes an [`Error::Gpu`] here and nowhere else.

use std::{
    ffi::{CStr, c_char, c_int},
    sync::OnceLock,
};

use crate::{
    Error, Result,
    sys::cuda::{self, Status, Table},
};

/// The variable that names another driver library than `libcuda.so.1`, for tests.
pub const LIBRARY_VARIABLE: &str = "GRADWIRE_CUDA_LIBRARY";

/// CUDA 11.0, whose PTX our kernels are.
const VERSION_MIN: c_int = 11_000;

pub(super) struct Driver {
    pub(super) table: Table,
    version: c_int,
}

/// The driver, or why there is none.
pub(super) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let found = DRIVER.get_or_init(|| {
        let name = std::env::var(LIBRARY_VARIABLE).unwrap_or_else(|_| cuda::SONAME.into());
        Driver::start(&name)
    });
    found.as_ref().map_err(|why| Error::Config(format!("no GPU can be used: {why}")))
}

/// The CUDA version that the driver runs, as `12.4`.
///
/// # Errors
///
/// Why there is no driver.
pub fn driver_version() -> Result<String> {
    Ok(driver()?.version_text())
}

impl Driver {
    fn start(name: &str) -> Result<Driver, String> {
        let table = Table::open(name)?;
        let mut driver = Driver { table, version: 0 };
        // SAFETY: a place for the version; may be asked before `cuInit`.
        let status = unsafe { (driver.table.driver_get_version)(&raw mut driver.version) };
        driver.in_words("cuDriverGetVersion", status)?;
        if driver.version < VERSION_MIN {
            let found = driver.version_text();
            return Err(format!(
                "the NVIDIA driver is for CUDA {found}; gradwire's kernels need one for CUDA 11.0 or later"
            ));
        }
        // SAFETY: the flags must be 0.
        let status = unsafe { (driver.table.init)(0) };
        driver.in_words("cuInit", status)?;
        if name != cuda::SONAME {
            tracing::warn!("{LIBRARY_VARIABLE} is set: the CUDA driver is {name}");
        }
        Ok(driver)
    }

    fn version_text(&self) -> String {
        format!("{}.{}", self.version / 1000, self.version % 1000 / 10)
    }

    fn in_words(&self, call: &str, status: Status) -> Result<(), String> {
        if status == cuda::SUCCESS { Ok(()) } else { Err(format!("{call} failed: {}", self.words(status))) }
    }

    /// A status as the driver calls it.
    fn words(&self, status: Status) -> String {
        let ask = |function: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: a place for the text's address.
            let found = unsafe { function(status, &raw mut text) };
            // SAFETY: where it succeeds, the driver gives a text that ends with a zero byte and is never freed.
            (found == cuda::SUCCESS && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
        };
        match (ask(self.table.get_error_name), ask(self.table.get_error_string)) {
            (Some(name), Some(words)) => format!("{name} ({words})"),
            _ => format!("CUDA error {status}, which this driver has no name for"),
        }
    }

    /// `Ok` for success; else what happened, to which device, and what follows.
    pub(super) fn check(&self, call: &'static str, device: impl FnOnce() -> String, status: Status) -> Result<()> {
        if status == cuda::SUCCESS {
            return Ok(());
        }
        Err(Error::Gpu { call, device: device(), cause: format!("{}{}", self.words(status), advice(status)) })
    }

    /// A function that older drivers lack.
    pub(super) fn newer<F: Copy>(&self, call: &'static str, function: Option<F>) -> Result<F> {
        let version = || self.version_text();
        function.ok_or_else(|| Error::Config(format!("the driver (CUDA {}) has no {call}", version())))
    }
}

fn advice(status: Status) -> &'static str {
    match status {
        cuda::OUT_OF_MEMORY => {
            "; parameters, optimizer state and staging of this device's shards must fit: use more GPUs or servers, smaller chunks \
             (`chunk_bytes`), or `--device cpu`"
        }
        // Faults of kernels, of the bus and of the device: the context is of no more use.
        214 | 220 | 700..=719 | 999 => {
            "; nothing of this process can use the device any more: resume the job from its last checkpoint; the kernel's log \
             (dmesg, NVRM: Xid) may say more"
        }
        _ => "",
    }
}
