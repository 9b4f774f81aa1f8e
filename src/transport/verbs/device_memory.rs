//! Registering memory of another device (a GPU) with an RDMA device, so that packets go there without passing through the host's.
//!
//! Two ways, the better one first: by a dma-buf, which the GPU's driver exports and any kernel from 5.12 on understands; and by the
//! GPU's own addresses, which the kernel understands where nvidia-peermem is loaded. Which of them works is known by trying only.
//!
//! Invariant: a range is registered once, in one of the two ways, with addresses that begin at 0; if neither works both reasons
//! are told, and nothing is left registered.

use std::{
    os::fd::AsRawFd,
    sync::{Arc, Once},
};

use super::{
    device::Device,
    memory::{ACCESS, Keys},
};
use crate::{Error, Result, mem::DeviceRange};

/// How a range was registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By its dma-buf.
    DmaBuf,
    /// By its address, through nvidia-peermem; and why not by a dma-buf.
    Address(String),
}

/// Registers `range`, and says once a process how.
///
/// # Errors
///
/// [`Error::Config`] with the reasons of both ways, if neither works: the caller goes through pinned memory of the host then.
///
/// # Safety
///
/// The range stays allocated as long as the keys live; what peers write into it is read through leases alone.
pub(super) unsafe fn register(device: &Arc<Device>, range: &DeviceRange<'_>) -> Result<Keys> {
    static SAID: Once = Once::new();
    // SAFETY: our caller promises the same.
    let (keys, way) = unsafe { try_both(device, range) }?;
    SAID.call_once(|| match way {
        Way::DmaBuf => tracing::info!("RDMA device {} reaches device memory by dma-buf", device.place.device),
        Way::Address(why_not) => tracing::info!(
            "RDMA device {} reaches device memory by its addresses (nvidia-peermem); not by dma-buf: {why_not}",
            device.place.device
        ),
    });
    Ok(keys)
}

/// Safety: as of `register`.
unsafe fn try_both(device: &Arc<Device>, range: &DeviceRange<'_>) -> Result<(Keys, Way)> {
    // SAFETY: our caller promises the same.
    let no_dma_buf = match unsafe { by_dma_buf(device, range) } {
        Ok(keys) => return Ok((keys, Way::DmaBuf)),
        Err(why) => why,
    };
    // SAFETY: our caller promises that the range stays. It is no memory of this process; the kernel refuses it unless a module
    // that knows these addresses claims them.
    match unsafe { Keys::of_pages(device, std::ptr::without_provenance_mut(range.address as usize), range.len) } {
        Ok(keys) => Ok((keys, Way::Address(no_dma_buf))),
        Err(error) => Err(Error::Config(format!(
            "RDMA device {} cannot reach {} bytes of device memory at {:#x}: by dma-buf: {no_dma_buf}; by address: ibv_reg_mr: \
             {error}, is nvidia-peermem loaded (`modprobe nvidia-peermem`)?",
            device.place.device, range.len, range.address
        ))),
    }
}

