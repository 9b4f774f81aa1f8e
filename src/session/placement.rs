//! The cores that the launcher has dealt to this process.
//!
//! Invariant: a hint, never a limit: a process that was dealt none may run anywhere.
#![forbid(unsafe_code)]

use crate::{Error, Result};

/// The cores in `GRADWIRE_CORES` ("0,1,5"), for a server one for each shard in their order; empty if none were dealt.
///
/// # Errors
///
/// [`Error::Config`] if the variable holds something else.
pub fn cores_from_environment() -> Result<Vec<usize>> {
    parse(&std::env::var("GRADWIRE_CORES").unwrap_or_default())
}

fn parse(text: &str) -> Result<Vec<usize>> {
    let numbers = text.split(',').map(str::trim).filter(|number| !number.is_empty());
    let wrong = |_| Error::Config(format!("GRADWIRE_CORES is `{text}`; it must be core numbers, such as 0,1,5"));
    numbers.map(|number| number.parse().map_err(wrong)).collect()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn cores_are_numbers_with_commas() {
        assert!(parse("").unwrap().is_empty());
        assert_eq!(parse("0, 12,3").unwrap(), [0, 12, 3]);
        assert!(parse("0-3").unwrap_err().to_string().contains("GRADWIRE_CORES is `0-3`"));
    }
}
