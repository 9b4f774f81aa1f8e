//! The handshake with which every connection begins: a codec and two state machines, one for each side, without I/O.
//!
//! The listener sends a *challenge* (a nonce); the caller answers with its *hello* (who it is, whom it wants, its own nonce, and an
//! HMAC over all that and the challenge under the job's token); the listener answers *accept* (an HMAC over both messages under
//! another label, so that the listener is authenticated too) or *refuse* with a reason.
//!
//! Invariant: the first 8 bytes of every message, and the whole of *refuse*, are the same in all versions of the protocol, so that
//! a difference of versions can always be told. Before a caller is authenticated it learns nothing but the version and whether
//! the job's number is right, and neither side ever holds more than one message of the other.

use std::fmt;

use super::{
    JobToken,
    note::{u32_at, u64_at},
};
use crate::types::{Epoch, PeerId};

/// Counts changes of the wire that are not compatible.
pub const PROTOCOL_VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"GRWR";
const PREFIX: usize = 8;
const SIGNATURE: usize = 32;
/// Bytes of a nonce.
pub const NONCE: usize = 32;
/// Bytes of a challenge.
pub const CHALLENGE: usize = PREFIX + NONCE;
/// Bytes of a hello.
pub const HELLO: usize = HELLO_SIGNED + SIGNATURE;
const HELLO_SIGNED: usize = PREFIX + 32 + NONCE;
/// Bytes of an accept.
pub const ACCEPT: usize = PREFIX + SIGNATURE;
/// Bytes of a refusal.
pub const REFUSE: usize = PREFIX;

const HELLO_LABEL: &[u8] = b"gradwire 1 hello";
const ACCEPT_LABEL: &[u8] = b"gradwire 1 accept";

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Message {
    Challenge = 1,
    Hello = 2,
    Accept = 3,
    Refuse = 4,
}

/// Why a listener refuses a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// The two speak different versions of the protocol.
    WrongVersion = 1,
    /// The caller belongs to another job.
    WrongJob = 2,
    /// The caller does not know the job's token.
    WrongToken = 3,
    /// The caller wants somebody else.
    WrongPeer = 4,
    /// The listener does not expect this caller, or not yet.
    UnknownPeer = 5,
    /// Somebody with the caller's name is connected already.
    Duplicate = 6,
    /// The caller is of another membership of the job.
    WrongEpoch = 7,
    /// The call is for a path that has ended since.
    Stale = 8,
}

impl Refusal {
    const ALL: [Refusal; 8] = [
        Refusal::WrongVersion,
        Refusal::WrongJob,
        Refusal::WrongToken,
        Refusal::WrongPeer,
        Refusal::UnknownPeer,
        Refusal::Duplicate,
        Refusal::WrongEpoch,
        Refusal::Stale,
    ];

    /// Whether to call again later can help: the listener may not have got to expecting us yet.
    pub fn is_passing(self) -> bool {
        self == Refusal::UnknownPeer
    }

    fn encode(self) -> [u8; REFUSE] {
        prefix(Message::Refuse, self as u8)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::WrongVersion => "the two sides speak different versions of the protocol",
            Refusal::WrongJob => "it belongs to another job",
            Refusal::WrongToken => "the job's token is wrong or missing",
            Refusal::WrongPeer => "another peer than the one wanted answers at this address",
            Refusal::UnknownPeer => "this peer is not expected",
            Refusal::Duplicate => "a peer of this name is connected already",
            Refusal::WrongEpoch => "the two sides are of different epochs of the job",
            Refusal::Stale => "the call is for a path that has ended since",
        })
    }
}

/// Why a handshake came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The other side's bytes are no handshake.
    #[error("what the other side sent is not gradwire's handshake")]
    Stranger,
    /// The listener speaks another version.
    #[error("the other side speaks version {theirs} of the protocol, this one version {PROTOCOL_VERSION}")]
    Version {
        /// The version in its challenge.
        theirs: u16,
    },
    /// The listener refused us.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The listener accepted without knowing the token.
    #[error("the other side accepted us without knowing the job's token")]
    Forged,
}

/// Who we are; the same for all handshakes of a transport.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The job's number (see [`super::job_id`]).
    pub job: u64,
    /// The job's secret.
    pub token: JobToken,
    /// Our own name.
    pub me: PeerId,
    /// The membership that we belong to.
    pub epoch: Epoch,
}

/// The listener's side.
#[derive(Debug)]
pub struct Answering {
    challenge: [u8; CHALLENGE],
    hello: [u8; HELLO],
    filled: usize,
}

