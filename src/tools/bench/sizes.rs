//! Sizes as people write them: `64`, `1MiB`, `64K`, and ranges such as `64..64M`.
//!
//! Invariant: what is accepted is exact; nothing is rounded to something that was not asked for.

use crate::{Error, Result};

/// A range goes up by this factor.
const STEP: u64 = 4;

/// Sizes from texts: single ones, or ranges that go up by a factor of 4 and end with the size that they name.
///
/// # Errors
///
/// [`Error::Config`] for what is no size, or a range that leads nowhere.
pub fn parse_sizes(texts: &[String]) -> Result<Vec<u64>> {
    let mut sizes = Vec::new();
    for text in texts {
        let Some((first, last)) = text.split_once("..") else {
            sizes.push(parse(text)?);
            continue;
        };
        let (mut size, last) = (parse(first)?, parse(last.trim_start_matches('='))?);
        if size > last {
            return Err(Error::Config(format!("`{text}` is an empty range: {size} is more than {last}")));
        }
        while size < last {
            sizes.push(size);
            size = size.saturating_mul(STEP);
        }
        sizes.push(last);
    }
    Ok(sizes)
}

fn parse(text: &str) -> Result<u64> {
    let wrong =
        || Error::Config(format!("`{text}` is no size: write bytes, or a number with K, M or G (KiB, MiB, GiB)"));
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return Err(wrong()),
    };
    let size = digits.trim().parse::<u64>().ok().and_then(|count| count.checked_mul(factor));
    size.filter(|size| *size > 0).ok_or_else(wrong)
}

/// A size as people read it; exact.
pub fn plain_bytes(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(texts: &[&str]) -> Vec<u64> {
        parse_sizes(&texts.iter().map(|text| text.to_string()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn single_sizes_and_ranges() {
        assert_eq!(sizes(&["64", "4K", "1 MiB"]), [64, 4096, 1 << 20]);
        assert_eq!(sizes(&["64..4K"]), [64, 256, 1024, 4096]);
        assert_eq!(sizes(&["64..=300"]), [64, 256, 300]);
        assert_eq!(sizes(&["64..64"]), [64]);
    }

    #[test]
    fn what_is_no_size_is_refused_with_what_would_be() {
        for wrong in ["", "0", "x", "1.5M", "64MB", "-1", "4K..64", "99999999999G"] {
            assert!(parse_sizes(&[wrong.into()]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read_back() {
        for size in [64, 1024, 1 << 20, 3 << 20, (1 << 20) + 64, 2 << 30] {
            assert_eq!(sizes(&[&plain_bytes(size)]), [size]);
        }
    }
}
