//! What devices there are.
//!
//! Invariant: looking changes nothing: no context is made.

use std::ffi::{CStr, c_char, c_int, c_uint};

use super::driver::{Driver, driver};
use crate::{
    Error, Result,
    sys::cuda::{self, Device},
};

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, counted from 0 among those that this process may see (`CUDA_VISIBLE_DEVICES`).
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Its second-level cache, in bytes.
    pub l2_bytes: u32,
    /// Its place on the PCI bus, `0000:3b:00.0`.
    pub pci: Option<String>,
    /// The NUMA node that it is attached to, where the kernel knows.
    pub numa_node: Option<u32>,
}

/// The GPUs that this process may use, in the driver's order.
///
/// # Errors
///
/// [`Error::Config`] if there is no driver or no device, with the reason; [`Error::Gpu`] if one does not answer.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: a place for the number.
    let status = unsafe { (driver.table.device_get_count)(&raw mut count) };
    driver.check("cuDeviceGetCount", || "this machine".into(), status)?;
    if count == 0 {
        return Err(Error::Config(
            "no GPU can be used: the driver has none to show (is CUDA_VISIBLE_DEVICES empty?)".into(),
        ));
    }
    (0..count).map(|ordinal| DeviceInfo::of(driver, ordinal as u32)).collect()
}

impl DeviceInfo {
    fn of(driver: &Driver, ordinal: u32) -> Result<DeviceInfo> {
        let device = handle(driver, ordinal)?;
        let named = || format!("GPU {ordinal}");
        let mut memory_bytes = 0usize;
        let mut name = [0u8; 128];
        // SAFETY: a place for the number.
        let status = unsafe { (driver.table.device_total_mem)(&raw mut memory_bytes, device) };
        driver.check("cuDeviceTotalMem_v2", named, status)?;
        // SAFETY: as many bytes as the length says; the driver ends the name with a zero byte within them.
        let status =
            unsafe { (driver.table.device_get_name)(name.as_mut_ptr().cast::<c_char>(), name.len() as c_int, device) };
        driver.check("cuDeviceGetName", named, status)?;
        let number = |attribute| attribute_of(driver, ordinal, attribute).map(|value| value as u32);
        let pci = pci(driver, device);
        Ok(DeviceInfo {
            ordinal,
            name: text(&name),
            memory_bytes: memory_bytes as u64,
            capability: (number(cuda::COMPUTE_CAPABILITY_MAJOR)?, number(cuda::COMPUTE_CAPABILITY_MINOR)?),
            multiprocessors: number(cuda::MULTIPROCESSOR_COUNT)?,
            l2_bytes: number(cuda::L2_CACHE_SIZE)?,
            numa_node: pci.as_deref().and_then(numa_node),
            pci,
        })
    }
}

impl std::fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GPU {} ({})", self.ordinal, self.name)
    }
}

pub(super) fn handle(driver: &Driver, ordinal: u32) -> Result<Device> {
    let mut device = 0;
    // SAFETY: a place for the number.
    let status = unsafe { (driver.table.device_get)(&raw mut device, ordinal as c_int) };
    driver.check("cuDeviceGet", || format!("GPU {ordinal}"), status).map(|()| device)
}

pub(super) fn attribute_of(driver: &Driver, ordinal: u32, attribute: c_uint) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: a place for the number.
    let status = unsafe { (driver.table.device_get_attribute)(&raw mut value, attribute, handle(driver, ordinal)?) };
    driver.check("cuDeviceGetAttribute", || format!("GPU {ordinal}"), status).map(|()| value)
}

/// As /sys has it; a device that is on no PCI bus has none.
fn pci(driver: &Driver, device: Device) -> Option<String> {
    let mut id = [0u8; 32];
    // SAFETY: as many bytes as the length says; the driver ends the text with a zero byte within them.
    let status =
        unsafe { (driver.table.device_get_pci_bus_id)(id.as_mut_ptr().cast::<c_char>(), id.len() as c_int, device) };
    let id = text(&id).to_lowercase();
    (status == cuda::SUCCESS && !id.is_empty()).then_some(id)
}

fn numa_node(pci: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/sys/bus/pci/devices/{pci}/numa_node")).ok()?;
    text.trim().parse().ok() // -1: not known
}

fn text(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
}