/// What the listener has heard so far, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Not a whole hello yet.
    More,
    /// Send this; the connection is `peer`'s.
    Accept {
        /// The authenticated caller.
        peer: PeerId,
        /// The message to send.
        reply: [u8; ACCEPT],
    },
    /// Send this and close.
    Refuse {
        /// Why.
        why: Refusal,
        /// Whom the caller said to be, where that could be read.
        caller: Option<PeerId>,
        /// The message to send.
        reply: [u8; REFUSE],
    },
}

impl Answering {
    /// Begins with a nonce that was never used before.
    pub fn begin(nonce: [u8; NONCE]) -> Answering {
        let mut challenge = [0; CHALLENGE];
        challenge[..PREFIX].copy_from_slice(&prefix(Message::Challenge, 0));
        challenge[PREFIX..].copy_from_slice(&nonce);
        Answering { challenge, hello: [0; HELLO], filled: 0 }
    }

    /// The message to send first.
    pub fn challenge(&self) -> &[u8; CHALLENGE] {
        &self.challenge
    }

    /// Where the next received bytes go; exactly what is missing of the hello, so what follows it stays in the socket.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.hello[self.filled..]
    }

    /// `count` more bytes lie in [`Answering::space`]. `admit` says whether an authenticated caller, who means this incarnation of
    /// the path, is wanted.
    pub fn received(
        &mut self,
        count: usize,
        identity: &Identity,
        admit: impl FnOnce(PeerId, u32) -> Result<(), Refusal>,
    ) -> Result<Heard, HandshakeError> {
        self.filled += count;
        let theirs = match read_prefix(&self.hello[..self.filled])? {
            None => return Ok(Heard::More),
            Some(theirs) => theirs,
        };
        if theirs.version != PROTOCOL_VERSION {
            // Of a hello of another version nothing but its prefix can be understood.
            return Ok(refuse(Refusal::WrongVersion, None));
        }
        if theirs.message != Message::Hello || theirs.code != 0 {
            return Err(HandshakeError::Stranger);
        }
        if self.filled < HELLO {
            return Ok(Heard::More);
        }
        Ok(self.judge(identity, admit))
    }

    fn judge(&self, identity: &Identity, admit: impl FnOnce(PeerId, u32) -> Result<(), Refusal>) -> Heard {
        let caller = PeerId::from_bits(u64_at(&self.hello, 16));
        if u64_at(&self.hello, 8) != identity.job {
            return refuse(Refusal::WrongJob, caller);
        }
        let (signed, signature) = self.hello.split_at(HELLO_SIGNED);
        if !identity.token.verifies(&[HELLO_LABEL, &self.challenge, signed], signature) {
            return refuse(Refusal::WrongToken, caller);
        }
        if PeerId::from_bits(u64_at(&self.hello, 24)) != Some(identity.me) {
            return refuse(Refusal::WrongPeer, caller);
        }
        if u32_at(&self.hello, 32) != identity.epoch {
            return refuse(Refusal::WrongEpoch, caller);
        }
        let Some(peer) = caller else { return refuse(Refusal::UnknownPeer, None) };
        if let Err(why) = admit(peer, u32_at(&self.hello, 36)) {
            return refuse(why, caller);
        }
        let mut reply = [0; ACCEPT];
        reply[..PREFIX].copy_from_slice(&prefix(Message::Accept, 0));
        reply[PREFIX..].copy_from_slice(&identity.token.sign(&[ACCEPT_LABEL, &self.challenge, &self.hello]));
        Heard::Accept { peer, reply }
    }
}

/// The caller's side.
#[derive(Debug)]
pub struct Calling {
    wanted: PeerId,
    incarnation: u32,
    nonce: [u8; NONCE],
    challenge: [u8; CHALLENGE],
    hello: Option<[u8; HELLO]>,
    reply: [u8; ACCEPT],
    filled: usize,
}

/// What the caller was told, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// Not a whole message yet.
    More,
    /// Send this.
    Answer([u8; HELLO]),
    /// The connection is ours, and the other side is who we wanted.
    Accepted,
}

impl Calling {
    /// Begins with a nonce that was never used before. `incarnation` is the number of the path in the listener's last offer.
    pub fn begin(wanted: PeerId, incarnation: u32, nonce: [u8; NONCE]) -> Calling {
        Calling { wanted, incarnation, nonce, challenge: [0; CHALLENGE], hello: None, reply: [0; ACCEPT], filled: 0 }
    }

