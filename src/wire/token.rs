//! The job's token: the 32 secret bytes that every process of a job knows and nobody else does.
//!
//! Invariant: no `Debug`, `Display` or error text shows a byte of it; only [`JobToken::to_hex`] does, for the launcher that hands
//! it to its children.

use std::fmt::{self, Write};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The secret of a job.
#[derive(Clone, PartialEq, Eq)]
pub struct JobToken([u8; 32]);

impl JobToken {
    /// A fresh token from the kernel's random numbers.
    pub fn random() -> Result<JobToken> {
        random_bytes().map(JobToken)
    }

    /// The token that [`JobToken::to_hex`] wrote; white space around it (a file's last newline) is allowed.
    pub fn from_hex(text: &str) -> Result<JobToken> {
        let defect = || Error::Config("the job token must be 64 hexadecimal digits".into());
        let digits = text.trim().as_bytes();
        let mut token = [0; 32];
        if digits.len() != 2 * token.len() {
            return Err(defect());
        }
        for (byte, pair) in token.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| (pair[at] as char).to_digit(16).ok_or_else(defect);
            *byte = (digit(0)? * 16 + digit(1)?) as u8;
        }
        Ok(JobToken(token))
    }

    /// 64 hexadecimal digits. For a child's environment or a file of mode 0600; never for a command line or a log.
    pub fn to_hex(&self) -> String {
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a string takes every write");
            text
        })
    }

    /// HMAC-SHA-256 under this token over `parts`, one after the other.
    pub(crate) fn sign(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// Whether `signature` is that of `parts`; compared in constant time.
    pub(crate) fn verifies(&self, parts: &[&[u8]], signature: &[u8]) -> bool {
        self.mac(parts).verify_slice(signature).is_ok()
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        parts.iter().for_each(|part| mac.update(part));
        mac
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(secret)")
    }
}

/// A job's number: the first eight bytes of the SHA-256 of its name and of what tells this run from another of the same name.
pub fn job_id(name: &str, instance: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    hash.update(instance);
    let digest = hash.finalize();
    digest[..8].iter().rev().fold(0, |id, byte| (id << 8) | u64::from(*byte))
}

/// Bytes that nobody can guess, from the kernel.
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::os("getrandom", "a nonce or a key", std::io::Error::other(e)))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trip_and_nothing_shown() {
        let token = JobToken::random().unwrap();
        let hex = token.to_hex();
        assert_eq!(JobToken::from_hex(&format!("{hex}\n")).unwrap(), token);
        assert_ne!(JobToken::random().unwrap(), token);
        let shown = format!("{token:?}");
        assert!(!shown.contains(&hex[..4]), "{shown}");
    }

    #[test]
    fn a_wrong_token_is_refused_without_showing_it() {
        for text in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"é".repeat(32)] {
            let error = JobToken::from_hex(text).unwrap_err().to_string();
            assert_eq!(error, "the job token must be 64 hexadecimal digits");
        }
    }

    #[test]
    fn jobs_differ_by_name_and_instance() {
        let ids = [job_id("a", "b"), job_id("ab", ""), job_id("", "ab"), job_id("a", "c")];
        for (at, id) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(id));
        }
        assert_eq!(job_id("a", "b"), ids[0]);
    }
}