/// Safety: as of `register`.
unsafe fn by_dma_buf(device: &Arc<Device>, range: &DeviceRange<'_>) -> std::result::Result<Keys, String> {
    let Some((fd, offset)) = range.dma_buf else {
        return Err("the memory's driver gives none (it takes Linux 5.12 and an open GPU kernel module)".into());
    };
    let Some(register) = device.table().reg_dmabuf_mr else {
        return Err("libibverbs is older than rdma-core 34".into());
    };
    // SAFETY: the domain is valid, the descriptor open, and the range our caller's.
    let raw = unsafe { register(device.pd(), offset, range.len, 0, fd.as_raw_fd(), ACCESS as i32) };
    Keys::had(device, raw).map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => " (this RDMA device's driver does not know how)",
            _ => "",
        };
        format!("ibv_reg_dmabuf_mr: {error}{hint}")
    })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::{
        super::fake::{Call, Fake},
        *,
    };

    const ADDRESS: u64 = 0x7f00_dead_0000;
    const LEN: usize = 3 << 20;

    fn dma_buf() -> File {
        File::open("/dev/null").unwrap()
    }

    fn range(file: &File) -> DeviceRange<'_> {
        DeviceRange { dma_buf: Some((file.as_fd(), 65536)), ordinal: 0, address: ADDRESS, len: LEN }
    }

    fn try_fake(fake: &Fake, range: &DeviceRange<'_>) -> Result<(Keys, Way)> {
        // SAFETY: the fake device reaches nothing.
        unsafe { try_both(&fake.device(), range) }
    }

    fn dma_buf_call(file: &File) -> Call {
        Call::DmaBuf { offset: 65536, length: LEN, iova: 0, fd: file.as_raw_fd(), access: ACCESS as i32 }
    }

    const ADDRESS_CALL: Call = Call::Pages { address: ADDRESS, length: LEN, iova: 0, access: ACCESS };

    #[test]
    fn a_dma_buf_is_the_first_choice_and_the_only_call() {
        let (fake, file) = (Fake::new(), dma_buf());
        let (keys, way) = try_fake(&fake, &range(&file)).unwrap();
        assert_eq!((way, keys.lkey(), keys.rkey()), (Way::DmaBuf, Fake::LKEY, Fake::RKEY));
        assert_eq!(fake.calls(), [dma_buf_call(&file)]);
        drop(keys);
        assert_eq!(fake.calls(), [dma_buf_call(&file), Call::Ended]);
    }

    #[test]
    fn where_the_dma_buf_is_refused_the_address_is_tried_and_the_reason_kept() {
        let (fake, file) = (Fake::new(), dma_buf());
        fake.refuse_dma_buf(libc::EOPNOTSUPP);
        let (keys, way) = try_fake(&fake, &range(&file)).unwrap();
        let Way::Address(why_not) = way else { panic!("{way:?}") };
        assert!(why_not.contains("not supported") && why_not.contains("driver does not know how"), "{why_not}");
        drop(keys);
        assert_eq!(fake.calls(), [dma_buf_call(&file), ADDRESS_CALL, Call::Ended]);
    }

    #[test]
    fn without_a_dma_buf_or_without_the_call_only_the_address_is_tried() {
        let file = dma_buf();
        let none = DeviceRange { dma_buf: None, ..range(&file) };
        for (fake, range, word) in [(Fake::new(), none, "gives none"), (Fake::old(), range(&file), "rdma-core 34")] {
            let (keys, way) = try_fake(&fake, &range).unwrap();
            assert!(matches!(&way, Way::Address(why_not) if why_not.contains(word)), "{way:?}");
            drop(keys);
            assert_eq!(fake.calls(), [ADDRESS_CALL, Call::Ended]);
        }
    }

    #[test]
    fn if_neither_works_both_reasons_are_told() {
        let (fake, file) = (Fake::new(), dma_buf());
        fake.refuse_dma_buf(libc::EINVAL);
        fake.refuse_pages(libc::EFAULT);
        let error = try_fake(&fake, &range(&file)).err().unwrap().to_string();
        for part in
            ["fake0", "3145728 bytes", "by dma-buf: ibv_reg_dmabuf_mr: Invalid", "Bad address", "nvidia-peermem"]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
        let none = DeviceRange { dma_buf: None, ..range(&file) };
        let error = try_fake(&fake, &none).err().unwrap().to_string();
        assert!(error.contains("gives none") && error.contains("Bad address"), "{error}");
        assert_eq!(fake.calls(), [dma_buf_call(&file), ADDRESS_CALL, ADDRESS_CALL], "nothing is left to end");
    }

    #[test]
    fn the_keys_are_those_of_registering() {
        let (fake, file) = (Fake::new(), dma_buf());
        // SAFETY: the fake device reaches nothing.
        let keys = unsafe { register(&fake.device(), &range(&file)) }.unwrap();
        assert_eq!(keys.rkey(), Fake::RKEY);
    }
}