    /// What to send before closing when the listener speaks another version, so that its side can tell as well.
    pub fn farewell() -> [u8; PREFIX] {
        prefix(Message::Hello, 0)
    }

    /// Whether the hello has been made, so that the listener may already count us as connected.
    pub fn has_answered(&self) -> bool {
        self.hello.is_some()
    }

    /// Where the next received bytes go; exactly what is missing of the message at hand.
    pub fn space(&mut self) -> &mut [u8] {
        match self.hello {
            None => &mut self.challenge[self.filled..],
            Some(_) => &mut self.reply[self.filled..],
        }
    }

    /// `count` more bytes lie in [`Calling::space`].
    pub fn received(&mut self, count: usize, identity: &Identity) -> Result<Told, HandshakeError> {
        self.filled += count;
        let message = if self.hello.is_some() { &self.reply[..] } else { &self.challenge[..] };
        let theirs = match read_prefix(&message[..self.filled])? {
            None => return Ok(Told::More),
            Some(theirs) => theirs,
        };
        if theirs.message == Message::Refuse {
            let why = Refusal::ALL.into_iter().find(|why| *why as u8 == theirs.code);
            return Err(why.map_or(HandshakeError::Stranger, HandshakeError::Refused));
        }
        if theirs.version != PROTOCOL_VERSION {
            return Err(HandshakeError::Version { theirs: theirs.version });
        }
        let expected = if self.hello.is_some() { Message::Accept } else { Message::Challenge };
        if theirs.message != expected || theirs.code != 0 {
            return Err(HandshakeError::Stranger);
        }
        if self.filled < message.len() {
            return Ok(Told::More);
        }
        match &self.hello {
            None => {
                let hello = self.answer(identity);
                self.hello = Some(hello);
                self.filled = 0;
                Ok(Told::Answer(hello))
            }
            Some(hello) => {
                let parts: [&[u8]; 3] = [ACCEPT_LABEL, &self.challenge, hello];
                match identity.token.verifies(&parts, &self.reply[PREFIX..]) {
                    true => Ok(Told::Accepted),
                    false => Err(HandshakeError::Forged),
                }
            }
        }
    }

    fn answer(&self, identity: &Identity) -> [u8; HELLO] {
        let mut hello = [0; HELLO];
        hello[..PREFIX].copy_from_slice(&prefix(Message::Hello, 0));
        hello[8..16].copy_from_slice(&identity.job.to_le_bytes());
        hello[16..24].copy_from_slice(&identity.me.to_bits().to_le_bytes());
        hello[24..32].copy_from_slice(&self.wanted.to_bits().to_le_bytes());
        hello[32..36].copy_from_slice(&identity.epoch.to_le_bytes());
        hello[36..40].copy_from_slice(&self.incarnation.to_le_bytes());
        hello[40..HELLO_SIGNED].copy_from_slice(&self.nonce);
        let signature = identity.token.sign(&[HELLO_LABEL, &self.challenge, &hello[..HELLO_SIGNED]]);
        hello[HELLO_SIGNED..].copy_from_slice(&signature);
        hello
    }
}

struct Prefix {
    version: u16,
    message: Message,
    code: u8,
}

fn prefix(message: Message, code: u8) -> [u8; PREFIX] {
    let mut bytes = [0; PREFIX];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes[6] = message as u8;
    bytes[7] = code;
    bytes
}

/// `None` while fewer bytes than a prefix are here; a stranger is told by its first wrong byte.
fn read_prefix(bytes: &[u8]) -> Result<Option<Prefix>, HandshakeError> {
    let magic = bytes.len().min(MAGIC.len());
    if bytes[..magic] != MAGIC[..magic] {
        return Err(HandshakeError::Stranger);
    }
    if bytes.len() < PREFIX {
        return Ok(None);
    }
    let message = match bytes[6] {
        1 => Message::Challenge,
        2 => Message::Hello,
        3 => Message::Accept,
        4 => Message::Refuse,
        _ => return Err(HandshakeError::Stranger),
    };
    Ok(Some(Prefix { version: u16::from_le_bytes([bytes[4], bytes[5]]), message, code: bytes[7] }))
}

fn refuse(why: Refusal, caller: Option<PeerId>) -> Heard {
    Heard::Refuse { why, caller, reply: why.encode() }
}

const _: () = assert!(CHALLENGE == 40 && HELLO == 104 && ACCEPT == 40 && REFUSE == 8);

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
