//! How launcher and caller prove to each other that they hold the job's token.
//!
//! The launcher sends a nonce; the caller answers with a nonce of its own and a keyed hash over both, its version, purpose, role
//! and rank; the launcher answers with a keyed hash over both nonces under another label.
//!
//! Invariant: the two labels differ, so neither side's proof can be played back as the other's; a nonce is used once.

use super::message::{Answer, Purpose};
use crate::{
    Result,
    types::Role,
    wire::{JobToken, random_bytes},
};

const CALLER: &str = "gradwire rendezvous: caller";
const LAUNCHER: &str = "gradwire rendezvous: launcher";

/// A nonce as it travels: 32 random bytes in hexadecimal.
pub(super) fn nonce() -> Result<String> {
    Ok(hex(&random_bytes::<32>()?))
}

/// The caller's proof for an answer (whose own `mac` is not looked at) to the launcher's nonce.
pub(super) fn caller_mac(token: &JobToken, nonce: &str, answer: &Answer) -> String {
    hex(&token.sign(&[&caller_text(nonce, answer)]))
}

/// Whether the caller holds the token.
pub(super) fn caller_holds(token: &JobToken, nonce: &str, answer: &Answer) -> bool {
    token.verifies(&[&caller_text(nonce, answer)], &from_hex(&answer.mac))
}

fn caller_text(nonce: &str, answer: &Answer) -> Vec<u8> {
    let purpose = match answer.purpose {
        Purpose::Join => "join",
        Purpose::Control => "control",
    };
    let role = match answer.role {
        Some(Role::Server) => "server",
        Some(Role::Worker) => "worker",
        None => "",
    };
    let rank = answer.rank.map(|rank| rank.to_string()).unwrap_or_default();
    joined(&[CALLER, nonce, &answer.nonce, &answer.version, purpose, role, &rank])
}

/// The launcher's proof.
pub(super) fn launcher_mac(token: &JobToken, nonce: &str, caller_nonce: &str) -> String {
    hex(&token.sign(&[&joined(&[LAUNCHER, nonce, caller_nonce])]))
}

/// Whether the launcher holds the token.
pub(super) fn launcher_holds(token: &JobToken, nonce: &str, caller_nonce: &str, mac: &str) -> bool {
    token.verifies(&[&joined(&[LAUNCHER, nonce, caller_nonce])], &from_hex(mac))
}

/// Parts with their lengths before them, so that no two lists of parts give the same bytes.
fn joined(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part.as_bytes()].concat()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that hexadecimal digits stand for; nothing for anything else, which then verifies as no proof at all.
fn from_hex(text: &str) -> Vec<u8> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
        return Vec::new();
    }
    (0..text.len()).step_by(2).filter_map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        Answer {
            version: "1".into(),
            purpose: Purpose::Join,
            role: Some(Role::Worker),
            rank: Some(3),
            nonce: "bb".into(),
            mac: String::new(),
            pid: 1,
            host: String::new(),
        }
    }

    #[test]
    fn a_proof_is_good_for_what_it_was_made_for_only() {
        let token = JobToken::random().unwrap();
        let mut good = answer();
        good.mac = caller_mac(&token, "aa", &good);
        assert!(caller_holds(&token, "aa", &good));
        assert!(!caller_holds(&token, "ab", &good), "another challenge");
        assert!(!caller_holds(&JobToken::random().unwrap(), "aa", &good), "another token");
        let spoils: [fn(&mut Answer); 6] = [
            |a| a.rank = Some(4),
            |a| a.rank = None,
            |a| a.role = Some(Role::Server),
            |a| a.version = "2".into(),
            |a| a.purpose = Purpose::Control,
            |a| a.mac.clear(),
        ];
        for spoil in spoils {
            let mut spoiled = Answer { mac: good.mac.clone(), ..answer() };
            spoil(&mut spoiled);
            assert!(!caller_holds(&token, "aa", &spoiled), "{spoiled:?}");
        }
    }

    #[test]
    fn the_launcher_cannot_be_played_by_its_caller() {
        let token = JobToken::random().unwrap();
        let mac = launcher_mac(&token, "aa", "bb");
        assert!(launcher_holds(&token, "aa", "bb", &mac));
        assert!(!launcher_holds(&token, "bb", "aa", &mac));
        assert!(!launcher_holds(&token, "aa", "bb", &caller_mac(&token, "aa", &answer())));
    }
}
