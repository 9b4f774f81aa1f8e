//! What concerns the whole process: the version, the last error, the log.
//!
//! Invariant: the log is started at most once, and goes to standard error.

use std::{ffi::c_char, sync::OnceLock};

use tracing_subscriber::{filter::Targets, layer::SubscriberExt, reload, util::SubscriberInitExt};

use super::status::{Answer, Fault, Status, guard, last_error, text};
use crate::observe::log_filter;

/// The version of the library, such as "0.1.0". The text is static. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn gw_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What went wrong in this thread's last call that failed: which call, what happened, to whom, what to do. Empty if none
/// has failed. The text belongs to the library; it stays until this thread's next failure or its end. Any thread, each
/// its own.
#[unsafe(no_mangle)]
pub extern "C" fn gw_last_error() -> *const c_char {
    let mut text = c"".as_ptr();
    guard("gw_last_error", || {
        text = last_error();
        Ok(())
    });
    text
}

/// What the library writes to standard error: "off", "error", "warn", "info", "debug" or "trace". Without this call it is
/// what GRADWIRE_LOG says, else "warn". It can be changed at any time, from any thread. The text is only read.
///
/// # Safety
///
/// `level` is null or a text that ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gw_set_log_level(level: *const c_char) -> Status {
    guard("gw_set_log_level", || {
        // SAFETY: the caller answers for it.
        let level = unsafe { text(level, "the level") }?;
        let wrong = |_| Fault::invalid(format!("`{level}` is no level: off, error, warn, info, debug or trace"));
        let filter = level.parse::<tracing_subscriber::filter::LevelFilter>().map_err(wrong)?;
        log(Targets::new().with_default(filter))
    })
}

/// Starts the log as the environment has it, unless there is one.
pub fn start_log() {
    if LOG.get().is_none() {
        // A program that has a log of its own (this library linked into Rust) keeps it.
        let _ = log(log_filter());
    }
}

type Reload = Box<dyn Fn(Targets) -> bool + Send + Sync>;

static LOG: OnceLock<Option<Reload>> = OnceLock::new();

fn log(filter: Targets) -> Answer {
    let mut first = Some(filter);
    let start = || {
        let (filter, handle) = reload::Layer::new(first.take()?);
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = log.with_target(false).without_time().with_ansi(false);
        tracing_subscriber::registry().with(log).with(filter).try_init().ok()?;
        Some(Box::new(move |filter| handle.reload(filter).is_ok()) as Reload)
    };
    let reload = LOG.get_or_init(start);
    let set = match (reload, first) {
        (Some(_), None) => true, // started with it just now
        (Some(reload), Some(filter)) => reload(filter),
        (None, _) => false,
    };
    if set { Ok(()) } else { Err(Fault::invalid("the program has a log of its own, which is not ours to change")) }
}
