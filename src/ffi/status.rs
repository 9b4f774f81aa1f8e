//! Statuses, the text of the last error, the boundary that panics do not cross, and pointers from C.
//!
//! Invariant: a text belongs to one thread, and stays where it is until that thread's next call that fails.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::Error;

/// How a call went. The text of a failure is that of gw_last_error.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::enum_variant_names)] // C has no namespaces
pub enum Status {
    /// It went well.
    GwOk = 0,
    /// An argument or a setting is wrong: a null pointer, an index, a length, an environment that names no job.
    GwInvalid = 1,
    /// The worker of this handle has been closed, or there never was one.
    GwClosed = 2,
    /// Another thread is in a call with this handle.
    GwBusy = 3,
    /// The handle was opened by another process: a forked child cannot use it.
    GwForked = 4,
    /// The deadline passed; the call may be made again.
    GwTimeout = 5,
    /// The launcher or a peer refused this process.
    GwRefused = 6,
    /// The job, or this worker's part in it, has failed; the handle can only be closed.
    GwFailed = 7,
    /// The job was told to stop and has written its checkpoint: end with exit code 75.
    GwPreempted = 8,
    /// The operating system refused: memory, descriptors, files, the network.
    GwSystem = 9,
    /// A bug in gradwire, which was kept from spreading. The handle, if there was one, can only be closed.
    GwPanic = 10,
    /// This worker was told to leave, and is of the job no more: call gw_finish and end.
    GwLeft = 11,
}

/// Why a call fails.
#[derive(Debug)]
pub(super) struct Fault {
    pub status: Status,
    pub text: String,
}

/// What the body of a call gives.
pub(super) type Answer<T = ()> = Result<T, Fault>;

impl Fault {
    pub fn new(status: Status, text: impl Into<String>) -> Fault {
        Fault { status, text: text.into() }
    }

    pub fn invalid(text: impl Into<String>) -> Fault {
        Fault::new(Status::GwInvalid, text)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let status = match error {
            Error::Config(_) | Error::LayoutConflict { .. } => Status::GwInvalid,
            Error::Os { .. } | Error::File { .. } | Error::Memlock { .. } | Error::Gpu { .. } => Status::GwSystem,
            Error::Deadline { .. } => Status::GwTimeout,
            Error::Refused { .. } => Status::GwRefused,
            Error::Preempted { .. } => Status::GwPreempted,
            Error::Left { .. } => Status::GwLeft,
            Error::Broken { .. } | Error::Protocol { .. } | Error::Checkpoint { .. } | Error::JobFailed(_) => {
                Status::GwFailed
            }
        };
        Fault::new(status, error.to_string())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The text of this thread's last failure; empty if there was none.
pub(super) fn last_error() -> *const c_char {
    // A thread that is ending may have lost its text already.
    LAST_ERROR.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of the call `name`: its fault, or the panic that it ended with, becomes a status and a text.
pub(super) fn guard(name: &str, body: impl FnOnce() -> Answer) -> Status {
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::GwOk,
        Ok(Err(fault)) => fault,
        Err(panic) => Fault::new(Status::GwPanic, format!("a bug in gradwire: {}", panic_text(&*panic))),
    };
    let text = format!("{name}: {}", fault.text).replace('\0', "\u{fffd}");
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = CString::new(text).unwrap_or_default());
    fault.status
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a text")
}

/// Refuses a pointer that cannot hold `count` values.
fn check<T>(pointer: *const T, count: usize, what: &str) -> Answer {
    if pointer.is_null() {
        return Err(Fault::invalid(format!("{what} is a null pointer")));
    }
    if !pointer.is_aligned() {
        return Err(Fault::invalid(format!("{what} must lie at a multiple of {} bytes", align_of::<T>())));
    }
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Fault::invalid(format!("{what} cannot have {count} elements"))),
    }
}

/// `count` values of the caller; the pointer may be null if there are none.
///
/// # Safety
///
/// A pointer that is not null is that of `count` initialised values, which nobody changes as long as the slice is used.
pub(super) unsafe fn slice<'a, T>(pointer: *const T, count: usize, what: &str) -> Answer<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check(pointer, count, what)?;
    // SAFETY: not null, aligned and not too long, as was just checked; the caller of this function answers for the rest.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Room for `count` values of the caller.
///
/// # Safety
///
/// A pointer that is not null is that of `count` values that nobody else uses as long as the slice is used.
pub(super) unsafe fn slice_mut<'a, T>(pointer: *mut T, count: usize, what: &str) -> Answer<&'a mut [T]> {
    check(pointer, count, what)?;
    // SAFETY: as in `slice`; that nobody else uses the values is for the caller of this function to answer for.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// Room for one answer.
///
/// # Safety
///
/// As [`slice_mut`], with one value.
pub(super) unsafe fn place<'a, T>(pointer: *mut T, what: &str) -> Answer<&'a mut T> {
    // SAFETY: the caller of this function answers for what `slice_mut` asks.
    let room = unsafe { slice_mut(pointer, 1, what) }?;
    Ok(&mut room[0])
}

/// A text of the caller.
///
/// # Safety
///
/// A pointer that is not null is that of bytes that end with a NUL, which nobody changes as long as the text is used.
pub(super) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Answer<&'a str> {
    check(pointer, 1, what)?;
    // SAFETY: not null, as was just checked; the caller of this function answers for the NUL.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|_| Fault::invalid(format!("{what} is not UTF-8: {}", bytes.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> String {
        // SAFETY: `last_error` gives a text that ends with a NUL and stays until this thread's next failure.
        unsafe { CStr::from_ptr(last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_text_of_its_thread() {
        assert_eq!(guard("gw_test", || panic!("chunk {} lost", 7)), Status::GwPanic);
        assert_eq!(told(), "gw_test: a bug in gradwire: chunk 7 lost");
        assert_eq!(guard("gw_test", || Ok(())), Status::GwOk);
        assert!(told().contains("chunk 7"), "the text stays until the next failure");
        assert_eq!(std::thread::spawn(told).join().unwrap(), "", "another thread has texts of its own");
        assert_eq!(guard("gw_wait", || Err(Fault::invalid("a\0b"))), Status::GwInvalid);
        assert_eq!(told(), "gw_wait: a\u{fffd}b");
    }

    #[test]
    fn pointers_that_cannot_be_are_refused() {
        let values = [1.0f32; 3];
        // SAFETY: what is not refused is a pointer into `values`, within its length.
        unsafe {
            assert_eq!(slice(values.as_ptr(), 3, "it").unwrap(), values);
            assert!(slice::<f32>(std::ptr::null(), 0, "it").unwrap().is_empty());
            let odd = values.as_ptr().byte_add(1);
            for (pointer, count, part) in [
                (std::ptr::null(), 1, "null"),
                (odd, 1, "multiple of 4"),
                (values.as_ptr(), usize::MAX / 4, "cannot have"),
            ] {
                let fault = slice(pointer, count, "it").unwrap_err();
                assert!(fault.status == Status::GwInvalid && fault.text.contains(part), "{}", fault.text);
            }
            assert!(text(c"\xff".as_ptr(), "the name").unwrap_err().text.contains("the name is not UTF-8"));
        }
    }
}
