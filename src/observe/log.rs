//! How much is logged.
//!
//! Invariant: a wish that cannot be read is answered with warnings, not with silence.
#![forbid(unsafe_code)]

use tracing_subscriber::filter::Targets;

/// What `GRADWIRE_LOG` asks for: a level, or levels by module as in `warn,gradwire::transport=debug`; else warnings.
pub fn log_filter() -> Targets {
    let asked = std::env::var("GRADWIRE_LOG").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or_else(|| Targets::new().with_default(tracing::Level::WARN))
}
